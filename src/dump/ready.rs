//! Waits for another mistctl to be done with a process: one that restores it.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::maps::Flags;
use crate::error::Failure;
use crate::kernel::proc_file;

/// How long a process is waited for that is traced, and one whose memory is being filled.
const TRACED: Duration = Duration::from_secs(2);
const FILLED: Duration = Duration::from_secs(60);
/// Between two looks: neither state has an event that others could wait for. A look at large memory takes a while itself,
/// and the processor may be what the other one waits for: most of the time is left to it.
const LOOK: Duration = Duration::from_millis(5);
const SHARE: u32 = 4;

/// Returns when process `pid` is no longer traced, as by a mistctl that is about to let it go, and its memory is no
/// longer being filled (`mistctl restore --lazy`): a page that is missing looks like one that holds nothing. Before it
/// is stopped, for what is filled once stays so. One that is traced for long is left to those who know by whom. What
/// was read of its mappings for that.
///
/// # Errors
/// [`Failure::Busy`] when filling takes too long.
pub fn wait(pid: i32) -> Result<Flags> {
    let from = Instant::now();
    loop {
        let began = Instant::now();
        let traced = is_traced(pid) && from.elapsed() < TRACED;
        let flags = flags(pid)?;
        // A program that gives itself missing pages has a descriptor for it, which is another matter.
        if !traced && (!flags.by_uffd || has_userfaultfd(pid)) {
            return Ok(flags);
        }
        if from.elapsed() > FILLED {
            return Err(Failure::Busy.because(format!(
                "process {pid}: its memory is still being filled by a lazy restore; nothing was changed, try again \
                 when that has ended"
            )));
        }
        std::thread::sleep(LOOK.max(began.elapsed() * SHARE));
    }
}

fn is_traced(pid: i32) -> bool {
    let status = proc_file::status(pid);
    status.is_ok_and(|status| status.tracerpid != 0)
}

fn flags(pid: i32) -> Result<Flags> {
    match Flags::read(pid) {
        Ok(flags) => Ok(flags),
        // It has ended, or may not be looked at: both are told better elsewhere.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            Ok(Flags::default())
        }
        Err(e) => Err(e).with_context(|| format!("reading /proc/{pid}/smaps")),
    }
}

fn has_userfaultfd(pid: i32) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    fds.flatten().any(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]")
    })
}
