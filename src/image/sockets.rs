//! Sockets of every family that is carried over.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// One socket; shared descriptors share it through their description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Inode number at dump time: names it towards others of the dump.
    pub ino: u64,
    /// AF_UNIX, AF_INET, AF_INET6, AF_NETLINK.
    pub family: i32,
    /// SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_RAW.
    pub kind: i32,
    pub protocol: i32,
    /// setsockopt calls that make it what it was, raw, in the order to issue them.
    pub options: Vec<SockOpt>,
    pub state: SocketState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SockOpt {
    pub level: i32,
    pub name: i32,
    pub value: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "family")]
pub enum SocketState {
    Unix(Unix),
    Inet(Inet),
    Tcp(Tcp),
    Netlink(Netlink),
}

/// AF_NETLINK of protocol NETLINK_ROUTE.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netlink {
    /// Port id it was bound to; 0 is not bound.
    pub pid: u32,
    /// Multicast groups joined, by number (NETLINK_LIST_MEMBERSHIPS).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u32>,
}

/// AF_UNIX of any type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unix {
    /// sun_path as bound: empty is unnamed, a first zero byte is abstract.
    pub name: Bytes,
    /// The socket file it made, when it was bound to a path and is not the accepted end of a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<UnixFile>,
    /// Listening, with this backlog.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// Inode of the peer when that is in the dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<u64>,
    /// Address of the peer (dgram sockets connected by name).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<Bytes>,
    /// The end of a connection that came out of accept(2): its name is its listener's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepted: bool,
    /// The peer was closed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub peer_closed: bool,
    /// The peer was closed with bytes it had not read: the next call gets ECONNRESET.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// The peer is alive and outside the dump; says who, for people. Such a socket is not rebuilt: who
    /// restores puts another in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<String>,
    /// RCV_SHUTDOWN = 1 | SEND_SHUTDOWN = 2.
    #[serde(default)]
    pub shutdown: u8,
    /// What this socket has received and not read, a message each (streams: runs of bytes).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue: Vec<UnixMessage>,
    /// What the kernel charges it with for what its peer has not read: bytes and overhead (streams).
    #[serde(default, skip_serializing_if = "super::files::is_zero")]
    pub charged: u32,
    /// Connections not accepted yet (listening sockets), first come first: each is the client's inode, 0 of one that
    /// was closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<u64>,
    /// What is in each of them; none where nothing is in any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_queues: Vec<Vec<UnixMessage>>,
    /// What SO_PEERCRED tells: who made the pair, connected, or listened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_creds: Option<PeerCreds>,
}

/// struct ucred: effective ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerCreds {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixFile {
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Directory a relative name was bound in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<Bytes>,
    /// The file had been unlinked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlinked: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    pub data: Bytes,
    /// Sender's sun_path (dgram).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Bytes>,
    /// Descriptions in flight (SCM_RIGHTS).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub descriptions: Vec<super::DescriptionId>,
    /// pid, uid, gid of SCM_CREDENTIALS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<(i32, u32, u32)>,
}

/// UDP and raw sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inet {
    /// struct sockaddr as getsockname and getpeername give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Bytes>,
    /// Datagrams that had not been read: sender's struct sockaddr and content.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue: Vec<(Bytes, Bytes)>,
    #[serde(default)]
    pub shutdown: u8,
    /// Multicast groups joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memberships: Vec<Membership>,
    /// The interface that IPv4 multicast is sent by, where it was chosen by its index (IP_MULTICAST_IF).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multicast_interface: Option<String>,
}

/// A multicast group that a socket receives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its address: 4 or 16 bytes.
    pub group: Bytes,
    /// Name of the interface it was joined on.
    pub interface: String,
    /// What `sources` send is received, and nothing else; otherwise all but that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Bytes>,
}

/// TCP in any state that is carried over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcp {
    /// TCP_ESTABLISHED ... TCP_LISTEN, TCP_CLOSE (linux/tcp_states.h).
    pub state: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// The other end's socket inode when that is in the dump (needs no peer outside).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_ino: Option<u64>,
    /// The other end was on the same host and closed by its process: nobody speaks there any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub peer_closed: bool,
    /// RCV_SHUTDOWN = 1 | SEND_SHUTDOWN = 2.
    #[serde(default)]
    pub shutdown: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<TcpConnection>,
    /// Of a connection that has ended (state CLOSE, shutdown both ways): what was not read of it.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub rest: Bytes,
    /// It ended with a reset that the program was not told of yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// It never was one: its connect was refused. `reset`: the program was not told so yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refused: bool,
    /// Connections not accepted yet, of clients in the dump, first come first: their inodes, 0 of one that was
    /// closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<u64>,
    /// What is in each of them, or still on its way; and its client's struct sockaddr.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_data: Vec<(Bytes, Bytes)>,
}

/// What TCP_REPAIR gives (net/ipv4/tcp.c, do_tcp_getsockopt).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// Sequence number behind the last byte of `send_queue`, a FIN not counted.
    pub send_seq: u32,
    /// Sequence number behind the last byte of `recv_queue`, a FIN not counted.
    pub recv_seq: u32,
    /// Sent or queued and not acknowledged; of it `unsent` bytes had not been sent.
    pub send_queue: Bytes,
    pub unsent: u32,
    pub recv_queue: Bytes,
    pub mss: u32,
    pub snd_wscale: Option<u8>,
    pub rcv_wscale: Option<u8>,
    pub sack: bool,
    pub timestamps: bool,
    /// TCP_TIMESTAMP: the clock that its time stamps show.
    pub timestamp: u32,
    /// struct tcp_repair_window, raw.
    pub window: Bytes,
    /// SO_COOKIE: names the socket on the host it was dumped on, until that reboots.
    #[serde(default)]
    pub cookie: u64,
}

fn is_empty(bytes: &Bytes) -> bool {
    bytes.is_empty()
}
