//! What is on its way to a task, or from it, until it is where it can be seen.
//!
//! A pvmd reads one fragment of each task in turn, so a message of somebody else's overtakes what still stands in
//! a sender's socket. What it has read, it passes on in order. So, before an agent's marker is worth
//! anything, everything that the tasks of its host had written must have been read by their pvmd.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use pvm_abi::NOOP_MARKER;

use crate::dump::{is_ending, is_over};
use crate::error::{Failure, too_many_files};
use crate::kernel::guardian::Guardian;
use crate::pvm::block::TaskBlock;
use crate::pvm::capture::{Task, fragments_of};
use crate::pvm::connection::{Connection, Daemons, PvmdEnd, Raised};
use crate::pvm::local;
use crate::pvm::tid::Tid;
use crate::pvm::wire::{Message, Reader};

/// A socket that was not seen empty for so long is that of a task that writes without pause.
const STREAMS: Duration = Duration::from_millis(20);
/// The first wait between two looks, and the longest.
const FIRST_WAIT: Duration = Duration::from_micros(200);
const LAST_WAIT: Duration = Duration::from_millis(5);

/// What the tasks of this host still have on its way to one task, whose gate is closed.
pub struct Drain {
    v: Tid,
    r: Tid,
    agent: Tid,
    number: u32,
    senders: Vec<Sender>,
    /// Tasks on their way out: without memory, and nobody can say whether their connection is closed yet.
    ending: Vec<i32>,
    /// Of tasks that have ended: their pvmd's ends.
    left_behind: Vec<PvmdEnd>,
}

/// A task of this host.
struct Sender {
    r: Tid,
    block: TaskBlock,
    connection: Connection,
    /// Since when it is not inside a send to the task, if so.
    written: Option<Instant>,
    /// It was asked for a marker of its own.
    asked: bool,
}

impl Drain {
    /// Begins with these `processes`, the tasks of this host, but without the task `v` itself, whose incarnation is `r`. To be
    /// called when its gate is closed, with those that there are then. Markers that are needed go to `agent`, with this
    /// number, which must be new to it.
    ///
    /// # Errors
    /// When their connections cannot be looked at.
    pub fn begin(processes: &[i32], v: Tid, r: Tid, agent: Tid, number: u32) -> Result<Drain> {
        let daemons = Daemons::look()?;
        let (mut senders, mut ending) = (Vec::new(), Vec::new());
        for &pid in processes {
            let block = local::enrolled(pid)?;
            let connection = match daemons.connection(pid) {
                Err(e) if too_many_files(&e) => return Err(e),
                found => found.ok().flatten(),
            };
            let tid = block.as_ref().map(TaskBlock::r);
            let (Some(block), Some(connection), Some(Ok(tid))) = (block, connection, tid) else {
                if is_ending(pid) {
                    ending.push(pid);
                }
                continue;
            };
            let tid = Tid(tid);
            if tid != r {
                senders.push(Sender {
                    r: tid,
                    block,
                    connection,
                    written: None,
                    asked: false,
                });
            }
        }
        Ok(Drain {
            v,
            r,
            agent,
            number,
            senders,
            ending,
            left_behind: daemons.left_behind()?,
        })
    }

    /// The tasks of this host, until they are through.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskBlock> {
        self.senders.iter().map(|sender| &sender.block)
    }

    /// Looks again. True when nobody of this host is inside a send to the task, and all that they had written
    /// before has been read by their pvmd.
    ///
    /// # Errors
    /// When a task's socket cannot be asked, or its memory not be written.
    pub fn look(&mut self) -> Result<bool> {
        let (v, r, agent, number) = (self.v, self.r, self.agent, self.number);
        let mut left = Vec::new();
        for mut sender in std::mem::take(&mut self.senders) {
            if !sender.done(v, r, agent, number)? {
                left.push(sender);
            }
        }
        self.senders = left;
        if !self.ending.is_empty() {
            self.ending.retain(|pid| is_ending(*pid) && !is_over(*pid));
            if self.ending.is_empty() {
                self.left_behind = Daemons::look()?.left_behind()?;
            }
        }
        self.left_behind.retain(PvmdEnd::is_unread);
        Ok(self.senders.is_empty() && self.ending.is_empty() && self.left_behind.is_empty())
    }

    /// To be told of every TC_NOOP that the agent receives. True if it was for this drain: a task's own marker
    /// stands behind everything that it had written.
    pub fn marker(&mut self, message: &Message) -> bool {
        let mut body = Reader::new(&message.body);
        let mut word = || body.uint().ok();
        let ours = word() == Some(pvm_abi::NOOP_MAGIC)
            && word() == Some(NOOP_MARKER)
            && word() == Some(self.number);
        if ours {
            self.senders.retain(|sender| sender.r != message.src);
        }
        ours
    }

    /// What is waited for, for people; empty when it is done.
    pub fn waits_for(&self) -> String {
        let one = |sender: &Sender| {
            let what = match sender.written {
                None => "is inside a send",
                Some(_) => "has written what its pvmd has not read",
            };
            format!(
                "task {} (process {}) {what}",
                sender.r, sender.connection.pid
            )
        };
        let mut all: Vec<String> = self.senders.iter().map(one).collect();
        all.extend(
            self.ending
                .iter()
                .map(|pid| format!("process {pid} is just ending")),
        );
        if !self.left_behind.is_empty() {
            all.push("tasks that have ended had written what their pvmd has not read".to_owned());
        }
        all.join(", ")
    }
}

impl Sender {
    fn done(&mut self, v: Tid, r: Tid, agent: Tid, number: u32) -> Result<bool> {
        let since = match self.written {
            Some(since) => since,
            None => {
                // A task that has ended sends nothing more; what it wrote may still be read.
                let on_its_way = match self.block.sending() {
                    Ok(None) => true,
                    Ok(Some(to)) => to.contains(&v.0) || to.contains(&r.0),
                    Err(_) => false,
                };
                if on_its_way {
                    return Ok(false);
                }
                *self.written.insert(Instant::now())
            }
        };
        if self.connection.unsent()? == 0 || self.connection.is_given_up() {
            return Ok(true);
        }
        if !self.asked
            && since.elapsed() > STREAMS
            && let Ok(Some(slot)) = self.block.free_marker()
        {
            self.asked = self.block.ask_marker(slot, agent.0, number).is_ok();
        }
        Ok(false)
    }
}

/// Waits until the pvmd of a task that stands still has read all that it wrote: messages and output.
///
/// # Errors
/// [`Failure::Busy`] when that is not so within `limit`.
pub fn written(task: &Task, limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    let mut wait = FIRST_WAIT;
    loop {
        let unsent = task.connection.unsent()?;
        let output: usize = task.connection.pipes()?.iter().map(|(_, n)| n).sum();
        if unsent == 0 && output == 0 {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::Busy.because(format!(
                "the pvmd of task {} has not read {unsent} bytes that it sent and {output} of its output within {} s",
                task.v,
                limit.as_secs_f64()
            )));
        }
        std::thread::sleep(wait.min(left));
        wait = (wait * 2).min(LAST_WAIT);
    }
}

/// Waits until a task that stands still has in its socket all that will ever come, and its pvmd all that it wrote:
/// a marker from each of `agents`, of this kind and number, stands there; its own socket, and its output
/// pipes to its pvmd, are empty. The buffers keep their size as long as the value returned lives.
///
/// # Errors
/// [`Failure::Busy`] when that is not so within `limit`, saying what is missing.
pub fn arrived(
    task: &Task,
    guardian: &Arc<Guardian>,
    (kind, number): (u32, u32),
    agents: &[Tid],
    limit: Duration,
) -> Result<Raised> {
    let raised = task.connection.raise(guardian)?;
    let until = Instant::now() + limit;
    let mut wait = FIRST_WAIT;
    let mut seen = 0;
    let mut missing: HashSet<Tid> = agents.iter().copied().collect();
    loop {
        if !missing.is_empty() && task.connection.waiting()? != seen {
            let unread = task.connection.unread(guardian)?;
            seen = unread.len();
            for fragment in fragments_of(&unread)? {
                let word = |at: usize| {
                    let word = fragment.noop()?.get(at..at + 4)?.try_into().ok()?;
                    Some(u32::from_be_bytes(word))
                };
                if word(0) == Some(kind) && word(4) == Some(number) {
                    missing.remove(&fragment.src);
                }
            }
        }
        let unsent = task.connection.unsent()?;
        let output: usize = task.connection.pipes()?.iter().map(|(_, n)| n).sum();
        if missing.is_empty() && unsent == 0 && output == 0 {
            return Ok(raised);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let agents: Vec<String> = missing.iter().map(Tid::to_string).collect();
            return Err(Failure::Busy.because(format!(
                "task {} is not flushed within {} s: {unsent} bytes that it sent and {output} of its output have \
                 not been read by its pvmd, and markers are missing from {} agents ({})",
                task.v,
                limit.as_secs_f64(),
                agents.len(),
                agents.join(", ")
            )));
        }
        std::thread::sleep(wait.min(left));
        wait = (wait * 2).min(LAST_WAIT);
    }
}
