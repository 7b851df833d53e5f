//! Never both, never neither: when the new incarnation may run.
//!
//! A move is committed when pvmd says that the old incarnation has ended. The notice comes in the task's own
//! connection, behind what is unread there, and stays in it: libpvm discards it unseen. When it does not come in time,
//! or nobody is left who would tell, the agent of the host that the task leaves is asked what is decided. A notice that
//! comes only because our pvmd takes that host for dead proves nothing: the master's knows (see [`agent::has_gone`]).

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};
use pvm_abi::CTX_TC;

use super::Agent;
use super::protocol::{Commit, ToLander};
use crate::kernel::{fds, sockopt};
use crate::pvm::agent;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::tid::Tid;
use crate::pvm::wire::{Assembler, tc};

const CONNECTION: u64 = 0;
const AGENT: u64 = 1;
const PARKED: u64 = 2;

/// The task's connection, and what was put into it.
pub struct Waiting<'a> {
    pub connection: BorrowedFd<'a>,
    /// Bytes in it before anything of pvmd's.
    pub before: usize,
    pub pvmd: &'a Pvmd,
    /// The task, and this incarnation of it.
    pub v: u32,
    pub r: Tid,
}

/// Who it is that pvmd says has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Said {
    Task,
    /// The host: of its tasks our pvmd knows nothing.
    Host,
}

/// How often it is asked what is decided.
const ASK_AGAIN: Duration = Duration::from_millis(500);

impl Waiting<'_> {
    /// Returns when the task may run. `parked` is it, where others than its tracer wait: it may end meanwhile.
    ///
    /// # Errors
    /// When it must not.
    pub fn until(
        &self,
        commit: &Commit,
        agent: Option<&mut Agent>,
        parked: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        match (commit, agent) {
            (Commit::WhenTold, None) => Ok(()),
            (Commit::WhenTold, Some(agent)) => match agent.hear()? {
                Some(ToLander::Run) => Ok(()),
                Some(other) => bail!("the agent has called it off ({other:?})"),
                None => bail!("the agent is gone, and has not said that the task may run"),
            },
            (Commit::WhenEnded { r1, lease_ms }, agent) => {
                self.until_ended(Tid(*r1), Duration::from_millis(*lease_ms), agent, parked)
            }
        }
    }

    fn until_ended(
        &self,
        r1: Tid,
        lease: Duration,
        mut agent: Option<&mut Agent>,
        parked: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let until = Instant::now() + lease;
        let mut host_lost = false;
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
        if let Some(parked) = parked {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, PARKED);
            epoll.add(parked, event).context("epoll_ctl")?;
        }
        loop {
            match self.says(r1)? {
                Some(Said::Task) => return Ok(()),
                Some(Said::Host) if !host_lost => (host_lost, ask_at) = (true, Instant::now()),
                _ => {}
            }
            let left = ask_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let asked = match host_lost {
                    true => self.has_gone(r1),
                    false => self.inquire(r1),
                };
                match asked {
                    Ok(Some(true)) if host_lost => return Ok(()),
                    Ok(_) if host_lost => {}
                    Ok(Some(false)) if self.says(r1)?.is_none() => bail!(
                        "the move has failed: {r1} still runs where it was, and goes on there"
                    ),
                    // The notice comes, or there is no decision yet.
                    Ok(_) => {}
                    // Nothing comes from a pvmd that is no more. (Its end of the connection is ours, too: that says
                    // nothing.)
                    Err(_)
                        if self.pvmd.is_dead().unwrap_or(false)
                            && self.says(r1)? != Some(Said::Task) =>
                    {
                        bail!(
                            "its pvmd has ended, and has not said that {r1} has: that goes on where it was"
                        )
                    }
                    // The lease has ended, and there is nobody to ask: who lives is the task. A pvmd that does not answer
                    // is taken for dead in the end.
                    Err(e) if Instant::now() > until && !host_lost => match self.has_gone(r1) {
                        Ok(Some(true)) => return Ok(()),
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
            let told = events.iter().take(count).any(|e| e.data() == AGENT);
            if let Some(line) = agent.as_deref_mut().filter(|_| told) {
                match line.hear() {
                    // What pvmd says counts more.
                    Ok(Some(ToLander::Abandon)) if self.says(r1)? != Some(Said::Task) => {
                        bail!("the agent has called it off")
                    }
                    Ok(Some(_)) => {}
                    // Nobody would tell us.
                    Ok(None) | Err(_) => {
                        epoll.delete(line.reader.get_ref()).context("epoll_ctl")?;
                        agent = None;
                        ask_at = Instant::now();
                    }
                }
            }
        }
    }

    /// What the connection says of `r1`'s end.
    fn says(&self, r1: Tid) -> Result<Option<Said>> {
        let there = fds::readable(self.connection).context("FIONREAD")?;
        if there <= self.before {
            return Ok(None);
        }
        let mut bytes = vec![0; there - self.before];
        let set = |offset: i32| {
            sockopt::set_int(self.connection, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
                .context("SO_PEEK_OFF")
        };
        set(self.before as i32)?;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let got = recv(self.connection.as_raw_fd(), &mut bytes, flags);
        set(-1)?;
        let got = got.context("looking at the connection to the pvmd")?;
        let mut assembler = Assembler::new(bytes.len());
        assembler.push(bytes.get(..got).unwrap_or_default());
        let mut said = None;
        while let Some(m) = assembler.message()? {
            if !m.src.is_pvmd() || (m.ctx, m.tag) != (CTX_TC as u32, tc::NOOP) {
                continue;
            }
            match m.reader().tid() {
                Ok(tid) if tid == r1 => return Ok(said.or(Some(Said::Task))),
                Ok(tid) if tid == r1.host() => said = Some(Said::Host),
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
