//! The keeper: what becomes of the guardian after a dump that killed processes with TCP connections to
//! peers outside ([`super::tcp`] says why).
//!
//! It holds the sockets, in repair mode and deaf, and waits at an abstract unix address of the network
//! namespace that both the dump and a restore of its image can tell (the least socket cookie). A restore
//! connects, gets duplicates, and says when it has let them speak; then the keeper ends. A restore that
//! fails leaves it as it was. It serves its own user and root only, and gives up after a day.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::kernel::socket::{self, Extra, SCM_MAX_FD};
use crate::kernel::sockopt;

/// How long connections are kept.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// What a restore says when the sockets are its own.
const TAKEN: &[u8] = b"T";

/// Address of the keeper of sockets with these cookies.
pub(crate) fn name(cookies: impl Iterator<Item = u64>) -> Vec<u8> {
    format!("\0mist-keeper-{:x}", cookies.min().unwrap_or(0)).into_bytes()
}

fn address(name: &[u8]) -> Vec<u8> {
    let mut a = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    a.extend_from_slice(name);
    a
}

/// Opens the address of a keeper; who connects early waits.
pub fn listen(name: &[u8]) -> io::Result<OwnedFd> {
    let listener = socket::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    socket::bind(&listener, &address(name))?;
    socket::listen(&listener, 8)?;
    Ok(listener)
}

/// Holds `kept` until a restore takes them. Runs in a process of its own, without descriptors but these.
pub fn serve(listener: &OwnedFd, kept: &[OwnedFd]) {
    crate::kernel::guardian::rename(c"mist-keeper");
    let _ = std::env::set_current_dir("/");
    for fd in kept {
        // Its probes would find no answer (we let none in), and then reset the peer. The image knows how
        // the program had it.
        let _ = sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 0);
    }
    let _ = wait_for_restore(listener, kept);
}

fn wait_for_restore(listener: &OwnedFd, kept: &[OwnedFd]) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if !readable(listener, left)? {
            continue;
        }
        let client = socket::accept(listener)?;
        if trusted(&client) && give(&client, kept).unwrap_or(false) {
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the other end is of our user, or root.
fn trusted(peer: &OwnedFd) -> bool {
    let cred = sockopt::get(
        peer,
        libc::SOL_SOCKET,
        libc::SO_PEERCRED,
        size_of::<libc::ucred>(),
    );
    // struct ucred: pid, uid, gid.
    let uid = cred
        .ok()
        .and_then(|c| c.get(4..8)?.try_into().ok())
        .map(u32::from_ne_bytes);
    uid == Some(0) || uid == Some(nix::unistd::geteuid().as_raw())
}

/// Hands out duplicates; true when the other end has taken them over.
fn give(client: &OwnedFd, kept: &[OwnedFd]) -> io::Result<bool> {
    for some in kept.chunks(SCM_MAX_FD) {
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(AsFd::as_fd).collect();
        let extra = Extra {
            fds: &fds,
            ..Extra::default()
        };
        socket::send(client, b"S", &extra)?;
    }
    socket::send(client, b"E", &Extra::default())?;
    let mut answer = [0; 8];
    loop {
        readable(client, Duration::from_secs(3600))?;
        match socket::receive(client, &mut answer, 0) {
            Ok(r) => return Ok(answer.get(..r.len) == Some(TAKEN)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

pub(crate) fn readable(fd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], limit) {
        Ok(n) => Ok(n > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// A keeper that has handed its sockets out and waits for our word.
pub(crate) struct Claim {
    channel: OwnedFd,
    pub sockets: Vec<OwnedFd>,
}

impl Claim {
    /// Asks the keeper with this name; None where there is none to be trusted.
    pub fn ask(name: &[u8]) -> Option<Self> {
        let channel = socket::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0).ok()?;
        socket::connect(&channel, &address(name)).ok()?;
        if !trusted(&channel) {
            return None;
        }
        let mut sockets = Vec::new();
        let mut kind = [0; 8];
        loop {
            if !readable(&channel, Duration::from_secs(5)).ok()? {
                return None;
            }
            let mut r = socket::receive(&channel, &mut kind, 0).ok()?;
            sockets.append(&mut r.fds);
            match kind.get(..r.len) {
                Some(b"S") => {}
                Some(b"E") => return Some(Self { channel, sockets }),
                _ => return None,
            }
        }
    }

    /// The sockets are ours from here on: the keeper ends.
    pub fn taken(&self) {
        let _ = socket::send(&self.channel, TAKEN, &Extra::default());
    }
}
