//! What was queued in unix sockets, once they are there; then what must come behind it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::display;
use super::names::{base_of, bind_unseen, reach};
use super::pieces::Pieces;
use super::restore::{is_paired, of};
use crate::image::sockets::{Socket, Unix, UnixMessage};
use crate::kernel::socket::{self, Extra};
use crate::net::makers::Makers;
use crate::net::options::{self, Phase};
use crate::net::{FdOf, Restorer};

/// Fills the queues, then sets shutdown states, options and the connections that wait for that.
pub(crate) fn fill(r: &mut Restorer, fd_of: &FdOf<'_>, makers: &mut Makers<'_>) -> Result<()> {
    let sockets = std::mem::take(&mut r.sockets);
    let result = fill_all(r, &sockets, fd_of, makers);
    r.sockets = sockets;
    result
}

fn fill_all(
    r: &mut Restorer,
    sockets: &[Socket],
    fd_of: &FdOf<'_>,
    makers: &mut Makers<'_>,
) -> Result<()> {
    let messages = sockets.iter().filter_map(of).flat_map(|u| &u.queue);
    let sending = Sending::new(messages, fd_of, makers);
    let sizes = queues(r, sockets, &sending)?;
    ends(r, sockets, &sizes)?;
    connect_by_name(r, sockets);
    for (i, s) in sockets.iter().enumerate() {
        if let (Some(_), Some(Some(fd))) = (of(s), r.fds.get(i)) {
            options::apply(fd, s, Phase::Late, &mut r.warnings);
        }
    }
    Ok(())
}

/// Sends what was not read; the sizes that the senders' buffers had.
fn queues(
    r: &Restorer,
    sockets: &[Socket],
    sending: &Sending<'_, '_>,
) -> Result<HashMap<usize, options::BufferSizes>> {
    let mut sizes = HashMap::new();
    let mut pieces = Pieces::of(libc::SOCK_STREAM);
    for (i, s) in sockets.iter().enumerate() {
        let Some(u) = of(s).filter(|u| u.outside.is_none()) else {
            continue;
        };
        if u.queue.is_empty() || !matches!(r.fds.get(i), Some(Some(_))) {
            continue;
        }
        let total: usize = u.queue.iter().map(|m| m.data.len() + 1024).sum();
        let peer = u.peer.and_then(|p| r.by_ino.get(&p)).copied();
        let sender = match peer {
            Some(p) => r.fds.get(p).and_then(Option::as_ref),
            None => r.partners.get(&i),
        };
        if let (Some(p), Some(fd)) = (peer, sender) {
            sizes.entry(p).or_insert_with(|| options::buffer_sizes(fd));
        }
        let context = || {
            format!(
                "socket {i} of the image, unix {}: filling its queue",
                display(&u.name)
            )
        };
        let peer = peer.and_then(|p| sockets.get(p)).and_then(of);
        let mut queue = Refill {
            bytes: u.queue.iter().map(|m| m.data.len()).sum(),
            // No more than there is room for.
            charge: peer
                .map_or(0, |p| p.charged as usize)
                .min(total.saturating_mul(4).max(4 << 20)),
            pieces: &mut pieces,
        };
        for m in &u.queue {
            if s.kind == libc::SOCK_DGRAM {
                fill_dgram(r, sockets, (i, u), sender, m, sending).with_context(context)?;
            } else if let Some(sender) = sender {
                options::enlarge_buffers(sender, total);
                if s.kind == libc::SOCK_STREAM && queue.charge > 0 {
                    queue.send(sender, m, sending).with_context(context)?;
                } else {
                    send_all(sender, None, m, sending).with_context(context)?;
                }
            } else {
                bail!("the image is damaged: {} with nobody to send", context());
            }
        }
    }
    Ok(sizes)
}

/// Closes what was closed, and makes buffers as large as they were.
fn ends(
    r: &mut Restorer,
    sockets: &[Socket],
    sizes: &HashMap<usize, options::BufferSizes>,
) -> Result<()> {
    for (i, s) in sockets.iter().enumerate() {
        let Some(u) = of(s).filter(|u| u.outside.is_none()) else {
            continue;
        };
        let Some(Some(fd)) = r.fds.get(i) else {
            continue;
        };
        if u.reset && r.partners.contains_key(&i) {
            // It is closed with a byte unread: that is what makes a reset.
            socket::send(fd, b"\0", &Extra::default()).context("send before a reset")?;
        }
        r.partners.remove(&i);
        if let Some(sizes) = sizes.get(&i) {
            options::restore_buffers(fd, sizes);
        }
        // Both ends' masks mirror each other; of a socket whose peer is gone the kernel set it.
        if u.shutdown != 0 && !u.peer_closed {
            socket::shutdown(fd, u.shutdown)
                .or_else(|e| match e.raw_os_error() {
                    Some(libc::ENOTCONN) => Ok(()),
                    _ => Err(e),
                })
                .with_context(|| format!("socket {i} of the image: shutdown"))?;
        }
    }
    Ok(())
}

fn connect_by_name(r: &mut Restorer, sockets: &[Socket]) {
    for (i, name) in std::mem::take(&mut r.unix.connect) {
        let Some(Some(fd)) = r.fds.get(i) else {
            continue;
        };
        let base = sockets
            .iter()
            .filter_map(of)
            .find(|u| *u.name == *name && u.file.is_some())
            .map(base_of)
            .unwrap_or_default();
        let connected =
            reach(&name, &base).and_then(|(_directory, to)| Ok(socket::connect(fd, &to)?));
        if let Err(e) = connected {
            r.warnings.push(format!(
                "socket {i} of the image: its peer {} is not there ({e:#}); the program will see it as gone",
                display(&name)
            ));
        }
    }
}

/// What the kernel shows for a user that it does not know (/proc/sys/kernel/overflowuid).
const OVERFLOW_UID: u32 = 65534;

/// pid, uid, gid.
type Creds = (i32, u32, u32);

/// What messages are sent with.
pub(super) struct Sending<'a, 'b> {
    fd_of: &'a FdOf<'b>,
    /// What can be sent for the credentials of a message.
    senders: HashMap<Creds, Creds>,
}

impl<'a, 'b> Sending<'a, 'b> {
    /// A sender has to be there to be named.
    pub(super) fn new<'m>(
        messages: impl Iterator<Item = &'m UnixMessage>,
        fd_of: &'a FdOf<'b>,
        makers: &mut Makers<'_>,
    ) -> Self {
        // Without a pid and under this user: nobody has asked for any.
        let all = messages
            .filter_map(|m| m.credentials)
            .filter(|c| c.0 > 0 || c.1 != OVERFLOW_UID);
        let senders = all.map(|c| (c, makers.sender(c))).collect();
        Self { fd_of, senders }
    }
}

/// A stream whose bytes are sent again in pieces, so that its sender is charged with what he was.
struct Refill<'a> {
    /// To be sent, and what that is to be charged with.
    bytes: usize,
    charge: usize,
    pieces: &'a mut Pieces,
}

impl Refill<'_> {
    /// The next of its runs.
    fn send(&mut self, from: &OwnedFd, m: &UnixMessage, sending: &Sending<'_, '_>) -> Result<()> {
        let mut rest: &[u8] = &m.data;
        loop {
            // What came with descriptors came in one piece.
            let len = if m.descriptions.is_empty() {
                self.pieces.next(self.bytes, self.charge)?.min(rest.len())
            } else {
                rest.len()
            };
            let (piece, behind) = rest.split_at(len);
            send_bytes(from, None, m, piece, sending)?;
            self.bytes = self.bytes.saturating_sub(len);
            self.charge = self.charge.saturating_sub(self.pieces.charge(len)?);
            rest = behind;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }
}

/// Sends one stored message from `from`, in one piece if it can be.
pub(super) fn send_all(
    from: impl AsFd,
    to: Option<&[u8]>,
    m: &UnixMessage,
    sending: &Sending<'_, '_>,
) -> Result<()> {
    send_bytes(from, to, m, &m.data, sending)
}

/// Some of its bytes.
fn send_bytes(
    from: impl AsFd,
    to: Option<&[u8]>,
    m: &UnixMessage,
    bytes: &[u8],
    sending: &Sending<'_, '_>,
) -> Result<()> {
    let from = from.as_fd();
    let mut fds = Vec::new();
    for d in &m.descriptions {
        fds.push((sending.fd_of)(*d).with_context(|| format!("description {d}, in flight"))?);
    }
    let mut extra = Extra {
        to,
        fds: &fds,
        credentials: (m.credentials).and_then(|c| sending.senders.get(&c).copied()),
    };
    let mut rest = bytes;
    loop {
        let sent = match socket::send(from, rest, &extra) {
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EPERM))
                    && extra.credentials.is_some() =>
            {
                // Its sender is not there any more: the kernel then takes no pid but our own.
                extra.credentials = extra.credentials.map(|(_, uid, gid)| (own_pid(), uid, gid));
                socket::send(from, rest, &extra)
            }
            other => other,
        };
        let n = sent.with_context(|| format!("sendmsg of {} bytes", rest.len()))?;
        rest = rest.get(n..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        extra.fds = &[];
    }
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// Sends one datagram from a socket with the right name.
fn fill_dgram(
    r: &Restorer,
    sockets: &[Socket],
    (i, u): (usize, &Unix),
    peer: Option<&OwnedFd>,
    m: &UnixMessage,
    sending: &Sending<'_, '_>,
) -> Result<()> {
    let from = m.from.as_deref().unwrap_or_default();
    let size = m.data.len() + 1024;
    let send_from = |sender: &OwnedFd, to: Option<&[u8]>| {
        let sizes = options::buffer_sizes(sender);
        options::enlarge_buffers(sender, size);
        let sent = send_all(sender, to, m, sending);
        options::restore_buffers(sender, &sizes);
        sent
    };
    let peer_name = u
        .peer
        .and_then(|p| r.by_ino.get(&p))
        .and_then(|p| sockets.get(*p))
        .and_then(of)
        .map(|p| p.name.to_vec())
        .unwrap_or_default();
    if let Some(peer) = peer
        && peer_name == from
        && is_paired(r, i)
    {
        // The peer may be connected to another by now: an unnamed socket is reached only by its pair.
        let (_directory, to) = reach(&u.name, &base_of(u))?;
        return send_from(peer, (!u.name.is_empty()).then_some(to.as_slice()));
    }
    if u.name.is_empty() {
        let Some(peer) = peer else {
            bail!("nobody can send to an unnamed socket");
        };
        return send_from(peer, None);
    }
    let (_directory, to) = reach(&u.name, &base_of(u))?;
    let known = sockets.iter().enumerate().find(|(_, s)| {
        s.kind == libc::SOCK_DGRAM && !from.is_empty() && of(s).is_some_and(|o| *o.name == *from)
    });
    if let Some(Some(sender)) = known.and_then(|(k, _)| r.fds.get(k)) {
        return send_from(sender, Some(&to));
    }
    let stranger = socket::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    if !from.is_empty()
        && let Err(e) = bind_unseen(&stranger, from, b"")
    {
        // Somebody else has the name: he is the sender still, only this message does not say so.
        let taken = e
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.raw_os_error() == Some(libc::EADDRINUSE));
        if !taken {
            return Err(e).with_context(|| format!("bind as sender {}", display(from)));
        }
    }
    send_from(&stranger, Some(&to))
}
