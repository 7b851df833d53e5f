//! Movers of this host: starting them, passing on what they ask, and what is to be done when one dies.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use pvm_abi::table::State;

use super::control::{Answer, Peer, Request, What};
use super::lines::Lines;
use super::{Agent, Asker, Ticket, no_task};
use crate::error::Failure;
use crate::kernel::pidfd;
use crate::pvm::mover::protocol::{FromMover, Job, ToMover};
use crate::pvm::tid::Tid;

/// A mover, or what is left to be done of one that has died.
struct Move {
    line: Lines,
    pid: i32,
    job: Job,
    /// The task's process.
    task: OwnedFd,
    /// Who wants to know.
    ticket: Option<Ticket>,
    /// Set when the decision has been made: the task is to run as this incarnation.
    committed: Option<u32>,
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
        if to.host == self.own.host().0 {
            return refuse(format!("task {} is on {} already", Tid(v), to.name));
        }
        if self.moves.moves.values().any(|m| m.job.v == v) {
            return Err(Failure::Busy.because(format!("task {} is moving already", Tid(v))));
        }
        if let Some(entry) = self.table.entry(v) {
            match entry.state {
                State::Hidden => return refuse(format!("{} is an agent of mist's", Tid(v))),
                State::Moving => {
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
        let number = self.moves.next;
        self.moves.next += 1;
        let job = Job {
            // Of this virtual machine no two are the same: tids are not given twice, agents neither.
            id: format!("{:x}-{:x}-{number}", self.own.0, v),
            number: number as u32,
            v,
            r1: r1.0,
            pid,
            to,
            agents,
        };
        let mover = self.start_mover(job, ticket)?;
        self.moves.moves.insert(number, mover);
        Ok(())
    }

    fn start_mover(&self, job: Job, ticket: Ticket) -> Result<Move> {
        let task = pidfd::open(job.pid)?;
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        let own = std::env::current_exe().context("cannot tell where mistctl is")?;
        let child = Command::new(&own)
            .arg("mover")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .with_context(|| format!("cannot start {}", own.display()))?;
        let mut line = Lines::new(ours)?;
        line.say(&ToMover::Job(job.clone()))?;
        Ok(Move {
            line,
            pid: child.id() as i32,
            job,
            task,
            ticket: Some(ticket),
            committed: None,
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
                if Tid(to) == self.own {
                    return self.request(ticket, request);
                }
                self.relay(ticket, Tid(to), request)
            }
            FromMover::Commit { r2 } => {
                if let Some(mover) = self.moves.moves.get_mut(&number) {
                    mover.committed = Some(r2);
                    let _ = mover.line.say(&ToMover::GoOn);
                }
                Ok(())
            }
            FromMover::Done(moved) => {
                let done = self.moves.moves.remove(&number);
                match done.and_then(|m| m.ticket) {
                    Some(ticket) => self.answer(ticket, Ok(Answer::Moved(moved))),
                    None => Ok(()),
                }
            }
            FromMover::Failed(failed) => {
                let done = self.moves.moves.remove(&number);
                match done.and_then(|m| m.ticket) {
                    Some(ticket) => self.pass_on(ticket, What::Failed(failed)),
                    None => Ok(()),
                }
            }
        }
    }

    /// A mover has died. Before its decision the task stays here, afterwards it goes.
    fn resolve(&mut self, gone: Move) -> Result<()> {
        let nobody = Ticket {
            asker: Asker::Nobody,
            id: 0,
        };
        let job = &gone.job;
        let why = match gone.committed {
            None => {
                self.relay(
                    nobody,
                    Tid(job.to.tid),
                    Request::Abandon { id: job.id.clone() },
                )?;
                let open = Request::OpenGate {
                    v: job.v,
                    r: job.r1,
                };
                self.tell_all(&job.agents, &open)?;
                format!(
                    "the mover has died; task {} runs on {} as before",
                    Tid(job.v),
                    self.host
                )
            }
            Some(r2) => {
                // It may have done it already. What is left is the gates: each agent opens its own when the lease
                // has ended, for who lives then; this is only sooner.
                match pidfd::send_signal(gone.task.as_fd(), Signal::SIGKILL as i32) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(e) => return Err(e).context("cannot end a task that has moved"),
                }
                let ticket = Ticket {
                    asker: Asker::Landed { v: job.v, r2 },
                    id: 0,
                };
                self.gates_left.insert(job.v, job.agents.clone());
                let ask = Request::Running { id: job.id.clone() };
                self.relay(ticket, Tid(job.to.tid), ask)?;
                format!(
                    "the mover has died when task {} had left: it goes on, on {}",
                    Tid(job.v),
                    job.to.name
                )
            }
        };
        match gone.ticket {
            Some(ticket) => self.answer(ticket, Err(anyhow!(why))),
            None => Ok(()),
        }
    }

    /// Asks something of all agents, ourselves too, and does not wait for their answers.
    pub(super) fn tell_all(&mut self, agents: &[Peer], request: &Request) -> Result<()> {
        let nobody = Ticket {
            asker: Asker::Nobody,
            id: 0,
        };
        for agent in agents {
            if Tid(agent.tid) == self.own {
                self.request(nobody, request.clone())?;
            } else {
                self.relay(nobody, Tid(agent.tid), request.clone())?;
            }
        }
        Ok(())
    }
}
