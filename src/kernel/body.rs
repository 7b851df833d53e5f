//! A fresh process to be rebuilt: a fork of us that does nothing.

use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};

use super::vacancy;

/// Forks a child that waits for signals for ever and dies with us; `pid` is the id it is to have
/// (clone3(2), set_tid: CAP_CHECKPOINT_RESTORE). It shares our descriptors' descriptions, and runs `first`
/// before it waits. `parent` is our id as it sees it: 0 when it is born in another pid namespace.
///
/// Call it from a single-threaded program: the child has only the calling thread.
pub fn fork_idle(pid: Option<i32>, parent: i32, first: &mut dyn FnMut()) -> io::Result<i32> {
    fork_with(0, pid, &mut || {
        die_with(parent);
        // A panic must not run on into what our parent would do next.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut *first));
        idle();
    })
}

/// Forks a child that runs `life` and ends; `flags` are those of clone3(2), without CLONE_VM, and `pid` as for
/// [`fork_idle`].
///
/// Call it from a single-threaded program: the child has only the calling thread.
pub fn fork_with(flags: u64, pid: Option<i32>, life: &mut dyn FnMut()) -> io::Result<i32> {
    let set_tid = pid.map(|p| [p]);
    let mut args = libc::clone_args {
        flags,
        exit_signal: libc::SIGCHLD as u64,
        ..zeroed_args()
    };
    if let Some(ids) = &set_tid {
        args.set_tid = ids.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    let is_taken = |e: &io::Error| e.raw_os_error() == Some(libc::EEXIST);
    let made = vacancy::once_free(pid, is_taken, || {
        // SAFETY: `args` is a live clone_args of the size passed, without CLONE_VM: the child goes on in its
        // own copy of memory, where no lock is held, for its parent has one thread.
        let r = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                size_of::<libc::clone_args>(),
            )
        };
        match r {
            0.. => Ok(r as i32),
            _ => Err(io::Error::last_os_error()),
        }
    })?;
    if made == 0 {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
        // SAFETY: ends this process without running our parent's destructors.
        unsafe { libc::_exit(0) }
    }
    Ok(made)
}

/// Makes this process the body: what returns is another process, a child of init's, that is to trace it, and
/// the body's pid with a descriptor whose end would end the body (until it is traced). The body runs `first`
/// and waits; no child of its is left, and no trace of one.
///
/// Call it from a single-threaded program.
///
/// # Errors
/// When no process can be made; we are who we were then.
pub fn step_aside(first: &mut dyn FnMut()) -> Result<(i32, OwnedFd)> {
    let body = std::process::id() as i32;
    let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("making a pipe");
    let (alive, tracer) = pipe()?;
    let (ready, not_ready) = pipe()?;
    match fork_silently().context(super::ONE_MORE)? {
        // The tracer is a child of a child that ends at once.
        0 => match fork_silently() {
            Ok(0) => {
                drop((alive, not_ready));
                // Signals to the program's group are none for us.
                let _ = nix::unistd::setsid();
                // Stopped before it has waited for that child, the body would keep it for ever.
                let mut byte = [0];
                while nix::unistd::read(&ready, &mut byte) == Err(nix::errno::Errno::EINTR) {}
                return Ok((body, tracer));
            }
            made => {
                // SAFETY: ends this process without running what our parent has still to run.
                unsafe { libc::_exit(i32::from(made.is_err())) }
            }
        },
        child => {
            let status = reap(child)?;
            if status != 0 {
                anyhow::bail!("the tracer could not be forked: no more processes");
            }
        }
    }
    drop((tracer, ready, not_ready));
    // A panic must not run on into what our caller would do next.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(first));
    let mut byte = [0];
    // Nothing is ever written: this ends with the tracer, if that has not taken us in hand before.
    while nix::unistd::read(&alive, &mut byte) == Err(nix::errno::Errno::EINTR) {}
    // SAFETY: ends this process without running what is the tracer's to run.
    unsafe { libc::_exit(125) }
}

/// fork(2) whose child ends without a signal to us.
fn fork_silently() -> io::Result<i32> {
    let mut args = zeroed_args();
    // SAFETY: as in `fork_idle`.
    let r = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r as i32)
    }
}

/// Waits for a child made by [`fork_silently`]; its wait status.
fn reap(child: i32) -> Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live i32.
        let r = unsafe { libc::waitpid(child, &mut status, libc::__WALL) };
        if r == child {
            return Ok(status);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e).context("waiting for a child");
        }
    }
}

fn zeroed_args() -> libc::clone_args {
    libc::clone_args {
        flags: 0,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    }
}

/// Lets us die with our parent, whose id `parent` is as we see it.
pub fn die_with(parent: i32) {
    // SAFETY: async-signal-safe calls with plain numbers. Whoever forked us and died before this line is
    // found out by the parent's id.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            libc::_exit(0);
        }
    }
}

fn idle() -> ! {
    loop {
        // SAFETY: async-signal-safe, without arguments.
        unsafe { libc::pause() };
    }
}

/// Unused results of calls that only matter when they fail.
pub fn check(what: &str, r: i64) -> Result<()> {
    if r < 0 {
        return Err(io::Error::from_raw_os_error(-r as i32)).with_context(|| what.to_owned());
    }
    Ok(())
}
