//! Processes by descriptor (pidfd_open(2)), and their descriptors (pidfd_getfd(2)).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

/// Flag of [`open_thread`]: the pidfd names a thread, not its whole process (linux/pidfd.h, since 6.9).
const PIDFD_THREAD: libc::c_uint = libc::O_EXCL as libc::c_uint;

fn open_with(pid: i32, flags: libc::c_uint) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, flags))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// A descriptor for process `pid`. Fails with ESRCH when there is none; close-on-exec.
pub fn open(pid: i32) -> Result<OwnedFd> {
    open_with(pid, 0).with_context(|| format!("process {pid}: pidfd_open"))
}

/// A descriptor for thread `tid`, which may be another than its process's leader (that may be dead).
pub fn open_thread(tid: i32) -> Result<OwnedFd> {
    match open_with(tid, PIDFD_THREAD) {
        // Before 6.9: only leaders.
        Err(Errno::EINVAL) => open(tid),
        other => other.with_context(|| format!("thread {tid}: pidfd_open")),
    }
}

/// A duplicate, in this process, of descriptor `fd` of the process behind `pidfd`; close-on-exec. It shares the
/// open file description (position, flags, locks) with the original. Needs PTRACE_MODE_ATTACH_REALCREDS.
pub fn get_fd(pidfd: BorrowedFd<'_>, fd: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and returns a new descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_pidfd_getfd,
            pidfd.as_raw_fd(),
            fd,
            0,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Sends `signal` (0 only asks) to the process behind `pidfd`; never to one that took over its pid.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: pidfd_send_signal with a null siginfo reads no memory of ours.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(r).map(drop)
}

/// A pidfd of a process that has ended and been waited for.
pub fn of_dead_process() -> Result<OwnedFd> {
    // SAFETY: the child does nothing but _exit, which is safe after a fork in any circumstances.
    let child = match Errno::result(unsafe { libc::fork() }).context("fork")? {
        // SAFETY: see above.
        0 => unsafe { libc::_exit(0) },
        child => child,
    };
    let fd = open(child);
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).context("waitpid")?;
    fd
}
