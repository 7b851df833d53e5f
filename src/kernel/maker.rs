//! A process with a chosen id and chosen credentials that makes unix sockets for us.
//!
//! The kernel notes who made a pair, who connected and who listened, and tells their peers (SO_PEERCRED,
//! unix(7)); nobody can change that afterwards. A maker shares our descriptor table, so what it makes is ours.
//! When it has ended its id is free for the program it was borrowed from, and the sockets keep naming it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::pid_ns::Entrance;
use super::{body, socket, vacancy};

/// Who a maker is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The id it is to have; None: any.
    pub pid: Option<i32>,
    /// Effective ids.
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// It ends with this value, and with us.
#[derive(Debug)]
pub struct Maker {
    pid: i32,
    line: UnixStream,
    /// Open as long as the maker uses it: its descriptors are ours.
    _theirs: UnixStream,
}

/// What it is asked for: an operation, three numbers, and an address of so many bytes.
const REQUEST: usize = 20;
/// What failed when it could not be had.
const READY: &str = "waiting for a process that makes sockets";
/// How long it waits to hear that its parent is there.
const PATIENCE: u16 = 10_000;
const PAIR: i32 = 1;
const LISTEN: i32 = 2;
const CONNECT: i32 = 3;
const PEER: i32 = 4;
const SENDER: i32 = 5;
/// What it answers: an errno or 0, and up to three numbers.
const ANSWER: usize = 16;

impl Maker {
    /// Starts it, in `namespace` if there is one. Call it from a single-threaded program.
    ///
    /// # Errors
    /// The id is taken, or choosing one needs CAP_CHECKPOINT_RESTORE.
    pub fn start(who: &Identity, namespace: Option<&Entrance>) -> Result<Self> {
        let (line, theirs) = UnixStream::pair().context("making a pair of sockets")?;
        let fork = |parent: i32| {
            let flags = libc::CLONE_FILES as u64;
            body::fork_with(flags, who.pid, &mut || serve(&theirs, who, parent))
                .map_err(|e| vacancy::explain(who.pid.unwrap_or(0), e))
        };
        let pid = match namespace {
            // Whose parent is outside, as it sees it.
            Some(n) => n.born_inside(|| fork(0))?,
            None => fork(std::process::id() as i32)?,
        };
        let me = Self {
            pid,
            line,
            _theirs: theirs,
        };
        let mut byte = [0];
        (&me.line).read_exact(&mut byte).context(READY)?;
        (&me.line).write_all(&byte).context(READY)?;
        Ok(me)
    }

    /// As we see it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// socketpair(2), close-on-exec.
    pub fn pair(&self, family: i32, kind: i32, protocol: i32) -> io::Result<(OwnedFd, OwnedFd)> {
        let [a, b, _] = self.ask([PAIR, family, kind, protocol], &[])?;
        // SAFETY: the maker has made them in our table and forgotten them.
        unsafe { Ok((OwnedFd::from_raw_fd(a), OwnedFd::from_raw_fd(b))) }
    }

    /// listen(2).
    pub fn listen(&self, fd: &OwnedFd, backlog: u32) -> io::Result<()> {
        let backlog = backlog.min(i32::MAX as u32) as i32;
        self.ask([LISTEN, fd.as_raw_fd(), backlog, 0], &[])
            .map(drop)
    }

    /// connect(2) to a struct sockaddr.
    pub fn connect(&self, fd: &OwnedFd, addr: &[u8]) -> io::Result<()> {
        self.ask([CONNECT, fd.as_raw_fd(), 0, 0], addr).map(drop)
    }

    /// SO_PEERCRED as it is seen in the maker's pid namespace: pid, uid, gid.
    pub fn peer(&self, fd: &OwnedFd) -> io::Result<(i32, u32, u32)> {
        let [pid, uid, gid] = self.ask([PEER, fd.as_raw_fd(), 0, 0], &[])?;
        Ok((pid, uid as u32, gid as u32))
    }

    /// Credentials of the sender of the message that is to be peeked at next, as they are seen in the maker's pid
    /// namespace: pid, uid, gid. SO_PEEK_OFF moves with it.
    pub fn sender(&self, fd: &OwnedFd) -> io::Result<(i32, u32, u32)> {
        let [pid, uid, gid] = self.ask([SENDER, fd.as_raw_fd(), 0, 0], &[])?;
        Ok((pid, uid as u32, gid as u32))
    }

    fn ask(&self, what: [i32; 4], addr: &[u8]) -> io::Result<[i32; 3]> {
        let mut request: Vec<u8> = what.iter().flat_map(|w| w.to_ne_bytes()).collect();
        request.extend((addr.len() as i32).to_ne_bytes());
        request.extend(addr);
        (&self.line).write_all(&request)?;
        let mut answer = [0; ANSWER];
        (&self.line).read_exact(&mut answer)?;
        match word(&answer, 0) {
            0 => Ok([1, 2, 3].map(|i| word(&answer, i))),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid);
        let _ = kill(pid, Signal::SIGKILL);
        // Its id is free only then.
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

fn word(bytes: &[u8], i: usize) -> i32 {
    bytes
        .get(4 * i..4 * i + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, i32::from_ne_bytes)
}

/// The life of a maker. It ends by a signal only: an end of file is not to be seen where descriptors are shared.
fn serve(line: &UnixStream, who: &Identity, parent: i32) {
    become_them(who);
    body::die_with(parent);
    let mut line = line;
    // Somebody who answers now has been there since we die with him.
    let mut byte = [1];
    let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
    let heard = line.write_all(&byte).is_ok() && poll(&mut fds, PATIENCE) == Ok(1);
    if !heard || line.read_exact(&mut byte).is_err() {
        return;
    }
    let mut request = [0; REQUEST];
    while line.read_exact(&mut request).is_ok() {
        let mut addr = vec![0; word(&request, 4).max(0) as usize];
        if line.read_exact(&mut addr).is_err() {
            return;
        }
        let [a, b, c] = [1, 2, 3].map(|i| word(&request, i));
        let made = match word(&request, 0) {
            PAIR => socket::pair(a, b, c).map(|(x, y)| [x.into_raw_fd(), y.into_raw_fd(), 0]),
            LISTEN => socket::listen(borrowed(a), b as u32).map(|()| [0; 3]),
            PEER => socket::peer_credentials(borrowed(a)).map(|(p, u, g)| [p, u as i32, g as i32]),
            SENDER => sender(borrowed(a)),
            _ => socket::connect(borrowed(a), &addr).map(|()| [0; 3]),
        };
        let (errno, words) = match made {
            Ok(words) => (0, words),
            Err(e) => (e.raw_os_error().unwrap_or(libc::EIO), [0; 3]),
        };
        let mut answer = errno.to_ne_bytes().to_vec();
        answer.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        if line.write_all(&answer).is_err() {
            return;
        }
    }
}

/// See [`Maker::sender`].
fn sender(fd: BorrowedFd<'_>) -> io::Result<[i32; 3]> {
    let mut some = [0];
    let received = socket::receive(fd, &mut some, libc::MSG_PEEK)?;
    let (pid, uid, gid) = received.credentials.unwrap_or_default();
    Ok([pid, uid as i32, gid as i32])
}

/// A descriptor that the asker holds open until he is answered.
fn borrowed<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: see above; it is used for one call.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Takes on credentials as far as we may, and keeps what we may do: whoever made the sockets could.
fn become_them(who: &Identity) {
    // linux/securebits.h: changing ids does not clear capabilities.
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    let (uid, gid) = (who.uid, who.gid);
    // SAFETY: plain numbers, and a list with its length; this process has one thread.
    unsafe {
        if libc::geteuid() == uid && libc::getegid() == gid {
            return;
        }
        libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP);
        libc::syscall(libc::SYS_setgroups, who.groups.len(), who.groups.as_ptr());
        libc::syscall(libc::SYS_setresgid, gid, gid, gid);
        libc::syscall(libc::SYS_setresuid, uid, uid, uid);
    }
}
