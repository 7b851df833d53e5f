//! Unix sockets, image -> state.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};

use super::fill::{Sending, send_all};
use super::names::{aside, base_of, bind, enter_unseen, path, reach};
use super::{address, display, is_path};
use crate::image::sockets::{PeerCreds, Socket, SocketState, Unix, UnixMessage};
use crate::kernel::socket;
use crate::net::Restorer;
use crate::net::makers::Makers;
use crate::net::options::{self, Phase};

/// What is left to do once the queues are full.
#[derive(Default)]
pub(crate) struct Plan {
    /// Datagram sockets to connect by name.
    pub(super) connect: Vec<(usize, Vec<u8>)>,
}

pub(super) fn of(s: &Socket) -> Option<&Unix> {
    match &s.state {
        SocketState::Unix(u) => Some(u),
        _ => None,
    }
}

fn pair(s: &Socket, who: Option<PeerCreds>, makers: &mut Makers<'_>) -> Result<(OwnedFd, OwnedFd)> {
    match makers.get(who)? {
        Some(m) => m.pair(s.family, s.kind, s.protocol),
        None => socket::pair(s.family, s.kind, s.protocol),
    }
    .context("socketpair")
}

fn listen(
    fd: &OwnedFd,
    backlog: u32,
    who: Option<PeerCreds>,
    makers: &mut Makers<'_>,
) -> Result<()> {
    match makers.get(who)? {
        Some(m) => m.listen(fd, backlog),
        None => socket::listen(fd, backlog),
    }
    .context("listen")
}

fn connect(
    fd: &OwnedFd,
    addr: &[u8],
    who: Option<PeerCreds>,
    makers: &mut Makers<'_>,
) -> Result<()> {
    match makers.get(who)? {
        Some(m) => m.connect(fd, addr),
        None => socket::connect(fd, addr),
    }
    .context("connect")
}

/// Connects `client` to a listening socket of the image, and returns the accepted end.
fn connect_to(
    listener: &OwnedFd,
    client: &OwnedFd,
    (name, base): (&[u8], &[u8]),
    who: Option<PeerCreds>,
    makers: &mut Makers<'_>,
) -> Result<OwnedFd> {
    let (_directory, to) = reach(name, base)?;
    connect(client, &to, who, makers)?;
    Ok(socket::accept(listener)?)
}

/// Makes `client` the client of a connection to a socket named `name` that is there for the moment only, and
/// returns the accepted end. `whos`: who listened, and who connected.
fn connect_through(
    client: &OwnedFd,
    kind: i32,
    (name, base): (&[u8], &[u8]),
    whos: (Option<PeerCreds>, Option<PeerCreds>),
    makers: &mut Makers<'_>,
) -> Result<OwnedFd> {
    let l = socket::socket(libc::AF_UNIX, kind, 0)?;
    // Other processes reach a file that only a thread of ours sees through a descriptor of it.
    let (_file, to) = if is_path(name) {
        let file = aside(|| {
            enter_unseen(name, base)?;
            socket::bind(&l, &address(name))?;
            let file = std::fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
                .open(path(name))
                .context("opening a socket's file")?;
            let _ = std::fs::remove_file(path(name));
            Ok(file)
        })?;
        let to = format!("/proc/self/fd/{}", file.as_raw_fd());
        (Some(file), address(to.as_bytes()))
    } else {
        socket::bind(&l, &address(name))?;
        (None, address(name))
    };
    listen(&l, 1, whos.0, makers)?;
    connect(client, &to, whos.1, makers)?;
    Ok(socket::accept(&l)?)
}

/// Backlog of listening sockets while connections are rebuilt.
const ROOMY: u32 = 4096;

pub(crate) fn build(r: &mut Restorer, makers: &mut Makers<'_>) -> Result<()> {
    let sockets = r.sockets.clone();
    let unix: Vec<(usize, &Socket, &Unix)> = sockets
        .iter()
        .enumerate()
        .filter_map(|(i, s)| of(s).filter(|u| u.outside.is_none()).map(|u| (i, s, u)))
        .collect();
    let at = |i: usize, u: &Unix| format!("socket {i} of the image, unix {}", display(&u.name));
    // 1. What listens or stands alone, and datagram sockets.
    for &(i, s, u) in &unix {
        let connected = s.kind != libc::SOCK_DGRAM && (u.peer.is_some() || u.peer_closed);
        if connected || is_client(&unix, s.ino) || r.fds.get(i).is_some_and(Option::is_some) {
            continue;
        }
        if s.kind == libc::SOCK_DGRAM {
            build_dgram(r, &unix, i, s, u, makers).with_context(|| at(i, u))?;
            continue;
        }
        let fd = alone(s, u, &mut r.warnings).with_context(|| at(i, u))?;
        if u.backlog.is_some() {
            listen(&fd, ROOMY, u.peer_creds, makers).with_context(|| at(i, u))?;
        }
        r.put(i, fd);
    }
    for &(i, s, u) in &unix {
        if s.kind == libc::SOCK_DGRAM {
            plan_dgram(r, &unix, i, s, u)?;
        }
    }
    // 2. Connections.
    for &(i, s, u) in &unix {
        if s.kind != libc::SOCK_DGRAM && r.fds.get(i).is_some_and(Option::is_none) {
            build_connection(r, &unix, i, s, u, makers).with_context(|| at(i, u))?;
        }
    }
    // 3. Connections that were not accepted yet, first come first.
    for &(i, _, u) in &unix {
        if let (false, Some(s), Some(Some(fd))) =
            (u.pending.is_empty(), sockets.get(i), r.fds.get(i))
        {
            // Connections inherit some.
            options::apply(fd, s, Phase::Late, &mut r.warnings);
        }
        for (n, client) in u.pending.iter().enumerate() {
            let queue = u.pending_queues.get(n).map_or(&[][..], Vec::as_slice);
            wait_again(r, &unix, (i, u), *client, queue, makers).with_context(|| at(i, u))?;
        }
        if let (Some(backlog), Some(Some(fd))) = (u.backlog, r.fds.get(i)) {
            listen(fd, backlog, u.peer_creds, makers).with_context(|| at(i, u))?;
        }
    }
    Ok(())
}

/// A client that waits to be accepted connects again, and sends what it had sent; 0 is one that was closed.
fn wait_again(
    r: &mut Restorer,
    unix: &[(usize, &Socket, &Unix)],
    (l, listener): (usize, &Unix),
    client: u64,
    queue: &[UnixMessage],
    makers: &mut Makers,
) -> Result<()> {
    let damaged = "the image is damaged: it awaits an unknown client";
    let known = r.by_ino.get(&client).copied();
    let found = unix.iter().find(|x| Some(x.0) == known);
    let fd = match (found, r.sockets.get(l)) {
        (Some(&(c, s, u)), Some(_)) if r.fds.get(c).is_some_and(Option::is_none) => {
            alone(s, u, &mut r.warnings)?
        }
        (None, Some(s)) if client == 0 => {
            socket::socket(s.family, s.kind, s.protocol).context("socket(AF_UNIX)")?
        }
        _ => bail!(damaged),
    };
    socket::set_nonblocking(&fd, true)?;
    let (_directory, to) = reach(&listener.name, &base_of(listener))?;
    let connected = match found {
        Some(&(c, ..)) => connect(&fd, &to, makers.holder(c), makers),
        None => Ok(socket::connect(&fd, &to)?),
    };
    connected.with_context(|| format!("connect to {}", display(&listener.name)))?;
    let sizes = options::buffer_sizes(&fd);
    options::enlarge_buffers(&fd, queue.iter().map(|m| m.data.len() + 1024).sum());
    // Descriptors cannot be in flight here.
    let none = |_| bail!(damaged);
    let sending = Sending::new(queue.iter(), &none, makers);
    for m in queue {
        send_all(&fd, None, m, &sending).context("sending what it had sent")?;
    }
    options::restore_buffers(&fd, &sizes);
    socket::set_nonblocking(&fd, false)?;
    if let Some(&(c, ..)) = found {
        r.put(c, fd);
    }
    Ok(())
}

/// Whether some listening socket of the image has this one waiting to be accepted.
fn is_client(unix: &[(usize, &Socket, &Unix)], ino: u64) -> bool {
    unix.iter().any(|(_, _, u)| u.pending.contains(&ino))
}

fn alone(s: &Socket, u: &Unix, warnings: &mut Vec<String>) -> Result<OwnedFd> {
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(AF_UNIX)")?;
    options::apply(&fd, s, Phase::Early, warnings);
    bind(&fd, u)?;
    Ok(fd)
}

/// A datagram socket, with its unnamed peer where it has one: only socketpair connects those.
fn build_dgram(
    r: &mut Restorer,
    unix: &[(usize, &Socket, &Unix)],
    i: usize,
    s: &Socket,
    u: &Unix,
    makers: &mut Makers<'_>,
) -> Result<()> {
    let unnamed_peer = |u: &Unix| {
        let ino = u.peer?;
        unix.iter()
            .find(|(_, p, pu)| p.ino == ino && pu.name.is_empty() && p.ino != s.ino)
            .copied()
    };
    // Either we are connected to an unnamed one, or, unnamed ourselves, somebody is to us.
    let partner = unnamed_peer(u).or_else(|| {
        if !u.name.is_empty() {
            return None;
        }
        unix.iter()
            .find(|(_, p, pu)| pu.peer == Some(s.ino) && p.ino != s.ino && p.kind == s.kind)
            .copied()
    });
    if let Some((j, ps, pu)) = partner
        && ps.kind == s.kind
        && r.fds.get(j).is_some_and(Option::is_none)
    {
        let (a, b) = pair(s, u.peer_creds.or(pu.peer_creds), makers)?;
        bind(&a, u)?;
        bind(&b, pu)?;
        for (own, other, fd) in [(u, ps.ino, &a), (pu, s.ino, &b)] {
            if own.peer != Some(other) {
                socket::disconnect(fd).context("connect(AF_UNSPEC)")?;
            }
        }
        r.put(i, a);
        r.put(j, b);
    } else if u.peer_closed {
        let (a, b) = pair(s, u.peer_creds, makers)?;
        bind(&a, u)?;
        r.put(i, a);
        r.partners.insert(i, b);
    } else {
        let fd = alone(s, u, &mut r.warnings)?;
        r.put(i, fd);
    }
    Ok(())
}

/// Which datagram sockets are connected by name, once their queues are full: a connected one takes
/// messages of its peer only.
fn plan_dgram(
    r: &mut Restorer,
    unix: &[(usize, &Socket, &Unix)],
    i: usize,
    s: &Socket,
    u: &Unix,
) -> Result<()> {
    if let Some(peer) = u.peer {
        let Some((_, _, pu)) = unix.iter().find(|(_, p, _)| p.ino == peer) else {
            bail!(
                "the image is damaged: socket {} has a peer that is not in it",
                s.ino
            );
        };
        // An unnamed peer was connected as one of a pair. If both are named they may have been one of
        // a pair too: the same to whoever uses them.
        if !pu.name.is_empty() && !is_paired(r, i) {
            r.unix.connect.push((i, pu.name.to_vec()));
        }
    } else if let Some(n) = &u.peer_name {
        r.unix.connect.push((i, n.to_vec()));
    }
    Ok(())
}

pub(super) fn is_paired(r: &Restorer, i: usize) -> bool {
    r.fds
        .get(i)
        .and_then(Option::as_ref)
        .is_some_and(|fd| socket::peer_name(fd).is_ok())
}

/// A stream or seqpacket connection of which one end is `i`.
fn build_connection(
    r: &mut Restorer,
    unix: &[(usize, &Socket, &Unix)],
    i: usize,
    s: &Socket,
    u: &Unix,
    makers: &mut Makers<'_>,
) -> Result<()> {
    if is_client(unix, s.ino) {
        return Ok(()); // with its listener, later
    }
    let lone = Unix::default();
    let (other, ou) = match u.peer {
        Some(ino) => {
            let Some(&(j, ps, pu)) = unix.iter().find(|(_, p, _)| p.ino == ino) else {
                bail!("the image is damaged: its peer is not in it");
            };
            if pu.peer != Some(s.ino) || ps.kind != s.kind || j == i {
                bail!("the image is damaged: its peer does not know it");
            }
            (Some(j), pu)
        }
        None => (None, &lone),
    };
    // Which end came out of accept: that one is named after its listener.
    let server = if u.accepted && !u.name.is_empty() {
        Some((u, ou))
    } else if ou.accepted && !ou.name.is_empty() {
        Some((ou, u))
    } else {
        None
    };
    let (mine, theirs) = match server {
        None => {
            let (a, b) = pair(s, u.peer_creds.or(ou.peer_creds), makers)?;
            bind(&a, u)?;
            bind(&b, ou)?;
            (a, b)
        }
        Some((su, cu)) => {
            let client = socket::socket(s.family, s.kind, s.protocol).context("socket(AF_UNIX)")?;
            bind(&client, cu)?;
            let listener = unix.iter().find(|(_, ls, lu)| {
                lu.backlog.is_some() && lu.name == su.name && ls.kind == s.kind
            });
            let base = listener.map(|(_, _, lu)| base_of(lu)).unwrap_or_default();
            let unlinked = listener
                .and_then(|(_, _, lu)| lu.file.as_ref())
                .is_some_and(|f| f.unlinked);
            let fd = listener
                .filter(|_| !unlinked)
                .and_then(|(l, _, _)| r.fds.get(*l))
                .and_then(Option::as_ref);
            let place = (&su.name[..], &base[..]);
            let connected = match fd {
                Some(l) => connect_to(l, &client, place, su.peer_creds, makers),
                None => {
                    let whos = (cu.peer_creds, su.peer_creds);
                    connect_through(&client, s.kind, place, whos, makers)
                }
            };
            match connected {
                Ok(accepted) if std::ptr::eq(su, u) => (accepted, client),
                Ok(accepted) => (client, accepted),
                Err(e) => {
                    // The name is only what getsockname tells: the connection matters more.
                    r.warnings.push(format!(
                        "a connection of unix socket {} comes back without its name: {e:#}",
                        display(&su.name)
                    ));
                    pair(s, u.peer_creds.or(ou.peer_creds), makers)?
                }
            }
        }
    };
    r.put(i, mine);
    match other {
        Some(j) => r.put(j, theirs),
        None => {
            r.partners.insert(i, theirs);
        }
    }
    Ok(())
}
