//! Waits for another mistctl to be done with a process: one that restores it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::error::Failure;

/// How long a process is waited for that is traced, and one whose memory is being filled.
const TRACED: Duration = Duration::from_secs(2);
const FILLED: Duration = Duration::from_secs(60);
/// Between two looks: neither state has an event that others could wait for. A look at large memory takes a while itself,
/// and the processor may be what the other one waits for: most of the time is left to it.
const LOOK: Duration = Duration::from_millis(5);
const SHARE: u32 = 4;

/// Returns when process `pid` is no longer traced, as by a mistctl that is about to let it go, and its memory is no
/// longer being filled (`mistctl restore --lazy`): a page that is missing looks like one that holds nothing. Before it
/// is stopped, for what is filled once stays so. One that is traced for long is left to those who know by whom.
///
/// # Errors
/// [`Failure::Busy`] when filling takes too long.
pub fn wait(pid: i32) -> Result<()> {
    let from = Instant::now();
    loop {
        let began = Instant::now();
        let traced = is_traced(pid) && from.elapsed() < TRACED;
        if !traced && !is_being_filled(pid)? {
            return Ok(());
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
    let status = procfs::process::Process::new(pid).and_then(|p| p.status());
    status.is_ok_and(|status| status.tracerpid != 0)
}

/// Whether somebody else gives it missing pages: mappings have the flag `um` (userfaultfd, missing pages). A program that
/// does so itself has a descriptor for it, which is another matter.
fn is_being_filled(pid: i32) -> Result<bool> {
    let path = format!("/proc/{pid}/smaps");
    let Ok(file) = fs::File::open(&path) else {
        // It has ended, or may not be looked at: both are told better elsewhere.
        return Ok(false);
    };
    let mut lines = BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    let mut found = false;
    while !found {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => break,
            Err(e) => return Err(e).with_context(|| format!("reading {path}")),
        }
        found = line.starts_with(b"VmFlags:") && line.windows(4).any(|w| w == b" um ");
    }
    Ok(found && !has_userfaultfd(pid))
}

fn has_userfaultfd(pid: i32) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    fds.flatten().any(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]")
    })
}
