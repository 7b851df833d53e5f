//! What would be refused once a process stands still, found while it runs: so it is not stopped for nothing.

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use procfs::process::Process as Proc;

use super::files::{FileDumper, Order};
use super::maps::Flags;
use super::tables::Tables;
use super::{maps, process, threads};
use crate::error::Failure;
use crate::kernel::guardian::Guardian;
use crate::kernel::{pidfd, proc_file};
use crate::net::{self, SocketDumper};

/// What can be seen of a process from outside.
pub struct Survey {
    /// Why it cannot be carried as it is now: all reasons, each with a way out, but not its children. What comes about
    /// later is found under the stop, and what is in flight behind other descriptors in flight.
    pub refusals: Vec<String>,
    /// Those of its mappings.
    pub flags: Flags,
}

/// Looks at process `pid`; `pvmd`: inode of its connection to its pvmd.
///
/// # Errors
/// When it cannot be looked at; when it has ended.
pub fn survey(pid: i32, pvmd: Option<u64>) -> Result<Survey> {
    // What is refused here cannot be looked at either.
    let flags = process::check(pid, &[pid], true)?;
    let via = process::living_thread(pid);
    let mut found = Vec::new();
    let tasks = Proc::new(pid).and_then(|p| p.tasks());
    for thread in tasks.into_iter().flatten().flatten() {
        if let Ok(status) = threads::status(pid, thread.tid) {
            found.extend(threads::unfiltered(pid, thread.tid, &status).err());
        }
    }
    found.extend(maps::read(via, &mut Tables::new(1)).err());
    let options = net::Options {
        pvmd,
        ..net::Options::default()
    };
    let guardian = Guardian::start().context("starting the guardian process")?;
    let mut sockets = SocketDumper::new(options, &Arc::new(guardian));
    let thread = pidfd::open_thread(via)?;
    let files = FileDumper::new(&[pid], Order::default());
    found.extend(files.refusals(pid, via, thread.as_fd(), &mut sockets)?);
    for own in sockets.in_flight() {
        found.extend(files.refusal(own, &mut sockets));
    }
    found.extend(sockets.refusals());
    found.retain(|e| Failure::of(e) == Failure::Refused);
    Ok(Survey {
        refusals: found.iter().map(|e| format!("{e:#}")).collect(),
        flags,
    })
}

/// A process that `pid` traces.
pub fn tracee(pid: i32) -> Option<i32> {
    let all = procfs::process::all_processes().into_iter().flatten();
    let mut pids = all.flatten().map(|p| p.pid);
    pids.find(|other| proc_file::status(*other).is_ok_and(|s| s.tracerpid == pid))
}

/// A child of a process, if it has one.
#[must_use]
pub fn child(pid: i32) -> Option<i32> {
    process::tree(pid, true).get(1).copied()
}
