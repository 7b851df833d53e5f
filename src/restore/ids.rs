//! Which ids processes and threads of an image get: programs keep them in memory.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Result;

use super::{Options, Report};
use crate::error::Failure;
use crate::image::process::Process;
use crate::kernel::caps;
use crate::kernel::pid_ns::PidNamespace;
use crate::kernel::vacancy::{self, Members};

/// The ids that processes and threads get.
#[derive(Debug)]
pub enum Ids {
    /// Those they had.
    Same,
    /// Any; the first process gets this one, if somebody knows it already.
    New { first: Option<i32> },
    /// Those they had, where they are free.
    Inside(PidNamespace),
}

impl Ids {
    /// Looks whether they are free here, and makes a pid namespace when that is called for. Call it from a
    /// single-threaded program. `here`: the first process has one already.
    ///
    /// # Errors
    /// Ids are taken, and that cannot be helped.
    pub fn choose(
        processes: &[Process],
        opts: &Options,
        here: bool,
        report: &mut Report,
    ) -> Result<Self> {
        let has = processes.first().filter(|_| here).map(|p| p.pid);
        // Who has just been killed, after a dump for instance, may have them yet.
        let until = vacancy::patience();
        let mut taken: BTreeSet<i32> = all(processes)
            .filter(|id| Some(*id) != has && !vacancy::becomes_free(*id, until))
            .collect();
        taken.extend(
            sessions_left(processes, until)
                .into_iter()
                .filter(|id| Some(*id) != has),
        );
        let has_all = all(processes).all(|id| Some(id) == has);
        let why_not = caps::why_not_choose_ids();
        if taken.is_empty() && (has_all || why_not.is_none()) {
            return Ok(Self::Same);
        }
        if let (true, Some(why)) = (taken.is_empty(), why_not) {
            if opts.same_pid || processes.len() > 1 {
                return Err(Failure::Restore
                    .because(format!("the processes cannot have the ids they had: {why}")));
            }
            report
                .warnings
                .push(format!("the program gets new ids: {why}"));
            return Ok(Self::New { first: None });
        }
        let members = Members::all();
        let taken = taken.iter().map(|id| match vacancy::is_taken_itself(*id) {
            true => id.to_string(),
            false => match members.who(*id) {
                Some(who) => format!("{id} ({who})"),
                None => id.to_string(),
            },
        });
        let taken = taken.collect::<Vec<_>>().join(", ");
        if here && processes.len() > 1 {
            return Err(Failure::Restore.because(format!(
                "the ids {taken} of the program's child processes are taken here; end those processes, or restore it on another host"
            )));
        }
        if opts.same_pid {
            return Err(Failure::Restore.because(format!(
                "the ids {taken} are taken here; end those processes, or restore without --same-pid"
            )));
        }
        if processes.len() > 1 {
            let namespace = own_namespace(processes, &taken)?;
            report.pid_namespace = true;
            report.warnings.push(format!(
                "the ids {taken} are taken here: the processes run in a pid namespace of their own, where \
                 they have their old ids"
            ));
            return Ok(Self::Inside(namespace));
        }
        report.warnings.push(format!(
            "the ids {taken} are taken here: the program gets new ones (one that keeps its own pid in memory \
             will be confused)"
        ));
        Ok(Self::New { first: None })
    }

    /// Gives the first process this id, if it gets a new one and may be given any.
    pub fn choose_first(&mut self, id: Option<i32>) {
        if let Self::New { first } = self {
            *first = id.filter(|_| caps::why_not_choose_ids().is_none());
        }
    }

    /// Whether everybody has the id that he had, as he sees it.
    pub fn are_same(&self) -> bool {
        !matches!(self, Self::New { .. })
    }

    /// The id to ask for, for somebody who had this one.
    pub fn wanted(&self, id: i32) -> Option<i32> {
        self.are_same().then_some(id)
    }

    /// The same for the first process.
    pub fn wanted_first(&self, id: i32) -> Option<i32> {
        match self {
            Self::New { first } => *first,
            Self::Same | Self::Inside(_) => Some(id),
        }
    }

    /// As [`Ids::wanted`], for somebody who may be left out.
    pub fn wanted_if_free(&self, id: i32) -> Option<i32> {
        match self {
            Self::New { .. } => None,
            Self::Same => Some(id).filter(|id| vacancy::is_free(*id)),
            Self::Inside(_) => Some(id),
        }
    }

    pub fn namespace(&self) -> Option<&PidNamespace> {
        match self {
            Self::Inside(n) => Some(n),
            Self::Same | Self::New { .. } => None,
        }
    }

    /// All processes run.
    pub fn released(&self) -> Result<()> {
        match self {
            Self::Inside(n) => n.release(),
            Self::Same | Self::New { .. } => Ok(()),
        }
    }
}

/// Ids of leaders that still name the sessions of others, who have been left behind.
fn sessions_left(processes: &[Process], until: Instant) -> Vec<i32> {
    let mut leaders: Vec<i32> = processes
        .iter()
        .filter(|p| p.sid == p.pid)
        .map(|p| p.pid)
        .collect();
    // Whoever was killed together with them may still be on his way out.
    while !leaders.is_empty() {
        let members = Members::all();
        leaders.retain(|id| members.has(*id));
        if Instant::now() >= until || leaders.iter().any(|id| !members.are_leaving(*id)) {
            break;
        }
        std::thread::sleep(vacancy::LOOK_EVERY);
    }
    leaders
}

/// Of all processes and threads.
fn all(processes: &[Process]) -> impl Iterator<Item = i32> {
    processes
        .iter()
        .flat_map(|p| std::iter::once(p.pid).chain(p.threads.iter().map(|t| t.tid)))
}

fn own_namespace(processes: &[Process], taken: &str) -> Result<PidNamespace> {
    let refuse = |why: String| {
        Failure::Restore.because(format!(
            "the ids {taken} are taken here, and the image cannot have a pid namespace of its own: {why}; run \
             mistctl as root, or end the processes that have them"
        ))
    };
    if all(processes).any(|id| id == 1) {
        return Err(refuse("it holds an init (pid 1)".to_owned()));
    }
    let first = processes.first().map_or(0, |p| p.pid);
    let highest = all(processes).max().unwrap_or(first);
    PidNamespace::start(first, highest).map_err(|e| refuse(format!("{e:#}")))
}
