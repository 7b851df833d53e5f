//! Tasks that were away and are restored on this host: when who has them restored is killed, and all hosts do not know yet.

use anyhow::Result;
use pvm_abi::table::Entry;

use super::Agent;
use super::control::Outcome;
use crate::pvm::block::TaskBlock;
use crate::pvm::local;
use crate::pvm::tid::Tid;

impl Agent {
    /// Whoever has had tasks restored has ended. It may have been killed: what does not run yet ends, and of what runs all
    /// hosts are told.
    pub(super) fn restorer_ended(&mut self, restorer: Tid) -> Result<()> {
        self.landings.forsake(restorer);
        self.serve_forsaken()
    }

    pub(super) fn serve_forsaken(&mut self) -> Result<()> {
        let (idle, run) = self.landings.forsaken();
        for id in idle {
            self.landings.abandon(&id, Tid::NONE);
        }
        for (v, from, r) in run {
            // It opens this gate last.
            self.restored_here(v, from, r)?;
        }
        Ok(())
    }

    /// Has all gates opened of a task that was away and runs here, unless that has been done.
    fn restored_here(&mut self, v: u32, from: u32, r: Tid) -> Result<()> {
        let waits = |entry: Entry| entry.is_away() && entry.r == from;
        if !self.table.entry(v).is_some_and(waits) {
            return Ok(());
        }
        self.tell(Outcome {
            id: String::new(),
            v,
            from,
            next: r.0,
            moved: true,
            restored: true,
        })
    }

    /// Whether a task that the table says is away runs here: it was restored, and both who did it and the agent before us
    /// have ended before all gates were open.
    pub(super) fn take_up_restored(&mut self, entry: &Entry) -> Result<()> {
        if !entry.is_away() {
            return Ok(());
        }
        let runs = |task: &TaskBlock| task.v().is_ok_and(|v| v == entry.v);
        let found = local::tasks()?.into_iter().find(|(_, task)| runs(task));
        let Some(r) = found.and_then(|(_, task)| task.r().ok()).map(Tid) else {
            return Ok(());
        };
        // What traces it decides whether it runs at all, or ends now that we have taken its agent's place.
        let task = self.tasks()?.into_iter().find(|task| task.tid == r);
        match task {
            Some(task) if !local::is_traced(task.pid) => {
                self.restored_here(entry.v, entry.r, r)?;
                self.table.add_incarnation(r.0, entry.v)?;
                self.open_gate(entry.v, r.0)
            }
            _ => Ok(()),
        }
    }
}
