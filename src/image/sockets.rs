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
    Netlink { pid: u32, groups: u32 },
}

/// AF_UNIX of any type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unix {
    /// sun_path as bound: empty is unnamed, a first zero byte is abstract.
    pub name: Bytes,
    /// Directory a relative name was bound in, and owner and mode of the socket file.
    pub file: Option<UnixFile>,
    /// Listening, with this backlog.
    pub backlog: Option<u32>,
    /// Inode of the peer when that is in the dump.
    pub peer: Option<u64>,
    /// Address of the peer (dgram sockets connected by name).
    pub peer_name: Option<Bytes>,
    /// SHUT_RD = 1 | SHUT_WR = 2.
    pub shutdown: u8,
    /// What this socket has received and not read, a message each (streams: runs of bytes).
    pub queue: Vec<UnixMessage>,
    /// Connections not accepted yet (listening sockets): each is the client's inode.
    pub pending: Vec<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixFile {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    pub data: Bytes,
    /// Sender's address (dgram).
    pub from: Option<Bytes>,
    /// Descriptions in flight (SCM_RIGHTS).
    pub descriptions: Vec<super::DescriptionId>,
    /// pid, uid, gid of SCM_CREDENTIALS.
    pub credentials: Option<(i32, u32, u32)>,
}

/// UDP and raw sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inet {
    /// struct sockaddr as getsockname and getpeername give it.
    pub local: Option<Bytes>,
    pub peer: Option<Bytes>,
    /// Datagrams that had not been read: sender's struct sockaddr and content.
    pub queue: Vec<(Bytes, Bytes)>,
    pub shutdown: u8,
}

/// TCP in any state that is carried over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcp {
    /// TCP_ESTABLISHED ... TCP_LISTEN, TCP_CLOSE (linux/tcp_states.h).
    pub state: u8,
    pub local: Option<Bytes>,
    pub peer: Option<Bytes>,
    pub backlog: Option<u32>,
    /// The other end's socket inode when that is in the dump (needs no peer outside).
    pub peer_ino: Option<u64>,
    pub connection: Option<TcpConnection>,
}

/// What TCP_REPAIR gives (net/ipv4/tcp.c, do_tcp_getsockopt).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    pub send_seq: u32,
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
    pub timestamp: u32,
    /// struct tcp_repair_window, raw.
    pub window: Bytes,
}
