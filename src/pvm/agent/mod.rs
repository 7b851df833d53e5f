//! The agent of a host: a PVM task that changes the host's tid table, drains its tasks, and starts movers and
//! landers. It is asked by PVM messages ([`control`]), by its movers over sockets, and answers when it can.
//!
//! One thread and one loop. What takes long is not waited for: the ticket of the request is kept.

mod call;
mod compare;
pub mod control;
mod gates;
mod landings;
pub mod lines;
mod moves;
mod names;
mod output;
mod restored;
mod settle;

pub use call::{Caller, Gone, Waits, all_answer, ask_everywhere, ask_last, ensure};
pub use compare::Hashes;
pub use settle::{conclude, hand_over_mailbox, has_gone, inquire, settle, until_known};

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pvm_abi::table::{Entry, State};
use pvm_abi::{AGENTS, CTX_TC, CTX_TM, NOOP_MARKER, place};

use crate::error::Failure;
use crate::kernel::fds;
use crate::pvm::client::{self, Client, Pvmd};
use crate::pvm::contexts;
use crate::pvm::local::{self, Seen};
use crate::pvm::mailbox::{MULTI_INSTANCE, packed};
use crate::pvm::table::TidTable;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::{Notify, Task, noticed, said_of_life};
use crate::pvm::wire::{Body, Message, tc, tm};
use control::{Answer, Envelope, Failed, Known, LONGEST, Outcome, Request, TAG, VERSION, What};
use gates::{Closing, Look};
use landings::Landings;
use moves::Moves;

/// How long a pvmd may take for an answer: while it does, nobody else is served.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a pvmd that ends may take for that.
const ENDING: Duration = Duration::from_secs(2);
/// How often a task that is drained is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// The pvmd's flag of a task that is connected to it.
const CONNECTED: i32 = 4;
/// Tag of pvmd's notices of landers and agents that have ended.
const ENDED: i32 = TAG + 1;
/// Our own program, also when another has been installed in its place.
const OWN: &str = "/proc/self/exe";
/// Tag of its notices of hosts that were added.
const ADDED: i32 = TAG + 2;

/// Whose request it is, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    asker: Asker,
    id: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asker {
    /// A task of the virtual machine.
    Task(Tid),
    /// A mover of ours, by its number.
    Mover(u64),
}

/// Runs until the virtual machine ends.
///
/// # Errors
/// When there is no virtual machine, or what an agent needs cannot be had; `Busy` when this host has an agent.
pub fn run() -> Result<()> {
    // Some for each task of the host, when a gate closes.
    fds::allow_all();
    let pvmd = Pvmd::find()?.context("no virtual machine is running here")?;
    let mut client = Client::enrol(&pvmd, client::own_cookie())?;
    client.set_patience(PATIENCE);
    let path = pvmd.table_path()?;
    let table = match TidTable::open(&path) {
        Ok(table) => table,
        Err(e) => {
            client.exit()?;
            return Err(e);
        }
    };
    let mut agent = Agent::new(client, table)?;
    let done = agent.take_up().and_then(|()| agent.serve());
    // Its movers notice by themselves; its landers, too.
    let _ = fs::remove_dir_all(&agent.dir);
    agent.clear_up(&pvmd);
    done
}

struct Agent {
    client: Client,
    own: Tid,
    host: String,
    table: TidTable,
    /// For our sockets and links; nobody else's business.
    dir: PathBuf,
    listener: UnixListener,
    signals: SignalFd,
    closing: Vec<Closing>,
    last_drain: u32,
    /// Which agent had a gate closed.
    closed_for: HashMap<u32, Tid>,
    landings: Landings,
    moves: Moves,
    /// Requests of movers that went to another agent, by our number.
    relayed: HashMap<u64, (Ticket, Tid)>,
    /// Tasks of whose end we are told.
    watched: HashSet<Tid>,
    /// What came of moves is being told everybody, by these children.
    settling: HashMap<i32, Outcome>,
    /// Questions after the two incarnations of a task.
    looks: Vec<Look>,
    /// What files hold that moves have compared.
    hashes: Hashes,
    /// Questions of others, by our wait ids.
    asked: HashMap<u32, (Ticket, Tid)>,
    next: u64,
}

impl Agent {
    fn new(mut client: Client, mut table: TidTable) -> Result<Agent> {
        let own = client.tid();
        let mut dir = table.path().as_os_str().to_owned();
        dir.push(".d");
        let dir = PathBuf::from(dir);
        // What an agent that was killed has left: we have its lock.
        let _ = fs::remove_dir_all(&dir);
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let socket = dir.join("agent");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        listener.set_nonblocking(true).context("O_NONBLOCK")?;
        let mut term = SigSet::empty();
        term.add(Signal::SIGTERM);
        term.add(Signal::SIGCHLD);
        term.thread_block().context("cannot block SIGTERM")?;
        let signals = SignalFd::with_flags(&term, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("signalfd")?;
        client.spare_from_reset(own)?;
        table.hide(own.0)?;
        // Of two that begin at the same time at least one sees the other.
        let class = AGENTS.to_str().context("the class of agents")?;
        client.mailbox_put(own, class, 0, MULTI_INSTANCE, &packed(own, &[]))?;
        let others: Vec<Tid> = (client.mailbox_names(class)?.iter())
            .map(|entry| entry.owner)
            .filter(|owner| *owner != own)
            .collect();
        if others.is_empty() {
            table.set_learned();
        }
        for other in &others {
            table.hide(other.0)?;
        }
        let hosts = client.hosts()?;
        let host = hosts.into_iter().find(|h| h.tid.host() == own.host());
        client.notify(Notify::HostAdd, ADDED, &[])?;
        let mut agent = Agent {
            host: host
                .map(|h| h.name)
                .context("this host is not in the list")?,
            client,
            own,
            table,
            listener,
            signals,
            closing: Vec::new(),
            last_drain: 0,
            closed_for: HashMap::new(),
            landings: Landings::new(dir.clone(), socket),
            moves: Moves::default(),
            relayed: HashMap::new(),
            watched: HashSet::new(),
            settling: HashMap::new(),
            looks: Vec::new(),
            hashes: Hashes::default(),
            asked: HashMap::new(),
            next: 1,
            dir,
        };
        // Nobody else tells them of one that follows another. Who does not hear it shows us, and no more.
        for other in others {
            let hide = Request::Hide { tids: vec![own.0] };
            agent.post(other, 0, What::Request(hide))?;
        }
        Ok(agent)
    }

    /// Takes the table away that nobody needs any more: with its pvmd all tasks of this host end. A move that is not over
    /// finds in it what was decided.
    fn clear_up(&mut self, pvmd: &Pvmd) {
        let until = Instant::now() + ENDING;
        // A pvmd that ends sends SIGTERM first, and takes its socket away last.
        let is_over = loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.client.recv(Some(left)) {
                Ok(Some(_)) => {}
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        while is_over && Instant::now() < until {
            if pvmd.is_dead().unwrap_or(false) {
                let closed = |entry: &Entry| entry.state.is_closed();
                if !self.moves.any() && !self.table.list().iter().any(closed) {
                    place::sweep(self.table.path());
                }
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            self.look_at_leases()?;
            self.serve_movers()?;
            self.serve_landers()?;
            // After all that asks the pvmd: what comes while an answer is waited for is kept, and no descriptor
            // tells of it. The end of the connection is the end of the virtual machine, or of this host's part of it.
            while let Some(message) = match self.client.recv(Some(Duration::ZERO)) {
                Ok(message) => message,
                Err(_) => return Ok(()),
            } {
                self.message(&message)?;
            }
            self.look_at_drains()?;
            if !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Waits until there is something to do; false when it is time to go.
    fn wait(&mut self) -> Result<bool> {
        let limit = if self.closing.is_empty() {
            self.until_next_lease()
        } else {
            Some(LOOK)
        };
        let limit = match limit {
            None => PollTimeout::NONE,
            Some(limit) => PollTimeout::from(limit.as_millis().clamp(1, 60_000) as u16),
        };
        let mut fds = vec![
            PollFd::new(self.client.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        self.landings.poll(&mut fds);
        self.moves.poll(&mut fds);
        match poll(&mut fds, limit) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).context("poll"),
        }
        while let Some(signal) = self.signals.read_signal().context("signalfd")? {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                return Ok(false);
            }
            self.reap()?;
        }
        while let Ok((stream, _)) = self.listener.accept() {
            self.landings.connected(stream);
        }
        Ok(true)
    }

    /// A message came in. Whatever it is, we go on.
    fn message(&mut self, message: &Message) -> Result<()> {
        if message.ctx == 0 && message.tag == ENDED as u32 && message.src.is_pvmd() {
            let ended = noticed(message);
            self.landers_ended(&ended)?;
            return self.agents_ended(&ended);
        }
        if message.ctx == 0 && message.tag == ADDED as u32 && message.src.is_pvmd() {
            return self.hosts_added();
        }
        if message.ctx == CTX_TC as u32 && message.tag == tc::NOOP {
            return self.marker(message);
        }
        if message.ctx == CTX_TM as u32 && message.tag == tm::PSTAT {
            return match self.asked.remove(&message.wait) {
                Some((ticket, r)) => {
                    let gone = said_of_life(r, message).ok().map(|lives| !lives);
                    self.answer(ticket, Ok(Answer::Gone { gone }))
                }
                None => self.lives(message),
            };
        }
        if message.ctx != 0 || message.tag != TAG as u32 || message.body.len() > LONGEST {
            return Ok(());
        }
        let Ok(envelope) = serde_json::from_slice::<Envelope>(&message.body) else {
            return Ok(());
        };
        let ticket = Ticket {
            asker: Asker::Task(message.src),
            id: envelope.id,
        };
        match envelope.what {
            What::Request(_) if envelope.version != VERSION => {
                let why = format!(
                    "the agent of {} speaks version {VERSION}, not {}; install the same mistctl on all hosts, and restart the virtual machine",
                    self.host, envelope.version
                );
                self.answer(ticket, Err(anyhow::Error::msg(why)))
            }
            What::Request(request) => self.request(ticket, request),
            // Only of those who were asked.
            answer => match self.relayed.remove(&envelope.id) {
                Some((ticket, asked)) if asked == message.src => self.pass_on(ticket, answer),
                Some(other) => {
                    self.relayed.insert(envelope.id, other);
                    Ok(())
                }
                None => Ok(()),
            },
        }
    }

    /// Sends a request of a mover on to another agent.
    fn relay(&mut self, ticket: Ticket, to: Tid, request: Request) -> Result<()> {
        let id = self.next;
        self.next += 1;
        self.relayed.insert(id, (ticket, to));
        self.watch(to)?;
        self.post(to, id, What::Request(request))
    }

    /// Sees to it that we are told when another agent ends.
    fn watch(&mut self, agent: Tid) -> Result<()> {
        if self.watched.insert(agent) {
            self.client.notify(Notify::TaskExit, ENDED, &[agent])?;
        }
        Ok(())
    }

    /// Other agents have ended: what they were asked they do not answer, and what they were doing is over soon.
    fn agents_ended(&mut self, tids: &[Tid]) -> Result<()> {
        for tid in tids {
            if !self.watched.remove(tid) {
                continue;
            }
            let asked = |(_, (_, to)): &(&u64, &(Ticket, Tid))| to == tid;
            let open: Vec<u64> = self
                .relayed
                .iter()
                .filter(asked)
                .map(|(id, _)| *id)
                .collect();
            for id in open {
                if let Some((ticket, _)) = self.relayed.remove(&id) {
                    self.answer(ticket, Err(anyhow!("the agent {tid} has ended")))?;
                }
            }
            self.closer_ended(*tid)?;
            self.restorer_ended(*tid)?;
        }
        Ok(())
    }

    fn post(&mut self, to: Tid, id: u64, what: What) -> Result<()> {
        let envelope = Envelope {
            version: VERSION,
            id,
            what,
        };
        let body = serde_json::to_vec(&envelope).context("JSON")?;
        self.client.send(to, TAG, Body::new().bytes(&body))
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<Answer>) -> Result<()> {
        let what = match answer {
            Ok(answer) => What::Answer(answer),
            Err(e) => What::Failed(Failed::of(&e)),
        };
        self.pass_on(ticket, what)
    }

    fn pass_on(&mut self, ticket: Ticket, what: What) -> Result<()> {
        match ticket.asker {
            Asker::Task(tid) => self.post(tid, ticket.id, what),
            Asker::Mover(number) => {
                self.moves.answer(number, ticket.id, what);
                Ok(())
            }
        }
    }

    /// Serves a request. Errors of ours are the asker's; only the end of the connection is ours.
    fn request(&mut self, ticket: Ticket, request: Request) -> Result<()> {
        match self.serve_request(ticket, request) {
            Ok(None) => Ok(()),
            Ok(Some(answer)) => self.answer(ticket, Ok(answer)),
            Err(e) => self.answer(
                ticket,
                Err(e.context(format!("the agent of {}", self.host))),
            ),
        }
    }

    /// The answer; none if it comes later.
    fn serve_request(&mut self, ticket: Ticket, request: Request) -> Result<Option<Answer>> {
        match request {
            Request::Hello => Ok(Some(Answer::Hello {
                pid: std::process::id() as i32,
                learned: self.table.has_learned(),
            })),
            Request::Hide { tids } => {
                for tid in tids {
                    self.table.hide(tid)?;
                }
                Ok(Some(Answer::Done))
            }
            Request::Table => Ok(Some(self.known())),
            Request::Learn {
                entries,
                incarnations,
            } => self.learn(&entries, &incarnations),
            Request::AddIncarnation { r, v } => {
                self.table.add_incarnation(r, v)?;
                Ok(Some(Answer::Done))
            }
            Request::CloseGate {
                v,
                from,
                next,
                lease_ms,
                saved,
            } => (self.close_gate(ticket, (v, from, next), lease_ms, saved)).map(|()| None),
            Request::Settle(outcome) => self.settle(&outcome).map(|()| Some(Answer::Done)),
            Request::Fate { v, next } => Ok(Some(Answer::Fate {
                moved: self.fate(v, next),
            })),
            Request::Gone { r } => self.gone(ticket, Tid(r)),
            Request::OpenGate { v, r } => {
                self.open_gate(v, r)?;
                Ok(Some(Answer::Done))
            }
            Request::Redirect { v, r } => {
                let (tids, left) = self.redirect(v, r, output::PATIENCE)?;
                Ok(Some(Answer::Redirected { tids, left }))
            }
            Request::Marker { r, number } => {
                self.client
                    .send_noop(Tid(r), NOOP_MARKER, &number.to_be_bytes())?;
                Ok(Some(Answer::Done))
            }
            Request::Compare { files } => Ok(Some(Answer::Compared {
                different: self.hashes.different(&files),
            })),
            Request::Land { order } => self.land(ticket, order).map(|()| None),
            Request::Parked { id } => self.landings.parked(ticket, &id),
            Request::Running { id } => self.landings.running(ticket, &id),
            Request::Run { id } => self.landings.tell_run(&id).map(|()| Some(Answer::Done)),
            Request::Abandon { id, r } => {
                self.landings.abandon(&id, Tid(r));
                Ok(Some(Answer::Done))
            }
            Request::Status => Ok(Some(Answer::Status {
                tasks: self.status()?,
            })),
            Request::UseUpContexts { count } => Ok(Some(Answer::Context {
                last: contexts::count(&mut self.client, count)?,
            })),
            Request::Migrate { tid, to, agents } => {
                self.migrate(ticket, tid, &to, agents).map(|()| None)
            }
            Request::CallOff { tid } => Ok(Some(Answer::CalledOff {
                in_time: self.call_off(tid),
            })),
        }
    }

    /// Whether an incarnation has gone: what our pvmd says, which is the master's, counts for all (see [`has_gone`]).
    fn gone(&mut self, ticket: Ticket, r: Tid) -> Result<Option<Answer>> {
        if !self.client.has_host(r)? {
            return Ok(Some(Answer::Gone { gone: Some(true) }));
        }
        let wait = self.client.begin_lives(r)?;
        self.asked.insert(wait, (ticket, r));
        Ok(None)
    }

    fn known(&self) -> Answer {
        let moves = |entry: &Entry| entry.state.is_closed() && entry.lease != 0;
        let (moving, settled): (Vec<Entry>, Vec<Entry>) =
            self.table.list().into_iter().partition(moves);
        Answer::Table {
            entries: settled
                .iter()
                .map(|entry| Known {
                    v: entry.v,
                    r: entry.r,
                    hidden: entry.state == State::Hidden,
                    away: entry.is_away(),
                })
                .collect(),
            incarnations: self.table.incarnations(),
            moving: !moving.is_empty(),
        }
    }

    fn learn(&mut self, entries: &[Known], incarnations: &[(u32, u32)]) -> Result<Option<Answer>> {
        for (r, v) in incarnations {
            self.table.add_incarnation(*r, *v)?;
        }
        for known in entries {
            match self.table.entry(known.v) {
                // What we know ourselves may be newer.
                Some(entry) if entry.state.is_closed() || entry.r != entry.v => continue,
                _ if known.hidden => self.table.hide(known.v)?,
                _ if known.r != known.v => self.table.open_gate(known.v, known.r)?,
                _ => {}
            }
            if known.away && self.table.entry(known.v).is_none_or(|e| e.r == known.r) {
                self.table.close_gate(known.v, 0, 0)?;
            }
        }
        self.table.set_learned();
        Ok(Some(Answer::Done))
    }

    /// The tasks of this host that are not mist's.
    fn tasks(&mut self) -> Result<Vec<Task>> {
        let mut tasks = self.client.tasks(self.own.host())?;
        tasks.retain(|task| task.tid != self.own);
        Ok(tasks)
    }

    /// Their processes. Others of the host may be tasks of another virtual machine, with the same tids.
    fn processes(&mut self) -> Result<Vec<i32>> {
        let tasks = self.tasks()?;
        Ok(tasks.iter().map(|task| task.pid).collect())
    }

    fn status(&mut self) -> Result<Vec<Seen>> {
        let tasks = self.tasks()?;
        let seen = tasks.iter().map(|task| local::seen(task).transpose());
        seen.flatten().collect()
    }

    /// New hosts need to know who is where: the agent of the master's host sees to their agents.
    fn hosts_added(&mut self) -> Result<()> {
        if self.own.is_master() {
            self.start_agents();
        }
        Ok(())
    }

    /// Has agents started where there are none. What comes of it does not concern us: whoever needs one starts it.
    fn start_agents(&self) {
        drop(self.start_helper(&["agent", "--everywhere"]));
    }

    fn start_helper(&self, args: &[&str]) -> Result<i32> {
        let child = Command::new(OWN).args(args).stdin(Stdio::null()).spawn();
        let child = child.context("cannot start another mistctl")?;
        Ok(child.id() as i32)
    }

    /// Takes note of children that have ended.
    fn reap(&mut self) -> Result<()> {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            let (status, pid) = match (status, status.pid()) {
                (WaitStatus::StillAlive, _) | (_, None) => break,
                (status, Some(pid)) => (status, pid.as_raw()),
            };
            self.moves.ended(pid);
            // One that fails cannot do it; one that was killed has not.
            if let Some(outcome) = self.settling.remove(&pid)
                && matches!(status, WaitStatus::Signaled(..))
            {
                self.tell(outcome)?;
            }
        }
        Ok(())
    }
}

/// An error of the class of a task that is not here.
fn no_task(tid: Tid, host: &str) -> anyhow::Error {
    Failure::NoSuchProcess.because(format!("there is no task {tid} on {host}"))
}
