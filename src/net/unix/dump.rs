//! Unix sockets, state -> image.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, bail};

use super::pieces::Pieces;
use super::{ESTABLISHED, LISTEN, display, is_path, name, strip};
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::sockets::{PeerCreds, Unix, UnixFile, UnixMessage};
use crate::kernel::guardian::{Guardian, Undo};
use crate::kernel::maker::Maker;
use crate::kernel::sock_diag::UnixDiag;
use crate::kernel::socket::{self, Received};
use crate::kernel::sockopt::{self, Queue};
use crate::net::messages::{Messages, Peeked, peek_messages};
use crate::net::{Describe, Diag, Met, SocketDumper, bytes, no_urgent_byte};

/// Peeks what a unix socket has received, descriptors in flight included.
pub(crate) fn read_queue(
    d: &mut SocketDumper,
    index: usize,
    describe: &mut Describe<'_>,
) -> Result<Vec<UnixMessage>> {
    let Some(met) = d.met.get(index) else {
        return Ok(Vec::new());
    };
    let mut warning = None;
    let messages = peek(d, met, &mut warning)
        .with_context(|| format!("{}: reading its queue", met.place()))?;
    let (pid, ino, dgram) = (met.pid, met.ino, met.kind == libc::SOCK_DGRAM);
    d.warnings.extend(warning);
    d.unaided.extend(messages.unaided.map(|why| (ino, why)));
    let mut queue = Vec::new();
    for (data, received) in messages.all {
        let mut descriptions = Vec::new();
        for fd in received.fds {
            descriptions.push(
                describe(d, fd)
                    .with_context(|| format!("pid {pid}: a descriptor in flight in a socket"))?,
            );
        }
        queue.push(UnixMessage {
            data: Bytes(data),
            from: if dgram {
                bytes(name(&received.from))
            } else {
                None
            },
            descriptions,
            credentials: received.credentials,
        });
    }
    Ok(queue)
}

/// Descriptors in front of its queue.
pub(crate) fn in_flight(met: &Met) -> Vec<OwnedFd> {
    // Where the program peeks by position, so would we.
    let peeks = sockopt::get_int(&met.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF);
    if peeks.is_ok_and(|offset| offset >= 0) {
        return Vec::new();
    }
    match socket::receive(&met.fd, &mut [0; 1], libc::MSG_PEEK) {
        Ok(received) => received.fds,
        Err(_) => Vec::new(),
    }
}

/// What is in the queue of a socket. Senders are seen by the ids that they have inside, dead ones too.
fn peek(d: &SocketDumper, met: &Met, warning: &mut Option<String>) -> Result<Messages> {
    let listening = sockopt::get_int(&met.fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?;
    let events = socket::poll_now(&met.fd).context("poll")?;
    if listening != 0 || events & libc::POLLIN == 0 {
        return Ok(Messages::default());
    }
    if met.kind == libc::SOCK_STREAM {
        let total = sockopt::queued(&met.fd, Queue::In).context("ioctl(SIOCINQ)")? as usize;
        let all = peek_stream(&met.fd, total, &d.guardian, d.inside.as_ref())?;
        return Ok(Messages { all, unaided: None });
    }
    if events & libc::POLLERR != 0 {
        // A receive would take the error away, and it cannot be put back.
        *warning = Some(format!(
            "{}: an error is pending on its socket; what it has received is not carried",
            met.place()
        ));
        return Ok(Messages::default());
    }
    peek_messages(d, met, events & libc::POLLRDHUP != 0)
}

/// Holds SO_PEEK_OFF while we walk a queue; puts the program's own value back.
pub(crate) struct PeekOffset<'a> {
    fd: &'a OwnedFd,
    old: i32,
    undo: Option<(crate::kernel::guardian::UndoId, &'a Guardian)>,
}

impl<'a> PeekOffset<'a> {
    pub fn new(fd: &'a OwnedFd, guardian: &'a Guardian) -> io::Result<Self> {
        let old = sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let id = guardian.protect(
            fd,
            &Undo::Options(vec![(
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                old.to_ne_bytes().to_vec(),
            )]),
        )?;
        let p = Self {
            fd,
            old,
            undo: Some((id, guardian)),
        };
        p.seek(0)?;
        Ok(p)
    }

    /// The next peeks see what stands in front, as without us.
    pub fn leave(&self) -> io::Result<()> {
        sockopt::set_int(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)
    }

    pub fn seek(&self, to: usize) -> io::Result<()> {
        sockopt::set_int(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, to as i32)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        let put = sockopt::set_int(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, self.old);
        if let (Ok(()), Some((id, guardian))) = (put, self.undo) {
            let _ = guardian.forget(id);
        }
    }
}

/// A stream's `total` bytes: a run for each boundary that a reader could see, which descriptors and, with
/// SO_PASSCRED, a change of sender make. Never asks for more than there is, for at the end of the queue a
/// receive would take a pending error.
fn peek_stream(
    fd: &OwnedFd,
    total: usize,
    guardian: &Guardian,
    inside: Option<&Maker>,
) -> Result<Peeked> {
    let mut all = Peeked::new();
    if total == 0 {
        return Ok(all);
    }
    let mut buffer = vec![0u8; total];
    if sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)? < 0 {
        let mut r =
            socket::receive(fd, &mut buffer, libc::MSG_PEEK).context("recvmsg(MSG_PEEK)")?;
        if r.len == total && r.fds.is_empty() {
            see_sender(fd, &mut r, inside)?;
            return Ok(vec![(buffer, r)]);
        }
    }
    let offset = PeekOffset::new(fd, guardian).context("setsockopt(SO_PEEK_OFF)")?;
    let mut at = 0;
    while at < total {
        offset.seek(at)?;
        let room = buffer.get_mut(at..).unwrap_or_default();
        let mut r = socket::receive(fd, room, libc::MSG_PEEK).context("recvmsg(MSG_PEEK)")?;
        if r.len == 0 {
            bail!("{at} of {total} bytes could be read");
        }
        offset.seek(at)?;
        see_sender(fd, &mut r, inside)?;
        let end = at + r.len;
        let mut start = at;
        if !r.fds.is_empty() {
            // Descriptors come with the last piece of this run, which always fits as a
            // whole (there is room for all): find where that piece begins.
            let mut scratch = vec![0u8; r.len - 1];
            offset.seek(at)?;
            start =
                at + socket::peek_whole_pieces(fd, &mut scratch).context("recvmsg(MSG_PEEK)")?;
        }
        if start > at {
            let data = buffer.get(at..start).unwrap_or_default().to_vec();
            all.push((
                data,
                Received {
                    credentials: r.credentials,
                    ..Received::default()
                },
            ));
        }
        r.len = end - start;
        all.push((buffer.get(start..end).unwrap_or_default().to_vec(), r));
        at = end;
    }
    Ok(all)
}

/// The bytes that a stream socket of another process has received and that process has not read. Nothing is
/// consumed.
///
/// # Errors
/// When they cannot be peeked.
pub fn peek_bytes(fd: &OwnedFd, guardian: &Guardian) -> Result<Vec<u8>> {
    let total = sockopt::queued(fd, Queue::In).context("ioctl(SIOCINQ)")? as usize;
    let mut all = Vec::with_capacity(total);
    for (bytes, _) in peek_stream(fd, total, guardian, None)? {
        all.extend(bytes);
    }
    Ok(all)
}

/// Names the sender of what has been peeked at, and is next to be peeked at once more, by the id he has inside.
fn see_sender(fd: &OwnedFd, r: &mut Received, inside: Option<&Maker>) -> Result<()> {
    if let (Some(inside), Some(sender)) = (inside, &mut r.credentials) {
        *sender = inside.sender(fd).context("asking for a sender")?;
    }
    Ok(())
}

/// Names, peer and state of a unix socket whose queue has been read.
pub(crate) fn read(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    warnings: &mut Vec<String>,
    queue: Vec<UnixMessage>,
) -> Result<Unix> {
    let Some(x) = diag.unix.get(&met.ino) else {
        return Err(Failure::Refused.because(format!(
            "{}: sock_diag does not know its unix socket; it belongs to another network namespace, run mistctl there: nsenter -t {} -n mistctl ...",
            met.place(),
            met.pid
        )));
    };
    no_urgent_byte(met)?;
    let mut u = Unix {
        name: Bytes(strip(&x.name)),
        shutdown: x.shutdown & 3,
        queue,
        peer_creds: peer_creds(d, &met.fd),
        ..Unix::default()
    };
    if x.state == LISTEN {
        u.backlog = Some(x.send_queue);
        read_pending(d, met, x, &mut u, warnings)?;
    } else if met.kind == libc::SOCK_DGRAM {
        read_dgram_peer(d, met, x, &mut u)?;
        see_passed(d, met, diag, &u, warnings)?;
    } else if x.state == ESTABLISHED {
        read_peer(d, met, diag, x, &mut u)?;
        if met.kind == libc::SOCK_STREAM {
            u.charged = sockopt::queued(&met.fd, Queue::Out).unwrap_or(0);
        }
        see_passed(d, met, diag, &u, warnings)?;
    }
    if is_path(&u.name) && !u.accepted {
        u.file = read_file(met, &u.name, warnings);
    }
    Ok(u)
}

/// Connections that a listening socket has not given out yet.
fn read_pending(
    d: &SocketDumper,
    met: &Met,
    x: &UnixDiag,
    u: &mut Unix,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let refuse = |what: String| {
        Failure::Refused.because(format!(
            "{}: a connection to {} that was not accepted yet {what}; try again in a moment",
            met.place(),
            display(&u.name)
        ))
    };
    let mut holds_data = false;
    let mut closed = 0;
    for client in x.pending.iter().map(|c| u64::from(*c)) {
        match d.index_of(client) {
            // sock_diag is silent about the end that was not accepted; the client's end tells how much memory it
            // has in flight towards it.
            Some(c) => holds_data |= sockopt::queued(&c.fd, Queue::Out).unwrap_or(0) > 0,
            None if client == 0 => closed += 1,
            None => {
                return Err(refuse(
                    "is from outside the dump, and its client would not know; dump both together (--tree)"
                        .to_owned(),
                ));
            }
        }
    }
    u.pending = x.pending.iter().map(|c| u64::from(*c)).collect();
    if !holds_data && closed == 0 {
        return Ok(());
    }
    let read = d
        .unaccepted()
        .and_then(|r| r.unix(met.fd.as_fd()).map_err(|e| format!("{e:#}")));
    match read {
        Ok(queues) if queues.len() == u.pending.len() => u.pending_queues = queues,
        Ok(_) => return Err(refuse("came right now".to_owned())),
        Err(why) if holds_data => {
            return Err(refuse(format!(
                "holds data, which only the kernel's memory shows ({why})"
            )));
        }
        Err(why) => {
            u.pending.retain(|c| *c != 0);
            warnings.push(format!(
                "{}: {closed} connections that were closed before they were accepted are not carried ({why})",
                met.place()
            ));
        }
    }
    Ok(())
}

fn read_peer(d: &SocketDumper, met: &Met, diag: &Diag, x: &UnixDiag, u: &mut Unix) -> Result<()> {
    let ino = u32::try_from(met.ino).unwrap_or(0);
    let listened = |n: &[u8]| {
        diag.unix
            .values()
            .any(|o| o.state == LISTEN && strip(&o.name) == n)
    };
    match x.peer {
        Some(p) if p != 0 => {
            let other = diag.unix.get(&u64::from(p));
            let peer_name = other.map(|o| strip(&o.name)).unwrap_or_default();
            // The accepted end of a connection has its listener's name.
            u.accepted = !u.name.is_empty() && (listened(&u.name) || !listened(&peer_name));
            if d.index_of(u64::from(p)).is_some() {
                u.peer = Some(u64::from(p));
            } else {
                outside(d, met, u, &peer_name)?;
            }
        }
        _ => {
            let listener = diag.unix.values().find(|o| o.pending.contains(&ino));
            match listener {
                Some(l) if d.index_of(u64::from(l.ino)).is_some() => {}
                Some(l) => outside(d, met, u, &strip(&l.name))?,
                None => {
                    u.peer_closed = true;
                    u.reset = socket::poll_now(&met.fd)? & libc::POLLERR != 0;
                    u.accepted = !u.name.is_empty();
                }
            }
        }
    }
    Ok(())
}

/// Says how many messages without bytes a walk has passed over: their sender is charged with them. Of senders outside,
/// and of unconnected ones, nobody knows.
fn see_passed(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    u: &Unix,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let (Some(why), Some(peer)) = (d.unaided.get(&met.ino), u.peer) else {
        return Ok(());
    };
    let sender = diag.unix.get(&peer);
    let Some(sender) = sender.filter(|s| s.peer.map(u64::from) == Some(met.ino)) else {
        return Ok(());
    };
    let mut pieces = Pieces::of(met.kind);
    let lengths = u.queue.iter().map(|m| m.data.len());
    let found = lengths.map(|len| pieces.charge(len)).sum::<Result<usize>>();
    // One may be larger than we may send.
    let (Ok(found), Ok(one)) = (found, pieces.charge(0)) else {
        return Ok(());
    };
    let passed = (sender.send_queue as usize).saturating_sub(found) / one.max(1);
    if passed == 0 {
        return Ok(());
    }
    let what = format!(
        "{}: {passed} messages without bytes stand unread in its socket, where only kernel memory shows them ({why}): run mistctl as root, or let the program read first",
        met.place()
    );
    if met.kind == libc::SOCK_SEQPACKET {
        return Err(Failure::Refused.because(what));
    }
    // The sender may have sent to others too.
    warnings.push(format!("{what}; they are not carried"));
    Ok(())
}

fn read_dgram_peer(d: &SocketDumper, met: &Met, x: &UnixDiag, u: &mut Unix) -> Result<()> {
    let Some(peer) = x.peer else { return Ok(()) };
    let peer_name = name(&socket::peer_name(&met.fd).unwrap_or_default());
    if peer == 0 {
        u.peer_closed = true;
    } else if d.index_of(u64::from(peer)).is_some() {
        u.peer = Some(u64::from(peer));
    } else if peer_name.is_empty() {
        outside(d, met, u, &peer_name)?;
    }
    if !u.peer_closed {
        u.peer_name = bytes(peer_name);
    }
    Ok(())
}

/// What the socket tells of whoever made it.
fn peer_creds(d: &SocketDumper, fd: &OwnedFd) -> Option<PeerCreds> {
    let asked = match &d.inside {
        Some(inside) => inside.peer(fd),
        None => socket::peer_credentials(fd),
    };
    let (pid, uid, gid) = asked.ok()?;
    // 0: none, or one of a pid namespace that we do not see.
    (pid > 0).then_some(PeerCreds { pid, uid, gid })
}

/// The peer lives outside the dump: a place-holder where that is allowed.
fn outside(d: &SocketDumper, met: &Met, u: &mut Unix, peer_name: &[u8]) -> Result<()> {
    let who = u
        .peer_creds
        .map(|c| c.pid)
        .filter(|_| met.kind != libc::SOCK_DGRAM);
    let mut what = "unix socket".to_owned();
    if !peer_name.is_empty() {
        what += &format!(" to {}", display(peer_name));
    }
    if let Some(pid) = who {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        what += &format!(", made with pid {pid} ({})", comm.trim_end());
    }
    if !met.standard && !d.options.outside && !d.is_pvmd(met) {
        return Err(Failure::Refused.because(format!(
            "{}: the other end of its {what} is outside the dump and would not know; dump both together (--tree), or let the program close it first",
            met.place()
        )));
    }
    u.outside = Some(what);
    Ok(())
}

/// The file a socket was bound to. Without CAP_NET_ADMIN (SIOCUNIXFILE) it is looked up by its name.
fn read_file(met: &Met, path: &[u8], warnings: &mut Vec<String>) -> Option<UnixFile> {
    let Ok(file) = socket::unix_file(&met.fd) else {
        if path.first() != Some(&b'/') {
            warnings.push(format!(
                "{}: cannot tell the directory of socket {}",
                met.place(),
                display(path)
            ));
        }
        return Some(UnixFile {
            mode: 0o755,
            ..UnixFile::default()
        });
    };
    let stat = nix::sys::stat::fstat(&file).ok()?;
    let mut full = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok()?
        .as_os_str()
        .as_bytes()
        .to_vec();
    if let Some(live) = full.strip_suffix(b" (deleted)")
        && stat.st_nlink == 0
    {
        full = live.to_vec();
    }
    let relative = path.first() != Some(&b'/');
    Some(UnixFile {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        directory: relative
            .then(|| full.strip_suffix(path).map(|d| Bytes(d.to_vec())))
            .flatten(),
        unlinked: stat.st_nlink == 0,
    })
}
