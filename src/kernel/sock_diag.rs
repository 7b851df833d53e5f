//! sock_diag(7): what the kernel tells about sockets that no descriptor of ours shows, such as the
//! inode of a unix socket's peer and the connections that wait to be accepted.

use std::io;
use std::os::fd::OwnedFd;

use super::{socket, sockopt};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;

/// A unix socket (linux/unix_diag.h).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixDiag {
    /// Connections that were not accepted have none, and are not listed.
    pub ino: u32,
    /// SOCK_STREAM ...
    pub kind: u8,
    /// TCP_ESTABLISHED, TCP_LISTEN, TCP_CLOSE: unix sockets use TCP's numbers.
    pub state: u8,
    /// sun_path, without a path's final zero byte.
    pub name: Vec<u8>,
    /// Inode of the peer; Some(0) is a peer that was closed, or one that has not been accepted yet.
    pub peer: Option<u32>,
    /// Of a listening socket: inodes of the clients that wait to be accepted, first come first.
    pub pending: Vec<u32>,
    /// Bytes to read; of a listening socket the number of connections that wait.
    pub receive_queue: u32,
    /// Memory in flight; of a listening socket its backlog.
    pub send_queue: u32,
    /// RCV_SHUTDOWN 1, SEND_SHUTDOWN 2.
    pub shutdown: u8,
}

/// A TCP or UDP socket (linux/inet_diag.h).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetDiag {
    pub family: u8,
    pub state: u8,
    /// struct inet_diag_sockid, raw: ports, addresses, interface, cookie.
    pub id: [u8; 48],
    pub receive_queue: u32,
    pub send_queue: u32,
    /// 0 is a socket without a descriptor: not accepted, orphaned, or in TIME_WAIT.
    pub ino: u32,
    pub shutdown: u8,
    /// Since something was sent last, it was sent again so often.
    pub retransmits: u8,
    /// When its timer expires, milliseconds.
    pub expires_ms: u32,
    /// TCP, for CAP_NET_ADMIN: its segments are signed (TCP_MD5SIG).
    pub signed: bool,
}

impl InetDiag {
    /// Local and remote port, host order.
    pub fn ports(&self) -> (u16, u16) {
        (
            u16::from_be_bytes([self.id[0], self.id[1]]),
            u16::from_be_bytes([self.id[2], self.id[3]]),
        )
    }

    /// Local and remote address; of IPv4 the first four bytes count.
    pub fn addresses(&self) -> ([u8; 16], [u8; 16]) {
        let (mut local, mut remote) = ([0; 16], [0; 16]);
        local.copy_from_slice(&self.id[4..20]);
        remote.copy_from_slice(&self.id[20..36]);
        (local, remote)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_ne_bytes)
}

fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut m = Vec::with_capacity(HEADER + body.len());
    m.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    m.extend_from_slice(&kind.to_ne_bytes());
    m.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    m.extend_from_slice(&[0; 8]);
    m.extend_from_slice(body);
    m
}

/// A sock_diag netlink socket in the network namespace of the calling thread.
pub struct SockDiag {
    netlink: OwnedFd,
}

impl SockDiag {
    /// # Errors
    /// errno of socket(2), for instance EPROTONOSUPPORT on a kernel without sock_diag.
    pub fn open() -> io::Result<Self> {
        const NETLINK_SOCK_DIAG: i32 = 4;
        let netlink = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
        Ok(Self { netlink })
    }

    /// Sends `body` and hands each answer to `each`: payload after the netlink header.
    fn ask(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        socket::send(
            &self.netlink,
            &request(kind, flags, body),
            &socket::Extra::default(),
        )?;
        let mut buffer = vec![0u8; 256 * 1024];
        loop {
            // The kernel answers a request for a dump inside send and each following recv: never waits.
            let n = socket::receive(&self.netlink, &mut buffer, 0)?.len;
            let mut rest = buffer.get(..n).unwrap_or_default();
            while rest.len() >= HEADER {
                let len = u32_at(rest, 0) as usize;
                let Some(message) = rest.get(HEADER..len) else {
                    return Err(io::Error::from_raw_os_error(libc::EPROTO));
                };
                match u16_at(rest, 4) {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let e = u32_at(message, 0) as i32;
                        return if e == 0 {
                            Ok(())
                        } else {
                            Err(io::Error::from_raw_os_error(-e))
                        };
                    }
                    _ => each(message),
                }
                rest = rest.get((len + 3) & !3..).unwrap_or_default();
            }
        }
    }

    /// Every unix socket of this network namespace.
    ///
    /// # Errors
    /// errno of the netlink exchange; ENOENT on a kernel without UNIX_DIAG.
    pub fn unix(&self) -> io::Result<Vec<UnixDiag>> {
        const SHOW_ALL: u32 = 0x3f;
        let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
        body.extend_from_slice(&u32::MAX.to_ne_bytes()); // states
        body.extend_from_slice(&0u32.to_ne_bytes()); // inode
        body.extend_from_slice(&SHOW_ALL.to_ne_bytes());
        body.extend_from_slice(&[0xff; 8]); // any cookie
        let mut all = Vec::new();
        self.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body, |m| {
            let mut d = UnixDiag {
                kind: m.get(1).copied().unwrap_or(0),
                state: m.get(2).copied().unwrap_or(0),
                ino: u32_at(m, 4),
                ..UnixDiag::default()
            };
            for (kind, value) in attributes(m, 16) {
                match kind {
                    0 => d.name = value.to_vec(),
                    2 => d.peer = Some(u32_at(value, 0)),
                    3 => d.pending = value.chunks_exact(4).map(|c| u32_at(c, 0)).collect(),
                    4 => {
                        d.receive_queue = u32_at(value, 0);
                        d.send_queue = u32_at(value, 4);
                    }
                    6 => d.shutdown = value.first().copied().unwrap_or(0),
                    _ => {}
                }
            }
            all.push(d);
        })?;
        Ok(all)
    }

    /// Every socket of this family (AF_INET, AF_INET6) and protocol (IPPROTO_TCP, IPPROTO_UDP).
    pub fn inet(&self, family: i32, protocol: i32) -> io::Result<Vec<InetDiag>> {
        self.inet_in(family, protocol, u32::MAX)
    }

    /// Those whose state's bit is among `states`.
    fn inet_in(&self, family: i32, protocol: i32, states: u32) -> io::Result<Vec<InetDiag>> {
        // Keys come with INET_DIAG_INFO only.
        const INFO: u8 = 1 << 1;
        let more = if protocol == libc::IPPROTO_TCP {
            INFO
        } else {
            0
        };
        let mut body = vec![family as u8, protocol as u8, more, 0];
        body.extend_from_slice(&states.to_ne_bytes());
        body.extend_from_slice(&[0; 48]);
        let mut all = Vec::new();
        self.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body, |m| {
            let mut d = InetDiag {
                family: m.first().copied().unwrap_or(0),
                state: m.get(1).copied().unwrap_or(0),
                id: [0; 48],
                receive_queue: u32_at(m, 56),
                send_queue: u32_at(m, 60),
                ino: u32_at(m, 68),
                shutdown: 0,
                retransmits: m.get(3).copied().unwrap_or(0),
                expires_ms: u32_at(m, 52),
                signed: false,
            };
            if let Some(id) = m.get(4..52) {
                d.id.copy_from_slice(id);
            }
            for (kind, value) in attributes(m, 72) {
                match kind {
                    8 => d.shutdown = value.first().copied().unwrap_or(0),
                    18 => d.signed = true,
                    _ => {}
                }
            }
            all.push(d);
        })?;
        Ok(all)
    }

    /// Ends a TCP socket (SOCK_DESTROY): used for what is left of connections whose process is gone.
    ///
    /// # Errors
    /// ENOENT when it is gone already, EOPNOTSUPP without INET_DIAG_DESTROY, EPERM without CAP_NET_ADMIN.
    pub fn destroy_tcp(&self, socket: &InetDiag) -> io::Result<()> {
        let mut body = vec![socket.family, libc::IPPROTO_TCP as u8, 0, 0];
        body.extend_from_slice(&(1u32 << socket.state).to_ne_bytes());
        body.extend_from_slice(&socket.id);
        self.ask(SOCK_DESTROY, NLM_F_ACK, &body, |_| {})
    }
}

/// For how long a TCP socket of this network namespace has been trying to connect, which it still does: by when its first
/// SYN was sent. Somewhat less where that was sent more than once, for timers expire late.
pub fn connecting_ns(socket: &OwnedFd) -> Option<i64> {
    const SYN_SENT: u8 = 2;
    // struct tcp_info.
    const AT_BACKOFF: usize = 4;
    const AT_RTO: usize = 8;
    let info = sockopt::get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, 104).ok()?;
    if info.first() != Some(&SYN_SENT) {
        return None;
    }
    let ino = nix::sys::stat::fstat(socket).ok()?.st_ino;
    let domain = sockopt::get_int(socket, libc::SOL_SOCKET, libc::SO_DOMAIN).ok()?;
    let all = SockDiag::open()
        .ok()?
        .inet_in(domain, libc::IPPROTO_TCP, 1 << SYN_SENT);
    let found = all.ok()?.into_iter().find(|d| u64::from(d.ino) == ino)?;
    let backoff = info.get(AT_BACKOFF).copied().unwrap_or(0).min(30);
    let now = i64::from(u32_at(&info, AT_RTO)) * 1000;
    // The first time-outs are all the same (tcp_syn_linear_timeouts), each of those that follow is twice the one before.
    let first = now >> backoff;
    let same = i64::from(found.retransmits.saturating_sub(backoff));
    let before = first * (same + (1 << backoff) - 1);
    Some(before + now - i64::from(found.expires_ms) * 1_000_000)
}

/// Netlink attributes of a message, from `at` on.
fn attributes(message: &[u8], at: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = message.get(at..).unwrap_or_default();
    std::iter::from_fn(move || {
        let len = u16_at(rest, 0) as usize;
        let value = rest.get(4..len)?;
        let kind = u16_at(rest, 2);
        rest = rest.get((len + 3) & !3..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn tells_the_peer_of_a_pair() {
        let (a, b) = socket::pair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        let ino = |f: &OwnedFd| {
            let l = std::fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd())).unwrap();
            let l = l.to_str().unwrap().to_owned();
            l["socket:[".len()..l.len() - 1].parse::<u32>().unwrap()
        };
        let all = SockDiag::open().unwrap().unix().unwrap();
        let of_a = all.iter().find(|d| d.ino == ino(&a)).unwrap();
        assert_eq!(of_a.peer, Some(ino(&b)));
    }
}
