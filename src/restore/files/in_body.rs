//! What only the restored process itself can do, once its descriptors are in place.

use super::Builder;
use crate::image::files::{DescriptionId, Fd, Kind, LockClass, Owner};
use crate::image::{Process, files::Lock};

/// Calls for the engine to make inside the bodies. All pids are those of the image.
#[derive(Debug, Default, Clone)]
pub struct InBody {
    /// In the session leaders, after setsid: their controlling terminals.
    pub terminals: Vec<Terminal>,
    /// Then, first of all: descriptors that mistctl could not open for them.
    pub pidfds: Vec<PidFdOpen>,
    pub opens: Vec<OpenInBody>,
    /// fcntl(F_SETLK).
    pub locks: Vec<RecordLock>,
    /// fcntl(F_SETOWN_EX) and F_SETSIG, with the process's credentials: the kernel notes them.
    pub owners: Vec<SetOwner>,
    /// fcntl(F_SETFL) with O_ASYNC, for which the kernel notes the number of the descriptor.
    pub flags: Vec<SetFlags>,
    /// epoll_ctl(EPOLL_CTL_ADD).
    pub epoll: Vec<EpollAdd>,
}

/// The terminal of a session. The leader opens `path` with O_RDWR (which makes it its controlling terminal, for it
/// has none), then ioctl(fd, TIOCSPGRP, &new id of `foreground`) with all signals blocked, then closes it.
#[derive(Debug, Clone)]
pub struct Terminal {
    /// Old pid of the leader.
    pub session: i32,
    /// Old id of the group; 0: leave it.
    pub foreground: i32,
    pub path: String,
}

/// pidfd_open(new pid of `target`, flags), to become `fd`.
#[derive(Debug, Clone)]
pub struct PidFdOpen {
    pub pid: i32,
    pub fd: Fd,
    pub target: i32,
    /// O_NONBLOCK (PIDFD_NONBLOCK), O_EXCL (PIDFD_THREAD).
    pub flags: i32,
}

/// open(`path`, `flags`), lseek to `pos`, to become `fd`. The path is below /proc/`owner`, old pid.
#[derive(Debug, Clone)]
pub struct OpenInBody {
    pub pid: i32,
    pub fd: Fd,
    /// The process of the dump whose directory in /proc it is: the new pid takes its place.
    pub owner: i32,
    /// What follows /proc/PID, with the leading slash or empty.
    pub rest: String,
    pub flags: i32,
    pub pos: i64,
}

#[derive(Debug, Clone)]
pub struct RecordLock {
    pub pid: i32,
    pub fd: i32,
    pub lock: Lock,
}

#[derive(Debug, Clone)]
pub struct SetOwner {
    pub pid: i32,
    pub fd: i32,
    pub owner: Owner,
}

#[derive(Debug, Clone)]
pub struct SetFlags {
    pub pid: i32,
    pub fd: i32,
    pub flags: i32,
}

#[derive(Debug, Clone)]
pub struct EpollAdd {
    pub pid: i32,
    pub epoll: i32,
    pub fd: i32,
    pub events: u32,
    pub data: u64,
}

/// The process of the dump that a path below /proc belongs to, and the rest of the path.
pub(super) fn proc_path<'p>(path: &'p str, processes: &[Process]) -> Option<(i32, &'p str)> {
    let below = path.strip_prefix("/proc/")?;
    let (pid, rest) = below.find('/').map_or((below, ""), |at| below.split_at(at));
    let pid: i32 = pid.parse().ok()?;
    processes
        .iter()
        .any(|p| p.pid == pid)
        .then_some((pid, rest))
}

impl Builder<'_> {
    /// Whether this file is below the /proc directory of a process of the image, which is not there yet.
    pub(super) fn opened_in_body(&self, file: u32) -> bool {
        self.file_ref(file)
            .is_ok_and(|f| proc_path(&f.path, &self.manifest.processes).is_some())
    }

    /// Fills the list of calls for the bodies.
    pub(super) fn in_body(&mut self) {
        let manifest = self.manifest;
        for (id, description) in manifest.descriptions.iter().enumerate() {
            let holders = manifest.processes.iter().flat_map(|p| {
                let of_it = move |f: &&Fd| f.description == id as DescriptionId;
                p.fds.iter().filter(of_it).map(move |f| (p.pid, f))
            });
            let in_body = &mut self.built.in_body;
            match &description.kind {
                Kind::PidFd { pid } if *pid != -1 => {
                    in_body
                        .pidfds
                        .extend(holders.clone().map(|(holder, fd)| PidFdOpen {
                            pid: holder,
                            fd: fd.clone(),
                            target: *pid,
                            flags: description.flags & (libc::O_NONBLOCK | libc::O_EXCL),
                        }));
                }
                Kind::Path { file, .. } => {
                    let path = manifest.files.get(*file as usize).map_or("", |f| &f.path);
                    if let Some((owner, rest)) = proc_path(path, &manifest.processes) {
                        in_body
                            .opens
                            .extend(holders.clone().map(|(holder, fd)| OpenInBody {
                                pid: holder,
                                fd: fd.clone(),
                                owner,
                                rest: rest.to_owned(),
                                flags: description.flags,
                                pos: description.pos,
                            }));
                    }
                }
                _ => {}
            }
            if matches!(description.kind, Kind::External(_)) {
                continue;
            }
            let Some((pid, fd)) = holders.clone().next() else {
                continue;
            };
            if let Some(owner) = &description.owner {
                in_body.owners.push(SetOwner {
                    pid,
                    fd: fd.fd,
                    owner: owner.clone(),
                });
            }
            if description.flags & libc::O_ASYNC != 0 {
                in_body.flags.push(SetFlags {
                    pid,
                    fd: fd.fd,
                    flags: description.flags & (super::SETTABLE | libc::O_ASYNC),
                });
            }
        }
        for process in &manifest.processes {
            for (description, lock) in &process.locks {
                let fd = process.fds.iter().find(|f| f.description == *description);
                if let (Some(fd), LockClass::Posix) = (fd, lock.class) {
                    self.built.in_body.locks.push(RecordLock {
                        pid: process.pid,
                        fd: fd.fd,
                        lock: lock.clone(),
                    });
                }
            }
        }
    }
}
