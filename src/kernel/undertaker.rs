//! A process of its own that ends what we leave half-released.
//!
//! Until a tree of processes is let go all of them die with their tracer. Letting go takes a moment for
//! each; killed in the middle we would leave some running and some dead. The undertaker knows them all,
//! and when the pipe to us ends without our word it kills them.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setsid};

use super::{fds, pidfd};

/// The word: all are released.
const DONE: i32 = 0;
/// A descriptor comes with this.
const KEEP: i32 = -1;
/// What it says when it has closed what it was born with.
const CLEAN: u8 = 1;

/// Our end of the line to it.
#[derive(Debug)]
pub struct Undertaker {
    pid: Pid,
    pipe: UnixStream,
}

impl Undertaker {
    /// Forks it; call it from a single-threaded program.
    pub fn start() -> Result<Self> {
        let (read, write) = UnixStream::pair().context("making a pair of sockets")?;
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
                pipe: write,
            }),
        }
    }

    /// Tells it of a process that is to die if we do.
    pub fn know(&mut self, pid: i32) -> Result<()> {
        self.pipe
            .write_all(&pid.to_le_bytes())
            .context("telling the undertaker")
    }

    /// Keeps a descriptor open as long as the pipe is: a page fault that nobody will answer waits until
    /// its process is killed, where with the last descriptor gone it would read zeros.
    pub fn keep_open(&mut self, fd: impl AsFd) -> Result<()> {
        let fds = [fd.as_fd().as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        let word = KEEP.to_le_bytes();
        let iov = [std::io::IoSlice::new(&word)];
        sendmsg::<()>(
            self.pipe.as_raw_fd(),
            &iov,
            &message,
            MsgFlags::empty(),
            None,
        )
        .context("giving a descriptor to the undertaker")?;
        Ok(())
    }

    /// Waits until it has nothing open any more that it has from us: a program that runs sooner may miss an
    /// end-of-file.
    ///
    /// # Errors
    /// It has ended.
    pub fn await_clean(&mut self) -> Result<()> {
        let mut word = [0];
        self.pipe
            .read_exact(&mut word)
            .context("waiting for the undertaker")
    }

    /// All are released: it has nothing to do.
    pub fn dismiss(self) -> Result<()> {
        self.second()?.dismiss()?;
        waitpid(self.pid, None).context("waiting for the undertaker")?;
        Ok(())
    }

    /// The line for another process, too: only when nobody has it any more is anything done.
    pub fn second(&self) -> Result<Line> {
        let pipe = self.pipe.try_clone();
        Ok(Line(pipe.context("doubling the undertaker's line")?))
    }
}

/// A line to an undertaker that another process has started.
#[derive(Debug)]
pub struct Line(UnixStream);

impl Line {
    /// As [`Undertaker::dismiss`], but for that nobody waits for its end.
    pub fn dismiss(&self) -> Result<()> {
        let told = (&self.0).write_all(&DONE.to_le_bytes());
        told.context("telling the undertaker")
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn serve(mut pipe: UnixStream) {
    // What is open here would be open for as long as we live.
    fds::close_all_but(&[pipe.as_fd()]);
    if pipe.write_all(&[CLEAN]).is_err() {
        return;
    }
    // Not stopped or ended by the terminal's signals that end us.
    let _ = setsid();
    let mut known = Vec::new();
    let mut kept = Vec::new();
    loop {
        let mut word = [0u8; 4];
        let mut iov = [IoSliceMut::new(&mut word)];
        let mut space = nix::cmsg_space!([i32; 4]);
        let got = recvmsg::<()>(
            pipe.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        );
        let Ok(got) = got else { break };
        // Words are sent whole: four bytes into an empty socket.
        if got.bytes != 4 {
            break;
        }
        for c in got.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(fds) = c {
                // SAFETY: the kernel has just installed these descriptors for this message.
                kept.extend(
                    fds.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        match i32::from_le_bytes(word) {
            DONE => return,
            KEEP => {}
            pid => known.extend(pidfd::open(pid)),
        }
    }
    for p in &known {
        let _ = pidfd::send_signal(p.as_fd(), libc::SIGKILL);
    }
    // Only with the processes dead may the descriptors go.
    for p in &known {
        let mut fds = [PollFd::new(p.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
    }
    drop(kept);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_one_holds_its_line_only() {
        for _ in 0..20 {
            let mut it = Undertaker::start().expect("start");
            it.await_clean().expect("clean");
            let open = std::fs::read_dir(format!("/proc/{}/fd", it.pid)).expect("its descriptors");
            assert_eq!(open.count(), 1);
            it.dismiss().expect("dismiss");
        }
    }
}
