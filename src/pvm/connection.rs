//! A task's connection to its pvmd, and what goes over it, seen from outside.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::error::Failure;
use crate::kernel::guardian::{Guardian, Undo, UndoId};
use crate::kernel::sock_diag::SockDiag;
use crate::kernel::sockopt::{self, Queue};
use crate::kernel::{fds, pidfd, socket};
use crate::net;

/// What a socket buffer may hold while a task stands still, bytes.
const ROOM: i32 = 256 << 20;

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
    pvmd_end: OwnedFd,
}

/// Buffers of both ends that have been made larger; they get their size back when this is dropped, or mistctl ends.
pub struct Raised<'g> {
    undo: Vec<(OwnedFd, UndoId, Vec<u8>)>,
    guardian: &'g Guardian,
}

impl Connection {
    /// Finds the connection of process `pid`; none when no pvmd is at the other end of any of its sockets.
    ///
    /// # Errors
    /// When /proc or sock_diag cannot be read, or the pvmd is none of the caller's.
    pub fn find(pid: i32) -> Result<Option<Connection>> {
        let ours = links(pid, "socket:[").with_context(|| {
            format!("cannot look at the descriptors of process {pid}; is it yours?")
        })?;
        if ours.is_empty() {
            return Ok(None);
        }
        let all = SockDiag::open()
            .and_then(|diag| diag.unix())
            .context("sock_diag: list of unix sockets; the kernel needs CONFIG_UNIX_DIAG")?;
        // By the other end's inode: our descriptor and inode, and the other end's name.
        let mut peers = HashMap::new();
        for socket in &all {
            let ino = u64::from(socket.ino);
            if let (Some(fd), Some(peer)) = (ours.get(&ino), socket.peer)
                && peer != 0
            {
                peers.insert(u64::from(peer), (*fd, ino));
            }
        }
        if peers.is_empty() {
            return Ok(None);
        }
        for pvmd in daemons()? {
            // Another user's pvmd is none that this process could be connected to.
            let Ok(theirs) = links(pvmd, "socket:[") else {
                continue;
            };
            for (peer, pvmd_fd) in theirs {
                let Some((fd, ino)) = peers.get(&peer) else {
                    continue;
                };
                let name = all.iter().find(|s| u64::from(s.ino) == peer);
                let name = name.map(|s| s.name.clone()).unwrap_or_default();
                let path: Vec<u8> = name.split(|b| *b == 0).next().unwrap_or_default().to_vec();
                return Ok(Some(Connection {
                    pid,
                    fd: *fd,
                    ino: *ino,
                    pvmd,
                    address: PathBuf::from(std::ffi::OsString::from_vec(path)),
                    task_end: duplicate(pid, *fd)?,
                    pvmd_end: duplicate(pvmd, pvmd_fd)?,
                }));
            }
        }
        Ok(None)
    }

    /// What the pvmd has written and the task has not read; nothing is consumed.
    ///
    /// # Errors
    /// When it cannot be peeked.
    pub fn unread(&self, guardian: &Guardian) -> Result<Vec<u8>> {
        net::peek_bytes(&self.task_end, guardian)
            .with_context(|| format!("process {}, fd {}: peeking", self.pid, self.fd))
    }

    /// The first of those bytes, at most `len`.
    ///
    /// # Errors
    /// As for [`Connection::unread`].
    pub fn peek(&self, len: usize) -> Result<Vec<u8>> {
        let waiting = sockopt::queued(&self.task_end, Queue::In).context("ioctl(SIOCINQ)")?;
        let mut bytes = vec![0; len.min(waiting as usize)];
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
        let n = sockopt::queued(&self.pvmd_end, Queue::In)
            .with_context(|| format!("pvmd {}: ioctl(SIOCINQ)", self.pvmd))?;
        Ok(n as usize)
    }

    /// Makes room for all that the pvmd may want to write while the task stands still. As far as the caller's
    /// privilege goes: without CAP_NET_ADMIN up to net.core.wmem_max.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub fn raise<'g>(&self, guardian: &'g Guardian) -> Result<Raised<'g>> {
        let mut raised = Raised {
            undo: Vec::new(),
            guardian,
        };
        // Of a unix socket the sender's buffer counts; of others both do.
        for (end, option, force) in [
            (&self.pvmd_end, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
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
                .push((end.try_clone().context("dup of a socket")?, id, old));
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

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        for (end, id, old) in &self.undo {
            let options = [libc::SO_SNDBUF, libc::SO_RCVBUF];
            let option = options[usize::from(self.undo.first().map(|u| u.1) != Some(*id))];
            let put = sockopt::set(end, libc::SOL_SOCKET, option, old);
            if put.is_ok() {
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
