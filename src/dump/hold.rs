//! Stopping processes so that it does not show.

use std::collections::BTreeSet;
use std::io;

use anyhow::{Context, Result, anyhow};

use crate::error::Failure;
use crate::kernel::arch::Regs;
use crate::kernel::batch::Held;
use crate::kernel::mem::Mem;
use crate::kernel::tracee::{Stop, Tracee};

/// A process all of whose threads stand still. Dropped without [`HeldProcess::release`], its threads
/// are put back and let go all the same.
pub struct HeldProcess {
    pub pid: i32,
    pub mem: Mem,
    /// Leader first (unless it is a zombie, then any other).
    pub threads: Vec<Held>,
    released: bool,
}

impl HeldProcess {
    /// Seizes and stops every thread. `signal` of the group stop is kept in each [`Held`].
    pub fn stop(pid: i32) -> Result<Self> {
        let mem = Mem::open(pid).map_err(|e| gone_or(pid, e))?;
        let mut held = Self {
            pid,
            mem,
            threads: Vec::new(),
            released: false,
        };
        let mut known = BTreeSet::new();
        loop {
            let new: Vec<i32> = thread_ids(pid)?
                .into_iter()
                .filter(|tid| !known.contains(tid))
                .collect();
            if new.is_empty() {
                break;
            }
            let mut seized = Vec::new();
            for tid in new {
                known.insert(tid);
                if let Some(t) = seize(pid, tid)? {
                    seized.push(t);
                }
            }
            for t in seized {
                if let Some(h) = hold(t)? {
                    held.threads.push(h);
                }
            }
        }
        if held.threads.is_empty() {
            return Err(Failure::NoSuchProcess.because(format!("process {pid} has ended")));
        }
        let leader = held
            .threads
            .iter()
            .position(|h| h.tracee.tid == pid)
            .unwrap_or(0);
        held.threads.swap(0, leader);
        Ok(held)
    }

    pub fn leader(&self) -> &Held {
        &self.threads[0]
    }

    /// Lets every thread go on as if nothing had happened; `signal` is sent first when not 0.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// Leaves it group-stopped, as SIGSTOP does.
    pub fn release_stopped(mut self) -> Result<()> {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGSTOP,
        )
        .with_context(|| format!("stopping process {}", self.pid))?;
        self.let_go()
    }

    /// Kills it while it stands: none of its instructions runs again.
    pub fn kill(mut self) -> Result<()> {
        self.released = true;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGKILL,
        )
        .with_context(|| format!("killing process {}", self.pid))?;
        // The leader's end is reported last.
        for h in self.threads.iter().rev() {
            while let Ok(s) = h.tracee.wait() {
                if matches!(s, Stop::Killed(_) | Stop::Exited(_)) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        let mut first = Ok(());
        for h in &self.threads {
            let r = h.release(0);
            if first.is_ok() {
                first = r;
            }
        }
        first
    }
}

impl Drop for HeldProcess {
    fn drop(&mut self) {
        let _ = self.let_go();
    }
}

fn gone_or(pid: i32, e: anyhow::Error) -> anyhow::Error {
    let kind = e.downcast_ref::<io::Error>().map(io::Error::kind);
    match kind {
        Some(io::ErrorKind::NotFound) => {
            Failure::NoSuchProcess.because(format!("there is no process {pid}"))
        }
        Some(io::ErrorKind::PermissionDenied) => Failure::Refused.because(format!(
            "process {pid} is not yours to dump (see `mistctl check` for what mistctl may do)"
        )),
        _ => e,
    }
}

fn thread_ids(pid: i32) -> Result<Vec<i32>> {
    let dir = format!("/proc/{pid}/task");
    let entries =
        std::fs::read_dir(&dir).map_err(|e| gone_or(pid, anyhow!(e).context(dir.clone())))?;
    let mut ids = Vec::new();
    for e in entries {
        // A thread that ends while we read is no error.
        if let Some(tid) = e.ok().and_then(|e| e.file_name().to_str()?.parse().ok()) {
            ids.push(tid);
        }
    }
    Ok(ids)
}

fn seize(pid: i32, tid: i32) -> Result<Option<Tracee>> {
    match Tracee::seize(tid, 0) {
        Ok(t) => {
            t.interrupt()
                .with_context(|| format!("interrupting thread {tid}"))?;
            Ok(Some(t))
        }
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => {
            let status = procfs::process::Process::new(tid)
                .and_then(|p| p.status())
                .ok();
            match status {
                // A leader that called pthread_exit: it is carried by its other threads.
                Some(s) if s.state.starts_with('Z') => Ok(None),
                Some(s) if s.tracerpid != 0 => Err(Failure::Busy.because(format!(
                    "process {pid} is being traced by process {} (a debugger or another mistctl); \
                     nothing was changed, try again when that has ended",
                    s.tracerpid
                ))),
                Some(_) => Err(Failure::Refused.with(anyhow!(e).context(format!(
                    "process {pid} may not be traced by you; run mistctl as root or as its owner \
                     (`mistctl check` tells what is missing)"
                )))),
                None => Ok(None),
            }
        }
    }
}

/// Waits for the stop of a seized and interrupted thread; None when it ended first.
fn hold(tracee: Tracee) -> Result<Option<Held>> {
    let Some(stop) = tracee.wait_interrupted()? else {
        return Ok(None);
    };
    let stopped_by = match stop {
        Stop::Interrupt { signal } if signal != libc::SIGTRAP => Some(signal),
        _ => None,
    };
    let regs: Regs = tracee.regs()?;
    let sigmask = tracee.sigmask()?;
    Ok(Some(Held {
        tracee,
        regs,
        sigmask,
        stopped_by,
    }))
}
