//! Those who ask agents: commands, over a PVM connection of their own.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::control::{Answer, Envelope, Known, Peer, Request, TAG, VERSION, What};
use super::names;
use crate::error::Failure;
use crate::pvm::client::Client;
use crate::pvm::spawn::{Sink, Spawn};
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::{Host, Notify, Task, noticed};
use crate::pvm::wire::Body;

/// Tag of pvmd's notice that an agent has ended.
const ENDED: i32 = TAG + 1;
/// How long an agent may take to say that it is there.
const STARTING: Duration = Duration::from_secs(20);
/// How long a host may be silent before whoever waits is told, and before it is waited for no longer.
const SILENT: Duration = Duration::from_secs(5);
const GIVES_UP: Duration = Duration::from_secs(30);
/// How long one may take for what it has at hand.
const LIMIT: Duration = Duration::from_secs(30);
/// How long the last step of a move may take: then its gates open by themselves. How often that is looked at.
const MOVES_END: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);
/// How often agents are started again that end while all are asked something.
const TRIES: usize = 5;

/// Is told in words for people what is waited for, when that takes long.
pub type Waits<'a> = &'a dyn Fn(&str);

/// Asks agents.
pub struct Caller<'c> {
    client: &'c mut Client,
    next: u64,
}

impl<'c> Caller<'c> {
    /// Asks in the name of `client`.
    pub fn new(client: &'c mut Client) -> Caller<'c> {
        Caller { client, next: 1 }
    }

    /// Asks an agent and waits for the answer.
    ///
    /// # Errors
    /// Those of the agent, or that it ended, or did not answer in time.
    pub fn ask(&mut self, agent: Tid, request: Request, limit: Duration) -> Result<Answer> {
        let id = self.next;
        self.next += 1;
        let envelope = Envelope {
            version: VERSION,
            id,
            what: What::Request(request),
        };
        let body = serde_json::to_vec(&envelope).context("JSON")?;
        self.client.notify(Notify::TaskExit, ENDED, &[agent])?;
        self.client.send(agent, TAG, Body::new().bytes(&body))?;
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Some(message) = self.client.recv(Some(left))? else {
                return Err(Failure::Busy.because(format!(
                    "{} did not answer within {} s: its host is down or cut off, or something holds it up there; \
                     `mistctl ps` names hosts that do not answer; try again when it does",
                    self.name(agent),
                    limit.as_secs()
                )));
            };
            if message.ctx != 0 {
                continue;
            }
            if message.tag == ENDED as u32 && noticed(&message).contains(&agent) {
                return Err(anyhow!(Gone(self.name(agent))));
            }
            if message.tag != TAG as u32 || message.src != agent {
                continue;
            }
            match serde_json::from_slice::<Envelope>(&message.body) {
                Ok(answer) if answer.id == id => match answer.what {
                    What::Answer(answer) => return Ok(answer),
                    What::Failed(failed) => return Err(failed.into_error()),
                    What::Request(_) => {}
                },
                _ => {}
            }
        }
    }

    /// What people know an agent by.
    fn name(&mut self, agent: Tid) -> String {
        let hosts = self.client.hosts().unwrap_or_default();
        match hosts.iter().find(|host| host.tid.host() == agent.host()) {
            Some(host) => format!("mistctl's agent on {} ({agent})", host.name),
            None => format!("mistctl's agent {agent}, whose host has left the virtual machine,"),
        }
    }
}

/// The agent that was asked has ended: its name for people.
#[derive(Debug)]
pub struct Gone(String);

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has ended", self.0)
    }
}

impl std::error::Error for Gone {}

/// The agents of all hosts: found, or started where there is none. All know each other, and what any of them knows
/// of tasks that moved.
///
/// # Errors
/// When there is no agent on some host and none can be started; `Busy` when a host does not answer.
pub fn ensure(client: &mut Client, waits: Waits<'_>) -> Result<Vec<Peer>> {
    let (agents, learned) = present(client, waits)?;
    if !learned {
        introduce(client, &agents)?;
    }
    Ok(agents)
}

/// Asks the agents of all hosts the same. Those that have ended are started again, and asked again: what they knew of gates
/// is in the tables of their hosts.
///
/// # Errors
/// What the last of them said that did not do it.
pub fn ask_everywhere(client: &mut Client, request: &Request) -> Result<()> {
    ask_last(client, request, "")
}

/// The same, and the agent of host `last` only when all others have done it.
///
/// # Errors
/// What the last of them said that did not do it.
pub fn ask_last(client: &mut Client, request: &Request, last: &str) -> Result<()> {
    let mut done = Vec::new();
    let mut failed = Ok(());
    for _ in 0..TRIES {
        failed = Ok(());
        let mut agents = ensure(client, &|_| {})?;
        agents.sort_by_key(|agent| agent.name == last);
        for agent in agents {
            if done.contains(&agent.tid) {
                continue;
            }
            if failed.is_err() && agent.name == last {
                break;
            }
            match Caller::new(client).ask(Tid(agent.tid), request.clone(), LIMIT) {
                Ok(_) => done.push(agent.tid),
                Err(e) => failed = Err(e.context(format!("the agent of {}", agent.name))),
            }
        }
        if !failed.as_ref().is_err_and(|e| e.is::<Gone>()) {
            break;
        }
    }
    failed
}

/// Sees to it that all hosts are there before anything is begun.
///
/// # Errors
/// `Busy` when one does not answer.
pub fn all_answer(client: &mut Client, waits: Waits<'_>) -> Result<()> {
    let hosts = client.hosts()?;
    (hosts.iter()).try_for_each(|host| tasks(client, host, waits).map(drop))
}

/// The agents of all hosts, and whether all know what the others do: those that do not wait until no move is at its end.
///
/// # Errors
/// As for [`ensure`].
pub(super) fn present(client: &mut Client, waits: Waits<'_>) -> Result<(Vec<Peer>, bool)> {
    let mut agents = Vec::new();
    let mut all = true;
    for host in client.hosts()? {
        let (tid, learned) = on_host(client, &host, waits)?;
        all &= learned;
        agents.push(Peer {
            host: host.tid.host().0,
            name: host.name,
            tid: tid.0,
        });
    }
    Ok((agents, all))
}

/// Finds the agent of a host, or starts one; true when it has been told what the others know.
pub(super) fn on_host(client: &mut Client, host: &Host, waits: Waits<'_>) -> Result<(Tid, bool)> {
    let program = program()?;
    let until = Instant::now() + STARTING;
    let mut pause = LOOK;
    loop {
        for task in &tasks(client, host, waits)? {
            let name = task.program.as_bytes();
            if name != program.as_os_str().as_bytes() {
                continue;
            }
            match Caller::new(client).ask(task.tid, Request::Hello, STARTING) {
                Ok(Answer::Hello { learned, .. }) => return Ok((task.tid, learned)),
                Ok(other) => bail!("the agent of {} answers {other:?}", host.name),
                // Another was there before it.
                Err(e) if e.downcast_ref::<Gone>().is_some() => {}
                Err(e) => return Err(e),
            }
        }
        if Instant::now() > until {
            bail!(
                "no agent stays on {}: each ends at once. See the pvmds' logs there and on the master's host, whether {} is \
                 installed there as it is here, and whether the file system of /tmp is full there",
                host.name,
                program.display()
            );
        }
        if pause > LOOK {
            std::thread::sleep(pause);
        }
        pause = (pause * 2).min(LOOK * 50);
        names::make_room(client, host)?;
        client
            .spawn(&Spawn {
                file: program.as_os_str().as_bytes(),
                args: &["agent"],
                host: &host.name,
                environment: &[],
                output: Sink::default(),
                trace: Sink::default(),
            })
            .with_context(|| {
                format!(
                    "cannot start the agent of {}; mistctl has to be installed there as it is here",
                    host.name
                )
            })?;
    }
}

/// The tasks of a host. The pvmds wait for one that is down or cut off until they give it up, for minutes; nobody can do
/// without it before: what is on it goes on, and it has to know who moves.
fn tasks(client: &mut Client, host: &Host, waits: Waits<'_>) -> Result<Vec<Task>> {
    let question = client.begin_tasks(host.tid)?;
    let soon = client.end_tasks(host.tid, question, SILENT)?;
    let late = match soon {
        Some(tasks) => return Ok(tasks),
        None => {
            waits(&format!("waiting for {}, which does not answer", host.name));
            client.end_tasks(host.tid, question, GIVES_UP - SILENT)?
        }
    };
    late.ok_or_else(|| {
        Failure::Busy.because(format!(
            "{} has not answered within {} s: it is down, or cut off. Every host of the virtual machine has to know of a \
             task that comes and goes; nothing has been done. PVM gives such a host up after some minutes (the console's \
             `conf` does not show it then): try again when it has, or when {0} is back",
            host.name,
            GIVES_UP.as_secs()
        ))
    })
}

/// mistctl's own path, by which tasks that are agents are known, too.
///
/// # Errors
/// When it is not to be found there any more.
pub(super) fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where mistctl is")?;
    // What the kernel calls it once another was installed in its place.
    let Some(path) = own.as_os_str().as_bytes().strip_suffix(b" (deleted)") else {
        return Ok(own);
    };
    let path = PathBuf::from(OsStr::from_bytes(path));
    match path.exists() {
        true => Ok(path),
        false => bail!(
            "{} is not there any more; install mistctl there again",
            path.display()
        ),
    }
}

/// Tells all agents of each other, and the new ones what the others know.
fn introduce(client: &mut Client, agents: &[Peer]) -> Result<()> {
    let tids: Vec<u32> = agents.iter().map(|agent| agent.tid).collect();
    for agent in agents {
        let hide = Request::Hide { tids: tids.clone() };
        Caller::new(client).ask(Tid(agent.tid), hide, LIMIT)?;
    }
    // Of a move that is at its end the new ones would never hear what became of it. Tasks wait for them meanwhile.
    let until = Instant::now() + MOVES_END;
    let (mut entries, mut incarnations) = (Vec::new(), Vec::new());
    for agent in agents {
        loop {
            match Caller::new(client).ask(Tid(agent.tid), Request::Table, LIMIT)? {
                Answer::Table { moving: true, .. } if Instant::now() < until => {
                    std::thread::sleep(LOOK);
                }
                Answer::Table {
                    entries: more,
                    incarnations: of_those,
                    ..
                } => {
                    entries.extend(more);
                    incarnations.extend(of_those);
                    break;
                }
                other => bail!("the agent of {} answers {other:?}", agent.name),
            }
        }
    }
    for agent in agents {
        for (r, v) in names::own_names(client, agent, &entries, &incarnations)? {
            incarnations.push((r, v));
            entries.push(Known {
                v,
                r,
                hidden: false,
                away: false,
            });
        }
    }
    for agent in agents {
        let learn = Request::Learn {
            entries: entries.clone(),
            incarnations: incarnations.clone(),
        };
        Caller::new(client).ask(Tid(agent.tid), learn, LIMIT)?;
    }
    Ok(())
}
