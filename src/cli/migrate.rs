//! `mistctl migrate`: a task goes to another host.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mistctl::error::Failure;
use mistctl::pvm::agent::control::{Answer, Moved, Peer, Request};
use mistctl::pvm::agent::{Caller, Gone, ensure};
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::tid::Tid;
use nix::sys::signal::{SigSet, Signal};

use super::{out, ps};

/// How long a move may take, however large the task and slow the link.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// How long one may take to come to its end when its agent has ended, and how often that is looked at.
const ENDING: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);
/// How long the agent may take to call a move off.
const CALL_OFF: Duration = Duration::from_secs(10);

/// Move a running PVM task to another host
///
/// The task goes on there, and neither it nor its partners notice. Its memory is sent while it runs, then it stands
/// still for a moment. If anything fails the task goes on where it was.
///
/// The task has to run under the shim (`mistctl ps` says so). Files that it has open must be there on the other host
/// under the same names with the same content. The first time on a host mistctl starts its agent there.
///
/// SIGINT (Ctrl-C) and SIGTERM call the move off as long as it is not decided, and the task stays where it is; the exit
/// code is 130 or 143 then. Behind the decision, the last moment of a move, they say that it is too late.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The task, as PVM writes it: t40002; its virtual tid or the one it has now
    #[arg(value_name = "TID")]
    tid: Tid,

    /// Name of the host, as `mistctl ps` and PVM's console show it
    host: String,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (pvmd, mut client) = ps::enrol()?;
    let hosts = client.hosts()?;
    if !hosts.iter().any(|host| host.name == args.host) {
        let names: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
        return Err(Failure::Refused.because(format!(
            "there is no host {} in the virtual machine; there are {}",
            args.host,
            names.join(", ")
        )));
    }
    let agents = ensure(&mut client, &out::waits)?;
    let table = ps::table_of(&pvmd)?;
    let now = table
        .and_then(|table| {
            let v = table.v_of(args.tid.0).unwrap_or(args.tid.0);
            table.entry(v).map(|entry| Tid(entry.r))
        })
        .unwrap_or(args.tid);
    let Some(agent) = agents.iter().find(|agent| agent.host == now.host().0) else {
        return Err(Failure::NoSuchProcess.because(format!(
            "there is no task {} in the virtual machine",
            args.tid
        )));
    };
    let request = Request::Migrate {
        tid: args.tid.0,
        to: args.host.clone(),
        agents: agents.clone(),
    };
    let signals = Signals::watch(args, &pvmd, agent)?;
    let answer = match Caller::new(&mut client).ask(Tid(agent.tid), request, LIMIT) {
        Ok(answer) => answer,
        Err(e) if let Some(signal) = signals.called_off() => {
            let code = interrupted(args.json, signal, &format!("{e:#}"))?;
            return Ok(ExitCode::from(code));
        }
        Err(e) if e.is::<Gone>() => {
            let found = whereabouts(&pvmd, &mut client, args.tid);
            return Err(e.context(match found {
                Some(host) => {
                    format!("the move has come to its end all the same: the task runs on {host}")
                }
                None => unknown(args, &agent.name),
            }));
        }
        Err(e) if client.hosts().is_err() => {
            let here = "this host is in the virtual machine no more, so the rest is not heard here";
            return Err(e.context(format!("{here}: {}", unknown(args, &agent.name))));
        }
        Err(e) => return Err(e),
    };
    let Answer::Moved(moved) = answer else {
        bail!("the agent of {} answers {answer:?}", agent.name);
    };
    // It may have ended before that was said.
    if signals.called_off().is_some() {
        too_late(args.tid, &args.host);
    }
    client.exit()?;
    print(args, &moved)?;
    Ok(ExitCode::SUCCESS)
}

/// What can be said of a move of which nothing more is heard.
fn unknown(args: &Args, from: &str) -> String {
    format!(
        "task {} runs on {from} as before, or on {} if that was decided already; `mistctl ps` tells",
        args.tid, args.host
    )
}

/// On which host a task is when its move is over, whose agent has ended: nobody decides it any more. None if that is not
/// to be found out.
fn whereabouts(pvmd: &Pvmd, client: &mut Client, tid: Tid) -> Option<String> {
    // The agent that follows brings it to its end, if the mover does not.
    ensure(client, &out::waits).ok()?;
    let until = Instant::now() + ENDING;
    while Instant::now() < until {
        let table = ps::table_of(pvmd).ok().flatten()?;
        let v = table.v_of(tid.0).unwrap_or(tid.0);
        let present = match table.entry(v) {
            Some(entry) if entry.state.is_closed() => None,
            entry => Some(Tid(entry.map_or(v, |entry| entry.r))),
        };
        if let Some(r) = present {
            let hosts = client.hosts().ok()?;
            let host = hosts.into_iter().find(|host| host.tid.host() == r.host())?;
            return client.lives(r).ok()?.then_some(host.name);
        }
        std::thread::sleep(LOOK);
    }
    None
}

/// Signals that would end us, from here on. The agent moves the task without us, so SIGINT and SIGTERM have it call the
/// move off; the second of them, and a terminal that goes, end this command alone.
struct Signals {
    /// The signal by which the move was to be called off, and nothing is said of that yet; 0 without one.
    by: Arc<AtomicI32>,
}

impl Signals {
    fn watch(args: &Args, pvmd: &Pvmd, agent: &Peer) -> anyhow::Result<Signals> {
        let status = procfs::process::Process::myself().and_then(|own| own.status());
        let ignored = status.context("reading our status")?.sigign;
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            if ignored & (1 << (signal as i32 - 1)) == 0 {
                set.add(signal);
            }
        }
        set.thread_block().context("blocking signals")?;
        let by = Arc::new(AtomicI32::new(0));
        let watcher = Watcher {
            set,
            by: Arc::clone(&by),
            pvmd: pvmd.clone(),
            agent: agent.clone(),
            tid: args.tid,
            host: args.host.clone(),
            json: args.json,
        };
        std::thread::spawn(move || watcher.run());
        Ok(Signals { by })
    }

    fn called_off(&self) -> Option<Signal> {
        Signal::try_from(self.by.load(Ordering::SeqCst)).ok()
    }
}

struct Watcher {
    set: SigSet,
    by: Arc<AtomicI32>,
    pvmd: Pvmd,
    agent: Peer,
    tid: Tid,
    host: String,
    json: bool,
}

impl Watcher {
    fn run(&self) {
        let mut asked = false;
        while let Ok(signal) = self.set.wait() {
            let mut more = String::new();
            if signal != Signal::SIGHUP && !std::mem::replace(&mut asked, true) {
                match self.call_off(signal) {
                    // Who asked for the move is told.
                    Ok(true) => continue,
                    Ok(false) => {
                        too_late(self.tid, &self.host);
                        continue;
                    }
                    Err(e) => more = format!(" (it could not be called off: {e:#})"),
                }
            }
            let why = format!(
                "the move of {} to {} goes on without this command, or comes to nothing and leaves the task where it \
                 is: `mistctl ps` shows it{more}",
                self.tid, self.host
            );
            let code = interrupted(self.json, signal, &why).unwrap_or(1);
            std::process::exit(code.into());
        }
    }

    /// True when the task stays; who asked for the move is told so then.
    fn call_off(&self, signal: Signal) -> anyhow::Result<bool> {
        // Before it is done: the answer to who asked for the move may be faster.
        self.by.store(signal as i32, Ordering::SeqCst);
        let done = self.ask();
        if !matches!(done, Ok(true)) {
            self.by.store(0, Ordering::SeqCst);
        }
        done
    }

    fn ask(&self) -> anyhow::Result<bool> {
        let mut client = Client::enrol(&self.pvmd, 0)?;
        let until = Instant::now() + CALL_OFF;
        loop {
            let call_off = Request::CallOff { tid: self.tid.0 };
            let left = until.saturating_duration_since(Instant::now());
            match Caller::new(&mut client).ask(Tid(self.agent.tid), call_off, left)? {
                Answer::CalledOff {
                    in_time: Some(in_time),
                } => return Ok(in_time),
                // It has not begun yet; or it is over, and who asked for it is about to say so.
                Answer::CalledOff { in_time: None } => std::thread::sleep(LOOK),
                other => bail!("the agent of {} answers {other:?}", self.agent.name),
            }
        }
    }
}

fn too_late(tid: Tid, host: &str) {
    out::note(&format!(
        "mistctl: it is decided that {tid} goes to {host}, which cannot be called off any more"
    ));
}

/// Says that a signal has ended us, and what came of that; the exit code.
fn interrupted(json: bool, signal: Signal, why: &str) -> anyhow::Result<u8> {
    let code = 128 + signal as u8;
    let why = format!("ended by {signal}; {why}");
    out::note(&format!("mistctl: {why}"));
    if json {
        out::object(
            &serde_json::json!({"error": why, "failure": Failure::Failed.name(), "exit": code}),
        )?;
    }
    Ok(code)
}

fn print(args: &Args, moved: &Moved) -> anyhow::Result<()> {
    if args.json {
        return out::object(&serde_json::json!({
            "virtual_tid": Tid(moved.v),
            "from": Tid(moved.from),
            "tid": Tid(moved.to),
            "host": args.host,
            "bytes": moved.bytes,
            "bytes_wire": moved.bytes_wire,
            "rounds": moved.rounds,
            "total_us": moved.total_us,
            "blackout_us": moved.blackout_us,
            "warnings": moved.warnings,
        }));
    }
    for warning in &moved.warnings {
        out::note(&format!("mistctl: {warning}"));
    }
    out::print(&format!(
        "{} is on {} as {}: {} in {} rounds, {} on the wire, {}, stopped for {}",
        Tid(moved.v),
        args.host,
        Tid(moved.to),
        out::bytes(moved.bytes),
        moved.rounds,
        out::bytes(moved.bytes_wire),
        out::micros(moved.total_us),
        out::micros(moved.blackout_us),
    ))
}
