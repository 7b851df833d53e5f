//! The mover: takes one task from this host to another. A process of its own, so that whatever becomes of it is
//! this move's end and no more.
//!
//! Until it is decided, every way out leaves the task running here, its gates open and the lander gone; from then on
//! the task goes, and what the mover does not do its agent does. The decision is one store by the agent into the tid
//! table of this host, which outlives both.

mod files;
mod link;
pub mod protocol;

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::dump::{self, After, Carried, Flags, Options, Session, Tracker};
use crate::error::Failure;
use crate::image::Compress;
use crate::image::pvm::MailboxEntry;
use crate::kernel::batch::Snapshot;
use crate::kernel::proc_file;
use crate::pvm::agent;
use crate::pvm::agent::control::{Answer, Failed, Landing, Moved, Outcome, Peer, Request};
use crate::pvm::capture::Task;
use crate::pvm::client::Client;
use crate::pvm::connection::Raised;
use crate::pvm::flush;
use crate::pvm::mailbox::Entry;
use crate::pvm::quiet;
use crate::pvm::shimabi::block::flag;
use crate::pvm::shimabi::{CTX_TC, CTX_TM, NOOP_MARKER, WAIT_ID_LATE};
use crate::pvm::stream::{ImageSender, Key, SPACE, Stream};
use crate::pvm::table;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Host;
use crate::pvm::wire::{Assembler, tc};
use crate::restore::Announced;
use link::Link;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{FromMover, Job};

/// How long agents may take for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two attempts to close gates while another task on its way stands in the way.
const BESIDE: Duration = Duration::from_millis(20);
/// When gates find out by themselves, ms.
const GATE_LEASE: u64 = 90_000;
/// How long a lander waits for the end of the old incarnation before it asks, ms.
const LANDER_LEASE: u64 = 60_000;
/// Rounds while the task runs.
const MOST_ROUNDS: u32 = 10;
/// Bytes that are sent sooner than another round would be made.
const LITTLE: u64 = 1 << 20;
/// A round that took no longer is the last one: whatever has changed meanwhile is sent in as long.
const QUICK: Duration = Duration::from_millis(10);
/// Memory from which on the task may run before all of it is in place, bytes.
const LAZY: u64 = 64 << 20;
/// Later than this after the stop nothing is decided any more: well inside the lander's lease.
const DECIDE: Duration = Duration::from_secs(30);

/// Moves the task that the agent at the other end of `stream` names, and tells it what came of it.
///
/// # Errors
/// When there is nobody to tell.
pub fn run(stream: UnixStream) -> Result<()> {
    let (mut link, job) = Link::new(stream)?;
    let mover = Mover::new(&job).map_err(|e| match dump::is_ending(job.pid) {
        true => Failure::NoSuchProcess
            .with(e.context(format!("task {} has ended before it was moved", Tid(job.v)))),
        false => e,
    });
    let done = match mover.and_then(|mut mover| mover.run(&mut link)) {
        Ok(moved) => FromMover::Done(moved),
        Err(e) => FromMover::Failed(Failed::of(&e)),
    };
    link.say(&done)
}

struct Mover<'j> {
    job: &'j Job,
    started: Instant,
    task: Task,
    client: Client,
    /// The agents of all hosts, this one's too.
    agents: Vec<Peer>,
    /// The lander's incarnation.
    r2: u32,
    closed: bool,
    landed: bool,
    /// It has entries in the mailbox, which are to go with it.
    has_entries: bool,
    /// Those that vanish with an incarnation.
    mailbox: Vec<MailboxEntry>,
    /// What others print comes to it.
    collects: bool,
    /// How much of what had reached it went with it.
    seen: usize,
    moved: Moved,
}

impl<'j> Mover<'j> {
    fn new(job: &'j Job) -> Result<Mover<'j>> {
        let started = Instant::now();
        let v = Tid(job.v);
        let gone = || {
            Failure::NoSuchProcess.because(format!(
                "task {v} (process {}) has left the virtual machine",
                job.pid
            ))
        };
        let task = Task::find(job.pid)?.ok_or_else(|| match dump::is_ending(job.pid) {
            true => gone(),
            false => Failure::Busy.because(format!(
                "task {v} (process {}) is not connected to its pvmd: it has not called PVM yet, or has left; try again",
                job.pid
            )),
        })?;
        if task.v != v || task.r.0 != job.r1 {
            return Err(Failure::NoSuchProcess.because(format!(
                "process {} is task {} ({}) now, and not {v} ({}) any more",
                job.pid,
                task.v,
                task.r,
                Tid(job.r1)
            )));
        }
        let client = task.client()?;
        Ok(Mover {
            job,
            started,
            task,
            client,
            agents: job.agents.clone(),
            r2: 0,
            closed: false,
            landed: false,
            has_entries: false,
            mailbox: Vec::new(),
            collects: false,
            seen: 0,
            moved: Moved {
                v: job.v,
                from: job.r1,
                ..Moved::default()
            },
        })
    }

    fn run(&mut self, link: &mut Link) -> Result<Moved> {
        let done = self.bring(link);
        if let Err(e) = done {
            let undone = self.undo(link);
            if undone.is_ok() && dump::is_ending(self.job.pid) {
                return Err(Failure::NoSuchProcess.with(e.context(format!(
                    "task {} has ended before it was moved",
                    Tid(self.job.v)
                ))));
            }
            return Err(match undone {
                Ok(()) => e.context(format!("task {} was not moved, and runs on", Tid(self.job.v))),
                Err(also) => e.context(format!(
                    "task {} was not moved, and runs on; but its gates open only in a while: {also:#}",
                    Tid(self.job.v)
                )),
            });
        }
        self.client.set_patience(Duration::from_secs(1));
        self.moved.total_us = self.started.elapsed().as_micros() as u64;
        Ok(std::mem::take(&mut self.moved))
    }

    /// All of it.
    fn bring(&mut self, link: &mut Link) -> Result<()> {
        // This waits until it is whole, if it has come here, or was restored, lately.
        let flags = self.may_go()?;
        let landing = self.land(link)?;
        // The lander starts meanwhile.
        let ready = self.get_ready(link);
        let landed = self.landed(link, landing);
        let (carried, mut tracker) = ready?;
        let sender = self.connect(link, landed?)?;
        let announced = sender.announce(&Announced::of(&flags.of_mappings(self.job.pid)?));
        let brought = announced.and_then(|()| self.hand_over(link, carried, &mut tracker, &sender));
        let (session, stopped, _raised) = match brought {
            Err(e) if sender.has_ended() => return Err(self.lander_met(link).unwrap_or(e)),
            other => other?,
        };
        self.commit(link)?;
        // Decided. What fails from here on is not undone: the agent and the lander see to it.
        let id = self.job.id.clone();
        // It asks if it does not hear so.
        let _ = link.begin(&self.job.to, Request::Run { id });
        self.finish(link, session, stopped)?;
        let totals = sender.totals();
        (self.moved.bytes, self.moved.bytes_wire) = (totals.raw, totals.wire);
        self.moved.to = self.r2;
        Ok(())
    }

    /// Memory and state, until all of it stands at the other host and only the decision is left.
    fn hand_over(
        &mut self,
        link: &mut Link,
        carried: Carried,
        tracker: &mut Tracker,
        sender: &ImageSender,
    ) -> Result<(Session, Instant, Raised)> {
        self.rounds(tracker, sender)?;
        self.close_gates_alone(link)?;
        let mut session = self.stop(carried)?;
        let stopped = session.stopped();
        // Its buffers stay large until it has ended.
        let raised = self.flush(link, &session)?;
        self.send(&mut session, tracker, sender)?;
        let left = DECIDE.saturating_sub(stopped.elapsed());
        if let Answer::Parked { warnings } = link.ask(&self.job.to, self.parked(), left)? {
            self.moved.warnings = warnings;
        }
        if stopped.elapsed() > DECIDE {
            bail!(
                "it took longer than {} s with the task stopped",
                DECIDE.as_secs()
            );
        }
        Ok((session, stopped, raised))
    }

    fn parked(&self) -> Request {
        Request::Parked {
            id: self.job.id.clone(),
        }
    }

    /// Why the lander has closed the stream: that it did tells nobody what is in its way.
    fn lander_met(&self, link: &mut Link) -> Option<anyhow::Error> {
        link.ask(&self.job.to, self.parked(), PATIENCE).err()
    }

    /// Refuses what would be refused under the stop, with the list, before anything is touched. The flags of the task's
    /// mappings.
    fn may_go(&self) -> Result<Flags> {
        let (v, pid, to) = (Tid(self.job.v), self.job.pid, &self.job.to.name);
        let seen = dump::survey(pid, Some(self.task.connection.ino))?;
        let mut why = seen.refusals;
        if let Some(child) = dump::child(pid) {
            why.push(format!(
                "process {pid} has children (process {child}), which do not move with it; wait until they have ended, \
                 or save it with them and restore it there: `mistctl dump --tree --kill --away {v} -o IMAGE`, then \
                 `mistctl restore --host {to} IMAGE`"
            ));
        }
        match why.is_empty() {
            true => Ok(seen.flags),
            false => Err(Failure::Refused.because(why.join("; also: "))),
        }
    }

    /// What else is to be done before memory can be sent: looks whether the files are there, and begins to follow the
    /// task's memory.
    fn get_ready(&mut self, link: &mut Link) -> Result<(Carried, Tracker)> {
        let carried = files::compare(self.job, &self.task.block.table_path()?, link)?;
        let tracker = Tracker::start(self.job.pid)?;
        dump::prepare();
        Ok((carried, tracker))
    }

    /// Has the lander started: the question, to be followed by [`Mover::landed`] whatever happens.
    fn land(&mut self, link: &mut Link) -> Result<u64> {
        let job = self.job;
        let origin = self.task.origin(&mut self.client)?;
        let order = Landing {
            id: job.id.clone(),
            v: job.v,
            parent: origin.parent,
            program: origin.program,
            moves: Some((job.r1, LANDER_LEASE)),
            image: None,
            lazy: self.resident()? > LAZY,
            announce: false,
        };
        self.landed = true;
        link.begin(&job.to, Request::Land { order })
    }

    /// Waits until the lander is there; the port at which it listens.
    fn landed(&mut self, link: &mut Link, question: u64) -> Result<u16> {
        let landed = link.end(&self.job.to, question, PATIENCE)?;
        let Answer::Landed { r, port } = landed else {
            bail!("the agent of {} answers {landed:?}", self.job.to.name);
        };
        self.r2 = r;
        Ok(port)
    }

    /// Makes the lander known everywhere, and connects to it.
    fn connect(&mut self, link: &mut Link, port: u16) -> Result<ImageSender> {
        let job = self.job;
        let known = Request::AddIncarnation {
            r: self.r2,
            v: job.v,
        };
        link.ask_all(&self.agents, &known, PATIENCE)?;
        let key = Key::of_user()?.derive(&job.id);
        let stream = Stream::connect(address(&job.to, port)?, &key, &job.id, PATIENCE)
            .with_context(|| format!("the lander on {}", job.to.name))?;
        Ok(ImageSender::new(stream))
    }

    /// Bytes of memory the task has.
    fn resident(&self) -> Result<u64> {
        let pid = self.job.pid;
        let status = proc_file::status(pid)
            .with_context(|| format!("reading the status of process {pid}"))?;
        Ok(status.rssanon.unwrap_or(0) * 1024)
    }

    /// Hosts may have come since the move began, and tasks on them know of the task.
    fn newcomers(&mut self, link: &mut Link) -> Result<()> {
        let hosts = self.client.hosts()?;
        let known = |host: &Host| self.agents.iter().any(|a| a.host == host.tid.host().0);
        if hosts.iter().all(known) {
            return Ok(());
        }
        let all = agent::ensure(&mut self.client, &|_| {}).context("a host was added")?;
        let (old, new): (Vec<Peer>, Vec<Peer>) =
            all.into_iter().partition(|a| self.agents.contains(a));
        let known = Request::AddIncarnation {
            r: self.r2,
            v: self.job.v,
        };
        link.ask_all(&new, &known, PATIENCE)?;
        self.agents = [old, new].concat();
        Ok(())
    }

    /// Closes them when no other task stands in the way, such as its collector, that is on its way itself.
    fn close_gates_alone(&mut self, link: &mut Link) -> Result<()> {
        let until = Instant::now() + quiet::PATIENCE;
        loop {
            match self.close_gates(link) {
                Err(e) if Failure::of(&e) == Failure::Busy && Instant::now() < until => {
                    self.settle(link, false)?;
                    self.closed = false;
                    std::thread::sleep(BESIDE);
                }
                done => return done,
            }
        }
    }

    fn close_gates(&mut self, link: &mut Link) -> Result<()> {
        self.newcomers(link)?;
        self.closed = true;
        let close = Request::CloseGate {
            v: self.job.v,
            from: self.job.r1,
            next: self.r2,
            lease_ms: GATE_LEASE,
            saved: false,
        };
        let answers = link.ask_all(&self.agents, &close, PATIENCE)?;
        let collects = |answer: &Answer| matches!(answer, Answer::Closed { collects: true });
        let for_others = self.task.block.flags()? & flag::COLLECTOR != 0;
        self.collects = for_others || answers.iter().any(collects);
        Ok(())
    }

    /// Sends what there is while the task runs, until what is left is little, or does not become less.
    fn rounds(&mut self, tracker: &mut Tracker, sender: &ImageSender) -> Result<()> {
        if let Some(why) = tracker.why_not() {
            self.moved.warnings.push(why.to_owned());
            return Ok(());
        }
        let mut before = u64::MAX;
        while self.moved.rounds < MOST_ROUNDS {
            let began = Instant::now();
            let round = tracker.round(&mut |at, pages| sender.give(SPACE, at, pages))?;
            sender.round()?;
            self.moved.rounds += 1;
            let little = round.bytes < LITTLE || began.elapsed() < QUICK;
            if little || round.bytes > before / 4 * 3 {
                break;
            }
            before = round.bytes;
        }
        Ok(())
    }

    fn stop(&mut self, carried: Carried) -> Result<Session> {
        let opts = Options {
            pid: self.job.pid,
            image: Default::default(),
            store: None,
            tree: false,
            after: After::Kill,
            compress: Compress::None,
            tcp_established: false,
            progress: false,
            carried,
            pvmd: Some(self.task.connection.ino),
        };
        Session::stop_with(&opts, &mut |_| quiet::stop(&self.task, quiet::PATIENCE))
    }

    /// Waits until nothing is on its way to the task, nor from it in this host's pvmd.
    fn flush(&mut self, link: &mut Link, session: &Session) -> Result<Raised> {
        // What it had written goes first, so that what its agent asks others for is behind it.
        flush::written(&self.task, PATIENCE)?;
        // The new incarnation's tid is given once: no marker of an earlier move has it.
        let marker = Request::Marker {
            r: self.job.r1,
            number: self.r2,
        };
        // Whoever answers has got this by way of the old pvmd, and what was before it.
        link.ask_all(&self.agents, &marker, PATIENCE)?;
        let agents: Vec<Tid> = self.agents.iter().map(|a| Tid(a.tid)).collect();
        flush::arrived(
            &self.task,
            session.guardian(),
            (NOOP_MARKER, self.r2),
            &agents,
            PATIENCE,
        )
    }

    fn send(
        &mut self,
        session: &mut Session,
        tracker: &mut Tracker,
        sender: &ImageSender,
    ) -> Result<()> {
        // Where the tracker could be started it may have children.
        if tracker.why_not().is_none() {
            session.want_heirs();
        }
        session.look(sender)?;
        let captured = self
            .task
            .capture(session, &mut self.client, sender, Entry::vanishes)?;
        (self.has_entries, self.seen) = (captured.has_entries, captured.seen);
        self.mailbox.clone_from(&captured.task.mailbox);
        session.set_pvm(captured.task);
        session.hang_up(self.task.connection.task_end()?);
        let (runs, _) = session.changes(tracker, sender)?;
        sender.populated(SPACE, &runs)?;
        self.moved.rounds += 1;
        let manifest = session.manifest()?;
        sender.finish(&manifest)?;
        // It is being rebuilt meanwhile.
        sender.changed_flags(&session.changed_flags(&manifest)?)
    }

    /// Has it decided that the task goes. From the question on the task may be as good as gone, so it must not go on
    /// by itself if we die: it stops then, until whoever knows ends it, or lets it go on.
    fn commit(&self, link: &mut Link) -> Result<()> {
        let signal = |signal: Signal| kill(Pid::from_raw(self.job.pid), signal);
        signal(Signal::SIGSTOP).context("stopping the task")?;
        let Err(e) = link.commit(self.r2) else {
            return Ok(());
        };
        // The agent may have decided it and died. Nobody decides it any more.
        if table::decided(&self.task.block.table_path()?, self.job.v, self.r2)? {
            return Ok(());
        }
        signal(Signal::SIGCONT).context("letting the task go on")?;
        Err(e)
    }

    /// Behind the decision.
    ///
    /// # Errors
    /// When what the task was to become has ended: it is as it was, and is let go on when `session` is dropped.
    fn finish(&mut self, link: &mut Link, mut session: Session, stopped: Instant) -> Result<()> {
        let late = match self.collects {
            true => self.pass_on(link, &session),
            false => Ok(()),
        };
        let mut warn = |what: &str, e: anyhow::Error| {
            self.moved.warnings.push(format!("{what}: {e:#}"));
        };
        if let Err(e) = late {
            warn("what others print, which it collects", e);
        }
        let (r1, r2) = (Tid(self.job.r1), Tid(self.r2));
        if self.has_entries
            && let Err(e) = agent::hand_over_mailbox(&mut self.client, r1, r2)
        {
            warn("the task's entries of the mailbox", e);
        }
        // Without our own pvmd this host is none of the virtual machine: the task is what that has elsewhere.
        if agent::until_known(&mut self.client, r2).unwrap_or(false) {
            let left = !self.client.has_host(r2).unwrap_or(true);
            self.take_back(link);
            let go_on = kill(Pid::from_raw(self.job.pid), Signal::SIGCONT);
            go_on.context("letting the task go on")?;
            match (left, &self.job.to.name) {
                (true, name) => bail!("{name} has left the virtual machine"),
                (false, name) => bail!("what was to become the task ended, on {name}"),
            }
        }
        let heirs = session.heirs();
        if let Err(e) = session.end(After::Kill) {
            // It has not gone on: it was told to stop.
            let _ = kill(Pid::from_raw(self.job.pid), Signal::SIGKILL);
            warn("ending the task here", e);
        }
        let id = self.job.id.clone();
        let running = link.ask(&self.job.to, Request::Running { id }, PATIENCE);
        self.moved.blackout_us = stopped.elapsed().as_micros() as u64;
        heirs.into_iter().for_each(Snapshot::abandon);
        if let Err(e) = running {
            warn("waiting for it to run", e);
        }
        if let Err(e) = self.settle(link, true) {
            self.moved.warnings.push(format!(
                "opening the gates, which will open later by themselves: {e:#}"
            ));
        }
        Ok(())
    }

    /// What has gone to the new incarnation already is the old one's again, as far as it is not lost with it.
    fn take_back(&mut self, link: &mut Link) {
        let (r1, r2) = (Tid(self.job.r1), Tid(self.r2));
        if self.collects {
            let redirect = Request::Redirect {
                v: self.job.v,
                r: r1.0,
            };
            let _ = link.ask_all(&self.agents, &redirect, PATIENCE);
        }
        if self.has_entries {
            let _ = agent::hand_over_mailbox(&mut self.client, r2, r1);
        }
        // Entries that vanished with it.
        for e in std::mem::take(&mut self.mailbox) {
            let (class, message) = (&e.class, &e.message.0);
            let there = self.client.mailbox_get(class, e.index);
            if there.is_ok_and(|there| there.is_none()) {
                let _ = (self.client).mailbox_put(r1, class, e.index, e.flags, message);
            }
        }
    }

    /// Of what others print nothing may come here any more when the task ends, and what has come since it was looked at
    /// goes after it.
    fn pass_on(&mut self, link: &mut Link, session: &Session) -> Result<()> {
        let (r1, r2) = (Tid(self.job.r1), Tid(self.r2));
        let redirect = Request::Redirect {
            v: self.job.v,
            r: r2.0,
        };
        let (mut ended, mut kept) = (Vec::new(), Vec::new());
        for answer in link.ask_all(&self.agents, &redirect, PATIENCE)? {
            if let Answer::Redirected { tids, left } = answer {
                ended.extend(tids);
                kept.extend(left);
            }
        }
        // No other marker that came to this incarnation had its own number.
        let marker = Request::Marker {
            r: r1.0,
            number: r1.0,
        };
        link.ask_all(&self.agents, &marker, PATIENCE)?;
        let agents: Vec<Tid> = self.agents.iter().map(|a| Tid(a.tid)).collect();
        let marked = (NOOP_MARKER, r1.0);
        let _raised = flush::arrived(&self.task, session.guardian(), marked, &agents, PATIENCE)?;
        let there = self.task.connection.unread(session.guardian())?;
        let late = there.get(self.seen..).unwrap_or_default();
        let mut assembler = Assembler::new(late.len());
        assembler.push(late);
        while let Some(message) = assembler.message()? {
            let noop = (message.ctx, message.tag) == (CTX_TC as u32, tc::NOOP);
            // It is none: pvmd says so to whoever it was told not to send to any more.
            let mut says = message.reader();
            if says.uint().is_ok_and(|tid| ended.contains(&tid)) && says.int().ok() == Some(0) {
                continue;
            }
            if message.src.is_pvmd() && message.ctx != CTX_TM as u32 && !noop {
                self.client.pass_on(r2, message, WAIT_ID_LATE)?;
            }
        }
        // The end of this incarnation is told behind it: the answer shows that pvmd has read it.
        self.client.lives(r1)?;
        if !kept.is_empty() {
            bail!("may be lost until they next call PVM: {}", kept.join("; "));
        }
        Ok(())
    }

    /// Tells all agents what came of it.
    fn settle(&mut self, link: &mut Link, moved: bool) -> Result<()> {
        let outcome = Outcome {
            id: self.job.id.clone(),
            v: self.job.v,
            from: self.job.r1,
            next: self.r2,
            moved,
            restored: false,
        };
        let told = Request::Settle(outcome.clone());
        match link.ask_all(&self.agents, &told, PATIENCE) {
            Ok(_) => Ok(()),
            // Our agent has ended, or another.
            Err(_) => agent::settle(&mut self.client, &outcome),
        }
    }

    /// Everything as it was before. The task runs already.
    fn undo(&mut self, link: &mut Link) -> Result<()> {
        let mut first = Ok(());
        if self.closed {
            first = self.settle(link, false);
        }
        if self.landed {
            let abandon = Request::Abandon {
                id: self.job.id.clone(),
                r: self.r2,
            };
            // When its agent has ended it finds out by itself.
            let _ = link.ask(&self.job.to, abandon, PATIENCE);
        }
        first
    }
}

/// Where the lander listens.
fn address(host: &Peer, port: u16) -> Result<SocketAddr> {
    let name = &host.name;
    let mut found = (name.as_str(), port)
        .to_socket_addrs()
        .with_context(|| format!("cannot look up the address of host {name}"))?;
    found
        .find(SocketAddr::is_ipv4)
        .ok_or_else(|| anyhow!("host {name} has no address"))
}
