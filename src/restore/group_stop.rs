//! Stopping a process again that its image has stopped: by the signal that its parent is told of (waitpid with
//! WUNTRACED, `jobs` of a shell).

use anyhow::{Context, Result};

use crate::image::process::Process;
use crate::kernel::tracee::{Stop, Tracee, queue_signal};

/// Has the process of `pid`, all of whose threads stand, stop by `signal` as soon as they are let go. `thread` is one of
/// them.
///
/// # Errors
/// When no signal can be sent to it.
pub fn stop(pid: i32, thread: Tracee, p: &Process, signal: i32) -> Result<()> {
    // Its handler would run.
    let has_handler = p
        .sigactions
        .iter()
        .any(|a| a.signal == signal && a.handler != 0);
    if signal != libc::SIGSTOP && !has_handler && stop_by(pid, thread, signal)? {
        return Ok(());
    }
    let id = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGSTOP)
        .with_context(|| format!("stopping process {pid}"))
}

/// Puts `signal` in the place of a SIGSTOP that the thread is about to take: only who takes a stop signal begins a group
/// stop. False where the kernel does not obey: signals of terminals stop nobody whose process group is orphaned.
fn stop_by(pid: i32, t: Tracee, signal: i32) -> Result<bool> {
    let stopping = || format!("stopping process {pid} by signal {signal}");
    let mask = t.sigmask()?;
    // No other comes first. SIGSTOP is never blocked.
    t.set_sigmask(!0)?;
    queue_signal(pid, t.tid, libc::SIGSTOP).with_context(stopping)?;
    t.cont(0)?;
    loop {
        match t.wait()? {
            Stop::Signal(libc::SIGSTOP) => break,
            Stop::Exited(_) | Stop::Killed(_) => return Ok(true),
            _ => t.cont(0)?,
        }
    }
    // Blocked it would be kept for later.
    t.set_sigmask(!(1 << (signal - 1)))?;
    // Before its next instruction it stops for us.
    t.interrupt().with_context(stopping)?;
    t.cont(signal)?;
    let stopped = loop {
        match t.wait()? {
            Stop::Interrupt { signal: by } => break by == signal,
            Stop::Exited(_) | Stop::Killed(_) => return Ok(true),
            _ => t.cont(0)?,
        }
    };
    t.set_sigmask(mask)?;
    Ok(stopped)
}
