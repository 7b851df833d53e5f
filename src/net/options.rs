//! Socket options: which there are, and which a socket has that a fresh one has not.
//!
//! A fresh socket of the same kind is the measure; only differences are stored, as the setsockopt calls
//! that make them again.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::Met;
use crate::image::Bytes;
use crate::image::sockets::{SockOpt, Socket};
use crate::kernel::{socket, sockopt};

const SOL_TCP: i32 = libc::IPPROTO_TCP;
const SOL_UDP: i32 = libc::IPPROTO_UDP;
const SOL_IP: i32 = libc::IPPROTO_IP;
const SOL_IPV6: i32 = libc::IPPROTO_IPV6;
const SOL_NETLINK: i32 = 270;
const SOL_RAW: i32 = 255;
const SO_BUF_LOCK: i32 = 72;
const SO_LOCK_FILTER: i32 = 44;
const TCP_ULP: i32 = 31;

/// When an option is set at restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before bind.
    Early,
    /// When queues are full again: buffer sizes, time-outs and all that would disturb the filling.
    Late,
}

/// Option, most bytes of its value.
type Known = (i32, usize);

/// Of an extension header.
const MOST: usize = 2048;

/// Set before bind, in this order.
const EARLY: [(i32, &[i32]); 3] = [
    (
        libc::SOL_SOCKET,
        &[
            libc::SO_REUSEADDR,
            libc::SO_REUSEPORT,
            libc::SO_MARK,
            libc::SO_BINDTODEVICE,
        ],
    ),
    // IP_FREEBIND, IP_TRANSPARENT, IP_HDRINCL, IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE
    (SOL_IP, &[15, 19, 3, 24, 51]),
    // IPV6_V6ONLY, IPV6_FREEBIND, IPV6_TRANSPARENT
    (SOL_IPV6, &[26, 78, 75]),
];

const SOCKET: &[Known] = &[
    (libc::SO_REUSEADDR, 4),
    (libc::SO_REUSEPORT, 4),
    (libc::SO_MARK, 4),
    (libc::SO_BINDTODEVICE, 16),
    (libc::SO_DEBUG, 4),
    (libc::SO_DONTROUTE, 4),
    (libc::SO_BROADCAST, 4),
    (libc::SO_KEEPALIVE, 4),
    (libc::SO_OOBINLINE, 4),
    (libc::SO_NO_CHECK, 4),
    (libc::SO_PRIORITY, 4),
    (libc::SO_LINGER, 8),
    (libc::SO_PASSCRED, 4),
    (libc::SO_RCVLOWAT, 4),
    (libc::SO_RCVTIMEO, 16),
    (libc::SO_SNDTIMEO, 16),
    (libc::SO_TIMESTAMP, 4),
    (libc::SO_TIMESTAMPNS, 4),
    (libc::SO_TIMESTAMPING, 8),
    (libc::SO_PASSSEC, 4),
    (libc::SO_RXQ_OVFL, 4),
    (libc::SO_PEEK_OFF, 4),
    (43, 4), // SO_NOFCS
    (45, 4), // SO_SELECT_ERR_QUEUE
    (46, 4), // SO_BUSY_POLL
    (47, 8), // SO_MAX_PACING_RATE
    (60, 4), // SO_ZEROCOPY
    (61, 8), // SO_TXTIME
    (49, 4), // SO_INCOMING_CPU
    (69, 4), // SO_PREFER_BUSY_POLL
    (73, 4), // SO_RESERVE_MEM
    (74, 4), // SO_TXREHASH
    (75, 4), // SO_RCVMARK
    (76, 4), // SO_PASSPIDFD
    (82, 4), // SO_RCVPRIORITY
    (83, 4), // SO_PASSRIGHTS
    (libc::SO_SNDBUF, 4),
    (libc::SO_RCVBUF, 4),
    (SO_BUF_LOCK, 4),
];

const IP: &[Known] = &[
    (15, 4), // IP_FREEBIND
    (19, 4), // IP_TRANSPARENT
    (3, 4),  // IP_HDRINCL
    (24, 4), // IP_BIND_ADDRESS_NO_PORT
    (51, 4), // IP_LOCAL_PORT_RANGE
    (1, 4),  // IP_TOS
    (2, 4),  // IP_TTL
    (4, 40), // IP_OPTIONS
    (6, 4),  // IP_RECVOPTS
    (7, 4),  // IP_RETOPTS
    (8, 4),  // IP_PKTINFO
    (10, 4), // IP_MTU_DISCOVER
    (11, 4), // IP_RECVERR
    (12, 4), // IP_RECVTTL
    (13, 4), // IP_RECVTOS
    (18, 4), // IP_PASSSEC
    (20, 4), // IP_RECVORIGDSTADDR
    (21, 4), // IP_MINTTL
    (22, 4), // IP_NODEFRAG
    (23, 4), // IP_CHECKSUM
    (25, 4), // IP_RECVFRAGSIZE
    (26, 4), // IP_RECVERR_RFC4884
    (32, 4), // IP_MULTICAST_IF
    (33, 4), // IP_MULTICAST_TTL
    (34, 4), // IP_MULTICAST_LOOP
    (49, 4), // IP_MULTICAST_ALL
    (50, 4), // IP_UNICAST_IF
];

const IPV6: &[Known] = &[
    (26, 4),    // IPV6_V6ONLY
    (78, 4),    // IPV6_FREEBIND
    (75, 4),    // IPV6_TRANSPARENT
    (2, 4),     // IPV6_2292PKTINFO
    (3, 4),     // IPV6_2292HOPOPTS
    (4, 4),     // IPV6_2292DSTOPTS
    (5, 4),     // IPV6_2292RTHDR
    (8, 4),     // IPV6_2292HOPLIMIT
    (11, 4),    // IPV6_FLOWINFO
    (16, 4),    // IPV6_UNICAST_HOPS
    (17, 4),    // IPV6_MULTICAST_IF
    (18, 4),    // IPV6_MULTICAST_HOPS
    (19, 4),    // IPV6_MULTICAST_LOOP
    (23, 4),    // IPV6_MTU_DISCOVER
    (25, 4),    // IPV6_RECVERR
    (29, 4),    // IPV6_MULTICAST_ALL
    (30, 4),    // IPV6_ROUTER_ALERT_ISOLATE
    (31, 4),    // IPV6_RECVERR_RFC4884
    (33, 4),    // IPV6_FLOWINFO_SEND
    (49, 4),    // IPV6_RECVPKTINFO
    (51, 4),    // IPV6_RECVHOPLIMIT
    (53, 4),    // IPV6_RECVHOPOPTS
    (54, MOST), // IPV6_HOPOPTS
    (55, MOST), // IPV6_RTHDRDSTOPTS
    (56, 4),    // IPV6_RECVRTHDR
    (57, MOST), // IPV6_RTHDR
    (58, 4),    // IPV6_RECVDSTOPTS
    (59, MOST), // IPV6_DSTOPTS
    (60, 4),    // IPV6_RECVPATHMTU
    (62, 4),    // IPV6_DONTFRAG
    (66, 4),    // IPV6_RECVTCLASS
    (67, 4),    // IPV6_TCLASS
    (70, 4),    // IPV6_AUTOFLOWLABEL
    (72, 4),    // IPV6_ADDR_PREFERENCES
    (73, 4),    // IPV6_MINHOPCOUNT
    (74, 4),    // IPV6_RECVORIGDSTADDR
    (76, 4),    // IPV6_UNICAST_IF
    (77, 4),    // IPV6_RECVFRAGSIZE
];

const TCP: &[Known] = &[
    (13, 16), // TCP_CONGESTION
    (1, 4),   // TCP_NODELAY
    (3, 4),   // TCP_CORK
    (4, 4),   // TCP_KEEPIDLE
    (5, 4),   // TCP_KEEPINTVL
    (6, 4),   // TCP_KEEPCNT
    (7, 4),   // TCP_SYNCNT
    (8, 4),   // TCP_LINGER2
    (9, 4),   // TCP_DEFER_ACCEPT
    (16, 4),  // TCP_THIN_LINEAR_TIMEOUTS
    (18, 4),  // TCP_USER_TIMEOUT
    (23, 4),  // TCP_FASTOPEN
    (25, 4),  // TCP_NOTSENT_LOWAT
    (27, 4),  // TCP_SAVE_SYN
    (30, 4),  // TCP_FASTOPEN_CONNECT
    (34, 4),  // TCP_FASTOPEN_NO_COOKIE
    (36, 4),  // TCP_INQ
    (37, 4),  // TCP_TX_DELAY
    (44, 4),  // TCP_RTO_MAX_MS
    (45, 4),  // TCP_RTO_MIN_US
    (46, 4),  // TCP_DELACK_MAX_US
];

/// TCP_MAXSEG, TCP_WINDOW_CLAMP: in a connection getsockopt tells the path's, not what was set.
const TCP_UNCONNECTED: &[Known] = &[(2, 4), (10, 4)];

const UDP: &[Known] = &[
    (1, 4),   // UDP_CORK
    (100, 4), // UDP_ENCAP
    (101, 4), // UDP_NO_CHECK6_TX
    (102, 4), // UDP_NO_CHECK6_RX
    (103, 4), // UDP_SEGMENT
    (104, 4), // UDP_GRO
];

const NETLINK: &[Known] = &[
    (3, 4),  // NETLINK_PKTINFO
    (4, 4),  // NETLINK_BROADCAST_ERROR
    (5, 4),  // NETLINK_NO_ENOBUFS
    (8, 4),  // NETLINK_LISTEN_ALL_NSID
    (10, 4), // NETLINK_CAP_ACK
    (11, 4), // NETLINK_EXT_ACK
    (12, 4), // NETLINK_GET_STRICT_CHK
];

const RAW: &[Known] = &[(1, 4)]; // ICMP_FILTER

const RAW6: &[Known] = &[(7, 4)]; // IPV6_CHECKSUM

/// The lists that concern a socket.
fn lists(family: i32, kind: i32, protocol: i32) -> Vec<(i32, &'static [Known])> {
    let mut all = vec![(libc::SOL_SOCKET, SOCKET)];
    if family == libc::AF_INET || family == libc::AF_INET6 {
        all.push((SOL_IP, IP));
        if family == libc::AF_INET6 {
            all.push((SOL_IPV6, IPV6));
        }
        match kind {
            libc::SOCK_STREAM => all.push((SOL_TCP, TCP)),
            libc::SOCK_DGRAM if protocol == libc::IPPROTO_UDP => all.push((SOL_UDP, UDP)),
            libc::SOCK_RAW if family == libc::AF_INET6 => all.push((SOL_IPV6, RAW6)),
            libc::SOCK_RAW => all.push((SOL_RAW, RAW)),
            _ => {}
        }
    } else if family == libc::AF_NETLINK {
        all.push((SOL_NETLINK, NETLINK));
    }
    all
}

fn is_multicast(level: i32, name: i32) -> bool {
    // IP_MULTICAST_IF, _TTL, _LOOP, _ALL; IPV6_MULTICAST_IF, _HOPS, _LOOP, _ALL
    (level == SOL_IP && [32, 33, 34, 49].contains(&name))
        || (level == SOL_IPV6 && [17, 18, 19, 29].contains(&name))
}

type Values = HashMap<(i32, i32), Vec<u8>>;

fn values(fd: impl AsFd, family: i32, kind: i32, protocol: i32) -> Values {
    let fd = fd.as_fd();
    let mut found = Values::new();
    let mut lists = lists(family, kind, protocol);
    let ended = || socket::poll_now(fd).is_ok_and(|e| e & libc::POLLRDHUP != 0);
    if kind == libc::SOCK_STREAM
        && family != libc::AF_UNIX
        && socket::peer_name(fd).is_err()
        && !ended()
    {
        lists.push((SOL_TCP, TCP_UNCONNECTED));
    }
    for (level, entries) in lists {
        for &(name, max) in entries {
            if kind == libc::SOCK_STREAM && is_multicast(level, name) {
                continue; // can be read, but not set
            }
            // An option this kernel or this kind of socket has not is not set either.
            if let Ok(value) = sockopt::get(fd, level, name, max) {
                found.insert((level, name), value);
            }
        }
    }
    found
}

/// Options of fresh sockets, by family, type and protocol.
#[derive(Default)]
pub(crate) struct Defaults(HashMap<(i32, i32, i32), Values>);

impl Defaults {
    /// The setsockopt calls that make a fresh socket like this one.
    pub fn read(&mut self, met: &Met) -> Result<Vec<SockOpt>> {
        let key = (met.family, met.kind, met.protocol);
        let fresh = match self.0.entry(key) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => {
                let fresh = socket::socket(met.family, met.kind, met.protocol)
                    .context("a fresh socket to compare with")?;
                e.insert(values(&fresh, met.family, met.kind, met.protocol))
            }
        };
        let mine = values(&met.fd, met.family, met.kind, met.protocol);
        let mut options = Vec::new();
        for (level, entries) in lists(met.family, met.kind, met.protocol)
            .into_iter()
            .chain([(SOL_TCP, TCP_UNCONNECTED)])
        {
            for &(name, _) in entries {
                let Some(value) = mine.get(&(level, name)) else {
                    continue;
                };
                if fresh.get(&(level, name)) != Some(value) {
                    options.push(SockOpt {
                        level,
                        name,
                        value: Bytes(value.clone()),
                    });
                }
            }
        }
        // Only sizes that the program chose are options; others are the kernel's own tuning, but kept
        // for their value where they are larger than a fresh socket's would be.
        filter(met, &mut options)?;
        if met.family != libc::AF_UNIX && met.kind == libc::SOCK_STREAM {
            let ulp = sockopt::get(&met.fd, SOL_TCP, TCP_ULP, 16).unwrap_or_default();
            if ulp.iter().any(|b| *b != 0) {
                bail!(
                    "an upper-layer protocol ({}) runs in the kernel on this socket and cannot be carried",
                    String::from_utf8_lossy(&ulp).trim_end_matches('\0')
                );
            }
        }
        Ok(options)
    }
}

/// A classic filter, and the lock on it.
fn filter(met: &Met, options: &mut Vec<SockOpt>) -> Result<()> {
    let program = match sockopt::filter(&met.fd) {
        Ok(p) => p,
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => {
            bail!("it has an eBPF filter (SO_ATTACH_BPF), which cannot be read")
        }
        Err(_) => return Ok(()), // a kind of socket that takes none
    };
    if program.is_empty() {
        return Ok(());
    }
    options.push(SockOpt {
        level: libc::SOL_SOCKET,
        name: libc::SO_ATTACH_FILTER,
        value: Bytes(program.concat()),
    });
    if sockopt::get_int(&met.fd, libc::SOL_SOCKET, SO_LOCK_FILTER).unwrap_or(0) != 0 {
        options.push(SockOpt {
            level: libc::SOL_SOCKET,
            name: SO_LOCK_FILTER,
            value: Bytes(1i32.to_ne_bytes().to_vec()),
        });
    }
    Ok(())
}

fn is_early(o: &SockOpt) -> bool {
    EARLY
        .iter()
        .any(|(level, names)| *level == o.level && names.contains(&o.name))
}

/// Sets the options of one phase. What fails is a warning: an option this kernel or privilege does not
/// allow is better missing than the program.
pub(crate) fn apply(fd: &OwnedFd, s: &Socket, phase: Phase, warnings: &mut Vec<String>) {
    for o in &s.options {
        if is_early(o) != (phase == Phase::Early) {
            continue;
        }
        if !is_known(s, o) {
            warnings.push(format!(
                "socket {}: option {} of level {} is none that this mistctl knows; left out",
                s.ino, o.name, o.level
            ));
            continue;
        }
        let r = match (o.level, o.name) {
            (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER) => {
                let program: Vec<_> = o
                    .value
                    .chunks_exact(8)
                    .filter_map(|c| c.try_into().ok())
                    .collect();
                sockopt::set_filter(fd, &program)
            }
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => {
                set_buffer(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, &o.value)
            }
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => {
                set_buffer(fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, &o.value)
            }
            _ => sockopt::set(fd, o.level, o.name, &o.value),
        };
        if let Err(e) = r {
            warnings.push(format!(
                "socket {}: setsockopt(level {}, option {}): {e}",
                s.ino, o.level, o.name
            ));
        }
    }
    if phase == Phase::Late && s.options.iter().any(is_buffer) && !s.options.iter().any(is_lock) {
        // The sizes were the kernel's own tuning: leave it free to go on.
        let _ = sockopt::set_int(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 0);
    }
}

/// Images are not trusted: only options that a dump may have stored are set.
fn is_known(s: &Socket, o: &SockOpt) -> bool {
    let filter = o.level == libc::SOL_SOCKET
        && (o.name == libc::SO_ATTACH_FILTER || o.name == SO_LOCK_FILTER);
    filter
        || lists(s.family, s.kind, s.protocol)
            .into_iter()
            .chain([(SOL_TCP, TCP_UNCONNECTED)])
            .any(|(level, names)| level == o.level && names.iter().any(|k| k.0 == o.name))
}

fn is_buffer(o: &SockOpt) -> bool {
    o.level == libc::SOL_SOCKET && (o.name == libc::SO_RCVBUF || o.name == libc::SO_SNDBUF)
}

fn is_lock(o: &SockOpt) -> bool {
    o.level == libc::SOL_SOCKET && o.name == SO_BUF_LOCK
}

/// getsockopt tells twice what setsockopt was told (socket(7)).
fn set_buffer(fd: &OwnedFd, force: i32, plain: i32, value: &[u8]) -> std::io::Result<()> {
    let size = value
        .try_into()
        .map(i32::from_ne_bytes)
        .map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL))?;
    sockopt::set_int(fd, libc::SOL_SOCKET, force, size / 2)
        .or_else(|_| sockopt::set_int(fd, libc::SOL_SOCKET, plain, size / 2))
}

/// Makes room in both buffers for a refill; [`restore_buffers`] or [`apply`] sets the true sizes.
pub(crate) fn enlarge_buffers(fd: impl AsFd, bytes: usize) {
    let fd = fd.as_fd();
    // Queued buffers are charged with their overhead, up to several times the data in small pieces.
    let size = i32::try_from(bytes.saturating_mul(4))
        .unwrap_or(i32::MAX / 4)
        .max(4 << 20);
    for (force, plain) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        if sockopt::set_int(fd, libc::SOL_SOCKET, force, size).is_err() {
            let _ = sockopt::set_int(fd, libc::SOL_SOCKET, plain, size);
        }
    }
}

/// SO_RCVBUF and SO_SNDBUF.
pub(crate) type BufferSizes = (Vec<u8>, Vec<u8>);

/// Sizes as a fresh socket has them, before the stored options are applied.
pub(crate) fn buffer_sizes(fd: impl AsFd) -> BufferSizes {
    let fd = fd.as_fd();
    let get = |name| sockopt::get(fd, libc::SOL_SOCKET, name, 4).unwrap_or_default();
    (get(libc::SO_RCVBUF), get(libc::SO_SNDBUF))
}

/// Undoes [`enlarge_buffers`].
pub(crate) fn restore_buffers(fd: &OwnedFd, sizes: &BufferSizes) {
    let _ = set_buffer(fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, &sizes.0);
    let _ = set_buffer(fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, &sizes.1);
    let _ = sockopt::set_int(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 0);
}

/// Undoes [`enlarge_buffers`] for a TCP socket whose image does not say otherwise: the kernel tunes them.
pub(crate) fn restore_default_buffers(fd: &OwnedFd, s: &Socket) {
    if let Ok(fresh) = socket::socket(s.family, s.kind, s.protocol) {
        let mut sizes = buffer_sizes(&fresh);
        // With much more queued than it has room for, a socket would not cut what it sends again into pieces
        // (tcp_fragment), and stand still for ever.
        let queued = sockopt::queued_memory(fd).unwrap_or(0);
        let size = <[u8; 4]>::try_from(&sizes.1[..]).map_or(0, i32::from_ne_bytes);
        if queued > size {
            sizes.1 = queued.to_ne_bytes().to_vec();
        }
        restore_buffers(fd, &sizes);
    }
}
