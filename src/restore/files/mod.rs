//! Open file descriptions, rebuilt in mistctl itself by ordinary calls.
//!
//! The bodies of the restored processes are forks of mistctl and inherit what is built here; each only has to
//! put its descriptors at their numbers. So whatever dup, fork and SCM_RIGHTS made shared is shared again without
//! more ado. What belongs to a process rather than to a description is listed in [`InBody`] and done there.

mod anon;
mod epoll;
mod in_body;
mod inotify;
pub mod memfd;
mod paths;
mod pipes;
mod ptys;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, Result};

use crate::image::Manifest;
use crate::image::files::{Description, DescriptionId, Kind, Lock, LockClass};
use crate::kernel::pid_ns::PidNamespace;
use crate::kernel::{fds, pidfd};
pub use in_body::{
    EpollAdd, InBody, OpenInBody, PidFdOpen, RecordLock, SetFlags, SetOwner, Terminal,
};
pub use paths::cut_back;

/// Circumstances of a restore that matter to descriptors.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Descriptors are built with numbers from here on.
    pub floor: RawFd,
    /// There is no shell: what led outside leads to /dev/null.
    pub detached: bool,
    /// CLOCK_MONOTONIC goes on where it was: same boot, or a time namespace takes care of it.
    pub same_clocks: bool,
    /// Where the processes are going to live, if that is not here.
    pub namespace: Option<&'a PidNamespace>,
}

/// The descriptions of an image as open descriptors of this process.
#[derive(Debug, Default)]
pub struct Built {
    /// Not among them: those that only their process can open ([`InBody`]).
    pub fds: BTreeMap<DescriptionId, OwnedFd>,
    pub in_body: InBody,
    /// What came back otherwise than it was, for people.
    pub warnings: Vec<String>,
    timers: Vec<(DescriptionId, anon::Arm)>,
}

impl Built {
    /// To be called right before the processes are released, when all have their descriptors: starts the timers
    /// (timerfd) and closes what is open here, or a program that runs at once may miss an end-of-file.
    pub fn release(&mut self) -> Result<()> {
        for (id, arm) in &self.timers {
            if let Some(fd) = self.fds.get(id) {
                arm.start(fd.as_fd())?;
            }
        }
        self.fds.clear();
        Ok(())
    }
}

/// Opens every description of the image. `sockets` gives the socket with an index in `Manifest::sockets`, `memory`
/// the filled object (see [`memfd::create`]) with an index in `Manifest::shared_memory`; `instead` are descriptions
/// that are there already.
pub fn build<'m>(
    manifest: &Manifest,
    surroundings: Surroundings<'_>,
    instead: BTreeMap<DescriptionId, OwnedFd>,
    sockets: &mut dyn FnMut(u32) -> Result<OwnedFd>,
    memory: &mut dyn FnMut(u32) -> Result<BorrowedFd<'m>>,
) -> Result<Built> {
    let mut builder = Builder {
        manifest,
        surroundings,
        built: Built::default(),
    };
    for (id, fd) in instead {
        builder.replace(id, fd).with_context(|| builder.who(id))?;
    }
    builder.pipes()?;
    builder.ptys()?;
    for (id, description) in manifest.descriptions.iter().enumerate() {
        let id = id as DescriptionId;
        builder
            .one(id, description, sockets, memory)
            .with_context(|| builder.who(id))?;
    }
    for (id, description) in manifest.descriptions.iter().enumerate() {
        let id = id as DescriptionId;
        builder
            .locks(id, description)
            .with_context(|| builder.who(id))?;
    }
    builder.epolls()?;
    builder.in_body();
    Ok(builder.built)
}

struct Builder<'a> {
    manifest: &'a Manifest,
    surroundings: Surroundings<'a>,
    built: Built,
}

impl Builder<'_> {
    /// Which descriptor of which process this is, for messages.
    fn who(&self, id: DescriptionId) -> String {
        for process in &self.manifest.processes {
            if let Some(fd) = process.fds.iter().find(|f| f.description == id) {
                return format!("process {} ({}): fd {}", process.pid, process.comm, fd.fd);
            }
        }
        format!("description {id}")
    }

    /// Uses `fd` for a description of the image.
    fn replace(&mut self, id: DescriptionId, fd: OwnedFd) -> Result<()> {
        if let Some(description) = self.manifest.descriptions.get(id as usize) {
            status_flags(fd.as_fd(), description.flags)?;
        }
        self.keep(id, fd)
    }

    /// Keeps `fd` as description `id`, out of the way, unless there is one already.
    fn keep(&mut self, id: DescriptionId, fd: OwnedFd) -> Result<()> {
        if self.built.fds.contains_key(&id) {
            return Ok(());
        }
        let fd = fds::dup_above(fd.as_fd(), self.surroundings.floor).with_context(|| {
            format!(
                "a descriptor above {} (F_DUPFD; see ulimit -n)",
                self.surroundings.floor
            )
        })?;
        self.built.fds.insert(id, fd);
        Ok(())
    }

    fn one<'m>(
        &mut self,
        id: DescriptionId,
        description: &Description,
        sockets: &mut dyn FnMut(u32) -> Result<OwnedFd>,
        memory: &mut dyn FnMut(u32) -> Result<BorrowedFd<'m>>,
    ) -> Result<()> {
        if self.built.fds.contains_key(&id) {
            return Ok(());
        }
        let fd = match &description.kind {
            Kind::Path { file, .. } if self.opened_in_body(*file) => return Ok(()),
            Kind::Path {
                file,
                file_type,
                rdev,
            } => self.path(description, *file, *file_type, *rdev)?,
            Kind::Memory { memory: index } => {
                let fd = paths::reopen(memory(*index)?, description.flags)?;
                paths::place(fd.as_fd(), description)?;
                fd
            }
            // Built with their other ends.
            Kind::Pipe(_) | Kind::Fifo { .. } | Kind::Pty(_) => return Ok(()),
            Kind::EventFd { count, semaphore } => anon::event(*count, *semaphore)?,
            Kind::SignalFd { mask } => anon::signal(*mask)?,
            Kind::TimerFd(timer) => {
                let (fd, arm) = self.timer(timer)?;
                if let Some(arm) = arm {
                    self.built.timers.push((id, arm));
                }
                fd
            }
            Kind::PidFd { pid: -1 } => match self.surroundings.namespace {
                Some(n) => n.entrance().born_inside(pidfd::of_dead_process)?,
                None => pidfd::of_dead_process()?,
            },
            Kind::PidFd { .. } => return Ok(()),
            Kind::MessageQueue(queue) => self.message_queue(description, queue)?,
            Kind::Socket { socket } => sockets(*socket)?,
            Kind::External(external) => {
                let fd = paths::external(external, self.surroundings.detached)?;
                if let Some(group) = external.foreground {
                    self.hand_over(fd.as_fd(), group)?;
                }
                return self.keep(id, fd);
            }
            Kind::Epoll { .. } => epoll::empty()?,
            Kind::Inotify { watches, queued } => inotify::instance(watches, *queued > 0)?,
        };
        status_flags(fd.as_fd(), description.flags)?;
        self.keep(id, fd)
    }

    /// flock(2) and open file description locks.
    fn locks(&mut self, id: DescriptionId, description: &Description) -> Result<()> {
        let Some(fd) = self.built.fds.get(&id) else {
            return Ok(());
        };
        for lock in &description.locks {
            let done = match lock.class {
                LockClass::Flock => fds::flock(fd.as_fd(), lock.exclusive),
                LockClass::Ofd => {
                    let lock = c_lock(lock);
                    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).map(drop)
                }
                LockClass::Posix => continue,
            };
            done.with_context(|| {
                format!(
                    "{} {} lock: another process holds a conflicting one (is the original still running?)",
                    if lock.exclusive { "exclusive" } else { "shared" },
                    match lock.class {
                        LockClass::Flock => "flock",
                        _ => "open file description",
                    }
                )
            })?;
        }
        Ok(())
    }
}

/// A lock as fcntl takes it.
pub fn c_lock(lock: &Lock) -> libc::flock {
    libc::flock {
        l_type: if lock.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: lock.start,
        l_len: lock.len,
        l_pid: 0,
    }
}

/// Flags that F_SETFL can change; O_ASYNC is not among them, for the kernel notes the number of the descriptor
/// with it ([`InBody::flags`]).
const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;

/// Sets the status flags that can be set on an open description, if they are others.
fn status_flags(fd: BorrowedFd<'_>, wanted: i32) -> Result<()> {
    let now = fds::flags(fd).context("F_GETFL")?;
    if now & libc::O_PATH == 0 && (now ^ wanted) & SETTABLE != 0 {
        fds::set_flags(fd, wanted & SETTABLE).context("F_SETFL")?;
    }
    Ok(())
}
