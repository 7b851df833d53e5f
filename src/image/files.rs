//! Descriptors and the open file descriptions behind them.

use serde::{Deserialize, Serialize};

/// Index in `Manifest::descriptions`.
pub type DescriptionId = u32;

/// One entry of a descriptor table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    pub fd: i32,
    pub description: DescriptionId,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cloexec: bool,
}

/// An open file description (open(2)): what dup, fork and SCM_RIGHTS share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// File status flags and access mode, as F_GETFL gives them (O_CLOEXEC is the descriptor's).
    pub flags: i32,
    /// Position, bytes.
    pub pos: i64,
    /// F_SETOWN_EX: type (F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP) and id; and F_SETSIG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// flock(2), F_OFD_SETLK locks of this description (record locks of processes are in `Process`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<Lock>,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub who: i32,
    pub id: i32,
    pub signal: i32,
}

/// A lock as /proc/PID/fdinfo/FD tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub class: LockClass,
    pub exclusive: bool,
    pub start: i64,
    /// Bytes; 0 is up to the end of the file.
    pub len: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockClass {
    Flock,
    Ofd,
    /// fcntl F_SETLK: belongs to a process.
    Posix,
}

/// What kind of thing is open. The helper structs live with the kind that needs them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Kind {
    /// Regular file, directory, character or block device, or O_PATH of anything, reopened by path.
    Path {
        /// Index in `Manifest::files`.
        file: u32,
        /// S_IFREG, S_IFDIR, S_IFCHR ...
        file_type: u32,
        /// Of a device node.
        rdev: u64,
    },
    /// Deleted file or memfd: index in `Manifest::shared_memory`.
    Memory {
        memory: u32,
    },
    /// One end of pipe number `pipe`; content is stored with the first description that names it.
    Pipe(Pipe),
    /// Named FIFO; like a pipe, reopened by path.
    Fifo {
        file: u32,
        pipe: Pipe,
    },
    EventFd {
        count: u64,
        semaphore: bool,
    },
    SignalFd {
        mask: u64,
    },
    TimerFd(TimerFd),
    Epoll {
        entries: Vec<EpollEntry>,
    },
    Inotify {
        watches: Vec<InotifyWatch>,
        /// Raw queued events that had not been read.
        queued: usize,
    },
    PidFd {
        /// Pid of a process of the dump; -1 when it has ended and been waited for.
        pid: i32,
    },
    /// POSIX message queue (mq_overview(7)).
    MessageQueue(MessageQueue),
    /// A pseudo terminal whose other end is in the dump too.
    Pty(Pty),
    /// Index in `Manifest::sockets`.
    Socket {
        socket: u32,
    },
    /// A standard stream or terminal to somebody outside the dump: becomes that of the restoring shell, or
    /// /dev/null when detached.
    External(External),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// What it was, for people.
    pub what: String,
    /// The standard stream (0, 1, 2) it is; none for a terminal on other descriptors only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<u8>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub terminal: bool,
    /// struct termios2, raw, of a terminal in whose foreground the program was: its modes were the
    /// program's, not a shell's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termios: Option<crate::image::Bytes>,
    /// The process group that was in its foreground, where the first process led the session of the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreground: Option<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Name as mq_open(3) takes it, with the leading slash.
    pub name: String,
    pub mode: u32,
    /// Attributes it was made with, and how many messages stood in it (they cannot be read without taking them).
    pub max_messages: i64,
    pub message_size: i64,
    pub messages: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// Same number, same pipe (its inode number at dump time).
    pub pipe: u64,
    pub write_end: bool,
    /// F_GETPIPE_SZ, bytes.
    pub capacity: u32,
    /// What was in it, base64; if that is more than one piece, each is a packet (O_DIRECT). Stored once a pipe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub content: Vec<crate::image::Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    pub clock: i32,
    /// TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET as set.
    pub settime_flags: i32,
    /// Nanoseconds to the next expiry at the moment of the dump; 0 is disarmed.
    pub left_ns: i64,
    pub interval_ns: i64,
    /// Expirations that have not been read.
    pub ticks: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The descriptor number it was registered under.
    pub fd: i32,
    pub events: u32,
    pub data: u64,
    /// The description registered: kcmp(KCMP_EPOLL_TFD) told, for the number may mean another file by now.
    pub description: DescriptionId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    pub wd: i32,
    pub path: String,
    pub mask: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// Number of the pair at dump time; same number, same pair.
    pub index: u32,
    pub master: bool,
    /// struct termios2, raw.
    pub termios: crate::image::Bytes,
    /// Rows, columns, x pixels, y pixels.
    pub winsize: [u16; 4],
    pub locked: bool,
    /// Packet mode (TIOCPKT) of the master; exclusive mode (TIOCEXCL).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packet: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclusive: bool,
    /// Of a master: its slave was open once and is not any more, so that reads fail with EIO.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hung_up: bool,
    /// Owner and mode of the slave's device file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PtyFile>,
    /// Bytes that stood in the pair towards this end.
    pub queued: crate::image::Bytes,
    /// Of a slave: how many bytes at the end of `queued` had not been through the terminal's modes; and the ends of
    /// file (^D) in those that had, each by the number of bytes before it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unseen: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ends: Vec<u32>,
    /// Of a master: whether the slave's output was stopped, and what packet mode had to tell (TIOCPKT_*).
    #[serde(default, skip_serializing_if = "Stopped::is_no")]
    pub stopped: Stopped,
    #[serde(default, skip_serializing_if = "is_zero_u8")]
    pub status: u8,
    /// Session and foreground process group it controls; 0 is none.
    pub session: i32,
    pub foreground: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyFile {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// What has stopped a terminal's output.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    #[default]
    No,
    /// tcflow(3).
    Program,
    /// The character for it (^S).
    Typed,
}

impl Stopped {
    fn is_no(&self) -> bool {
        *self == Self::No
    }
}

pub(super) fn is_zero(n: &u32) -> bool {
    *n == 0
}

fn is_zero_u8(n: &u8) -> bool {
    *n == 0
}
