//! The process that traces is not the one that people kill.
//!
//! A tracer that is killed between the stop of a thread and its first act on it leaves the call that the stop broke
//! off as it is. So what the user has started only waits for a child, in a session of its own and with a name of its
//! own, that does the work. When the one he started dies, by whatever, the kernel sends the child SIGTERM
//! (PR_SET_PDEATHSIG), and the child dies of it where that does no harm: not as long as it has it [`Postponed`].

use std::io;

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getpid, getppid, setsid};

use super::guardian;

/// Name of the child (/proc/PID/comm).
const NAME: &std::ffi::CStr = c"mist-tracer";

/// What became of the child, to the process that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(u8),
    /// By this signal.
    Killed(Signal),
}

/// Goes on in a child (None), and waits for it. Call it from a single-threaded program.
///
/// # Errors
/// When no process can be made, or waited for.
pub fn step_apart() -> Result<Option<Ended>> {
    let by_default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // A caller that ignores them would have us wait for nothing, or the child outlive us.
    for signal in [Signal::SIGCHLD, Signal::SIGTERM] {
        // SAFETY: no handler is set.
        unsafe { sigaction(signal, &by_default) }.context("resetting a signal")?;
    }
    let started = getpid();
    // SAFETY: mistctl has one thread here, so the child may do anything.
    match unsafe { fork() }.context("forking")? {
        ForkResult::Child => {
            let _ = setsid();
            guardian::rename(NAME);
            SigSet::from(Signal::SIGTERM).thread_unblock()?;
            // SAFETY: plain numbers.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } < 0 {
                return Err(io::Error::last_os_error()).context("PR_SET_PDEATHSIG");
            }
            if getppid() != started {
                // SAFETY: ends this process, which nobody waits for.
                unsafe { libc::_exit(1) }
            }
            Ok(None)
        }
        ForkResult::Parent { child } => loop {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Some(Ended::Exited(code as u8))),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Some(Ended::Killed(signal))),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e).context("waiting for the process that does the work"),
            }
        },
    }
}

/// As long as this lives, the death of who started us does not end the calling thread's work.
#[derive(Debug)]
pub struct Postponed(Option<SigSet>);

impl Postponed {
    pub fn new() -> Self {
        let term = SigSet::from(Signal::SIGTERM);
        // It fails for unknown signals only.
        Self(term.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok())
    }
}

impl Default for Postponed {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Postponed {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = before.thread_set_mask();
        }
    }
}
