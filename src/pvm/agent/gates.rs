//! Gates: closing one, and seeing that all that was sent before is through.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use pvm_abi::block::state;
use pvm_abi::table::{State, lease_clock, lease_over};

use super::control::Answer;
use super::{Agent, Asker, Ticket};
use crate::pvm::block::TaskBlock;
use crate::pvm::flush::Drain;
use crate::pvm::tid::Tid;
use crate::pvm::wire::Message;

/// A gate that was closed: what is still on its way to it.
pub struct Closing {
    ticket: Ticket,
    v: u32,
    until: Instant,
    drain: Drain,
}

impl Agent {
    pub(super) fn close_gate(
        &mut self,
        ticket: Ticket,
        v: u32,
        next: u32,
        lease_ms: u64,
    ) -> Result<()> {
        self.table.close_gate(v, next, lease_ms)?;
        match ticket.asker {
            // It stays closed whatever becomes of who asks.
            _ if lease_ms == 0 => drop(self.closed_for.remove(&v)),
            Asker::Task(asker) => {
                self.watch(asker)?;
                self.closed_for.insert(v, asker);
            }
            _ => {}
        }
        let r = Tid(self.table.r_of(v));
        self.last_drain += 1;
        let drain = Drain::begin(Tid(v), r, self.own, self.last_drain)?;
        // Less than the lease: who waits longer opens the gate again anyway.
        let limit = Duration::from_millis(lease_ms / 2);
        self.closing.push(Closing {
            ticket,
            v,
            until: Instant::now() + limit,
            drain,
        });
        self.look_at_drains()
    }

    /// Looks at those who are not through yet; answers where all are.
    pub(super) fn look_at_drains(&mut self) -> Result<()> {
        for mut closing in std::mem::take(&mut self.closing) {
            match closing.drain.look() {
                Ok(true) => self.answer(closing.ticket, Ok(Answer::Done))?,
                Ok(false) if Instant::now() < closing.until => self.closing.push(closing),
                Ok(false) => {
                    let why = anyhow!(
                        "tasks on {} do not come to an end of what they send: {}",
                        self.host,
                        closing.drain.waits_for()
                    );
                    self.answer(closing.ticket, Err(why))?;
                }
                Err(e) => self.answer(closing.ticket, Err(e))?,
            }
        }
        Ok(())
    }

    /// A TC_NOOP came: it may be the marker of a task that is drained.
    pub(super) fn marker(&mut self, message: &Message) -> Result<()> {
        for closing in &mut self.closing {
            if closing.drain.marker(message) {
                break;
            }
        }
        self.look_at_drains()
    }

    pub(super) fn open_gate(&mut self, v: u32, r: u32) -> Result<()> {
        self.table.open_gate(v, r)?;
        self.closing.retain(|closing| closing.v != v);
        self.closed_for.remove(&v);
        self.nudge()
    }

    /// Sends every task under the shim something that its libpvm discards: it looks at the table again.
    fn nudge(&mut self) -> Result<()> {
        const NUDGE: u32 = 0;
        for task in self.tasks()? {
            let enrolled = |block: TaskBlock| block.state().ok() == Some(state::ENROLLED);
            if TaskBlock::find(task.pid).is_ok_and(|block| block.is_some_and(enrolled)) {
                self.client.send_noop(task.tid, NUDGE, &[])?;
            }
        }
        Ok(())
    }

    /// Whoever had gates closed has ended, or (none given) an agent before us: they find out soon who lives. Soon,
    /// not now: what had been decided may still have to be done.
    pub(super) fn shorten_leases(&mut self, asker: Option<Tid>) -> Result<()> {
        const SOON: u64 = 5000;
        for entry in self.table.list() {
            let his = asker.is_none() || self.closed_for.get(&entry.v).copied() == asker;
            if entry.state == State::Moving && entry.lease != 0 && his {
                self.table.close_gate(entry.v, entry.next, SOON)?;
            }
        }
        Ok(())
    }

    /// Opens the gates whose lease has ended, for whoever of the two incarnations lives.
    pub(super) fn look_at_leases(&mut self) -> Result<()> {
        let now = lease_clock();
        for entry in self.table.list() {
            if entry.state != State::Moving || !lease_over(entry.lease, now) {
                continue;
            }
            let old = self.client.lives(Tid(entry.r));
            let new = match entry.next {
                0 => Ok(false),
                next => self.client.lives(Tid(next)),
            };
            let present = match (old, new) {
                (Ok(false), Ok(true)) => entry.next,
                // Neither lives: what is sent vanishes, as it does for any task that has ended.
                (Ok(_), Ok(_)) => entry.r,
                // A pvmd that cannot tell: later.
                _ => {
                    self.table.close_gate(entry.v, entry.next, 1000)?;
                    continue;
                }
            };
            self.open_gate(entry.v, present)?;
        }
        Ok(())
    }

    pub(super) fn until_next_lease(&self) -> Option<Duration> {
        let now = lease_clock();
        let moving = self.table.list().into_iter();
        let leases = moving.filter(|entry| entry.state == State::Moving && entry.lease != 0);
        leases
            .map(|entry| Duration::from_millis(entry.lease.wrapping_sub(now) & ((1 << 33) - 1)))
            .min()
    }
}
