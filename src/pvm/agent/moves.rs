//! Movers of this host: starting them, passing on what they ask, and what is to be done when one dies.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pvm_abi::table::{Entry, State};

use super::control::{Answer, Failed, Outcome, Peer, Request, What};
use super::lines::Lines;
use super::{Agent, Asker, OWN, Ticket, no_task};
use crate::error::Failure;
use crate::kernel::pidfd;
use crate::pvm::local;
use crate::pvm::mover::protocol::{FromMover, Job, ToMover};
use crate::pvm::tid::Tid;

/// A mover, or what is left to be done of one that has died.
struct Move {
    line: Lines,
    pid: i32,
    job: Job,
    /// Who wants to know.
    ticket: Option<Ticket>,
    /// The incarnation it is to become, once there is one.
    next: u32,
    /// Somebody wants the task to stay.
    called_off: bool,
}

/// All of them.
#[derive(Default)]
pub struct Moves {
    moves: HashMap<u64, Move>,
    next: u64,
}

impl Moves {
    pub fn poll<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        for mover in self.moves.values() {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, mover.line.is_full());
            if !mover.line.has_ended() {
                fds.push(PollFd::new(mover.line.as_fd(), flags));
            }
        }
    }

    /// Whether there is one.
    pub fn any(&self) -> bool {
        !self.moves.is_empty()
    }

    pub fn answer(&mut self, number: u64, id: u64, what: What) {
        if let Some(mover) = self.moves.get_mut(&number) {
            // If it has gone, its end is noticed elsewhere.
            let _ = mover.line.say(&ToMover::Answer { id, what });
        }
    }

    /// A child has ended: the end of its line is what counts.
    pub fn ended(&mut self, pid: i32) {
        for mover in self.moves.values_mut().filter(|mover| mover.pid == pid) {
            mover.pid = 0;
        }
    }
}

impl Agent {
    pub(super) fn migrate(
        &mut self,
        ticket: Ticket,
        tid: u32,
        to: &str,
        agents: Vec<Peer>,
    ) -> Result<()> {
        let v = self.table.v_of(tid);
        let r1 = Tid(self.table.r_of(v));
        let refuse = |why: String| Err(Failure::Refused.because(why));
        if r1.host() != self.own.host() {
            return Err(no_task(Tid(tid), &self.host));
        }
        let Some(to) = agents.iter().find(|agent| agent.name == to) else {
            return refuse(format!("there is no host {to} in the virtual machine"));
        };
        let to = to.clone();
        if self.moves.moves.values().any(|m| m.job.v == v) {
            return Err(Failure::Busy.because(format!("task {} is moving already", Tid(v))));
        }
        if let Some(entry) = self.table.entry(v) {
            match entry.state {
                State::Hidden => return refuse(format!("{} is an agent of mist's", Tid(v))),
                _ if entry.is_away() => {
                    return Err(Failure::NoSuchProcess.because(format!(
                        "task {} is away: it was saved, and has ended; restore it there: `mistctl ps` names its image, \
                         `mistctl restore IMAGE --host {}`",
                        Tid(v),
                        to.name
                    )));
                }
                State::Moving | State::Decided => {
                    return Err(Failure::Busy.because(format!(
                        "what became of the last move of task {} is not clear yet; try again in a while",
                        Tid(v)
                    )));
                }
                State::Settled => {}
            }
        }
        let tasks = self.tasks()?;
        let task = tasks.iter().find(|task| task.tid == r1);
        let pid = task.ok_or_else(|| no_task(Tid(tid), &self.host))?.pid;
        if to.host == self.own.host().0 {
            return refuse(format!("task {} is on {} already", Tid(v), to.name));
        }
        let number = self.moves.next;
        self.moves.next += 1;
        let job = Job {
            // Of this virtual machine no two are the same: tids are not given twice, agents neither.
            id: format!("{:x}-{:x}-{number}", self.own.0, v),
            v,
            r1: r1.0,
            pid,
            to,
            agents,
            hashes: self.hashes.clone(),
        };
        let mover = self.start_mover(job, ticket)?;
        self.moves.moves.insert(number, mover);
        Ok(())
    }

    fn start_mover(&self, job: Job, ticket: Ticket) -> Result<Move> {
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        let child = Command::new(OWN)
            .arg("mover")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .context("cannot start a mover")?;
        let mut line = Lines::new(ours)?;
        line.say(&ToMover::Job(job.clone()))?;
        Ok(Move {
            line,
            pid: child.id() as i32,
            job,
            ticket: Some(ticket),
            next: 0,
            called_off: false,
        })
    }

    pub(super) fn serve_movers(&mut self) -> Result<()> {
        let numbers: Vec<u64> = self.moves.moves.keys().copied().collect();
        for number in numbers {
            while let Some(said) = self.hear_mover(number) {
                self.mover_says(number, said)?;
            }
            let ended = |m: &Move| m.line.has_ended();
            if self.moves.moves.get(&number).is_some_and(ended)
                && let Some(gone) = self.moves.moves.remove(&number)
            {
                self.resolve(gone)?;
            }
        }
        Ok(())
    }

    fn hear_mover(&mut self, number: u64) -> Option<FromMover> {
        let mover = self.moves.moves.get_mut(&number)?;
        let heard = mover
            .line
            .flush()
            .and_then(|()| mover.line.fill())
            .and_then(|()| mover.line.hear());
        match heard {
            Ok(said) => said,
            Err(_) => {
                mover.line.end();
                None
            }
        }
    }

    fn mover_says(&mut self, number: u64, said: FromMover) -> Result<()> {
        match said {
            FromMover::Ask { id, to, request } => {
                let ticket = Ticket {
                    asker: Asker::Mover(number),
                    id,
                };
                if let Request::CloseGate { next, .. } = request
                    && let Some(mover) = self.moves.moves.get_mut(&number)
                {
                    mover.next = next;
                }
                if Tid(to) == self.own {
                    return self.request(ticket, request);
                }
                self.relay(ticket, Tid(to), request)
            }
            FromMover::Hashed { hashes } => {
                self.hashes.learn(hashes);
                Ok(())
            }
            FromMover::Commit { r2 } => {
                if let Some(mover) = self.moves.moves.get_mut(&number) {
                    // Whoever of us ends from here on: the table says it.
                    let decided = !mover.called_off && self.table.decide(mover.job.v, r2)?;
                    let _ = mover.line.say(&match decided {
                        true => ToMover::GoOn,
                        false => ToMover::GoBack,
                    });
                }
                Ok(())
            }
            FromMover::Done(moved) => match self.moves.moves.remove(&number) {
                Some(done) => {
                    self.left_over(&done)?;
                    self.tell_asker(done.ticket, What::Answer(Answer::Moved(moved)))
                }
                None => Ok(()),
            },
            FromMover::Failed(mut failed) => match self.moves.moves.remove(&number) {
                Some(done) => {
                    self.left_over(&done)?;
                    // Whatever the mover has met then: it says that the process runs on, which as a task it does not.
                    if failed.failure != Failure::NoSuchProcess.name()
                        && self.tasks()?.iter().all(|task| task.tid.0 != done.job.r1)
                    {
                        let v = Tid(done.job.v);
                        let why = format!(
                            "task {v} has left the virtual machine before it was moved; nothing was done to its process"
                        );
                        failed = Failed::of(&Failure::NoSuchProcess.because(why));
                    }
                    self.tell_asker(done.ticket, What::Failed(failed))
                }
                None => Ok(()),
            },
        }
    }

    fn tell_asker(&mut self, ticket: Option<Ticket>, what: What) -> Result<()> {
        match ticket {
            Some(ticket) => self.pass_on(ticket, what),
            None => Ok(()),
        }
    }

    /// Calls a move off, unless it is decided; true if it was in time, none when there is none. The mover is killed: it may
    /// be waiting for a slow link, and its death leaves the task as it was (see [`Agent::resolve`]).
    pub(super) fn call_off(&mut self, tid: u32) -> Option<bool> {
        let v = self.table.v_of(tid);
        let moves = |m: &&mut Move| m.job.v == v && !m.line.has_ended();
        let mover = self.moves.moves.values_mut().find(moves)?;
        let decided = |entry: Entry| entry.state == State::Decided;
        if self.table.entry(v).is_some_and(decided) {
            return Some(false);
        }
        mover.called_off = true;
        // Until it is waited for, which sets the pid to 0, it is nobody else's.
        if mover.pid != 0 {
            let _ = kill(Pid::from_raw(mover.pid), Signal::SIGKILL);
        }
        Some(true)
    }

    /// A mover has died. Before its decision the task stays here, afterwards it goes.
    fn resolve(&mut self, gone: Move) -> Result<()> {
        let (v, next) = (gone.job.v, gone.next);
        let moved = self.fate(v, next) == Some(true);
        let why = match moved {
            true => format!(
                "the mover has died when it was decided that task {} goes to {}: `mistctl ps` shows it there, or here if \
                 what it was to become there has ended",
                Tid(v),
                gone.job.to.name
            ),
            false => format!(
                "{}; task {} runs on {} as before",
                match gone.called_off {
                    true => "the move is called off",
                    false => "the mover has died",
                },
                Tid(v),
                self.host
            ),
        };
        self.conclude(gone.outcome(moved))?;
        self.tell_asker(gone.ticket, What::Failed(Failed::of(&anyhow!(why))))
    }

    /// What a mover could not do before it ended.
    fn left_over(&mut self, done: &Move) -> Result<()> {
        let closed = |entry: &Entry| entry.state.is_closed() && entry.next == done.next;
        if !self.table.entry(done.job.v).as_ref().is_some_and(closed) {
            return Ok(());
        }
        let moved = self.fate(done.job.v, done.next) == Some(true);
        self.conclude(done.outcome(moved))
    }

    /// Whether a task of this host goes on as `next`; none while its mover may still decide.
    pub(super) fn fate(&self, v: u32, next: u32) -> Option<bool> {
        let entry = self.table.entry(v);
        match entry {
            // It may be on its way again.
            Some(entry) if entry.r == next => Some(true),
            Some(entry) if entry.state == State::Decided && entry.next == next => Some(true),
            _ if (self.moves.moves.values()).any(|m| m.job.v == v && !m.line.has_ended()) => None,
            _ => Some(false),
        }
    }

    /// Ends a move that has no mover any more: here, and then everywhere.
    pub(super) fn conclude(&mut self, outcome: Outcome) -> Result<()> {
        if !outcome.moved {
            // The mover had it stop in case that it dies (see `crate::pvm::mover`).
            let stopped = self.tasks()?.into_iter().find(|t| t.tid.0 == outcome.from);
            if let Some(task) = stopped
                && local::stands(task.pid)
            {
                let _ = pidfd::open(task.pid)
                    .map(|task| pidfd::send_signal(task.as_fd(), Signal::SIGCONT as i32));
            }
            self.settle(&outcome)?;
        }
        self.tell(outcome)
    }

    /// Has everybody told what came of a move, by a child: that takes its time.
    pub(super) fn tell(&mut self, outcome: Outcome) -> Result<()> {
        let json = serde_json::to_string(&outcome).context("JSON")?;
        match self.start_helper(&["agent", "--settle", &json]) {
            Ok(pid) => drop(self.settling.insert(pid, outcome)),
            // Others find out by themselves, as soon as one of the two incarnations has ended.
            Err(e) => eprintln!("mistctl: {e:#}"),
        }
        Ok(())
    }
}

impl Move {
    fn outcome(&self, moved: bool) -> Outcome {
        Outcome {
            id: self.job.id.clone(),
            v: self.job.v,
            from: self.job.r1,
            next: self.next,
            moved,
            restored: false,
        }
    }
}
