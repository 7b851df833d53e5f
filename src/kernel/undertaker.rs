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
    line: Line,
}

impl Undertaker {
    /// Forks it; call it from a single-threaded program.
    pub fn start() -> Result<Self> {
        let (read, write) = UnixStream::pair().context("making a pair of sockets")?;
        // SAFETY: mistctl has one thread here, so the child may do anything.
        match unsafe { fork() }.context(super::ONE_MORE)? {
            ForkResult::Child => {
                drop(write);
                serve(read);
                // SAFETY: ends this process without running our parent's destructors.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                line: Line(write),
            }),
        }
    }

    /// Tells it of a process that is to die if we do, with all its children.
    pub fn know(&mut self, pid: i32) -> Result<()> {
        (&self.line.0)
            .write_all(&pid.to_le_bytes())
            .context("telling the undertaker")
    }

    /// See [`Line::keep_open`].
    pub fn keep_open(&self, fd: impl AsFd) -> Result<()> {
        self.line.keep_open(fd)
    }

    /// Waits until it has nothing open any more that it has from us: a program that runs sooner may miss an
    /// end-of-file.
    ///
    /// # Errors
    /// It has ended.
    pub fn await_clean(&mut self) -> Result<()> {
        let mut word = [0];
        (&self.line.0)
            .read_exact(&mut word)
            .context("waiting for the undertaker")
    }

    /// All are released: it has nothing to do.
    pub fn dismiss(self) {
        self.line.dismiss();
        // Ended by somebody else it is dismissed, too.
        let _ = waitpid(self.pid, None);
    }

    /// The line for another process, or another thread: only when nobody has it any more is anything done.
    pub fn second(&self) -> Result<Line> {
        self.line.second()
    }
}

/// The line to an undertaker.
#[derive(Debug)]
pub struct Line(UnixStream);

impl Line {
    /// Keeps a descriptor open as long as the line is: a page fault that nobody will answer waits until
    /// its process is killed, where with the last descriptor gone it would read zeros.
    pub fn keep_open(&self, fd: impl AsFd) -> Result<()> {
        let fds = [fd.as_fd().as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        let word = KEEP.to_le_bytes();
        let iov = [std::io::IoSlice::new(&word)];
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &iov,
            &message,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("giving a descriptor to the undertaker")?;
        Ok(())
    }

    pub fn second(&self) -> Result<Self> {
        let line = self.0.try_clone();
        Ok(Self(line.context("doubling the undertaker's line")?))
    }

    /// There is nothing to do any more. One that has ended knows it, too.
    pub fn dismiss(&self) {
        let _ = (&self.0).write_all(&DONE.to_le_bytes());
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
            pid => known.extend(pidfd::open(pid).map(|fd| (pid, fd))),
        }
    }
    gather(&mut known);
    for (_, p) in &known {
        let _ = pidfd::send_signal(p.as_fd(), libc::SIGKILL);
    }
    // Only with the processes dead may the descriptors go.
    for (_, p) in &known {
        let mut fds = [PollFd::new(p.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
    }
    drop(kept);
}

/// Adds what those processes have forked, and stops all of them, so that they fork no more.
fn gather(known: &mut Vec<(i32, OwnedFd)>) {
    let mut stopped = 0;
    while let Some(fresh) = known.get(stopped..).filter(|fresh| !fresh.is_empty()) {
        for (_, p) in fresh {
            let _ = pidfd::send_signal(p.as_fd(), libc::SIGSTOP);
        }
        stopped = known.len();
        let Ok(all) = std::fs::read_dir("/proc") else {
            return;
        };
        for pid in all
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
        {
            let is_known = |pid| known.iter().any(|(k, _)| *k == pid);
            let stat = super::proc_file::stat(pid);
            if !is_known(pid) && stat.is_ok_and(|s| is_known(s.ppid)) {
                known.extend(pidfd::open(pid).map(|fd| (pid, fd)));
            }
        }
    }
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
            it.dismiss();
        }
    }
}
