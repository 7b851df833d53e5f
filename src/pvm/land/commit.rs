//! Never both, never neither: when the new incarnation may run.
//!
//! A move is over when it is decided and pvmd says that the old incarnation has ended. The notice comes in the task's own
//! connection, behind what is unread there, and stays in it: libpvm discards it unseen. That it is decided the mover has us
//! told meanwhile: without it the task may have been let go on, and have come to its end. When either does not come in time,
//! or nobody is left who would tell, the agent of the host that the task leaves is asked what is decided. A notice that
//! comes only because our pvmd takes that host for dead proves nothing: the master's knows (see [`agent::has_gone`]).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::Agent;
use super::protocol::{Commit, ToLander};
use crate::kernel::{fds, sockopt};
use crate::pvm::capture::Fragment;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::tid::Tid;
use crate::pvm::{agent, local};

const CONNECTION: u64 = 0;
const AGENT: u64 = 1;
const PARKED: u64 = 2;

/// The task's connection, and what was put into it.
pub struct Waiting<'a> {
    pub connection: BorrowedFd<'a>,
    /// Bytes in it before what pvmd says of the move.
    pub before: usize,
    pub pvmd: &'a Pvmd,
    /// The task, and this incarnation of it.
    pub v: u32,
    pub r: Tid,
    /// The process, where others than its tracer wait: it may end meanwhile, and an agent may know that it may run, too. What
    /// pvmd says it reads then itself, and nobody else does.
    pub parked: Option<&'a Parked>,
}

/// A process that waits where others than its tracer decide.
#[derive(Debug)]
pub struct Parked {
    pub pid: i32,
    pub process: OwnedFd,
}

/// What one may do with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Go {
    /// Let it run.
    Now,
    /// Nothing: somebody else has let it run.
    Already,
}

impl Parked {
    /// Whether it runs. Looks twice: on its way into a stop it runs, too, with no signal pending any more.
    pub fn runs(&self) -> bool {
        const MOMENT: Duration = Duration::from_millis(20);
        local::runs(self.pid) && {
            std::thread::sleep(MOMENT);
            local::runs(self.pid)
        }
    }
}

/// Who it is that pvmd says has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Said {
    Task,
    /// The host: of its tasks our pvmd knows nothing.
    Host,
    /// What stands there makes no sense: somebody reads it. The task runs.
    Runs,
}

/// How long it may take until we are told that it was decided, when the old incarnation has ended.
const TOLD: Duration = Duration::from_millis(100);

/// How often it is asked what is decided.
const ASK_AGAIN: Duration = Duration::from_millis(500);

impl Waiting<'_> {
    /// Returns when the task may run.
    ///
    /// # Errors
    /// When it must not.
    pub fn until(&self, commit: &Commit, agent: Option<&mut Agent>) -> Result<Go> {
        match (commit, agent) {
            (Commit::WhenTold, None) => Ok(Go::Now),
            (Commit::WhenTold, Some(agent)) => match agent.hear()? {
                Some(ToLander::Run) => Ok(Go::Now),
                Some(other) => bail!("the agent has called it off ({other:?})"),
                None => bail!("the agent is gone, and has not said that the task may run"),
            },
            (Commit::WhenEnded { r1, lease_ms }, agent) => {
                self.until_ended(Tid(*r1), Duration::from_millis(*lease_ms), agent)
            }
        }
    }

    fn until_ended(&self, r1: Tid, lease: Duration, mut agent: Option<&mut Agent>) -> Result<Go> {
        let until = Instant::now() + lease;
        let (mut host_lost, mut decided, mut ended) = (false, false, false);
        let mut ask_at = if agent.is_some() {
            until
        } else {
            Instant::now()
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create")?;
        // Told of what comes, not of what is there.
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, CONNECTION);
        epoll.add(self.connection, event).context("epoll_ctl")?;
        if let Some(agent) = &agent {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, AGENT);
            epoll
                .add(agent.reader.get_ref(), event)
                .context("epoll_ctl")?;
        }
        if let Some(parked) = self.parked {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, PARKED);
            epoll.add(&parked.process, event).context("epoll_ctl")?;
        }
        loop {
            match self.says(r1)? {
                Some(Said::Runs) => return Ok(Go::Already),
                Some(Said::Task) if decided => return Ok(Go::Now),
                Some(Said::Task) if !ended => {
                    ended = true;
                    ask_at = Instant::now() + agent.as_ref().map_or(Duration::ZERO, |_| TOLD);
                }
                Some(Said::Host) if !host_lost => (host_lost, ask_at) = (true, Instant::now()),
                _ => {}
            }
            let left = ask_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                if self.parked.is_some_and(Parked::runs) {
                    return Ok(Go::Already);
                }
                let asked = match host_lost {
                    true => self.has_gone(r1),
                    false => self.inquire(r1),
                };
                // That took its time.
                self.listen(r1, &mut agent, &epoll, &mut decided)?;
                match asked {
                    Ok(Some(true)) if host_lost => return Ok(Go::Now),
                    Ok(_) if host_lost => {}
                    Ok(Some(false)) if !decided => match self.says(r1)? {
                        None => bail!(
                            "the move has failed: {r1} still runs where it was, and goes on there"
                        ),
                        Some(Said::Task) => {
                            bail!("the move has failed: {r1} has ended before it was decided")
                        }
                        Some(Said::Host | Said::Runs) => {}
                    },
                    // The notice comes.
                    Ok(Some(true)) => decided = true,
                    Ok(_) => {}
                    // Nothing comes from a pvmd that is no more. (Its end of the connection is ours, too: that says
                    // nothing.)
                    Err(_)
                        if self.pvmd.is_dead().unwrap_or(false)
                            && matches!(self.says(r1)?, None | Some(Said::Host)) =>
                    {
                        bail!(
                            "its pvmd has ended, and has not said that {r1} has: that goes on where it was"
                        )
                    }
                    // The lease has ended, and there is nobody to ask: who lives is the task. A pvmd that does not answer
                    // is taken for dead in the end.
                    Err(e) if Instant::now() > until && !host_lost => match self.has_gone(r1) {
                        Ok(Some(true)) => return Ok(Go::Now),
                        Ok(Some(false)) => {
                            return Err(e.context(format!(
                                "{r1} still runs where it was when the lease ended, and nobody tells what is decided"
                            )));
                        }
                        Ok(None) | Err(_) => {}
                    },
                    Err(_) => {}
                }
                ask_at = Instant::now() + ASK_AGAIN;
                continue;
            }
            let ms = left.as_micros().div_ceil(1000).min(60_000) as u16;
            let mut events = [EpollEvent::empty(); 3];
            let count = match epoll.wait(&mut events, PollTimeout::from(ms)) {
                Err(Errno::EINTR) => continue,
                other => other.context("epoll_wait")?,
            };
            if events.iter().take(count).any(|e| e.data() == PARKED) {
                bail!("the parked task has ended");
            }
            if events.iter().take(count).any(|e| e.data() == AGENT) {
                self.listen(r1, &mut agent, &epoll, &mut decided)?;
                if agent.is_none() {
                    ask_at = Instant::now();
                }
            }
        }
    }

    /// Hears what the agent has said already: that it is decided, or called off. One that has gone is none any more.
    fn listen(
        &self,
        r1: Tid,
        agent: &mut Option<&mut Agent>,
        epoll: &Epoll,
        decided: &mut bool,
    ) -> Result<()> {
        while let Some(line) = agent {
            let mut fds = [PollFd::new(
                line.reader.get_ref().as_fd(),
                PollFlags::POLLIN,
            )];
            if line.reader.buffer().is_empty() && poll(&mut fds, PollTimeout::ZERO) == Ok(0) {
                break;
            }
            match line.hear() {
                // What is over is over.
                Ok(Some(ToLander::Abandon)) if !*decided || self.says(r1)? != Some(Said::Task) => {
                    bail!("the agent has called it off")
                }
                Ok(Some(ToLander::Run)) => *decided = true,
                Ok(Some(_)) => {}
                // Nobody would tell us.
                Ok(None) | Err(_) => {
                    epoll.delete(line.reader.get_ref()).context("epoll_ctl")?;
                    *agent = None;
                }
            }
        }
        Ok(())
    }

    /// What the connection says of `r1`'s end.
    fn says(&self, r1: Tid) -> Result<Option<Said>> {
        match self.stands_there(r1) {
            // Of one that is parked nobody reads.
            Err(_) if self.parked.is_some() => Ok(Some(Said::Runs)),
            said => said,
        }
    }

    fn stands_there(&self, r1: Tid) -> Result<Option<Said>> {
        let bytes = behind(self.connection, self.before)?;
        let mut rest = bytes.as_slice();
        let mut said = None;
        while let Some(fragment) = Fragment::take(&mut rest)? {
            match fragment.notice() {
                Some(tid) if tid == r1 => return Ok(said.or(Some(Said::Task))),
                Some(tid) if tid == r1.host() => said = Some(Said::Host),
                _ => {}
            }
        }
        Ok(said)
    }

    /// Asks whether it has gone, by a connection of its own, too.
    fn has_gone(&self, r1: Tid) -> Result<Option<bool>> {
        let mut client = Client::enrol(self.pvmd, 0)?;
        let gone = agent::has_gone(&mut client, r1);
        let _ = client.exit();
        gone
    }

    /// Asks what is decided, by a connection of its own, for in the task's the answers would stand.
    fn inquire(&self, r1: Tid) -> Result<Option<bool>> {
        let mut client = Client::enrol(self.pvmd, 0)?;
        let fate = agent::inquire(&mut client, self.v, r1, self.r);
        // It has been asked.
        let _ = client.exit();
        fate
    }
}

/// What stands in a connection behind so many bytes.
fn behind(connection: BorrowedFd<'_>, before: usize) -> Result<Vec<u8>> {
    let there = fds::readable(connection).context("FIONREAD")?;
    ensure!(there >= before, "somebody reads from the task's connection");
    if there == before {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; there - before];
    let set = |offset: i32| {
        sockopt::set_int(connection, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
            .context("SO_PEEK_OFF")
    };
    set(before as i32)?;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let got = recv(connection.as_raw_fd(), &mut bytes, flags);
    set(-1)?;
    bytes.truncate(got.context("looking at the connection to the pvmd")?);
    Ok(bytes)
}

/// How many bytes of a connection end with `mark`: `at_least` so many, but its pvmd may have written before it.
///
/// # Errors
/// When it is not there.
pub fn end_of(mark: &[u8], connection: BorrowedFd<'_>, at_least: usize) -> Result<usize> {
    let from = at_least.saturating_sub(mark.len());
    let bytes = behind(connection, from)?;
    let at = bytes.windows(mark.len()).position(|part| part == mark);
    let at = at.context("what was put into the connection is not there")?;
    Ok(from + at + mark.len())
}
