//! UDP and raw sockets: addresses, peers, datagrams that were not read.
//!
//! A datagram comes back with its sender's address: it is made whole, headers and all, and sent through a
//! raw socket to the socket's own address, which the kernel delivers over loopback whatever its source
//! says. Needs CAP_NET_RAW.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::messages::peek_messages;
use super::options::{self, Phase};
use super::unaccepted::Reader;
use super::{Diag, Met, SocketDumper, bytes, multicast};
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::sockets::{Inet, Socket};
use crate::kernel::sockopt::Queue;
use crate::kernel::{socket, sockopt};

/// Whether an address, if there, is one of this family.
pub(crate) fn family_fits(family: i32, address: &Option<Bytes>) -> bool {
    address.as_ref().is_none_or(|a| {
        a.get(..2) == Some(&(family as u16).to_ne_bytes()[..])
            && a.len() >= if family == libc::AF_INET6 { 28 } else { 16 }
            && a.len() <= 128
    })
}

/// Port of a struct sockaddr_in or sockaddr_in6.
pub(crate) fn port(address: &[u8]) -> u16 {
    match address.get(2..4) {
        Some(&[a, b]) => u16::from_be_bytes([a, b]),
        _ => 0,
    }
}

/// The address itself: 4 or 16 bytes.
pub fn host(address: &[u8]) -> &[u8] {
    if is_v6(address) {
        address.get(8..24).unwrap_or_default()
    } else {
        address.get(4..8).unwrap_or_default()
    }
}

pub(crate) fn is_v6(address: &[u8]) -> bool {
    address.get(..2) == Some(&(libc::AF_INET6 as u16).to_ne_bytes()[..])
}

/// An address alone, for people.
pub(crate) fn display_host(host: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(host) {
        return std::net::Ipv4Addr::from(v4).to_string();
    }
    <[u8; 16]>::try_from(host).map_or_else(
        |_| "(no address)".to_owned(),
        |v6| std::net::Ipv6Addr::from(v6).to_string(),
    )
}

/// For people: 127.0.0.1:80, [::1]:80.
pub(crate) fn display(address: &[u8]) -> String {
    let port = port(address);
    match host(address) {
        &[a, b, c, d] => format!("{}:{port}", std::net::Ipv4Addr::new(a, b, c, d)),
        h => <[u8; 16]>::try_from(h).map_or_else(
            |_| "(no address)".to_owned(),
            |h| format!("[{}]:{port}", std::net::Ipv6Addr::from(h)),
        ),
    }
}

/// struct sockaddr of a family from host bytes and port.
pub(crate) fn make_address(host: &[u8], port: u16) -> Vec<u8> {
    let v6 = host.len() == 16;
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET } as u16;
    let mut a = family.to_ne_bytes().to_vec();
    a.extend_from_slice(&port.to_be_bytes());
    if v6 {
        a.extend_from_slice(&[0; 4]);
    }
    a.extend_from_slice(host);
    a.resize(if v6 { 28 } else { 16 }, 0);
    a
}

pub(crate) fn read(
    d: &SocketDumper,
    met: &Met,
    diag: &Diag,
    warnings: &mut Vec<String>,
) -> Result<Inet> {
    let local =
        socket::local_name(&met.fd).with_context(|| format!("{}: getsockname", met.place()))?;
    let ino = u32::try_from(met.ino).unwrap_or(0);
    let mut inet = Inet {
        // Port 0 of a UDP socket: not bound. Of a raw socket the port is the protocol.
        local: (port(&local) != 0 || host(&local).iter().any(|b| *b != 0)).then_some(Bytes(local)),
        peer: socket::peer_name(&met.fd).ok().and_then(bytes),
        shutdown: diag
            .udp
            .iter()
            .find(|x| x.ino == ino)
            .map_or(0, |x| x.shutdown & 3),
        ..Inet::default()
    };
    multicast::read(d, met, &mut inet);
    let udp = met.kind == libc::SOCK_DGRAM && met.protocol == libc::IPPROTO_UDP;
    // What waits to be sent is charged for; so is, for a moment, what is on its way.
    if udp && sockopt::queued(&met.fd, Queue::Out).unwrap_or(0) > 0 && d.is_corked(met) {
        return Err(Failure::Refused.because(format!(
            "{}: a part of a datagram waits for the rest (UDP_CORK, MSG_MORE), which cannot be carried; let the program send it first",
            met.place()
        )));
    }
    let events = socket::poll_now(&met.fd).context("poll")?;
    if events & libc::POLLERR != 0 {
        // A receive would take the error, and it cannot be put back.
        warnings.push(format!(
            "{}: an error is pending on its UDP socket; datagrams that were not read are not carried",
            met.place()
        ));
    } else if events & libc::POLLIN != 0 {
        if !udp {
            warnings.push(format!(
                "{}: unread packets of a raw socket are not carried",
                met.place()
            ));
            return Ok(inet);
        }
        let messages = peek_messages(d, met, false)
            .with_context(|| format!("{}: reading its queue", met.place()))?;
        inet.queue = messages
            .all
            .into_iter()
            .map(|(data, r)| (Bytes(r.from), Bytes(data)))
            .collect();
    }
    Ok(inet)
}

impl SocketDumper {
    /// Whether a UDP socket has begun a datagram; false where the kernel cannot be asked.
    fn is_corked(&self, met: &Met) -> bool {
        let pending = |reader: &Reader| {
            let sock = reader.sock(met.fd.as_fd())?;
            reader
                .kernel
                .u32(reader.kernel.field(sock, "udp_sock", "pending")?)
        };
        self.unaccepted()
            .is_ok_and(|r| pending(r).is_ok_and(|p| p != 0))
    }
}

pub(crate) fn build(s: &Socket, inet: &Inet, warnings: &mut Vec<String>) -> Result<OwnedFd> {
    let fd = socket::socket(s.family, s.kind, s.protocol)
        .with_context(|| format!("socket({}, {}, {})", s.family, s.kind, s.protocol))?;
    options::apply(&fd, s, Phase::Early, warnings);
    if let Some(local) = &inet.local {
        let mut local = local.to_vec();
        if s.kind == libc::SOCK_RAW
            && let Some(port) = local.get_mut(2..4)
        {
            port.fill(0);
        }
        bind(&fd, &local)?;
    }
    Ok(fd)
}

/// bind(2) with an error that says what to do.
pub(crate) fn bind(fd: &OwnedFd, local: &[u8]) -> Result<()> {
    socket::bind(fd, local).with_context(|| {
        format!(
            "bind to {}; is the port in use, or the address not one of this host (ip addr add ...)?",
            display(local)
        )
    })
}

/// Refills the queue, connects, applies the rest.
pub(crate) fn fill(
    s: &Socket,
    inet: &Inet,
    fd: &OwnedFd,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let udp = s.kind == libc::SOCK_DGRAM && s.protocol == libc::IPPROTO_UDP;
    if let (true, false, Some(local)) = (udp, inet.queue.is_empty(), &inet.local) {
        let sizes = options::buffer_sizes(fd);
        let total = inet.queue.iter().map(|(_, d)| d.len() + 1024).sum();
        options::enlarge_buffers(fd, total);
        if let Err(e) = refill(s, inet, local, fd) {
            warnings.push(format!(
                "UDP socket {}: datagrams that were not read did not all come back: {e:#}",
                display(local)
            ));
        }
        options::restore_buffers(fd, &sizes);
    }
    if let Some(peer) = &inet.peer {
        socket::connect(fd, peer).with_context(|| format!("connect to {}", display(peer)))?;
    }
    if inet.shutdown != 0 {
        let _ = socket::shutdown(fd, inet.shutdown);
    }
    options::apply(fd, s, Phase::Late, warnings);
    // Behind the options: that of the interface has an address only.
    multicast::apply(fd, inet, warnings);
    Ok(())
}

fn refill(s: &Socket, inet: &Inet, local: &[u8], fd: &OwnedFd) -> Result<()> {
    for (from, data) in &inet.queue {
        // With SO_REUSEPORT the kernel may choose another of the group: one that is connected to the
        // sender comes first.
        let shared = s.options.iter().any(|o| {
            o.level == libc::SOL_SOCKET
                && (o.name == libc::SO_REUSEPORT || o.name == libc::SO_REUSEADDR)
        });
        if shared {
            socket::connect(fd, from).context("connect to the sender for a moment")?;
        }
        let before = memory(fd);
        let sent = inject(from, local, data);
        let arrived = sent.is_ok() && {
            let deadline = Instant::now() + Duration::from_secs(1);
            loop {
                if memory(fd) > before {
                    break true;
                }
                if Instant::now() > deadline {
                    break false;
                }
                std::thread::yield_now();
            }
        };
        if shared {
            socket::disconnect(fd).context("connect(AF_UNSPEC)")?;
        }
        sent.with_context(|| format!("a datagram from {}", display(from)))?;
        if !arrived {
            anyhow::bail!(
                "a datagram from {} was sent again and did not arrive; is there a firewall rule on lo?",
                display(from)
            );
        }
    }
    Ok(())
}

/// Bytes of memory charged to the receive queue (SO_MEMINFO, SK_MEMINFO_RMEM_ALLOC).
fn memory(fd: &OwnedFd) -> u32 {
    const SO_MEMINFO: i32 = 55;
    sockopt::get(fd, libc::SOL_SOCKET, SO_MEMINFO, 36)
        .ok()
        .and_then(|m| Some(u32::from_ne_bytes(m.get(..4)?.try_into().ok()?)))
        .unwrap_or(0)
}

/// An address as IPv4 if it is one that IPv6 only wraps (::ffff:a.b.c.d).
pub(crate) fn unmapped(host: &[u8]) -> &[u8] {
    match host.strip_prefix(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]) {
        Some(v4) => v4,
        None => host,
    }
}

/// Sends a UDP datagram to a local address as if it came from `from`.
fn inject(from: &[u8], local: &[u8], data: &[u8]) -> Result<()> {
    let source = unmapped(host(from));
    let mut target = unmapped(host(local)).to_vec();
    if target.iter().all(|b| *b == 0) {
        // Bound to any address: loopback, of the sender's version.
        target = loopback(source.len());
    }
    let len = u16::try_from(data.len() + 8).context("a datagram of more than 64 KiB")?;
    let mut udp = Vec::with_capacity(data.len() + 8);
    udp.extend_from_slice(&port(from).to_be_bytes());
    udp.extend_from_slice(&port(local).to_be_bytes());
    udp.extend_from_slice(&len.to_be_bytes());
    udp.extend_from_slice(&[0; 2]);
    udp.extend_from_slice(data);
    let sum = checksum(source, &target, libc::IPPROTO_UDP as u8, &udp);
    if let Some(field) = udp.get_mut(6..8) {
        // Zero means none: its complement means the same number.
        field.copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    }
    send_packet(source, &target, libc::IPPROTO_UDP as u8, &udp)
}

pub(crate) fn loopback(len: usize) -> Vec<u8> {
    if len == 4 {
        vec![127, 0, 0, 1]
    } else {
        std::net::Ipv6Addr::LOCALHOST.octets().to_vec()
    }
}

/// Sends an IP packet with a source address of our choice to an address of this host.
pub(crate) fn send_packet(
    source: &[u8],
    target: &[u8],
    protocol: u8,
    payload: &[u8],
) -> Result<()> {
    const IPV6_HDRINCL: i32 = 36;
    let v6 = target.len() == 16;
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let raw = socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)
        .context("a raw socket; needs CAP_NET_RAW")?;
    let mut packet = Vec::with_capacity(40 + payload.len());
    if v6 {
        sockopt::set_int(&raw, libc::IPPROTO_IPV6, IPV6_HDRINCL, 1)
            .context("setsockopt(IPV6_HDRINCL)")?;
        packet.extend_from_slice(&[0x60, 0, 0, 0]);
        packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        packet.extend_from_slice(&[protocol, 64]);
    } else {
        // Length, id and checksum are the kernel's to fill in (raw(7)).
        packet.extend_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
    }
    packet.extend_from_slice(source);
    packet.extend_from_slice(target);
    packet.extend_from_slice(payload);
    options::enlarge_buffers(&raw, packet.len());
    let to = make_address(target, 0);
    socket::send(
        &raw,
        &packet,
        &socket::Extra {
            to: Some(&to),
            ..Default::default()
        },
    )
    .context("sending through a raw socket")?;
    Ok(())
}

/// Internet checksum over pseudo header and payload (RFC 768, RFC 8200 8.1).
pub(crate) fn checksum(source: &[u8], target: &[u8], protocol: u8, payload: &[u8]) -> u16 {
    let mut sum = u32::from(protocol) + payload.len() as u32;
    for part in [source, target, payload] {
        for pair in part.chunks(2) {
            let high = pair.first().copied().unwrap_or(0);
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([high, low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
