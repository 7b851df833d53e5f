//! A process of its own that ends what we leave half-released.
//!
//! Until a tree of processes is let go all of them die with their tracer. Letting go takes a moment for
//! each; killed in the middle we would leave some running and some dead. The undertaker knows them all,
//! and when the pipe to us ends without our word it kills them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2, setsid};

use super::pidfd;

/// The word: all are released.
const DONE: i32 = 0;

/// Our end of the pipe to it.
pub struct Undertaker {
    pid: Pid,
    pipe: File,
}

impl Undertaker {
    /// Forks it; call it from a single-threaded program.
    pub fn start() -> Result<Self> {
        let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("making a pipe")?;
        // SAFETY: mistctl has one thread here, so the child may do anything.
        match unsafe { fork() }.context("forking")? {
            ForkResult::Child => {
                drop(write);
                serve(read);
                // SAFETY: ends this process without running our parent's destructors.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                pipe: write.into(),
            }),
        }
    }

    /// Tells it of a process that is to die if we do.
    pub fn know(&mut self, pid: i32) -> Result<()> {
        self.pipe
            .write_all(&pid.to_le_bytes())
            .context("telling the undertaker")
    }

    /// All are released: it has nothing to do.
    pub fn dismiss(mut self) -> Result<()> {
        self.pipe
            .write_all(&DONE.to_le_bytes())
            .context("telling the undertaker")?;
        waitpid(self.pid, None).context("waiting for the undertaker")?;
        Ok(())
    }
}

fn serve(read: OwnedFd) {
    // Not stopped or ended by the terminal's signals that end us.
    let _ = setsid();
    let mut pipe = File::from(read);
    let mut known = Vec::new();
    let mut word = [0u8; 4];
    while pipe.read_exact(&mut word).is_ok() {
        match i32::from_le_bytes(word) {
            DONE => return,
            pid => known.extend(pidfd::open(pid)),
        }
    }
    for p in known {
        let _ = pidfd::send_signal(p.as_fd(), libc::SIGKILL);
    }
}
