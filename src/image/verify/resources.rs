//! Open file descriptions, sockets, files and shared memory.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};

use super::{PATH_MAX, id, index, text};
use crate::image::files::{Kind, Lock, Pipe};
use crate::image::memory::SharedKind;
use crate::image::objects::is_object_name;
use crate::image::sockets::SocketState;
use crate::image::{Bytes, Description, Manifest, Socket};

/// Bytes of struct sockaddr_storage.
const SOCKADDR: usize = 128;
/// Bytes of sun_path, and one for a path that fills it.
const SUN_PATH: usize = 109;

pub(super) fn check(manifest: &Manifest) -> Result<()> {
    for (i, file) in manifest.files.iter().enumerate() {
        let check = || -> Result<()> {
            text("path", &file.path, PATH_MAX)?;
            let object = file.object.as_deref();
            ensure!(
                object.is_none_or(is_object_name),
                "{:?} is not the name of an object",
                object.unwrap_or_default()
            );
            ensure!(file.size <= i64::MAX as u64, "its size is impossible");
            Ok(())
        };
        check().with_context(|| format!("file {i} ({:.200})", file.path))?;
    }
    for (i, memory) in manifest.shared_memory.iter().enumerate() {
        let check = || -> Result<()> {
            ensure!(memory.size <= i64::MAX as u64, "its size is impossible");
            match &memory.kind {
                SharedKind::Anonymous | SharedKind::SysV { .. } => Ok(()),
                SharedKind::Memfd { name, .. } => text("name", name, PATH_MAX),
                SharedKind::DeletedFile { path, .. } => text("path", path, PATH_MAX),
            }
        };
        check().with_context(|| format!("shared memory {i}"))?;
    }
    for (i, description) in manifest.descriptions.iter().enumerate() {
        self::description(manifest, description)
            .with_context(|| format!("open file description {i}"))?;
    }
    let mut inodes = HashSet::new();
    for (i, socket) in manifest.sockets.iter().enumerate() {
        ensure!(
            inodes.insert(socket.ino),
            "socket {i}: inode {} is there twice",
            socket.ino
        );
    }
    for (i, socket) in manifest.sockets.iter().enumerate() {
        self::socket(manifest, socket, &inodes).with_context(|| format!("socket {i}"))?;
    }
    Ok(())
}

/// A lock of any class: positions are offsets in a file.
pub(super) fn lock(lock: &Lock) -> Result<()> {
    ensure!(
        lock.start >= 0 && lock.len >= 0 && lock.start.checked_add(lock.len).is_some(),
        "a lock from {} on, {} bytes long, is impossible",
        lock.start,
        lock.len
    );
    Ok(())
}

fn description(manifest: &Manifest, d: &Description) -> Result<()> {
    for lock in &d.locks {
        self::lock(lock)?;
    }
    let files = manifest.files.len();
    match &d.kind {
        Kind::Path { file, .. } => index("file", *file, files),
        Kind::Memory { memory } => index("shared memory", *memory, manifest.shared_memory.len()),
        Kind::Pipe(p) => pipe(p),
        Kind::Fifo { file, pipe: p } => {
            index("file", *file, files)?;
            pipe(p)
        }
        Kind::Epoll { entries } => {
            for entry in entries {
                index(
                    "open file description in epoll",
                    entry.description,
                    manifest.descriptions.len(),
                )?;
            }
            Ok(())
        }
        Kind::Inotify { watches, .. } => {
            for watch in watches {
                text("path", &watch.path, PATH_MAX)?;
            }
            Ok(())
        }
        Kind::TimerFd(timer) => {
            ensure!(
                timer.left_ns >= 0 && timer.interval_ns >= 0,
                "its times are impossible"
            );
            Ok(())
        }
        // -1: it has ended and been waited for.
        Kind::PidFd { pid: -1 } => Ok(()),
        Kind::PidFd { pid } => id("pid", *pid),
        Kind::MessageQueue(queue) => text("name", &queue.name, PATH_MAX),
        Kind::Socket { socket } => index("socket", *socket, manifest.sockets.len()),
        Kind::External(external) => {
            ensure!(
                external.stream.is_none_or(|s| s <= 2),
                "it is standard stream {:?}",
                external.stream
            );
            external
                .foreground
                .map_or(Ok(()), |group| id("foreground group", group))?;
            text("description", &external.what, PATH_MAX)
        }
        Kind::Pty(_) | Kind::EventFd { .. } | Kind::SignalFd { .. } => Ok(()),
    }
}

fn pipe(pipe: &Pipe) -> Result<()> {
    let bytes: usize = pipe.content.iter().map(|c| c.len()).sum();
    ensure!(
        bytes <= pipe.capacity as usize && pipe.capacity <= i32::MAX as u32,
        "a pipe of {} bytes has {bytes} bytes in it",
        pipe.capacity
    );
    Ok(())
}

fn socket(manifest: &Manifest, s: &Socket, inodes: &HashSet<u64>) -> Result<()> {
    let fits = match (&s.state, s.family) {
        (SocketState::Unix(_), libc::AF_UNIX) | (SocketState::Netlink { .. }, libc::AF_NETLINK) => {
            true
        }
        (SocketState::Inet(_) | SocketState::Tcp(_), f) => {
            f == libc::AF_INET || f == libc::AF_INET6
        }
        _ => false,
    };
    ensure!(fits, "its state is not one of family {}", s.family);
    let known = |what: &str, ino: u64| -> Result<()> {
        ensure!(inodes.contains(&ino), "{what} {ino} is not in the image");
        Ok(())
    };
    match &s.state {
        SocketState::Unix(unix) => {
            for name in [Some(&unix.name), unix.peer_name.as_ref()]
                .into_iter()
                .flatten()
            {
                address(name, SUN_PATH)?;
            }
            if let Some(peer) = unix.peer {
                known("its peer", peer)?;
            }
            for client in unix.pending.iter().filter(|c| **c != 0) {
                known("its client", *client)?;
            }
            for message in unix
                .queue
                .iter()
                .chain(unix.pending_queues.iter().flatten())
            {
                if let Some(from) = &message.from {
                    address(from, SUN_PATH)?;
                }
                for d in &message.descriptions {
                    index(
                        "open file description in flight",
                        *d,
                        manifest.descriptions.len(),
                    )?;
                }
            }
        }
        SocketState::Inet(inet) => {
            for a in [&inet.local, &inet.peer].into_iter().flatten() {
                address(a, SOCKADDR)?;
            }
            for (from, _) in &inet.queue {
                address(from, SOCKADDR)?;
            }
        }
        SocketState::Tcp(tcp) => {
            for a in [&tcp.local, &tcp.peer].into_iter().flatten() {
                address(a, SOCKADDR)?;
            }
            if let Some(peer) = tcp.peer_ino {
                known("its peer", peer)?;
            }
            for client in tcp.pending.iter().filter(|c| **c != 0) {
                known("its client", *client)?;
            }
            for (_, client) in &tcp.pending_data {
                address(client, SOCKADDR)?;
            }
            if let Some(c) = &tcp.connection {
                ensure!(
                    c.unsent as usize <= c.send_queue.len() && c.window.len() <= 256,
                    "its queue or window is impossible"
                );
            }
        }
        SocketState::Netlink { .. } => {}
    }
    Ok(())
}

fn address(bytes: &Bytes, max: usize) -> Result<()> {
    ensure!(bytes.len() <= max, "an address has {} bytes", bytes.len());
    Ok(())
}
