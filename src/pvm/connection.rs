//! A task's connection to its pvmd, and what goes over it, seen from outside.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::error::Failure;
use crate::kernel::guardian::{Guardian, Undo, UndoId};
use crate::kernel::sock_diag::SockDiag;
use crate::kernel::sockopt::{self, Queue};
use crate::kernel::{fds, pidfd, socket};
use crate::net;

/// What a socket buffer may hold while a task stands still, bytes.
const ROOM: i32 = 256 << 20;

/// What links in /proc to a socket begin with.
const SOCKET: &str = "socket:[";

/// The socket between a task and its pvmd: duplicates of both ends.
pub struct Connection {
    /// The task's process, and its descriptor.
    pub pid: i32,
    pub fd: i32,
    /// Inode of the task's end.
    pub ino: u64,
    /// The pvmd's process, and where it listens.
    pub pvmd: i32,
    pub address: PathBuf,
    task_end: OwnedFd,
    pvmd_end: PvmdEnd,
}

/// Buffers of both ends that have been made larger; they get their size back when this is dropped, or mistctl ends.
pub struct Raised {
    /// The end, the option, what it was.
    undo: Vec<(OwnedFd, UndoId, i32, Vec<u8>)>,
    guardian: Arc<Guardian>,
}

/// What all pvmds and unix sockets of this host look like at a moment: finds the connections of many tasks.
/// Unix sockets are all that a Linux pvmd serves its tasks by: TCP is for systems that PVM was built for with
/// NOUNIXDOM, and no option or variable chooses it (PVMNETSOCKPORT is about the ports between pvmds).
pub struct Daemons {
    /// Sockets of pvmds by inode: the process and its descriptor.
    sockets: HashMap<u64, (i32, i32)>,
    /// Unix sockets by inode: the other end's inode.
    peers: HashMap<u64, u64>,
    /// Paths that sockets are bound to, by inode; an accepted connection has its listener's.
    paths: HashMap<u64, Vec<u8>>,
}

impl Daemons {
    /// Looks at the pvmds that the caller may look at.
    ///
    /// # Errors
    /// When /proc or sock_diag cannot be read.
    pub fn look() -> Result<Daemons> {
        let mut found = Daemons {
            sockets: HashMap::new(),
            peers: HashMap::new(),
            paths: HashMap::new(),
        };
        for pvmd in daemons()? {
            // Another user's pvmd is none that a process of ours could be connected to.
            for (ino, fd) in links(pvmd, SOCKET).unwrap_or_default() {
                found.sockets.entry(ino).or_insert((pvmd, fd));
            }
        }
        if found.sockets.is_empty() {
            return Ok(found);
        }
        let all = SockDiag::open()
            .and_then(|diag| diag.unix())
            .context("sock_diag: list of unix sockets; the kernel needs CONFIG_UNIX_DIAG")?;
        for socket in all {
            let ino = u64::from(socket.ino);
            if let Some(peer) = socket.peer.filter(|peer| *peer != 0) {
                found.peers.insert(ino, u64::from(peer));
            }
            if found.sockets.contains_key(&ino) {
                found.paths.insert(ino, socket.name);
            }
        }
        Ok(found)
    }

    /// The connection of process `pid`; none when no pvmd is at the other end of any of its sockets.
    ///
    /// # Errors
    /// When the process cannot be looked at, or its descriptors or the pvmd's not be duplicated.
    pub fn connection(&self, pid: i32) -> Result<Option<Connection>> {
        if self.sockets.is_empty() {
            return Ok(None);
        }
        let ours = links(pid, SOCKET)
            .with_context(|| {
                format!("cannot look at the descriptors of process {pid}; is it yours?")
            })
            .map_err(|e| crate::dump::ending_or(pid, e))?;
        for (ino, fd) in ours {
            let Some(peer) = self.peers.get(&ino) else {
                continue;
            };
            let Some((pvmd, pvmd_fd)) = self.sockets.get(peer) else {
                continue;
            };
            if *pvmd == pid {
                continue;
            }
            let path = self.paths.get(peer).cloned().unwrap_or_default();
            let path: Vec<u8> = path.split(|b| *b == 0).next().unwrap_or_default().to_vec();
            return Ok(Some(Connection {
                pid,
                fd,
                ino,
                pvmd: *pvmd,
                address: PathBuf::from(std::ffi::OsString::from_vec(path)),
                task_end: duplicate(pid, fd)?,
                pvmd_end: PvmdEnd::of(*pvmd, *pvmd_fd, *peer)?,
            }));
        }
        Ok(None)
    }

    /// The pvmds' ends of connections whose other end is closed by now, with something in them that their pvmd has
    /// not read: what tasks that have ended had written.
    ///
    /// # Errors
    /// When sock_diag cannot be read.
    pub fn left_behind(&self) -> Result<Vec<PvmdEnd>> {
        if self.sockets.is_empty() {
            return Ok(Vec::new());
        }
        let now = SockDiag::open().and_then(|diag| diag.unix());
        let now = now.context("sock_diag: list of unix sockets")?;
        let mut left = Vec::new();
        for socket in now {
            let Some((pvmd, fd)) = self.sockets.get(&u64::from(socket.ino)) else {
                continue;
            };
            // One that pvmd has closed since has been read.
            if socket.peer == Some(0)
                && socket.receive_queue != 0
                && let Ok(end) = PvmdEnd::of(*pvmd, *fd, socket.ino.into())
            {
                left.push(end);
            }
        }
        Ok(left)
    }
}

/// A pvmd's end of a connection, which it may close meanwhile.
pub struct PvmdEnd {
    end: OwnedFd,
    pvmd: i32,
    fd: i32,
    ino: u64,
}

impl PvmdEnd {
    fn of(pvmd: i32, fd: i32, ino: u64) -> Result<PvmdEnd> {
        let end = duplicate(pvmd, fd)?;
        Ok(PvmdEnd { end, pvmd, fd, ino })
    }

    fn is_held(&self) -> bool {
        inode(self.pvmd, self.fd, SOCKET) == Some(self.ino)
    }

    /// Whether there is something in it that pvmd may still read.
    pub fn is_unread(&self) -> bool {
        sockopt::queued(&self.end, Queue::In).is_ok_and(|bytes| bytes != 0) && self.is_held()
    }
}

impl Connection {
    /// The pvmd's end.
    pub fn into_pvmd_end(self) -> OwnedFd {
        self.pvmd_end.end
    }

    /// Whether its pvmd will read no more of it: a task that it has started it takes for dead as soon as the process is, and
    /// what that had written and it has not read is lost.
    pub fn is_given_up(&self) -> bool {
        !self.pvmd_end.is_held()
    }

    /// A duplicate of the task's end.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn task_end(&self) -> Result<OwnedFd> {
        self.task_end.try_clone().context("dup of a socket")
    }

    /// What the pvmd has written and the task has not read; nothing is consumed.
    ///
    /// # Errors
    /// When it cannot be peeked.
    pub fn unread(&self, guardian: &Guardian) -> Result<Vec<u8>> {
        net::peek_bytes(&self.task_end, guardian)
            .with_context(|| format!("process {}, fd {}: peeking", self.pid, self.fd))
    }

    /// How many bytes that are.
    ///
    /// # Errors
    /// errno of ioctl(SIOCINQ).
    pub fn waiting(&self) -> Result<usize> {
        let n = sockopt::queued(&self.task_end, Queue::In)
            .with_context(|| format!("process {}, fd {}: ioctl(SIOCINQ)", self.pid, self.fd))?;
        Ok(n as usize)
    }

    /// The first of those bytes, at most `len`.
    ///
    /// # Errors
    /// As for [`Connection::unread`].
    pub fn peek(&self, len: usize) -> Result<Vec<u8>> {
        // A lander that was killed while it looked may have left another.
        let _ = sockopt::set_int(&self.task_end, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1);
        let mut bytes = vec![0; len.min(self.waiting()?)];
        if !bytes.is_empty() {
            let got = socket::receive(&self.task_end, &mut bytes, libc::MSG_PEEK)
                .with_context(|| format!("process {}, fd {}: peeking", self.pid, self.fd))?;
            bytes.truncate(got.len);
        }
        Ok(bytes)
    }

    /// Bytes that the task has written and the pvmd has not read.
    ///
    /// # Errors
    /// errno of ioctl(SIOCINQ).
    pub fn unsent(&self) -> Result<usize> {
        let n = sockopt::queued(&self.pvmd_end.end, Queue::In)
            .with_context(|| format!("pvmd {}: ioctl(SIOCINQ)", self.pvmd))?;
        Ok(n as usize)
    }

    /// Makes room for all that the pvmd may want to write while the task stands still. As far as the caller's
    /// privilege goes: without CAP_NET_ADMIN up to net.core.wmem_max.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub fn raise(&self, guardian: &Arc<Guardian>) -> Result<Raised> {
        let mut raised = Raised {
            undo: Vec::new(),
            guardian: Arc::clone(guardian),
        };
        // Of a unix socket the sender's buffer counts; of others both do.
        for (end, option, force) in [
            (&self.pvmd_end.end, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
            (&self.task_end, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
        ] {
            let level = libc::SOL_SOCKET;
            // The kernel tells twice what it was given.
            let old = sockopt::get_int(end, level, option).context("getsockopt of a buffer")? / 2;
            let old = old.to_ne_bytes().to_vec();
            let undo = Undo::Options(vec![
                (level, option, old.clone()),
                (level, force, old.clone()),
            ]);
            let id = guardian
                .protect(end, &undo)
                .context("the guardian process is gone")?;
            raised
                .undo
                .push((end.try_clone().context("dup of a socket")?, id, option, old));
            if sockopt::set_int(end, level, force, ROOM).is_err() {
                sockopt::set_int(end, level, option, ROOM).context("setsockopt of a buffer")?;
            }
        }
        Ok(raised)
    }

    /// Descriptors of the task that are pipes to its pvmd (its output), and how many bytes stand in each.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn pipes(&self) -> Result<Vec<(i32, usize)>> {
        let theirs = links(self.pvmd, "pipe:[")?;
        let mut pipes = Vec::new();
        for entry in numbers(self.pid)? {
            let Some(ino) = inode(self.pid, entry, "pipe:[") else {
                continue;
            };
            if theirs.contains_key(&ino) {
                let own = duplicate(self.pid, entry)?;
                pipes.push((entry, fds::readable(own.as_fd()).unwrap_or(0)));
            }
        }
        pipes.sort_unstable();
        Ok(pipes)
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        for (end, id, option, old) in &self.undo {
            if sockopt::set(end, libc::SOL_SOCKET, *option, old).is_ok() {
                let _ = self.guardian.forget(*id);
            }
        }
    }
}

fn duplicate(pid: i32, fd: i32) -> Result<OwnedFd> {
    let process = pidfd::open(pid)?;
    pidfd::get_fd(process.as_fd(), fd)
        .with_context(|| format!("process {pid}: fd {fd}: pidfd_getfd (may you trace it?)"))
        .map_err(|e| Failure::Refused.with(e))
}

/// Processes that call themselves pvmd, oldest first: one that pvmd has just forked does so too, for a moment.
fn daemons() -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let comm = fs::read_to_string(Path::new("/proc").join(&name).join("comm"));
        if comm.is_ok_and(|comm| comm.starts_with("pvmd")) {
            all.push(pid);
        }
    }
    all.sort_unstable();
    Ok(all)
}

fn numbers(pid: i32) -> Result<Vec<i32>> {
    let dir = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&dir).with_context(|| format!("reading {dir}"))?;
    Ok(entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect())
}

fn inode(pid: i32, fd: i32, prefix: &str) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let inode = link.to_str()?.strip_prefix(prefix)?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Descriptors of a process by inode, of those whose link begins with `prefix`.
fn links(pid: i32, prefix: &str) -> Result<HashMap<u64, i32>> {
    let mut all = HashMap::new();
    for fd in numbers(pid)? {
        if let Some(ino) = inode(pid, fd, prefix) {
            all.entry(ino).or_insert(fd);
        }
    }
    Ok(all)
}
