//! TCP_REPAIR: reading and making a TCP connection's state without a packet (linux/tcp.h; net/ipv4/tcp.c,
//! do_tcp_setsockopt). Needs CAP_NET_ADMIN.
//!
//! A socket in repair mode sends nothing when it is closed.

use std::io;
use std::os::fd::AsFd;

use super::sockopt;

const TCP: i32 = libc::IPPROTO_TCP;
/// The option itself, for who registers an undo.
pub const TCP_REPAIR: i32 = 19;
/// Leaves repair mode without the window probe.
pub const OFF_SILENT: i32 = -1;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Bytes of struct tcp_repair_window.
pub const WINDOW_LEN: usize = 20;

/// Which queue of the connection calls are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepairQueue {
    None = 0,
    Receive = 1,
    Send = 2,
}

/// Enters repair mode. The kernel forgets SO_REUSEADDR over it: set that again afterwards.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN or for a listening socket.
pub fn on(fd: impl AsFd) -> io::Result<()> {
    sockopt::set_int(fd, TCP, TCP_REPAIR, 1)
}

/// Leaves repair mode; with `probe` a window probe makes the peer answer with what it knows.
pub fn off(fd: impl AsFd, probe: bool) -> io::Result<()> {
    sockopt::set_int(fd, TCP, TCP_REPAIR, if probe { 0 } else { OFF_SILENT })
}

/// Chooses the queue that sequence numbers, sends and receives concern.
pub fn queue(fd: impl AsFd, queue: RepairQueue) -> io::Result<()> {
    sockopt::set_int(fd, TCP, TCP_REPAIR_QUEUE, queue as i32)
}

/// Sequence number behind the chosen queue: write_seq or rcv_nxt.
pub fn sequence(fd: impl AsFd) -> io::Result<u32> {
    Ok(sockopt::get_int(fd, TCP, TCP_QUEUE_SEQ)? as u32)
}

/// Sets where the chosen queue begins; before connect only.
pub fn set_sequence(fd: impl AsFd, sequence: u32) -> io::Result<()> {
    sockopt::set_int(fd, TCP, TCP_QUEUE_SEQ, sequence as i32)
}

/// struct tcp_repair_window, raw.
pub fn window(fd: impl AsFd) -> io::Result<Vec<u8>> {
    sockopt::get(fd, TCP, TCP_REPAIR_WINDOW, WINDOW_LEN)
}

/// Sets struct tcp_repair_window.
pub fn set_window(fd: impl AsFd, window: &[u8]) -> io::Result<()> {
    sockopt::set(fd, TCP, TCP_REPAIR_WINDOW, window)
}

/// The clock of the connection's time stamps.
pub fn timestamp(fd: impl AsFd) -> io::Result<u32> {
    Ok(sockopt::get_int(fd, TCP, TCP_TIMESTAMP)? as u32)
}

/// Sets the clock of the connection's time stamps.
pub fn set_timestamp(fd: impl AsFd, value: u32) -> io::Result<()> {
    sockopt::set_int(fd, TCP, TCP_TIMESTAMP, value as i32)
}

/// What both ends agreed on at the handshake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Largest segment that may be sent, bytes.
    pub mss: u32,
    /// Send and receive window scale, when both scale.
    pub scales: Option<(u8, u8)>,
    pub sack: bool,
    pub timestamps: bool,
}

/// Reads TCP_INFO's options; `fd` must be in repair mode, for then TCP_MAXSEG tells the agreed one.
pub fn agreed(fd: impl AsFd) -> io::Result<Agreed> {
    let fd = fd.as_fd();
    let info = sockopt::get(fd, TCP, libc::TCP_INFO, 8)?;
    // struct tcp_info: options at 5 (TCPI_OPT_*), window scales in two nibbles at 6.
    let options = info.get(5).copied().unwrap_or(0);
    let scales = info.get(6).copied().unwrap_or(0);
    Ok(Agreed {
        mss: sockopt::get_int(fd, TCP, libc::TCP_MAXSEG)?.max(0) as u32,
        timestamps: options & 1 != 0,
        sack: options & 2 != 0,
        scales: (options & 4 != 0).then_some((scales & 0xf, scales >> 4)),
    })
}

/// Sets what was agreed on; after connect, before any data.
pub fn set_agreed(fd: impl AsFd, a: &Agreed) -> io::Result<()> {
    // TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERM, TCPOPT_TIMESTAMP (net/tcp.h).
    let mut options: Vec<(u32, u32)> = vec![(2, a.mss)];
    if let Some((send, receive)) = a.scales {
        options.push((3, u32::from(send) | u32::from(receive) << 16));
    }
    if a.sack {
        options.push((4, 0));
    }
    if a.timestamps {
        options.push((8, 0));
    }
    let mut raw = Vec::new();
    for (code, value) in options {
        raw.extend_from_slice(&code.to_ne_bytes());
        raw.extend_from_slice(&value.to_ne_bytes());
    }
    sockopt::set(fd, TCP, TCP_REPAIR_OPTIONS, &raw)
}
