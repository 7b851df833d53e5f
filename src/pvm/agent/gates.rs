//! Gates: closing one, and seeing that all that was sent before is through.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use pvm_abi::block::state;
use pvm_abi::table::{Entry, State, lease_clock, lease_over};

use super::control::{Answer, Outcome};
use super::{Agent, Asker, PATIENCE, Ticket};
use crate::error::Failure;
use crate::pvm::block::TaskBlock;
use crate::pvm::flush::Drain;
use crate::pvm::local;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::said_of_life;
use crate::pvm::wire::Message;

/// How long until pvmd is asked again who lives, ms.
const ASK_AGAIN: u64 = 500;

/// A gate that was closed: what is still on its way to it.
pub struct Closing {
    ticket: Ticket,
    v: u32,
    until: Instant,
    drain: Drain,
    /// Tasks of this host print to who moves.
    collects: bool,
    /// Those of them that were on their way themselves: while they are nobody can say where their output is to go.
    moving: Vec<u32>,
}

/// Both incarnations of a task whose gate's lease has ended are asked after.
pub struct Look {
    /// V, the incarnation it has, and the one it may get.
    of: (u32, u32, u32),
    /// Wait ids of the questions, and what was answered.
    old: (u32, Option<bool>),
    new: (u32, Option<bool>),
    /// Later than this it is asked again.
    until: Instant,
}

impl Agent {
    pub(super) fn close_gate(
        &mut self,
        ticket: Ticket,
        (v, from, next): (u32, u32, u32),
        lease_ms: u64,
        saved: bool,
    ) -> Result<()> {
        match self.table.entry(v) {
            Some(entry) if entry.r == from => {}
            // What came of the move before is known by the one that follows.
            Some(entry) if entry.state.is_closed() && entry.next == from => {
                self.open_gate(v, from)?;
            }
            None if v == from => {}
            None => {
                self.table.add_incarnation(from, v)?;
                self.table.open_gate(v, from)?;
            }
            Some(entry) => {
                return Err(Failure::Busy.because(format!(
                    "here task {} is {}, not {}; try again in a while",
                    Tid(v),
                    Tid(entry.r),
                    Tid(from)
                )));
            }
        }
        if next != 0 && Tid(from).host() == self.own.host() {
            self.refuse_beside_collector(v)?;
        }
        self.table.close_gate(v, next, lease_ms)?;
        if saved {
            self.table.decide(v, next)?;
        }
        match ticket.asker {
            // It stays closed whatever becomes of who asks.
            _ if lease_ms == 0 => drop(self.closed_for.remove(&v)),
            Asker::Task(asker) => {
                self.closed_for.insert(v, asker);
                self.watch(asker)?;
            }
            _ => {}
        }
        let r = Tid(self.table.r_of(v));
        self.last_drain += 1;
        let processes = self.processes()?;
        let drain = Drain::begin(&processes, Tid(v), r, self.own, self.last_drain)?;
        let collects = drain.tasks().any(|task| self.prints_to(task).contains(&v));
        let moving = (drain.tasks())
            .filter(|task| self.prints_to(task).contains(&v))
            .filter_map(|task| task.v().ok())
            .filter(|child| self.is_moving(*child))
            .collect();
        // Less than the lease: who waits longer opens the gate again anyway.
        let limit = Duration::from_millis(lease_ms / 2);
        self.closing.push(Closing {
            ticket,
            v,
            until: Instant::now() + limit,
            drain,
            collects,
            moving,
        });
        self.look_at_drains()
    }

    /// Of a task and who collects its output one moves after the other, in the order in which this host hears of it: what
    /// a task prints where it has come to goes to where its collector was when it left.
    fn refuse_beside_collector(&mut self, v: u32) -> Result<()> {
        for pid in self.processes()? {
            let task = local::enrolled(pid)?.filter(|task| task.v().is_ok_and(|own| own == v));
            let collectors = task.map(|task| self.prints_to(&task)).unwrap_or_default();
            if let Some(collector) = collectors.into_iter().find(|v| self.is_moving(*v)) {
                return Err(Failure::Busy.because(format!(
                    "task {}, which collects its output, moves; try again in a while",
                    Tid(collector)
                )));
            }
        }
        Ok(())
    }

    /// Whose are the tasks that its output and its traces go to: others than itself.
    fn prints_to(&self, task: &TaskBlock) -> Vec<u32> {
        let (Ok(own), Ok((output, trace))) = (task.v(), task.sinks()) else {
            return Vec::new();
        };
        let sinks = [output.0, trace.0].into_iter();
        let tasks = sinks.filter(|tid| Tid(*tid).is_task());
        (tasks.map(|tid| self.table.v_of(tid)))
            .filter(|v| *v != own)
            .collect()
    }

    fn is_moving(&self, v: u32) -> bool {
        let entry = self.table.entry(v);
        entry.is_some_and(|entry| entry.state.is_closed() && entry.next != 0)
    }

    /// Looks at those who are not through yet; answers where all are.
    pub(super) fn look_at_drains(&mut self) -> Result<()> {
        for mut closing in std::mem::take(&mut self.closing) {
            let mut moving = std::mem::take(&mut closing.moving);
            moving.retain(|child| self.is_moving(*child));
            closing.moving = moving;
            match closing.drain.look() {
                Ok(true) if closing.moving.is_empty() => {
                    let collects = closing.collects;
                    self.answer(closing.ticket, Ok(Answer::Closed { collects }))?;
                }
                Ok(_) if Instant::now() < closing.until => self.closing.push(closing),
                Ok(true) => {
                    let tids = closing.moving.iter().map(|v| Tid(*v).to_string());
                    let why = Failure::Busy.because(format!(
                        "tasks whose output it collects move: {}; try again in a while",
                        tids.collect::<Vec<_>>().join(", ")
                    ));
                    self.answer(closing.ticket, Err(why))?;
                }
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
        let closed = self.table.entry(v).filter(|entry| entry.state.is_closed());
        let before = self.table.r_of(v);
        self.table.open_gate(v, r)?;
        self.closing.retain(|closing| closing.v != v);
        self.closed_for.remove(&v);
        self.landings.decided(Tid(r));
        if let Some(entry) = closed {
            self.left_standing(Tid(entry.next), entry.next == r)?;
        }
        if before != r {
            // Those whose collector was restored know nothing yet, and of those whose collector has moved some may have been
            // on their way themselves when that was told. Who cannot be told now does it himself.
            let _ = self.redirect(v, r, Duration::ZERO);
        }
        self.nudge()
    }

    /// Opens the gate of a move that has an outcome. What was said of another one comes too late.
    pub(super) fn settle(&mut self, outcome: &Outcome) -> Result<()> {
        let (v, r) = (outcome.v, outcome.present());
        let ours = match self.table.entry(v) {
            Some(entry) if outcome.restored => entry.is_away() && entry.r == outcome.from,
            Some(entry) if entry.state.is_closed() => entry.next == outcome.next,
            Some(entry) => outcome.moved && entry.r == outcome.from,
            None => outcome.moved,
        };
        if !ours || outcome.next == 0 {
            return Ok(());
        }
        self.table.add_incarnation(r, v)?;
        self.open_gate(v, r)
    }

    /// Sends every task under the shim something that its libpvm discards: it looks at the table again. Not what is to
    /// become one: what stands unread comes first there, and it looks when it begins to run.
    fn nudge(&mut self) -> Result<()> {
        const NUDGE: u32 = 0;
        for task in self.tasks()? {
            if self.landings.is_landing(task.tid) {
                continue;
            }
            let enrolled = |block: TaskBlock| block.state().ok() == Some(state::ENROLLED);
            if TaskBlock::find(task.pid).is_ok_and(|block| block.is_some_and(enrolled)) {
                self.client.send_noop(task.tid, NUDGE, &[])?;
            }
        }
        Ok(())
    }

    /// Whoever had gates closed has ended: it is found out now what came of it.
    pub(super) fn closer_ended(&mut self, closer: Tid) -> Result<()> {
        let his: Vec<u32> = (self.closed_for.iter())
            .filter(|(_, tid)| **tid == closer)
            .map(|(v, _)| *v)
            .collect();
        let any = !his.is_empty();
        for v in his {
            self.closed_for.remove(&v);
            // One that was to be ended may be at its end: it keeps its lease.
            if !self.table.entry(v).is_some_and(|entry| entry.is_saved()) {
                self.table.set_lease(v, 0)?;
            }
        }
        if any {
            // On its host another agent has to find out.
            self.start_agents();
        }
        Ok(())
    }

    /// What an agent before us has left. Moves that began here are ours to end: whoever has lost his agent decides
    /// nothing any more.
    pub(super) fn take_up(&mut self) -> Result<()> {
        let closed = self.table.list();
        for entry in closed.into_iter().filter(|entry| entry.state.is_closed()) {
            if entry.next == 0 {
                self.take_up_restored(&entry)?;
                continue;
            }
            if Tid(entry.r).host() != self.own.host() {
                self.table.set_lease(entry.v, 0)?;
                continue;
            }
            let outcome = Outcome {
                id: String::new(),
                v: entry.v,
                from: entry.r,
                next: entry.next,
                moved: entry.state == State::Decided,
                restored: false,
            };
            self.conclude(outcome)?;
        }
        // Of those that wait for a gate some may not have been told that it is open.
        self.nudge()
    }

    /// Asks after both incarnations where a lease has ended. The gate opens for the old one if it lives and the new
    /// one cannot become the task any more, and for the new one if the old one has ended; while both live nothing
    /// is decided.
    pub(super) fn look_at_leases(&mut self) -> Result<()> {
        let now = lease_clock();
        for entry in self.table.list() {
            if !entry.state.is_closed() || !lease_over(entry.lease, now) {
                continue;
            }
            self.table.set_lease(entry.v, ASK_AGAIN)?;
            let of = (entry.v, entry.r, entry.next);
            self.looks.retain(|look| look.until > Instant::now());
            if self.looks.iter().any(|look| look.of == of) {
                continue;
            }
            let old = self.client.begin_lives(Tid(entry.r))?;
            let new = match entry.next {
                0 => (0, Some(false)),
                next => (self.client.begin_lives(Tid(next))?, None),
            };
            self.looks.push(Look {
                of,
                old: (old, None),
                new,
                until: Instant::now() + PATIENCE,
            });
        }
        Ok(())
    }

    /// An answer of pvmd: whether a task lives.
    pub(super) fn lives(&mut self, answer: &Message) -> Result<()> {
        let wait = answer.wait;
        let asked = |look: &Look| look.old.0 == wait || look.new.0 == wait;
        let Some(at) = self.looks.iter().position(asked) else {
            return Ok(());
        };
        let Some(look) = self.looks.get_mut(at) else {
            return Ok(());
        };
        let (v, r, next) = look.of;
        // A pvmd that cannot tell is asked again.
        let Ok(lives) = said_of_life(Tid(r), answer) else {
            self.looks.swap_remove(at);
            return Ok(());
        };
        match look.old.0 == wait {
            true => look.old.1 = Some(lives),
            false => look.new.1 = Some(lives),
        }
        let (Some(old), Some(new)) = (look.old.1, look.new.1) else {
            return Ok(());
        };
        self.looks.swap_remove(at);
        let same = |entry: &Entry| {
            entry.state.is_closed() && (entry.r, entry.next) == (r, next) && entry.lease != 0
        };
        let Some(entry) = self.table.entry(v).filter(same) else {
            return Ok(());
        };
        match (old, new) {
            // Whoever has saved it died before he could say that it has ended.
            (false, _) if entry.is_saved() => self.table.close_gate(v, 0, 0),
            (true, true) => Ok(()),
            (false, _) if next != 0 => {
                self.table.add_incarnation(next, v)?;
                self.open_gate(v, next)
            }
            // Of a task that was saved and has ended: what is sent vanishes, as for any that has ended.
            (false, _) | (true, false) => self.open_gate(v, r),
        }
    }

    pub(super) fn until_next_lease(&self) -> Option<Duration> {
        let now = lease_clock();
        let entries = self.table.list().into_iter();
        let leases = entries.filter(|entry| entry.state.is_closed() && entry.lease != 0);
        leases
            .map(|entry| match lease_over(entry.lease, now) {
                true => Duration::ZERO,
                false => Duration::from_millis(entry.lease.wrapping_sub(now) & ((1 << 33) - 1)),
            })
            .min()
    }
}
