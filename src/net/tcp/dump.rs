//! TCP, state -> image.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};

use super::refused;
use super::{
    CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN, SYN_SENT, fin_received, fin_sent, is_connection,
};
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::sockets::{Socket, SocketState, Tcp, TcpConnection};
use crate::kernel::guardian::{Guardian, Undo, UndoId};
use crate::kernel::sock_diag::InetDiag;
use crate::kernel::sockopt::{self, Queue};
use crate::kernel::tcp_repair::{self, RepairQueue};
use crate::kernel::{socket, sockopt::DROP_ALL};
use crate::net::{Diag, Met, SocketDumper, inet, no_urgent_byte};

/// Connections that are to end without a word, deaf if the peer is outside.
#[derive(Default)]
pub(crate) struct Held {
    held: Vec<HeldSocket>,
}

struct HeldSocket {
    id: UndoId,
    /// The peer is outside: somebody must hold the socket until the restore.
    keep: bool,
    fd: OwnedFd,
    undo: Vec<(i32, i32, Vec<u8>)>,
    filter: Option<Vec<sockopt::Instruction>>,
}

impl HeldSocket {
    fn undo(&self) {
        if let Some(program) = &self.filter {
            let _ = sockopt::set_filter(&self.fd, program);
        }
        self.leave_repair();
    }

    fn leave_repair(&self) {
        for (level, name, value) in &self.undo {
            let _ = sockopt::set(&self.fd, *level, *name, value);
        }
    }
}

/// Hosts and ports of both ends, an IPv6 address that wraps an IPv4 one as that.
type Ends = (Vec<u8>, u16, Vec<u8>, u16);

fn ends(local: &[u8], peer: &[u8]) -> Ends {
    (
        inet::unmapped(inet::host(local)).to_vec(),
        inet::port(local),
        inet::unmapped(inet::host(peer)).to_vec(),
        inet::port(peer),
    )
}

fn diag_ends(x: &InetDiag) -> Ends {
    let (local, remote) = x.addresses();
    let (lp, rp) = x.ports();
    let cut = |a: [u8; 16]| {
        if i32::from(x.family) == libc::AF_INET {
            a.get(..4).unwrap_or_default().to_vec()
        } else {
            inet::unmapped(&a).to_vec()
        }
    };
    (cut(local), lp, cut(remote), rp)
}

fn reversed(e: &Ends) -> Ends {
    (e.2.clone(), e.3, e.0.clone(), e.1)
}

/// Addresses and state; refuses what cannot be carried. Connections' own state comes later.
pub(crate) fn read(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    warnings: &mut Vec<String>,
) -> Result<Tcp> {
    let ino = u32::try_from(met.ino).unwrap_or(0);
    let found = diag.tcp.iter().find(|x| x.ino == ino);
    let local =
        socket::local_name(&met.fd).with_context(|| format!("{}: getsockname", met.place()))?;
    no_urgent_byte(met)?;
    no_signatures(d, met, found)?;
    let mut tcp = Tcp {
        // A socket in state CLOSE is in no table of the kernel's.
        state: found.map_or(CLOSE, |x| x.state),
        shutdown: found.map_or(0, |x| x.shutdown & 3),
        ..Tcp::default()
    };
    match (tcp.state, found) {
        (LISTEN, Some(x)) => {
            tcp.backlog = Some(x.send_queue);
            if x.receive_queue > 0 {
                read_pending(d, met, diag, x, &mut tcp, warnings)?;
            }
        }
        (state, Some(x)) if is_connection(state) || state == SYN_SENT => {
            let peer = if state == SYN_SENT {
                syn_target(met, x)
            } else {
                socket::peer_name(&met.fd)
                    .with_context(|| format!("{}: getpeername", met.place()))?
            };
            let mine = ends(&local, &peer);
            let theirs = reversed(&mine);
            let other = diag
                .tcp
                .iter()
                .find(|o| o.state != LISTEN && diag_ends(o) == theirs && o.ino != ino);
            tcp.peer_ino = other
                .map(|o| u64::from(o.ino))
                .filter(|p| d.index_of(*p).is_some());
            if state != SYN_SENT && tcp.peer_ino.is_none() {
                tcp.peer_closed = outside(d, met, diag, &mine, state, other)?;
            }
            tcp.peer = Some(Bytes(peer));
        }
        (CLOSE, _) => {
            // A connection that has ended reads as its end; its port is nobody's any more.
            let events = socket::poll_now(&met.fd)?;
            if events & libc::POLLRDHUP != 0 {
                tcp.shutdown = 3;
                tcp.reset = events & libc::POLLERR != 0;
                let segments = refused::segments(&met.fd);
                // With none it may have been shut down alone.
                tcp.refused = segments == Some(1) || segments == Some(0) && tcp.reset;
                if tcp.reset && segments == Some(0) {
                    warnings.push(format!(
                        "{}: its connect failed, and the program was not told why yet: after a restore it is told that it was refused",
                        met.place()
                    ));
                }
                let unread = sockopt::queued(&met.fd, Queue::In).unwrap_or(0);
                if sockopt::get_int(&met.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1) < 0
                {
                    tcp.rest = Bytes(
                        peek(met.fd.as_fd(), unread as usize)
                            .with_context(|| format!("{}: recv(MSG_PEEK)", met.place()))?,
                    );
                } else if unread > 0 {
                    warnings.push(format!(
                        "{}: unread bytes of a TCP connection that has ended are not carried",
                        met.place()
                    ));
                }
            }
        }
        (state, _) => {
            return Err(Failure::Refused.because(format!(
                "{}: a TCP socket in state {state} is between two others; try again in a moment",
                met.place()
            )));
        }
    }
    let bound = inet::port(&local) != 0 || inet::host(&local).iter().any(|b| *b != 0);
    let ended = tcp.state == CLOSE && tcp.shutdown != 0;
    tcp.local = (bound && !ended).then_some(Bytes(local));
    Ok(tcp)
}

/// Refuses a socket whose segments are signed. Of one that does nothing yet only kernel memory tells.
fn no_signatures(d: &SocketDumper, met: &Met, found: Option<&InetDiag>) -> Result<()> {
    let signed = match (found, d.unaccepted()) {
        (Some(x), _) => x.signed,
        (None, Ok(reader)) => reader.is_signed(met.fd.as_fd()),
        (None, Err(_)) => false,
    };
    if signed {
        return Err(Failure::Refused.because(format!(
            "{}: what it sends is signed with a key (TCP_MD5SIG), which nobody is told, so it cannot be carried; close it first",
            met.place()
        )));
    }
    Ok(())
}

/// Where a connect that goes on leads to: getpeername does not tell yet.
fn syn_target(met: &Met, x: &InetDiag) -> Vec<u8> {
    let (_, _, host, port) = diag_ends(x);
    if met.family == libc::AF_INET6 && host.len() == 4 {
        let mut mapped = vec![0; 10];
        mapped.extend_from_slice(&[0xff, 0xff]);
        mapped.extend_from_slice(&host);
        return inet::make_address(&mapped, port);
    }
    inet::make_address(&host, port)
}

/// A connection whose other end is in no process of the dump; true when it is in none at all.
fn outside(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    mine: &Ends,
    state: u8,
    other: Option<&InetDiag>,
) -> Result<bool> {
    let (local, lp, host, port) = mine;
    let who = inet::display(&inet::make_address(host, *port));
    // A client of the dump that waits to be accepted by a listener of the dump.
    if let Some(o) = other
        && o.ino == 0
        && is_unaccepted(o.state)
        && waits_here(d, diag, host, *port)
    {
        return Ok(false);
    }
    let here = host == local || matches!(host.as_slice(), [127, ..]) || *host == inet::loopback(16);
    let gone = other.map_or(here && fin_received(state), |o| o.ino == 0);
    if let Some(o) = other.filter(|o| o.ino == 0 && o.send_queue > 1) {
        return Err(Failure::Refused.because(format!(
            "{}: the peer {who} of its TCP connection has closed it, and {} bytes of it are still on the way, which nobody can read; try again in a moment",
            met.place(),
            o.send_queue
        )));
    }
    if gone || d.options.tcp_established {
        return Ok(gone);
    }
    Err(Failure::Refused.because(format!(
        "{}: the peer {who} of its TCP connection from port {lp} is outside the dump; carry the connection with --tcp-established, dump the peer too (--tree), or let the program close it",
        met.place()
    )))
}

/// State of a connection without a descriptor that may be given out by accept; one that was closed is on
/// its way out in another.
fn is_unaccepted(state: u8) -> bool {
    matches!(state, ESTABLISHED | CLOSE_WAIT)
}

/// Whether a socket of the dump listens at this address.
fn waits_here(d: &SocketDumper, diag: &Diag, host: &[u8], port: u16) -> bool {
    diag.tcp.iter().any(|l| {
        let (at, p, _, _) = diag_ends(l);
        l.state == LISTEN
            && p == port
            && (at == host || at.iter().all(|b| *b == 0))
            && d.index_of(u64::from(l.ino)).is_some()
    })
}

/// Connections that a listening socket has not given out yet.
fn read_pending(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    listener: &InetDiag,
    tcp: &mut Tcp,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let (host, port, _, _) = diag_ends(listener);
    let any = host.iter().all(|b| *b == 0);
    let waiting = diag.tcp.iter().filter(|x| {
        let (h, p, _, _) = diag_ends(x);
        x.ino == 0 && is_unaccepted(x.state) && p == port && (any || h == host)
    });
    let mut strangers = 0;
    let mut found = Vec::new();
    for w in waiting {
        let ends = diag_ends(w);
        let client = reversed(&ends);
        let alive = diag
            .tcp
            .iter()
            .find(|c| c.ino != 0 && diag_ends(c) == client);
        let local = ends.0 == ends.2 || matches!(ends.2.as_slice(), [127, ..]);
        match alive {
            Some(c) if d.index_of(u64::from(c.ino)).is_some() => {
                found.push((u64::from(c.ino), ends, w.receive_queue));
            }
            None if local && w.state == CLOSE_WAIT => found.push((0, ends, w.receive_queue)),
            _ => strangers += 1,
        }
    }
    if strangers > 0 && !d.options.tcp_established {
        return Err(Failure::Refused.because(format!(
            "{}: {strangers} connections from outside to port {port} were not accepted yet, and their clients would not know; let the program accept them first, or leave them out with --tcp-established",
            met.place()
        )));
    }
    if strangers > 0 {
        warnings.push(format!(
            "{}: {strangers} connections from outside to port {port} that were not accepted yet are not carried: nobody can make such a connection again",
            met.place()
        ));
    }
    let silent = found.iter().all(|f| f.0 != 0 && f.2 == 0);
    if found.is_empty() {
        return Ok(());
    }
    if let (false, Err(why)) = (silent, d.unaccepted()) {
        return Err(Failure::Refused.because(format!(
            "{}: connections to port {port} that were not accepted yet hold data, which only the kernel's memory shows ({why}); try again in a moment",
            met.place()
        )));
    }
    // In the order of sock_diag, which tells none, and without what is in them, until [`read_children`].
    for (client, (_, _, host, port), _) in found {
        tcp.pending.push(client);
        let from = inet::make_address(&host, port);
        tcp.pending_data.push((Bytes::default(), Bytes(from)));
    }
    Ok(())
}

/// What is in the connections that listening sockets have not given out, `unsent` being what their clients still
/// have of it. The clients' queues were read before: what has moved on since is in both.
fn read_children(
    d: &SocketDumper,
    sockets: &mut [Socket],
    unsent: &[(u64, TcpConnection)],
) -> Result<()> {
    for (s, met) in sockets.iter_mut().zip(&d.met) {
        let SocketState::Tcp(t) = &mut s.state else {
            continue;
        };
        // Where there is no reader there is nothing in them.
        let Some(Ok(reader)) = (!t.pending.is_empty()).then(|| d.unaccepted()) else {
            continue;
        };
        let children = reader
            .tcp(met.fd.as_fd())
            .with_context(|| format!("{}: its queue", met.place()))?;
        let known: Vec<_> = t.pending.drain(..).zip(t.pending_data.drain(..)).collect();
        for mut child in children {
            let host = inet::unmapped(&child.host);
            let is_it = |from: &Bytes| {
                inet::unmapped(inet::host(from)) == host && inet::port(from) == child.port
            };
            let Some((client, _)) = known.iter().find(|(_, (_, from))| is_it(from)) else {
                continue; // from outside
            };
            if let Some((_, c)) = unsent.iter().find(|(u, _)| u == client) {
                let missing = c.send_seq.wrapping_sub(child.next) as usize;
                // None when it has all, and the end of the connection too.
                if let Some(rest) = c.send_queue.len().checked_sub(missing) {
                    let rest = c.send_queue.get(rest..).unwrap_or_default();
                    child.data.extend_from_slice(rest);
                }
            }
            let from = inet::make_address(&child.host, child.port);
            t.pending.push(*client);
            t.pending_data.push((Bytes(child.data), Bytes(from)));
        }
        if t.pending.len() != known.len() {
            return Err(Failure::Refused.because(format!(
                "{}: connections to it come and go right now; try again in a moment",
                met.place()
            )));
        }
    }
    Ok(())
}

/// Reads every connection of `sockets`. For a dump that kills they stay in repair mode.
pub(crate) fn read_connections(d: &mut SocketDumper, sockets: &mut [Socket]) -> Result<()> {
    let waiting: Vec<u64> = sockets
        .iter()
        .filter_map(|s| match &s.state {
            SocketState::Tcp(t) => Some(t.pending.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    let mut unsent = Vec::new();
    for (i, s) in sockets.iter_mut().enumerate() {
        let SocketState::Tcp(t) = &mut s.state else {
            continue;
        };
        // Who waits to be accepted connects again, and sends again what the other end has got and what it has not.
        let waits = waiting.contains(&s.ino);
        let Some(met) = d.met.get(i) else { continue };
        let on_the_way = || sockopt::queued(&met.fd, Queue::Out).unwrap_or(0) > 0;
        if !is_connection(t.state) || waits && !on_the_way() {
            continue;
        }
        let far = t.peer_ino.is_none() && !t.peer_closed && !waits;
        let read = read_connection(&d.guardian, met, t, (d.options.kill, far), &mut d.held)
            .with_context(|| format!("{}: TCP_REPAIR of its connection", met.place()));
        match read {
            Ok(c) if waits => unsent.push((s.ino, c)),
            Ok(c) => t.connection = Some(c),
            Err(e) => {
                release(d);
                return Err(e);
            }
        }
    }
    let read = read_children(d, sockets, &unsent);
    if read.is_err() {
        release(d);
    }
    read
}

fn read_connection(
    guardian: &Guardian,
    met: &Met,
    t: &Tcp,
    (kill, far): (bool, bool),
    held: &mut Held,
) -> Result<TcpConnection> {
    let fd = met.fd.as_fd();
    let option = |name| sockopt::get(fd, libc::SOL_SOCKET, name, 4);
    // What leaving repair mode puts right, in this order.
    let undo = vec![
        (
            libc::IPPROTO_TCP,
            tcp_repair::TCP_REPAIR,
            tcp_repair::OFF_SILENT.to_ne_bytes().to_vec(),
        ),
        (
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            option(libc::SO_REUSEADDR)?,
        ),
        (
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            option(libc::SO_PEEK_OFF).unwrap_or_else(|_| (-1i32).to_ne_bytes().to_vec()),
        ),
    ];
    let keep = kill && far;
    let filter = keep.then(|| sockopt::filter(fd)).transpose()?;
    let id = guardian
        .protect(
            fd,
            &match &filter {
                Some(program) => Undo::Filter(program.clone(), undo.clone()),
                None => Undo::Options(undo.clone()),
            },
        )
        .context("the guardian process is gone")?;
    let h = HeldSocket {
        id,
        keep,
        fd: met.fd.try_clone().context("dup")?,
        undo,
        filter,
    };
    let result = read_in_repair(fd, t.state, keep);
    if result.is_ok() && kill {
        // In repair mode the program's own calls fail. Deaf is enough until it is killed: should we die
        // before, it may run on before the guardian comes, and notices nothing.
        h.leave_repair();
        held.held.push(h);
    } else {
        h.undo();
        guardian
            .forget(id)
            .context("the guardian process is gone")?;
    }
    result
}

fn read_in_repair(fd: BorrowedFd<'_>, state: u8, close_ears: bool) -> Result<TcpConnection> {
    if close_ears {
        sockopt::set_filter(fd, &DROP_ALL)
            .context("setsockopt(SO_ATTACH_FILTER), to keep the peer's segments out")?;
    }
    if let Err(e) = tcp_repair::on(fd) {
        if e.raw_os_error() == Some(libc::EPERM) {
            return Err(Failure::Refused.because(
                "setsockopt(TCP_REPAIR): not permitted; carrying TCP connections needs CAP_NET_ADMIN (run as root, or setcap cap_net_admin+ep on mistctl)",
            ));
        }
        return Err(e).context("setsockopt(TCP_REPAIR)");
    }
    let _ = sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1);
    let agreed = tcp_repair::agreed(fd).context("getsockopt(TCP_INFO)")?;
    let mut c = TcpConnection {
        mss: agreed.mss,
        snd_wscale: agreed.scales.map(|s| s.0),
        rcv_wscale: agreed.scales.map(|s| s.1),
        sack: agreed.sack,
        timestamps: agreed.timestamps,
        timestamp: tcp_repair::timestamp(fd).context("getsockopt(TCP_TIMESTAMP)")?,
        cookie: cookie(fd),
        ..TcpConnection::default()
    };
    // Received: what has been read does not move, the program stands; the end may, if segments come.
    tcp_repair::queue(fd, RepairQueue::Receive).context("setsockopt(TCP_REPAIR_QUEUE)")?;
    let (begin, waiting) = loop {
        let next = tcp_repair::sequence(fd).context("getsockopt(TCP_QUEUE_SEQ)")?;
        let waiting = sockopt::queued(fd, Queue::In).context("ioctl(SIOCINQ)")?;
        if tcp_repair::sequence(fd)? == next {
            let fin = u32::from(fin_received(state));
            break (next.wrapping_sub(fin).wrapping_sub(waiting), waiting);
        }
    };
    c.recv_queue = Bytes(peek(fd, waiting as usize).context("peeking the receive queue")?);
    if (c.recv_queue.len() as u32) < waiting {
        return Err(Failure::Refused.because(
            "urgent (out-of-band) data stands in its receive queue; try again in a moment",
        ));
    }
    c.recv_seq = begin.wrapping_add(waiting);
    // Sent or to be sent: the end does not move, acknowledgements move the beginning.
    tcp_repair::queue(fd, RepairQueue::Send).context("setsockopt(TCP_REPAIR_QUEUE)")?;
    c.send_seq = tcp_repair::sequence(fd)
        .context("getsockopt(TCP_QUEUE_SEQ)")?
        .wrapping_sub(u32::from(fin_sent(state)));
    let queued = sockopt::queued(fd, Queue::Out).context("ioctl(SIOCOUTQ)")? as usize;
    c.send_queue = Bytes(if queued == 0 {
        Vec::new()
    } else {
        peek(fd, queued).context("peeking the send queue")?
    });
    let mut unsent = sockopt::queued(fd, Queue::OutUnsent).context("ioctl(SIOCOUTQNSD)")?;
    if unsent > 0 && fin_sent(state) {
        unsent -= 1; // the FIN, behind all data
    }
    c.unsent = unsent.min(c.send_queue.len() as u32);
    c.window = Bytes(tcp_repair::window(fd).context("getsockopt(TCP_REPAIR_WINDOW)")?);
    tcp_repair::queue(fd, RepairQueue::None).context("setsockopt(TCP_REPAIR_QUEUE)")?;
    Ok(c)
}

/// Up to `len` bytes of the chosen queue.
fn peek(fd: BorrowedFd<'_>, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; len];
    if len > 0 {
        let n = socket::receive(fd, &mut buffer, libc::MSG_PEEK)?.len;
        buffer.truncate(n);
    }
    Ok(buffer)
}

/// SO_COOKIE: names a socket for as long as the host is up.
pub(crate) fn cookie(fd: BorrowedFd<'_>) -> u64 {
    sockopt::get(fd, libc::SOL_SOCKET, libc::SO_COOKIE, 8)
        .ok()
        .and_then(|c| c.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}

/// Lets all held connections go on.
pub(crate) fn release(d: &mut SocketDumper) {
    for h in std::mem::take(&mut d.held.held) {
        h.undo();
        let _ = d.guardian.forget(h.id);
    }
}

/// Hands held connections to the guardian for good: see [`SocketDumper::finish_kill`].
pub(crate) fn hold_until_dead(d: &mut SocketDumper, pidfds: &[BorrowedFd<'_>]) -> Result<()> {
    if d.held.held.is_empty() {
        return Ok(());
    }
    let kept: Vec<&HeldSocket> = d.held.held.iter().filter(|h| h.keep).collect();
    let ids: Vec<UndoId> = kept.iter().map(|h| h.id).collect();
    let name = crate::net::keeper::name(kept.iter().map(|h| cookie(h.fd.as_fd())));
    let keeper = d
        .guardian
        .keep(&name, &ids, pidfds)
        .context("telling the guardian process what to keep")?;
    if !kept.is_empty() {
        d.warnings.push(format!(
            "process {keeper} (mist-keeper) holds {} TCP connection{} to others until a restore takes them, a day at most; end \
             it to give them up",
            kept.len(),
            if kept.len() == 1 { "" } else { "s" }
        ));
    }
    // In repair mode now: our copies close without a word.
    d.held.held.clear();
    Ok(())
}
