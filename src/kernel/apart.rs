//! The process that traces is not the one that people kill.
//!
//! A tracer that is killed between the stop of a thread and its first act on it leaves the call that the stop broke
//! off as it is. So what the user has started only waits for a child, in a session of its own and with a name of its
//! own, that does the work. When the one he started dies, by whatever, the kernel sends the child SIGTERM
//! (PR_SET_PDEATHSIG), and the child dies of it where that does no harm: not as long as it has it [`Postponed`].

use std::io;
use std::ptr;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, raise, sigaction,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, setsid};

use super::guardian;

/// Name of the child (/proc/PID/comm).
const NAME: &std::ffi::CStr = c"mist-tracer";

/// By which people end a program, and let it clean up.
const CALL_OFF: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// What became of the child, to the process that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(u8),
    /// By this signal.
    Killed(Signal),
    /// By us, who were asked by this signal.
    CalledOff(Signal),
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
    let before = SigSet::thread_get_mask()?;
    let waited: SigSet = CALL_OFF
        .into_iter()
        .filter(|s| !before.contains(*s) && !is_ignored(*s))
        .chain([Signal::SIGCHLD])
        .collect();
    waited.thread_block()?;
    let started = getpid();
    // SAFETY: mistctl has one thread here, so the child may do anything.
    match unsafe { fork() }.context(super::ONE_MORE)? {
        ForkResult::Child => {
            before.thread_set_mask()?;
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
        ForkResult::Parent { child } => {
            let ended = wait(child, &waited)?;
            before.thread_set_mask()?;
            Ok(Some(ended))
        }
    }
}

/// Waits for the child, and ends it when one of the signals `waited` comes.
fn wait(child: Pid, waited: &SigSet) -> Result<Ended> {
    let mut asked = None;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(Ended::Exited(code as u8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return Ok(asked.map_or(Ended::Killed(signal), Ended::CalledOff));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for the process that does the work"),
        }
        match waited.wait() {
            Ok(Signal::SIGCHLD) | Err(Errno::EINTR) => {}
            // It does not come to its end: a second time is once too often.
            Ok(signal) if asked == Some(signal) => return Ok(Ended::CalledOff(signal)),
            Ok(signal) => {
                asked = Some(signal);
                kill(child, Signal::SIGTERM).context("ending the process that does the work")?;
            }
            Err(e) => return Err(e).context("waiting for signals"),
        }
    }
}

/// Ends this process as a signal does that nobody handles.
pub fn end_by(signal: Signal) -> ! {
    let _ = SigSet::from(signal).thread_unblock();
    let _ = raise(signal);
    // SAFETY: ends this process.
    unsafe { libc::_exit(128 + signal as i32) }
}

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: zeros are a struct sigaction, and nothing is set.
    let now = unsafe {
        let mut now = std::mem::zeroed::<libc::sigaction>();
        libc::sigaction(signal as i32, ptr::null(), &raw mut now);
        now
    };
    now.sa_sigaction == libc::SIG_IGN
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
