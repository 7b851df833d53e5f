//! TCP, image -> state.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::{CLOSE, SYN_SENT, fin_received, fin_sent, is_connection, refused};
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::sockets::{Socket, SocketState, Tcp, TcpConnection};
use crate::kernel::sock_diag::SockDiag;
use crate::kernel::socket::{self, Extra};
use crate::kernel::sockopt;
use crate::kernel::tcp_repair::{self, Agreed, RepairQueue};
use crate::net::keeper::{self, Claim};
use crate::net::options::{self, Phase};
use crate::net::{Restorer, inet};

/// What is left to do when the processes are released.
#[derive(Default)]
pub(crate) struct Pending {
    connections: Vec<usize>,
    /// Sockets of a keeper, already in use for the connections of the same index.
    claimed: Vec<usize>,
    claim: Option<Claim>,
    /// Connects that were under way.
    connecting: Vec<usize>,
}

fn of(s: &Socket) -> Option<&Tcp> {
    match &s.state {
        SocketState::Tcp(t) => Some(t),
        _ => None,
    }
}

pub(crate) fn build(r: &mut Restorer) -> Result<()> {
    let sockets = r.sockets.clone();
    let waiting: Vec<u64> = sockets
        .iter()
        .filter_map(of)
        .flat_map(|t| t.pending.iter().copied())
        .collect();
    claim(r, &sockets);
    for (i, s) in sockets.iter().enumerate() {
        let Some(t) = of(s) else { continue };
        if waiting.contains(&s.ino) || r.fds.get(i).is_some_and(Option::is_some) {
            continue;
        }
        let at = || format!("socket {i} of the image, TCP {}", names(t));
        let fd = match &t.connection {
            Some(c) if is_connection(t.state) => {
                r.tcp.connections.push(i);
                let fd = connection(s, t, c, &mut r.warnings).with_context(at)?;
                if t.peer_closed {
                    // Its end is closed once more when this one can hear it.
                    let mut lone = s.clone();
                    lone.options.clear();
                    let (t, c) = mirror(t, c);
                    let partner = connection(&lone, &t, &c, &mut r.warnings);
                    r.partners.insert(i, partner.with_context(at)?);
                }
                fd
            }
            None if !is_connection(t.state) => plain(s, t, r, i).with_context(at)?,
            _ => bail!("the image is damaged: {} has no connection", at()),
        };
        r.put(i, fd);
    }
    for s in &sockets {
        let Some(t) = of(s) else { continue };
        for (n, client) in t.pending.iter().enumerate() {
            let held = t.pending_data.get(n);
            let data = held.map_or(&[][..], |h| &h.0);
            if *client == 0 {
                closed_again(t, s, held.map(|h| &h.1[..]), data)?;
            } else {
                wait_again(r, &sockets, t, *client, data)?;
            }
        }
    }
    Ok(())
}

fn names(t: &Tcp) -> String {
    let show = |a: &Option<Bytes>| {
        a.as_ref()
            .map_or_else(|| "-".to_owned(), |a| inet::display(a))
    };
    format!("{} to {}", show(&t.local), show(&t.peer))
}

/// Takes sockets over that a keeper on this host still holds, if they are what the image says.
fn claim(r: &mut Restorer, sockets: &[Socket]) {
    let outside = |t: &&Tcp| t.peer_ino.is_none() && t.connection.is_some();
    let cookies = sockets
        .iter()
        .filter_map(of)
        .filter(outside)
        .filter_map(|t| t.connection.as_ref().map(|c| c.cookie))
        .filter(|c| *c != 0);
    let mut cookies = cookies.peekable();
    if cookies.peek().is_none() {
        return;
    }
    let Some(mut claim) = Claim::ask(&keeper::name(cookies)) else {
        return;
    };
    for fd in std::mem::take(&mut claim.sockets) {
        let cookie = super::dump::cookie(fd.as_fd());
        let found = sockets.iter().enumerate().find_map(|(i, s)| {
            let t = of(s).filter(|t| t.peer_ino.is_none())?;
            let c = t.connection.as_ref().filter(|c| c.cookie == cookie)?;
            Some((i, t, c))
        });
        if let Some((i, t, c)) = found
            && is_same(&fd, t, c).unwrap_or(false)
        {
            r.put(i, fd);
            r.tcp.claimed.push(i);
        }
    }
    if !r.tcp.claimed.is_empty() {
        r.tcp.claim = Some(claim);
    }
}

/// Whether a kept socket stands where the image does.
fn is_same(fd: &OwnedFd, t: &Tcp, c: &TcpConnection) -> Result<bool> {
    let same = |a: &Option<Bytes>, b: Vec<u8>| a.as_ref().is_some_and(|a| a.0 == b);
    if !same(&t.local, socket::local_name(fd)?) || !same(&t.peer, socket::peer_name(fd)?) {
        return Ok(false);
    }
    tcp_repair::queue(fd, RepairQueue::Send)?;
    let sent = tcp_repair::sequence(fd)?.wrapping_sub(u32::from(fin_sent(t.state)));
    tcp_repair::queue(fd, RepairQueue::Receive)?;
    let received = tcp_repair::sequence(fd)?.wrapping_sub(u32::from(fin_received(t.state)));
    tcp_repair::queue(fd, RepairQueue::None)?;
    Ok(sent == c.send_seq && received == c.recv_seq)
}

/// A socket without a connection: fresh, bound, listening, or connecting.
fn plain(s: &Socket, t: &Tcp, r: &mut Restorer, i: usize) -> Result<OwnedFd> {
    if t.state == CLOSE && t.shutdown == 3 && t.backlog.is_none() {
        let fd = match t.refused {
            true => refused::again(s, !t.reset).context("a connect that was refused")?,
            false => ended(s, t).context("a connection that has ended")?,
        };
        options::apply(&fd, s, Phase::Early, &mut r.warnings);
        options::apply(&fd, s, Phase::Late, &mut r.warnings);
        return Ok(fd);
    }
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(SOCK_STREAM)")?;
    options::apply(&fd, s, Phase::Early, &mut r.warnings);
    if let Some(local) = &t.local {
        // What is left of the old connections (TIME_WAIT) must not keep the port from us.
        let reuse = sockopt::get(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)?;
        sockopt::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if let Err(e) = inet::bind(&fd, local)
            && !(destroy_orphans(local, None).unwrap_or(false) && socket::bind(&fd, local).is_ok())
        {
            return Err(e);
        }
        sockopt::set(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse)?;
    }
    if let Some(backlog) = t.backlog {
        // Options that accepted sockets inherit must be there before the first comes.
        options::apply(&fd, s, Phase::Late, &mut r.warnings);
        // One more than its backlog may wait.
        let room = (t.pending.len() as u32).saturating_sub(1);
        socket::listen(&fd, backlog.max(room)).context("listen")?;
    } else if t.state == SYN_SENT {
        r.tcp.connecting.push(i);
    } else {
        options::apply(&fd, s, Phase::Late, &mut r.warnings);
    }
    Ok(fd)
}

/// A connection that has ended, with what was not read of it: one over loopback, ended again.
fn ended(s: &Socket, t: &Tcp) -> Result<OwnedFd> {
    let listener = socket::socket(s.family, s.kind, s.protocol).context("socket")?;
    let host = inet::loopback(if s.family == libc::AF_INET6 { 16 } else { 4 });
    socket::bind(&listener, &inet::make_address(&host, 0)).context("bind to loopback")?;
    socket::listen(&listener, 1).context("listen")?;
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket")?;
    socket::connect(&fd, &socket::local_name(&listener)?).context("connect over loopback")?;
    let other = socket::accept(&listener).context("accept")?;
    options::enlarge_buffers(&fd, t.rest.len());
    options::enlarge_buffers(&other, t.rest.len());
    send_all(&other, &t.rest).context("send over loopback")?;
    if t.reset {
        // Closing without lingering resets (socket(7), SO_LINGER).
        let linger: Vec<u8> = [1i32, 0].iter().flat_map(|v| v.to_ne_bytes()).collect();
        sockopt::set(&other, libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
    } else {
        socket::shutdown(&other, 2)?;
        socket::shutdown(&fd, 2)?;
    }
    drop(other);
    options::restore_default_buffers(&fd, s);
    Ok(fd)
}

/// A client that waits to be accepted connects again, to the listener that was rebuilt.
fn wait_again(
    r: &mut Restorer,
    sockets: &[Socket],
    listener: &Tcp,
    client: u64,
    data: &[u8],
) -> Result<()> {
    let Some((i, s, t)) = r
        .by_ino
        .get(&client)
        .and_then(|i| Some((*i, sockets.get(*i)?, of(sockets.get(*i)?)?)))
    else {
        bail!("the image is damaged: a listener awaits an unknown client");
    };
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(SOCK_STREAM)")?;
    options::apply(&fd, s, Phase::Early, &mut r.warnings);
    let connect = || -> Result<()> {
        sockopt::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if let Some(local) = &t.local {
            inet::bind(&fd, local)?;
        }
        let to = t.peer.as_ref().context("it has no peer")?;
        // Over loopback, to a listener with room: done when it returns.
        socket::connect(&fd, to).with_context(|| format!("connect to {}", inet::display(to)))
    };
    connect().with_context(|| {
        format!(
            "socket {i} of the image, TCP {}, which waits for {}",
            names(t),
            names(listener)
        )
    })?;
    send_waiting(&fd, data).context("sending what it had sent")?;
    if fin_sent(t.state) {
        socket::shutdown(&fd, 2)?;
    }
    options::restore_default_buffers(&fd, s);
    let reuse = i32::from(wanted_reuse(s));
    sockopt::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    options::apply(&fd, s, Phase::Late, &mut r.warnings);
    r.put(i, fd);
    Ok(())
}

/// Sends to somebody who does not read: what finds no room there stays with the sender.
fn send_waiting(fd: &OwnedFd, data: &[u8]) -> Result<()> {
    options::enlarge_buffers(fd, data.len());
    let before = socket::set_nonblocking(fd, true)?;
    send_all(fd, data)?;
    socket::set_nonblocking(fd, before)?;
    Ok(())
}

/// A client that was closed before it was accepted connects, sends and closes again.
fn closed_again(listener: &Tcp, s: &Socket, client: Option<&[u8]>, data: &[u8]) -> Result<()> {
    let again = || -> Result<()> {
        let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(SOCK_STREAM)")?;
        sockopt::set_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if let Some(client) = client {
            // What is left of the old one may be in the way; then another port has to do.
            let _ = destroy_orphans(client, listener.local.as_deref());
            let _ = socket::bind(&fd, client);
        }
        let local = listener.local.as_deref().context("it has no address")?;
        let mut host = inet::host(local).to_vec();
        if host.iter().all(|b| *b == 0) {
            host = client.map_or_else(|| inet::loopback(host.len()), |c| inet::host(c).to_vec());
        }
        socket::connect(&fd, &inet::make_address(&host, inet::port(local)))?;
        send_waiting(&fd, data)
    };
    again().with_context(|| format!("a client that was closed, of TCP {}", names(listener)))
}

fn wanted_reuse(s: &Socket) -> bool {
    s.options.iter().any(|o| {
        o.level == libc::SOL_SOCKET
            && o.name == libc::SO_REUSEADDR
            && o.value.iter().any(|b| *b != 0)
    })
}

/// A connection in repair mode, deaf until [`activate`].
fn connection(
    s: &Socket,
    t: &Tcp,
    c: &TcpConnection,
    warnings: &mut Vec<String>,
) -> Result<OwnedFd> {
    let (Some(local), Some(peer)) = (&t.local, &t.peer) else {
        bail!("the image is damaged: a connection without addresses");
    };
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(SOCK_STREAM)")?;
    options::apply(&fd, s, Phase::Early, warnings);
    if let Err(e) = tcp_repair::on(&fd) {
        if e.raw_os_error() == Some(libc::EPERM) {
            return Err(Failure::Refused.because(
                "setsockopt(TCP_REPAIR): not permitted; restoring TCP connections needs CAP_NET_ADMIN (run as root, or setcap cap_net_admin+ep on mistctl)",
            ));
        }
        return Err(e).context("setsockopt(TCP_REPAIR)");
    }
    sockopt::set_filter(&fd, &sockopt::DROP_ALL).context("setsockopt(SO_ATTACH_FILTER)")?;
    inet::bind(&fd, local)?;
    let unsent = (c.unsent as usize).min(c.send_queue.len());
    let (sent, _) = c.send_queue.split_at(c.send_queue.len() - unsent);
    let first = c.send_seq.wrapping_sub(c.send_queue.len() as u32);
    let begin = c.recv_seq.wrapping_sub(c.recv_queue.len() as u32);
    for (queue, sequence) in [(RepairQueue::Send, first), (RepairQueue::Receive, begin)] {
        tcp_repair::queue(&fd, queue).context("setsockopt(TCP_REPAIR_QUEUE)")?;
        tcp_repair::set_sequence(&fd, sequence).context("setsockopt(TCP_QUEUE_SEQ)")?;
    }
    connect_in_repair(&fd, local, peer)?;
    tcp_repair::set_agreed(
        &fd,
        &Agreed {
            mss: c.mss,
            scales: c.snd_wscale.zip(c.rcv_wscale),
            sack: c.sack,
            timestamps: c.timestamps,
        },
    )
    .context("setsockopt(TCP_REPAIR_OPTIONS)")?;
    tcp_repair::set_timestamp(&fd, c.timestamp).context("setsockopt(TCP_TIMESTAMP)")?;
    options::enlarge_buffers(&fd, c.recv_queue.len().max(c.send_queue.len()));
    for (queue, data) in [
        (RepairQueue::Receive, &c.recv_queue[..]),
        (RepairQueue::Send, sent),
    ] {
        tcp_repair::queue(&fd, queue).context("setsockopt(TCP_REPAIR_QUEUE)")?;
        send_all(&fd, data).with_context(|| format!("filling its {queue:?} queue"))?;
    }
    tcp_repair::queue(&fd, RepairQueue::None).context("setsockopt(TCP_REPAIR_QUEUE)")?;
    tcp_repair::set_window(&fd, &window(c)?).context("setsockopt(TCP_REPAIR_WINDOW)")?;
    Ok(fd)
}

/// The other end of a connection, with nothing on its way.
fn mirror(t: &Tcp, c: &TcpConnection) -> (Tcp, TcpConnection) {
    let part = |at: usize| {
        c.window
            .get(at..at + 4)
            .and_then(|w| w.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    let acknowledged = c.send_seq.wrapping_sub(c.send_queue.len() as u32);
    let scale = |w: u32| w.max(1);
    // struct tcp_repair_window: what one end may send is what the other takes.
    let window = [
        acknowledged,
        scale(part(12)),
        scale(part(12)),
        scale(part(4)),
        acknowledged,
    ];
    let other = TcpConnection {
        send_seq: c.recv_seq,
        recv_seq: acknowledged,
        mss: c.mss,
        snd_wscale: c.rcv_wscale,
        rcv_wscale: c.snd_wscale,
        sack: c.sack,
        timestamps: c.timestamps,
        timestamp: c.timestamp,
        window: Bytes(window.iter().flat_map(|w| w.to_ne_bytes()).collect()),
        ..TcpConnection::default()
    };
    let ends = Tcp {
        local: t.peer.clone(),
        peer: t.local.clone(),
        ..Tcp::default()
    };
    (ends, other)
}

/// connect in repair mode; clears what the kernel still holds of the old connection once.
fn connect_in_repair(fd: &OwnedFd, local: &[u8], peer: &[u8]) -> Result<()> {
    let Err(e) = socket::connect(fd, peer) else {
        return Ok(());
    };
    if e.raw_os_error() == Some(libc::EADDRNOTAVAIL)
        && destroy_orphans(local, Some(peer)).unwrap_or(false)
        && socket::connect(fd, peer).is_ok()
    {
        return Ok(());
    }
    Err(e).with_context(|| {
        format!(
            "connect from {} to {} in repair mode; is the original still running, or is there no route?",
            inet::display(local),
            inet::display(peer)
        )
    })
}

/// Ends sockets that no process has any more (TIME_WAIT, FIN_WAIT ...) at this local address, and to this
/// peer if one is given.
fn destroy_orphans(local: &[u8], peer: Option<&[u8]>) -> Result<bool> {
    let ask = SockDiag::open()?;
    let end = |a: &[u8]| (inet::unmapped(inet::host(a)).to_vec(), inet::port(a));
    let (mine, theirs) = (end(local), peer.map(end));
    let any_host = mine.0.iter().all(|b| *b == 0);
    let mut any = false;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for x in ask.inet(family, libc::IPPROTO_TCP)? {
            let (l, p) = x.addresses();
            let cut = |a: &[u8; 16]| {
                if family == libc::AF_INET {
                    a.get(..4).unwrap_or_default().to_vec()
                } else {
                    inet::unmapped(a).to_vec()
                }
            };
            let here = x.ports().0 == mine.1 && (any_host || cut(&l) == mine.0);
            let there = theirs.as_ref().is_none_or(|t| *t == (cut(&p), x.ports().1));
            if x.ino == 0 && here && there {
                any |= ask.destroy_tcp(&x).is_ok();
            }
        }
    }
    Ok(any)
}

/// The stored window, with the FIN that is still to come not counted.
fn window(c: &TcpConnection) -> Result<Vec<u8>> {
    let mut w = c.window.to_vec();
    if w.len() != tcp_repair::WINDOW_LEN {
        bail!("the image is damaged: its window has {} bytes", w.len());
    }
    // struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    if let Some(wup) = w.get_mut(16..20) {
        let value = <[u8; 4]>::try_from(&*wup).map_or(0, u32::from_ne_bytes);
        if (value.wrapping_sub(c.recv_seq) as i32) > 0 {
            wup.copy_from_slice(&c.recv_seq.to_ne_bytes());
        }
    }
    Ok(w)
}

fn send_all(fd: &OwnedFd, data: &[u8]) -> Result<()> {
    for piece in data.chunks(32 * 1024) {
        let mut rest = piece;
        while !rest.is_empty() {
            let n = socket::send(fd, rest, &Extra::default())?;
            rest = rest.get(n..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Lets all connections speak. Nothing here fails the restore, for the program is as good as running.
pub(crate) fn activate(r: &mut Restorer) {
    let sockets = std::mem::take(&mut r.sockets);
    let pending = std::mem::take(&mut r.tcp);
    let mut warnings = Vec::new();
    let each = |list: &[usize], f: &mut dyn FnMut(&Socket, &Tcp, &OwnedFd) -> Result<()>| {
        let mut failed = Vec::new();
        for &i in list {
            if let (Some(s), Some(Some(fd))) = (sockets.get(i), r.fds.get(i))
                && let Some(t) = of(s)
                && let Err(e) = f(s, t, fd)
            {
                failed.push(format!("TCP connection {}: {e:#}", names(t)));
            }
        }
        failed
    };
    let all: Vec<usize> = pending
        .claimed
        .iter()
        .chain(&pending.connections)
        .copied()
        .collect();
    let partners: Vec<OwnedFd> = r.partners.drain().map(|(_, fd)| fd).collect();
    for fd in &partners {
        let _ = sockopt::set_filter(fd, &[]);
        let _ = tcp_repair::off(fd, false);
    }
    // Ears first, all of them: ends of one connection may both be here.
    warnings.extend(each(&all, &mut |_, _, fd| {
        Ok(sockopt::set_filter(fd, &[])?)
    }));
    warnings.extend(each(&all, &mut |s, t, fd| {
        let far = t.peer_ino.is_none() && !t.peer_closed;
        tcp_repair::off(fd, far).context("leaving TCP_REPAIR")?;
        let reuse = i32::from(wanted_reuse(s));
        Ok(sockopt::set_int(
            fd,
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            reuse,
        )?)
    }));
    if let Some(claim) = &pending.claim {
        claim.taken();
    }
    warnings.extend(each(&pending.connections, &mut |_, t, fd| {
        let Some(c) = &t.connection else {
            return Ok(());
        };
        let unsent = (c.unsent as usize).min(c.send_queue.len());
        let (_, rest) = c.send_queue.split_at(c.send_queue.len() - unsent);
        send_all(fd, rest).context("sending what had not been sent")
    }));
    drop(partners);
    warnings.extend(each(&pending.connections, &mut |_, t, _| {
        if fin_received(t.state) && t.peer_ino.is_none() && !t.peer_closed {
            inject_fin(t).context("the peer's end of the connection")?;
        }
        Ok(())
    }));
    warnings.extend(each(&pending.connections, &mut |_, t, fd| {
        if fin_sent(t.state) {
            socket::shutdown(fd, 2).context("shutdown")?;
        }
        Ok(())
    }));
    let mut late = Vec::new();
    warnings.extend(each(&all, &mut |s, t, fd| {
        options::restore_default_buffers(fd, s);
        options::apply(fd, s, Phase::Late, &mut late);
        // The peer's side of the mask came with its FIN.
        if t.shutdown & 1 != 0 && !fin_received(t.state) {
            socket::shutdown(fd, 1).context("shutdown")?;
        }
        Ok(())
    }));
    warnings.extend(each(&pending.connecting, &mut |s, t, fd| {
        options::apply(fd, s, Phase::Late, &mut late);
        let Some(peer) = &t.peer else { return Ok(()) };
        let before = socket::set_nonblocking(fd, true)?;
        let connecting = socket::connect(fd, peer);
        socket::set_nonblocking(fd, before)?;
        match connecting {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => Err(e.into()),
            _ => Ok(()),
        }
    }));
    r.warnings.append(&mut warnings);
    r.warnings.append(&mut late);
}

/// Sends the FIN that the peer has sent before, as the peer.
fn inject_fin(t: &Tcp) -> Result<()> {
    let (Some(local), Some(peer), Some(c)) = (&t.local, &t.peer, &t.connection) else {
        return Ok(());
    };
    let source = inet::unmapped(inet::host(peer));
    let target = inet::unmapped(inet::host(local));
    // What the peer has acknowledged, and its window: news of neither.
    let ack = c.send_seq.wrapping_sub(c.send_queue.len() as u32);
    let window = c
        .window
        .get(4..8)
        .and_then(|w| w.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
        >> c.snd_wscale.unwrap_or(0).min(14);
    const FIN_ACK: u8 = 0x11;
    let mut segment = Vec::with_capacity(20);
    segment.extend_from_slice(&inet::port(peer).to_be_bytes());
    segment.extend_from_slice(&inet::port(local).to_be_bytes());
    segment.extend_from_slice(&c.recv_seq.to_be_bytes());
    segment.extend_from_slice(&ack.to_be_bytes());
    segment.extend_from_slice(&[5 << 4, FIN_ACK]);
    segment.extend_from_slice(&(window.min(0xffff) as u16).to_be_bytes());
    segment.extend_from_slice(&[0; 4]);
    let sum = inet::checksum(source, target, libc::IPPROTO_TCP as u8, &segment);
    if let Some(field) = segment.get_mut(16..18) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    inet::send_packet(source, target, libc::IPPROTO_TCP as u8, &segment)
}
