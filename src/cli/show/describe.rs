//! Words for what an image holds.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mistctl::image::files::Kind;
use mistctl::image::memory::SharedKind;
use mistctl::image::sockets::{SocketState, Unix};
use mistctl::image::threads::Resume;
use mistctl::image::{Fd, Manifest, Socket, Thread};

use crate::cli::out::{bytes, count};

/// Path of a file the manifest refers to.
pub fn path(m: &Manifest, file: u32) -> String {
    match m.files.get(file as usize) {
        Some(f) if f.deleted => format!("{} (deleted)", f.path),
        Some(f) => f.path.clone(),
        None => "?".to_owned(),
    }
}

/// What a thread does when it goes on.
pub fn doing(t: &Thread) -> String {
    let call =
        |nr: u64| syscall_name(nr).map_or_else(|| format!("system call {nr}"), str::to_owned);
    match &t.resume {
        Resume::Run => "runs".to_owned(),
        Resume::Again { nr } => format!("waits in {}", call(*nr)),
        Resume::Timed { nr, left_ns, .. } => format!(
            "waits in {}, {:.3} s left",
            call(*nr),
            *left_ns as f64 / 1e9
        ),
        Resume::Partial { nr, done, .. } => format!("in {}, {} done", call(*nr), bytes(*done)),
    }
}

/// Names of the calls a thread is usually found in (x86-64).
fn syscall_name(nr: u64) -> Option<&'static str> {
    const NAMES: [(i64, &str); 40] = [
        (libc::SYS_read, "read"),
        (libc::SYS_write, "write"),
        (libc::SYS_readv, "readv"),
        (libc::SYS_writev, "writev"),
        (libc::SYS_poll, "poll"),
        (libc::SYS_ppoll, "ppoll"),
        (libc::SYS_select, "select"),
        (libc::SYS_pselect6, "pselect6"),
        (libc::SYS_pause, "pause"),
        (libc::SYS_nanosleep, "nanosleep"),
        (libc::SYS_clock_nanosleep, "clock_nanosleep"),
        (libc::SYS_connect, "connect"),
        (libc::SYS_accept, "accept"),
        (libc::SYS_accept4, "accept4"),
        (libc::SYS_sendto, "sendto"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_recvfrom, "recvfrom"),
        (libc::SYS_recvmsg, "recvmsg"),
        (libc::SYS_recvmmsg, "recvmmsg"),
        (libc::SYS_wait4, "wait4"),
        (libc::SYS_waitid, "waitid"),
        (libc::SYS_semop, "semop"),
        (libc::SYS_semtimedop, "semtimedop"),
        (libc::SYS_msgsnd, "msgsnd"),
        (libc::SYS_msgrcv, "msgrcv"),
        (libc::SYS_mq_timedsend, "mq_timedsend"),
        (libc::SYS_mq_timedreceive, "mq_timedreceive"),
        (libc::SYS_fcntl, "fcntl"),
        (libc::SYS_flock, "flock"),
        (libc::SYS_futex, "futex"),
        (libc::SYS_futex_waitv, "futex_waitv"),
        (libc::SYS_epoll_wait, "epoll_wait"),
        (libc::SYS_epoll_pwait, "epoll_pwait"),
        (libc::SYS_epoll_pwait2, "epoll_pwait2"),
        (libc::SYS_rt_sigtimedwait, "sigtimedwait"),
        (libc::SYS_rt_sigsuspend, "sigsuspend"),
        (libc::SYS_io_getevents, "io_getevents"),
        (libc::SYS_restart_syscall, "a call that was interrupted"),
        (libc::SYS_splice, "splice"),
        (libc::SYS_sendfile, "sendfile"),
    ];
    NAMES
        .iter()
        .find(|(n, _)| u64::try_from(*n).is_ok_and(|n| n == nr))
        .map(|(_, name)| *name)
}

pub fn shared(kind: &SharedKind) -> String {
    match kind {
        SharedKind::Anonymous => "shared anonymous memory".to_owned(),
        SharedKind::Memfd { name, .. } => format!("memfd {name}"),
        SharedKind::SysV { key, shmid, .. } => format!("SysV segment {shmid}, key {key:#x}"),
        SharedKind::DeletedFile { path, .. } => format!("deleted file {path}"),
    }
}

pub fn descriptor(m: &Manifest, fd: &Fd) -> String {
    let Some(d) = m.descriptions.get(fd.description as usize) else {
        return "?".to_owned();
    };
    let mode = match d.flags & libc::O_ACCMODE {
        _ if d.flags & libc::O_PATH != 0 => "path only",
        libc::O_RDONLY => "read",
        libc::O_WRONLY => "write",
        _ => "read and write",
    };
    match &d.kind {
        Kind::Path {
            file, file_type, ..
        } => {
            let what = match *file_type & libc::S_IFMT {
                libc::S_IFREG => format!(", at {}", d.pos),
                libc::S_IFDIR => return format!("directory {}", path(m, *file)),
                libc::S_IFCHR | libc::S_IFBLK => return format!("device {}", path(m, *file)),
                _ => String::new(),
            };
            let append = if d.flags & libc::O_APPEND != 0 {
                ", append"
            } else {
                ""
            };
            format!("file {}, {mode}{append}{what}", path(m, *file))
        }
        Kind::Memory { memory } => match m.shared_memory.get(*memory as usize) {
            Some(s) => format!("{}, {mode}, at {}", shared(&s.kind), d.pos),
            None => "?".to_owned(),
        },
        Kind::Pipe(p) => {
            let queued: usize = p.content.iter().map(|b| b.len()).sum();
            let end = if p.write_end { "write end" } else { "read end" };
            format!("pipe {}, {end}{}", p.pipe, holding(queued))
        }
        Kind::Fifo { file, pipe } => {
            let queued: usize = pipe.content.iter().map(|b| b.len()).sum();
            format!("fifo {}, {mode}{}", path(m, *file), holding(queued))
        }
        Kind::EventFd { count, .. } => format!("eventfd, at {count}"),
        Kind::SignalFd { mask } => format!("signalfd, mask {mask:#x}"),
        Kind::TimerFd(t) if t.left_ns == 0 => "timerfd, disarmed".to_owned(),
        Kind::TimerFd(t) => format!("timerfd, {:.3} s left", t.left_ns as f64 / 1e9),
        Kind::Epoll { entries } => format!("epoll of {}", count(entries.len(), "descriptor")),
        Kind::Inotify { watches, .. } => {
            format!("inotify with {} watched", count(watches.len(), "path"))
        }
        Kind::PidFd { pid } => format!("pidfd of process {pid}"),
        Kind::Pty(p) => format!(
            "pty {}, {}",
            p.index,
            if p.master { "master" } else { "slave" }
        ),
        Kind::Socket { socket } => m
            .sockets
            .get(*socket as usize)
            .map_or_else(|| "?".to_owned(), self::socket),
        Kind::MessageQueue(q) => format!("message queue {}, {mode}", q.name),
        Kind::External(e) => format!("outside: {}", e.what),
    }
}

fn holding(queued: usize) -> String {
    if queued == 0 {
        String::new()
    } else {
        format!(", {} in it", bytes(queued as u64))
    }
}

fn socket(s: &Socket) -> String {
    let kind = match s.kind {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "dgram",
        libc::SOCK_SEQPACKET => "seqpacket",
        libc::SOCK_RAW => "raw",
        _ => "socket",
    };
    match &s.state {
        SocketState::Unix(u) => unix(kind, u),
        SocketState::Inet(i) => {
            let name = if s.kind == libc::SOCK_DGRAM {
                "UDP"
            } else {
                kind
            };
            let queued: usize = i.queue.iter().map(|(_, b)| b.len()).sum();
            let peer = i
                .peer
                .as_ref()
                .map_or_else(String::new, |p| format!(" to {}", address(p)));
            let local = i
                .local
                .as_ref()
                .map_or_else(|| "unbound".to_owned(), |l| address(l));
            format!("{name} {local}{peer}{}", holding(queued))
        }
        SocketState::Tcp(t) => {
            let local = t
                .local
                .as_ref()
                .map_or_else(|| "unbound".to_owned(), |l| address(l));
            match (&t.peer, t.backlog) {
                (_, Some(_)) => format!("TCP {local}, listening"),
                (Some(peer), _) => {
                    let queued = t
                        .connection
                        .as_ref()
                        .map_or(0, |c| c.recv_queue.len() + c.send_queue.len());
                    let inside = if t.peer_ino.is_some() {
                        " (inside)"
                    } else {
                        ""
                    };
                    format!(
                        "TCP {local} to {}{inside}{}",
                        address(peer),
                        holding(queued)
                    )
                }
                _ => format!("TCP {local}"),
            }
        }
        SocketState::Netlink(n) => {
            format!("netlink, protocol {}, groups {:?}", s.protocol, n.groups)
        }
    }
}

fn unix(kind: &str, u: &Unix) -> String {
    let name = match u.name.split_first() {
        None => String::new(),
        Some((0, rest)) => format!(" @{}", String::from_utf8_lossy(rest)),
        Some(_) => {
            let end = u.name.iter().position(|&b| b == 0).unwrap_or(u.name.len());
            format!(
                " {}",
                String::from_utf8_lossy(u.name.get(..end).unwrap_or_default())
            )
        }
    };
    let queued: usize = u.queue.iter().map(|q| q.data.len()).sum();
    let state = match (u.backlog, u.peer) {
        (Some(_), _) => ", listening",
        (_, Some(_)) => ", connected inside",
        _ => "",
    };
    format!("unix {kind}{name}{state}{}", holding(queued))
}

/// struct sockaddr_in or sockaddr_in6 as people write it.
fn address(raw: &[u8]) -> String {
    let part = |from: usize, to: usize| raw.get(from..to);
    let family = part(0, 2)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    let port = part(2, 4)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_be_bytes);
    let ip = match family.map(i32::from) {
        Some(libc::AF_INET) => part(4, 8)
            .and_then(|b| <[u8; 4]>::try_from(b).ok())
            .map(|b| Ipv4Addr::from(b).into()),
        Some(libc::AF_INET6) => part(8, 24)
            .and_then(|b| <[u8; 16]>::try_from(b).ok())
            .map(|b| Ipv6Addr::from(b).into()),
        _ => None,
    };
    match (ip, port) {
        (Some(ip), Some(port)) => SocketAddr::new(ip, port).to_string(),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_people_write_them() {
        assert_eq!(
            address(&[2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            "127.0.0.1:8080"
        );
        assert_eq!(address(&[2, 0, 0x1f]), "?");
    }
}
