//! What processes share that each would have for itself after a restore (clone(2)).

use std::cmp::Ordering;

use anyhow::Result;

use super::{hold, process};
use crate::error::Failure;
use crate::kernel::kcmp::{self, Common};

/// What it is, and how clone(2) is asked for it.
const ALL: [(Common, &str, &str); 3] = [
    (Common::Memory, "memory", "CLONE_VM"),
    (Common::Descriptors, "descriptor table", "CLONE_FILES"),
    (Common::Directories, "current directory", "CLONE_FS"),
];

/// Refuses processes that have one memory, one descriptor table, or one current directory.
pub fn check(pids: &[i32]) -> Result<()> {
    if pids.len() < 2 {
        return Ok(());
    }
    for (what, name, flag) in ALL {
        // In the kernel's order, in which what ends meanwhile may be out of place.
        let mut known: Vec<(i32, i32)> = Vec::new();
        for pid in pids.iter().copied() {
            let via = process::living_thread(pid);
            let compare =
                |other: &(i32, i32)| kcmp::common(other.1, via, what).unwrap_or(Ordering::Less);
            let other = match known.binary_search_by(compare) {
                Ok(at) => known[at].0,
                Err(at) => {
                    known.insert(at, (pid, via));
                    continue;
                }
            };
            // What has ended has nothing, and is equal to all others that have; a vfork is waited for.
            let over = |pid| process::is_ending(pid) || hold::vfork_of(pid).is_some();
            if !over(pid) && !over(other) {
                return Err(Failure::Refused.because(format!(
                    "processes {other} and {pid} share one {name} ({flag} of clone(2)), which cannot be carried; dump \
                     them when one of them has ended or executed another program"
                )));
            }
        }
    }
    Ok(())
}
