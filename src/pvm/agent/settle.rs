//! What came of a move that has lost its mover, or its agent: finding out, and telling everybody.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::call::{Caller, on_host, present};
use super::control::{Answer, Outcome, Request};
use crate::kernel::pidfd;
use crate::pvm::client::Client;
use crate::pvm::local;
use crate::pvm::tid::Tid;

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often agents are looked for that end while they are told.
const TRIES: u32 = 5;
/// How long a task that was killed may take to end, and how often that is looked at.
const ENDING: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);
/// How often it is asked what nobody can say yet.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Nobody looks on.
fn quietly(_: &str) {}

/// Tells the agents of all hosts what came of a move, and the lander if it came to nothing. Agents that have ended
/// are started again.
///
/// # Errors
/// When some agent cannot be told: it finds out by itself, as soon as one of the two incarnations has ended.
pub fn settle(client: &mut Client, outcome: &Outcome) -> Result<()> {
    let mut told = Vec::new();
    let mut failed = None;
    for _ in 0..TRIES {
        failed = None;
        for agent in present(client, &quietly)?.0 {
            if told.contains(&agent.tid) {
                continue;
            }
            let mut caller = Caller::new(client);
            let mut done = caller.ask(Tid(agent.tid), Request::Settle(outcome.clone()), PATIENCE);
            if !outcome.moved && done.is_ok() {
                let call_off = Request::Abandon {
                    id: outcome.id.clone(),
                    r: outcome.next,
                };
                done = caller.ask(Tid(agent.tid), call_off, PATIENCE);
            }
            match done {
                Ok(_) => told.push(agent.tid),
                Err(e) => failed = Some(e.context(format!("the agent of {}", agent.name))),
            }
        }
        if failed.is_none() {
            return Ok(());
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Brings a move to its end, on the host that it began on, whoever has ended: a task that is decided to go on
/// elsewhere ends here. Then [`settle`].
///
/// # Errors
/// When that cannot be done; it can be tried again.
pub fn conclude(client: &mut Client, outcome: &Outcome) -> Result<()> {
    if outcome.restored {
        return settle(client, outcome);
    }
    if outcome.moved && goes_on(client, outcome)? {
        let outcome = Outcome {
            moved: false,
            ..outcome.clone()
        };
        return settle(client, &outcome);
    }
    if outcome.moved {
        let (from, next) = (Tid(outcome.from), Tid(outcome.next));
        hand_over_mailbox(client, from, next)?;
        let tasks = client.tasks(from.host())?;
        if let Some(task) = tasks.iter().find(|task| task.tid == from)
            && let Ok(process) = pidfd::open(task.pid)
        {
            // It may have ended, and the pid be another's.
            if client.lives(from)? {
                let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
            }
        }
        let until = Instant::now() + ENDING;
        while client.lives(from)? {
            if Instant::now() > until {
                bail!(
                    "{from} does not end, which goes on as {next} when it has; it has been killed (task {})",
                    Tid(outcome.v)
                );
            }
            std::thread::sleep(LOOK);
        }
    }
    settle(client, outcome)
}

/// Whether a task that was decided to go on elsewhere goes on where it was, and has it do so: what it was to become has
/// ended, or its host left, which is for ever. Whoever finds that out comes to the same, whatever the table says.
fn goes_on(client: &mut Client, outcome: &Outcome) -> Result<bool> {
    let (from, next) = (Tid(outcome.from), Tid(outcome.next));
    if !until_known(client, next)? {
        return Ok(false);
    }
    let tasks = client.tasks(from.host())?;
    let Some(task) = tasks.iter().find(|task| task.tid == from) else {
        return Ok(false);
    };
    if local::stands(task.pid)
        && let Ok(process) = pidfd::open(task.pid)
        && client.lives(from)?
    {
        let _ = pidfd::send_signal(process.as_fd(), libc::SIGCONT);
    }
    Ok(true)
}

/// Whether it is sure that no process is an incarnation any more, nor will become it; none when nobody can say yet. Its own
/// pvmd says so, or that is of the virtual machine no more. Two pvmds that have lost each other say that of each other: what
/// the master's says counts then, and who has lost that one ends.
///
/// # Errors
/// When the own pvmd has ended, or cannot tell, or the master's host has no agent that does.
pub fn has_gone(client: &mut Client, r: Tid) -> Result<Option<bool>> {
    if let Some(lives) = client.lives_here(r)? {
        return Ok(Some(!lives));
    }
    if client.tid().is_master() {
        return Ok(Some(true));
    }
    let hosts = client.hosts()?;
    let master = hosts.iter().find(|host| host.tid.is_master());
    let master = master.context("the master's host is not in the virtual machine")?;
    let (agent, _) = on_host(client, master, &quietly)?;
    match Caller::new(client).ask(agent, Request::Gone { r: r.0 }, PATIENCE)? {
        Answer::Gone { gone } => Ok(gone),
        other => bail!("the agent of {} answers {other:?}", master.name),
    }
}

/// The same, when that is known.
///
/// # Errors
/// When the own pvmd has ended.
pub fn until_known(client: &mut Client, r: Tid) -> Result<bool> {
    loop {
        match has_gone(client, r) {
            Ok(Some(gone)) => return Ok(gone),
            Ok(None) => {}
            // Without a pvmd nothing more will be known; without the master's there soon is none.
            Err(e) => drop(client.hosts().map_err(|_| e)?),
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

/// Entries of the mailbox that are one incarnation's become another's, which lives, too: most would vanish with the
/// first, and persistent ones be nobody's.
///
/// # Errors
/// When the pvmd does not answer, or refuses.
pub fn hand_over_mailbox(client: &mut Client, from: Tid, to: Tid) -> Result<()> {
    for entry in client.mailbox_names("*")? {
        if entry.owner == from {
            client.mailbox_hand_over(&entry, to)?;
        }
    }
    Ok(())
}

/// Asks the agent of the host that a task leaves, `from` being its incarnation there, whether it is decided that it
/// goes on as `next`; none while that is open.
///
/// # Errors
/// When there is no agent there, and none can be started.
pub fn inquire(client: &mut Client, v: u32, from: Tid, next: Tid) -> Result<Option<bool>> {
    let hosts = client.hosts()?;
    let host = hosts.iter().find(|host| host.tid.host() == from.host());
    let host = host.with_context(|| format!("the host of {from} has left the virtual machine"))?;
    let (agent, _) = on_host(client, host, &quietly)?;
    let fate = Request::Fate { v, next: next.0 };
    match Caller::new(client).ask(agent, fate, PATIENCE)? {
        Answer::Fate { moved } => Ok(moved),
        other => bail!("the agent of {} answers {other:?}", host.name),
    }
}
