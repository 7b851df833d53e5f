//! Processes in a pid namespace that a restore made (kernel/pid_ns.rs): the image names them as they know
//! themselves, whoever looks from outside.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;
use procfs::process::Process as Proc;

use super::look::{Looked, Subject};
use crate::error::Failure;
use crate::image::files::{Description, Kind};
use crate::image::process::Process;
use crate::kernel::pid_ns;
use crate::kernel::proc_file;

/// Number of a namespace of a task ("self" is ours); None where that cannot be seen.
fn number(who: &str, kind: &str) -> Option<u64> {
    let meta = std::fs::metadata(format!("/proc/{who}/ns/{kind}"));
    meta.map(|m| m.ino()).ok()
}

/// Whether a task lives among other pids than we do, in a namespace that a restore has made.
pub fn is_inside(tid: i32) -> bool {
    let who = tid.to_string();
    let pids = number(&who, "pid");
    if pids.is_none() || pids == number("self", "pid") {
        return false;
    }
    // Its init has our name, and the same mounts.
    let is_init = |p: &Proc| {
        let other = p.pid.to_string();
        number(&other, "pid") == pids
            && inside_id(p.pid) == Some(1)
            && proc_file::stat(p.pid).is_ok_and(|s| s.comm == pid_ns::INIT_NAME)
            && number(&other, "mnt") == number(&who, "mnt")
    };
    let all = procfs::process::all_processes();
    all.into_iter().flatten().flatten().any(|p| is_init(&p))
}

/// Refuses process `pid`, seen through its thread `via`, when it has namespaces that an image cannot hold. `first`
/// is a thread of the first process of the dump.
pub fn check(pid: i32, via: i32, first: i32) -> Result<()> {
    let (who, first_one) = (via.to_string(), first.to_string());
    for kind in ["net", "uts", "ipc", "user", "pid", "mnt"] {
        let theirs = number(&who, kind);
        if theirs.is_none() || theirs == number("self", kind) {
            continue;
        }
        let together = theirs == number(&first_one, kind);
        if matches!(kind, "pid" | "mnt") && together && is_inside(first) {
            continue;
        }
        return Err(Failure::Refused.because(format!(
            "process {pid} is in another {kind} namespace than mistctl; run mistctl inside its container or \
             host (nsenter -t {pid} -a mistctl dump ...)"
        )));
    }
    Ok(())
}

/// The id of a task in its own pid namespace.
fn inside_id(tid: i32) -> Option<i32> {
    let ids = proc_file::status(tid).ok()?.nspid?;
    ids.last().copied()
}

/// Gives everything that is named by a pid the id it has inside: of the dump, and of what else lives there.
/// What lives outside is 0. Peers and senders of sockets were asked for from inside.
pub fn translate(subjects: &mut [Subject], looked: &mut Looked) {
    let first = subjects.first().map_or(0, |s| s.process.pid);
    let mut known = Known {
        place: number(&first.to_string(), "pid"),
        ids: HashMap::new(),
    };
    // A leader that has ended shows no namespaces, but its ids.
    for s in subjects.iter() {
        known
            .ids
            .extend(inside_id(s.process.pid).map(|id| (s.process.pid, id)));
        let living = s.process.threads.first().map(|t| t.tid);
        known.place = known
            .place
            .or(living.and_then(|t| number(&t.to_string(), "pid")));
    }
    for s in subjects {
        known.process(&mut s.process);
    }
    for d in &mut looked.descriptions {
        known.description(d);
    }
}

/// Ids inside, by those outside.
struct Known {
    place: Option<u64>,
    ids: HashMap<i32, i32>,
}

impl Known {
    fn change(&mut self, id: &mut i32) {
        // 0 and less name nobody.
        if *id <= 0 {
            return;
        }
        let place = self.place;
        *id = *self.ids.entry(*id).or_insert_with_key(|id| {
            let there = number(&id.to_string(), "pid") == place;
            inside_id(*id).filter(|_| there).unwrap_or(0)
        });
    }

    fn process(&mut self, p: &mut Process) {
        for id in [&mut p.pid, &mut p.ppid, &mut p.pgid, &mut p.sid] {
            self.change(id);
        }
        for t in &mut p.threads {
            self.change(&mut t.tid);
        }
        for t in &mut p.posix_timers {
            self.change(&mut t.tid);
        }
    }

    fn description(&mut self, d: &mut Description) {
        if let Some(owner) = &mut d.owner {
            self.change(&mut owner.id);
        }
        match &mut d.kind {
            Kind::PidFd { pid } => self.change(pid),
            Kind::Pty(p) => {
                self.change(&mut p.session);
                self.change(&mut p.foreground);
            }
            Kind::External(e) => e.foreground.iter_mut().for_each(|g| self.change(g)),
            _ => {}
        }
    }
}
