//! Descriptors of stopped processes, read from outside.
//!
//! Every descriptor is duplicated into this process (pidfd_getfd), where it can be asked with ordinary calls
//! that change nothing: the duplicate shares the open file description, so nothing here may move a position,
//! set a flag or consume a byte. Descriptions that several descriptors share are told apart with kcmp.

mod anon;
mod epoll;
mod fdinfo;
mod inotify;
mod order;
mod paths;
mod pipes;
mod ptys;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, Metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::dump::tables::Tables;
use crate::error::{Classify, Failure};
use crate::image::files::{Description, DescriptionId, External, Fd, Kind, Lock, LockClass, Owner};
use crate::kernel::kcmp::Common;
use crate::kernel::proc_file;
use crate::kernel::{fds, kcmp, pidfd};
pub use fdinfo::FdInfo;
use fdinfo::Infos;
pub use order::Order;

/// The sockets' side of a dump.
pub trait Sockets {
    /// Index in `Manifest::sockets` of the socket open as `fd` in process `pid` and, in this process, as
    /// `socket`. Called once for each description.
    fn socket(&mut self, pid: i32, fd: i32, socket: BorrowedFd<'_>) -> Result<u32>;

    /// Asked when all processes have been seen: what the socket leads to if that is outside the dump and it
    /// can only become a stream of the restoring shell ("unix stream to process 7 (sshd)"). Such a socket is
    /// carried as a standard stream and refused elsewhere.
    fn outside(&mut self, _index: u32) -> Option<String> {
        None
    }
}

/// What [`FileDumper::finish`] gives.
#[derive(Debug, Default)]
pub struct Dumped {
    pub descriptions: Vec<Description>,
    /// Descriptor tables by pid.
    pub fds: BTreeMap<i32, Vec<Fd>>,
    /// Record locks (F_SETLK) by pid.
    pub locks: BTreeMap<i32, Vec<(DescriptionId, Lock)>>,
}

/// Collects the descriptors of all processes of a dump.
pub struct FileDumper {
    pids: BTreeSet<i32>,
    open: Vec<Open>,
    order: Order,
    by_inode: HashMap<(u64, u64), Known>,
    fds: BTreeMap<i32, Vec<Fd>>,
    locks: BTreeMap<i32, Vec<(DescriptionId, Lock)>>,
}

/// Descriptions of one inode.
#[derive(Default)]
struct Known {
    /// In kcmp's order.
    sorted: Vec<DescriptionId>,
    /// Where the next one is likely to be.
    next: usize,
}

/// What is read of a descriptor whatever it is.
struct Facts {
    fd: i32,
    own: File,
    meta: Metadata,
    info: FdInfo,
    link: PathBuf,
}

/// One description, and a duplicate of it in this process.
struct Open {
    own: File,
    place: Place,
    pipe: bool,
    /// Of an epoll instance: what it watches, until the descriptions are found.
    registered: Vec<epoll::Registered>,
    /// Of a terminal: which side of which pair.
    side: Option<ptys::Side>,
    description: Description,
}

impl Open {
    /// How many bytes can be read of a pipe or socket.
    fn unread(&self) -> usize {
        if self.description.flags & libc::O_ACCMODE == libc::O_WRONLY {
            return 0;
        }
        fds::readable(self.own.as_fd()).unwrap_or(0)
    }
}

/// Where a description was met first, for messages.
#[derive(Debug, Clone)]
struct Place {
    /// Process; 0 for a descriptor in flight.
    pid: i32,
    fd: i32,
    /// What /proc/PID/fd/FD points to.
    link: String,
}

impl Place {
    /// An error that says which descriptor cannot be carried, why, and what to do about it.
    fn refuse(&self, why: &str, way_out: &str) -> anyhow::Error {
        Failure::Refused.because(format!("{self}: {why}; {way_out}"))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.pid == 0 {
            return write!(f, "descriptor in flight ({})", self.link);
        }
        write!(f, "process {}", self.pid)?;
        if let Ok(comm) = proc_file::text(format!("/proc/{}/comm", self.pid)) {
            write!(f, " ({})", comm.trim_end())?;
        }
        write!(f, ": fd {} ({})", self.fd, self.link)
    }
}

/// What is known of a descriptor when its kind is to be found.
struct Seen<'a> {
    place: &'a Place,
    own: &'a File,
    meta: &'a Metadata,
    info: &'a FdInfo,
}

impl FileDumper {
    /// For a dump of these processes, whose descriptors were looked at before they stood. A duplicate of every
    /// description is held until the end: as many should be allowed as can be.
    pub fn new(pids: &[i32], order: Order) -> Self {
        Self {
            pids: pids.iter().copied().collect(),
            open: Vec::new(),
            order,
            by_inode: HashMap::new(),
            fds: BTreeMap::new(),
            locks: BTreeMap::new(),
        }
    }

    /// Reads the descriptor table of process `pid`, which stands still. `tid` is a living thread of it (its
    /// leader may be dead) and `pidfd` that thread's (see [`pidfd::open_thread`]).
    pub fn process(
        &mut self,
        pid: i32,
        tid: i32,
        pidfd: BorrowedFd<'_>,
        tables: &mut Tables,
        sockets: &mut dyn Sockets,
    ) -> Result<()> {
        one_table(pid, tid)?;
        let mut numbers = numbers(tid)?;
        numbers.sort_by_key(|fd| self.order.rank(pid, *fd));
        let mut table = Vec::new();
        for numbers in numbers.chunks(AT_ONCE) {
            for facts in gather(pid, tid, pidfd, numbers)? {
                let fd = facts.fd;
                let cloexec = facts.info.flags & libc::O_CLOEXEC != 0;
                let posix = facts.info.locks.iter();
                let posix = posix.filter(|l| l.class == LockClass::Posix);
                let posix: Vec<Lock> = posix.cloned().collect();
                let description = self.describe(pid, facts, tables, sockets)?;
                table.push(Fd {
                    fd,
                    description,
                    cloexec,
                });
                let locks = self.locks.entry(pid).or_default();
                for lock in posix {
                    // Listed under every descriptor of the description.
                    let lock = (description, lock);
                    if !locks.contains(&lock) {
                        locks.push(lock);
                    }
                }
            }
        }
        table.sort_unstable_by_key(|f| f.fd);
        self.fds.insert(pid, table);
        Ok(())
    }

    /// Why descriptors of process `pid`, which runs, cannot be carried, as far as each tells by itself.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn refusals(
        &self,
        pid: i32,
        tid: i32,
        pidfd: BorrowedFd<'_>,
        sockets: &mut dyn Sockets,
    ) -> Result<Vec<anyhow::Error>> {
        let shown = Shown::by(&tid.to_string())?;
        let (mut found, mut terminals) = (Vec::new(), Vec::new());
        for fd in numbers(tid)? {
            // What is closed meanwhile does not matter.
            let Ok(facts) = Facts::of(pid, fd, pidfd, &shown) else {
                continue;
            };
            match self.first_look(pid, facts, sockets) {
                Ok(terminal) => terminals.extend(terminal),
                Err(e) => found.push(e),
            }
        }
        found.extend(ptys::refusals(&terminals, &self.pids));
        found.retain(|e| Failure::of(e) == Failure::Refused);
        Ok(found)
    }

    /// Why a descriptor in flight cannot be carried.
    pub fn refusal(&self, own: OwnedFd, sockets: &mut dyn Sockets) -> Option<anyhow::Error> {
        let fd = own.as_raw_fd();
        let facts = Facts::read(0, fd, own, &Shown::by("self").ok()?).ok()?;
        self.first_look(0, facts, sockets).err()
    }

    /// What a descriptor tells by itself of whether it can be carried; a terminal's side, which does not.
    fn first_look(
        &self,
        pid: i32,
        facts: Facts,
        sockets: &mut dyn Sockets,
    ) -> Result<Option<(ptys::Side, Place, File)>> {
        let place = Place {
            pid,
            fd: facts.fd,
            link: facts.link.to_string_lossy().into_owned(),
        };
        let seen = Seen {
            place: &place,
            own: &facts.own,
            meta: &facts.meta,
            info: &facts.info,
        };
        if let Some((_, side)) = terminal(&seen) {
            return Ok(side.map(|side| (side, place, facts.own)));
        }
        self.kind(&seen, &mut Tables::new(1), sockets)?;
        Ok(None)
    }

    /// Index of the description behind a descriptor of this process, for descriptors in flight (SCM_RIGHTS)
    /// that were peeked.
    pub fn adopt(
        &mut self,
        own: OwnedFd,
        tables: &mut Tables,
        sockets: &mut dyn Sockets,
    ) -> Result<DescriptionId> {
        let fd = own.as_raw_fd();
        let facts = Facts::read(0, fd, own, &Shown::by("self")?)?;
        self.describe(0, facts, tables, sockets)
    }

    /// What is left to find out once all descriptors are known: which end belongs to which.
    pub fn finish(mut self, tables: &mut Tables, sockets: &mut dyn Sockets) -> Result<Dumped> {
        self.pipes()?;
        self.ptys(tables)?;
        self.epolls(tables)?;
        self.socket_partners(sockets);
        self.split_streams(tables)?;
        Ok(Dumped {
            descriptions: self.open.into_iter().map(|o| o.description).collect(),
            fds: self.fds,
            locks: self.locks,
        })
    }

    fn describe(
        &mut self,
        pid: i32,
        facts: Facts,
        tables: &mut Tables,
        sockets: &mut dyn Sockets,
    ) -> Result<DescriptionId> {
        let Facts {
            fd,
            own,
            meta,
            info,
            link,
        } = facts;
        let known = self.by_inode.entry((meta.dev(), meta.ino())).or_default();
        let found = search(known, &self.open, &own)?;
        let (Ok(at) | Err(at)) = found;
        known.next = at + 1;
        if found.is_ok() {
            return Ok(known.sorted[at]);
        }
        let id = self.open.len() as DescriptionId;
        known.sorted.insert(at, id);

        let place = Place {
            pid,
            fd,
            link: link.to_string_lossy().into_owned(),
        };
        if link.to_str().is_none() {
            return Err(place.refuse("its name is not UTF-8", "rename it"));
        }
        let seen = Seen {
            place: &place,
            own: &own,
            meta: &meta,
            info: &info,
        };
        let mut side = None;
        let kind = match terminal(&seen) {
            Some((kind, of)) => {
                side = of;
                kind
            }
            None => self.kind(&seen, tables, sockets)?,
        };
        let registered = match kind {
            Kind::Epoll { .. } => epoll::registered(&info).with_context(|| place.to_string())?,
            _ => Vec::new(),
        };
        let description = Description {
            flags: info.flags & !libc::O_CLOEXEC,
            pos: info.pos,
            owner: owner(&own, info.flags).with_context(|| format!("{place}: F_GETOWN_EX"))?,
            locks: info
                .locks
                .iter()
                .filter(|l| l.class != LockClass::Posix)
                .cloned()
                .collect(),
            kind,
        };
        self.open.push(Open {
            own,
            place,
            pipe: meta.mode() & libc::S_IFMT == libc::S_IFIFO,
            registered,
            side,
            description,
        });
        Ok(id)
    }

    fn kind(
        &self,
        seen: &Seen<'_>,
        tables: &mut Tables,
        sockets: &mut dyn Sockets,
    ) -> Result<Kind> {
        let file_type = seen.meta.mode() & libc::S_IFMT;
        if seen.info.flags & libc::O_PATH != 0 {
            return paths::kind(seen, &self.pids, tables);
        }
        // Objects without a name come as "anon_inode:[..]", "pidfd:[..]", "net:[..]"; some of them call
        // themselves regular files on newer kernels.
        match file_type {
            libc::S_IFSOCK => Ok(Kind::Socket {
                socket: sockets.socket(seen.place.pid, seen.place.fd, seen.own.as_fd())?,
            }),
            libc::S_IFIFO => pipes::kind(seen, tables),
            _ if !seen.place.link.starts_with('/') => anon::kind(seen, &self.pids, tables),
            libc::S_IFCHR => paths::device(seen, &self.pids, tables),
            _ => paths::kind(seen, &self.pids, tables),
        }
    }

    fn socket_partners(&mut self, sockets: &mut dyn Sockets) {
        for open in &mut self.open {
            if let Kind::Socket { socket } = open.description.kind
                && let Some(what) = sockets.outside(socket)
            {
                open.description.kind = Kind::External(External {
                    what,
                    ..External::default()
                });
            }
        }
    }

    /// Gives each standard stream that leads outside a description of its own: at the restore each becomes
    /// that stream of the restoring shell, which need not share them as the old one did.
    fn split_streams(&mut self, tables: &mut Tables) -> Result<()> {
        for id in 0..self.open.len() {
            let Kind::External(external) = &self.open[id].description.kind else {
                continue;
            };
            let mut streams: BTreeMap<i32, DescriptionId> = BTreeMap::new();
            let of_it = |f: &&mut Fd| f.description as usize == id && f.fd <= 2;
            for fd in self.fds.values_mut().flatten().filter(of_it) {
                streams.insert(fd.fd, id as DescriptionId);
            }
            if streams.is_empty() && !external.terminal {
                let open = &self.open[id];
                if !open.pipe {
                    return Err(open.place.refuse(
                        &format!("it is a {}", external.what),
                        "dump the other side too (--tree), or close it",
                    ));
                }
                // Pipes that programs inherit from whatever started them and never use are common.
                tables.warn(format!(
                    "{}: is a {}; it leads to /dev/null after a restore",
                    open.place, external.what
                ));
            }
            let unread = self.open[id].unread();
            if unread > 0 && !external.terminal {
                tables.warn(format!(
                    "{}: is a {}, and {unread} bytes stand in it that were not read: they are not carried; \
                     dump the other side too (--tree), or stop it and let them be read first",
                    self.open[id].place, external.what
                ));
            }
            let mut external = external.clone();
            if external.terminal && self.open[id].side.is_none_or(|s| !s.master) {
                self.in_use(self.open[id].own.as_fd(), &mut external);
            }
            for (n, (&stream, target)) in streams.iter_mut().enumerate() {
                let mut description = self.open[id].description.clone();
                description.kind = Kind::External(External {
                    stream: Some(stream as u8),
                    ..external.clone()
                });
                if n == 0 {
                    self.open[id].description = description;
                    continue;
                }
                *target = self.open.len() as DescriptionId;
                let open = Open {
                    own: self.open[id].own.try_clone()?,
                    place: self.open[id].place.clone(),
                    pipe: self.open[id].pipe,
                    registered: Vec::new(),
                    side: None,
                    description,
                };
                self.open.push(open);
            }
            for fd in self.fds.values_mut().flatten().filter(of_it) {
                if let Some(&target) = streams.get(&fd.fd) {
                    fd.description = target;
                }
            }
            for open in &mut self.open {
                let Kind::Epoll { entries } = &mut open.description.kind else {
                    continue;
                };
                for entry in entries.iter_mut().filter(|e| e.description as usize == id) {
                    if let Some(&target) = streams.get(&entry.fd) {
                        entry.description = target;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A device number as stat tells it of one as the kernel keeps and some /proc files show it (linux/kdev_t.h).
fn user_dev(sdev: u64) -> u64 {
    libc::makedev((sdev >> 20) as u32, (sdev & 0xf_ffff) as u32)
}

impl Facts {
    /// Of descriptor `fd` of process `pid`.
    fn of(pid: i32, fd: i32, pidfd: BorrowedFd<'_>, shown: &Shown) -> Result<Self> {
        let own = pidfd::get_fd(pidfd, fd)
            .with_context(|| format!("process {pid}: fd {fd}: pidfd_getfd"))?;
        Self::read(pid, fd, own, shown)
    }

    /// The same, duplicated as `own`.
    fn read(pid: i32, fd: i32, own: OwnedFd, shown: &Shown) -> Result<Self> {
        let context = |what: &str| format!("process {pid}: fd {fd}: {what}");
        let info = shown
            .infos
            .read(fd)
            .with_context(|| format!("process {pid}: fd {fd}"))
            .or_failure(Failure::Refused)?;
        let own = File::from(own);
        let meta = own.metadata().with_context(|| context("fstat"))?;
        let number = own.as_raw_fd().to_string();
        let link = nix::fcntl::readlinkat(&shown.ours, number.as_str())
            .with_context(|| context("readlink"))?
            .into();
        Ok(Self {
            fd,
            own,
            meta,
            info,
            link,
        })
    }
}

/// Where descriptors are shown: the way to it takes longer than one of them.
struct Shown {
    /// Those of the process.
    infos: Infos,
    /// Our own: /proc/self/fd.
    ours: OwnedFd,
}

impl Shown {
    /// `dir` is a pid or "self".
    fn by(dir: &str) -> Result<Self> {
        use nix::fcntl::OFlag;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let ours = nix::fcntl::open("/proc/self/fd", flags, nix::sys::stat::Mode::empty());
        Ok(Self {
            infos: Infos::of(dir)?,
            ours: ours.context("/proc/self/fd")?,
        })
    }
}

/// So many descriptors are duplicated before it is known which mean the same.
const AT_ONCE: usize = 256;

/// Reads the descriptors with these numbers, of a process that stands still. In one thread: with two, the kernel would
/// wait for all processors each time that our own table grows.
fn gather(pid: i32, tid: i32, pidfd: BorrowedFd<'_>, numbers: &[i32]) -> Result<Vec<Facts>> {
    let shown = Shown::by(&tid.to_string())
        .with_context(|| format!("process {pid}: descriptors"))
        .or_failure(Failure::Refused)?;
    let one = |fd: &i32| Facts::of(pid, *fd, pidfd, &shown);
    numbers.iter().map(one).collect()
}

/// Where among `known` the description behind `own` is or belongs.
fn search(known: &Known, open: &[Open], own: &File) -> Result<Result<usize, usize>> {
    let me = std::process::id() as i32;
    order::search(known.sorted.len(), known.next, |i| {
        let other = &open[known.sorted[i] as usize].own;
        kcmp::files(me, other.as_raw_fd(), me, own.as_raw_fd())
    })
}

fn terminal(seen: &Seen<'_>) -> Option<(Kind, Option<ptys::Side>)> {
    let device = seen.meta.mode() & libc::S_IFMT == libc::S_IFCHR;
    (device && seen.info.flags & libc::O_PATH == 0)
        .then(|| ptys::kind(seen))
        .flatten()
}

/// Numbers of the open descriptors of a thread, rising.
fn numbers(tid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{tid}/fd");
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(&path).with_context(|| path.clone())? {
        let name = entry.with_context(|| path.clone())?.file_name();
        if let Some(fd) = name.to_str().and_then(|n| n.parse().ok()) {
            numbers.push(fd);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Refuses a process whose threads do not share one descriptor table and current directory (unshare(2)).
fn one_table(pid: i32, tid: i32) -> Result<()> {
    let path = format!("/proc/{pid}/task");
    for entry in std::fs::read_dir(&path).with_context(|| path.clone())? {
        let name = entry.with_context(|| path.clone())?.file_name();
        let Some(other) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if other == tid {
            continue;
        }
        // A dead leader has no table; a thread that is gone has none either.
        let has_table = || {
            let fds = std::fs::read_dir(format!("/proc/{other}/fd"));
            fds.is_ok_and(|mut d| d.next().is_some())
        };
        let own = |what| match kcmp::common(tid, other, what) {
            Ok(order) => Ok(order.is_ne()),
            Err(e) if has_table() => Err(e),
            Err(_) => Ok(false),
        };
        let (name, flag) = if own(Common::Descriptors)? {
            ("descriptor table", "CLONE_FILES")
        } else if own(Common::Directories)? {
            ("current directory", "CLONE_FS")
        } else {
            continue;
        };
        if has_table() {
            return Err(Failure::Refused.because(format!(
                "process {pid}: thread {other} has a {name} of its own (unshare {flag}), which cannot be carried"
            )));
        }
    }
    Ok(())
}

fn owner(own: &File, flags: i32) -> nix::Result<Option<Owner>> {
    if flags & libc::O_PATH != 0 {
        return Ok(None);
    }
    let owner = fds::owner(own.as_fd())?;
    let signal = fds::signal(own.as_fd())?;
    Ok((owner.pid != 0 || signal != 0).then_some(Owner {
        who: owner.who,
        id: owner.pid,
        signal,
    }))
}
