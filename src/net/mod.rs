//! Sockets: what a dump stores of them and how a restore rebuilds them.
//!
//! Dump: [`SocketDumper::add`] takes a descriptor duplicated from a stopped process (pidfd_getfd shares
//! the open description, so what we read is the program's own socket); [`SocketDumper::finish`] reads
//! queues and matches peers. Nothing is consumed: queues are peeked, with SO_PEEK_OFF, or TCP_REPAIR, set
//! for the moment and undone by the [`Guardian`] should we be killed.
//!
//! Restore: [`Restorer::build`] makes every socket in this process (bodies inherit them),
//! [`Restorer::fill`] puts bytes and descriptors in flight back into the queues once every description
//! exists, [`Restorer::activate`] lets TCP connections speak at the moment of release.

mod inet;
pub mod keeper;
pub mod makers;
mod messages;
mod multicast;
mod netlink;
mod options;
mod tcp;
mod unaccepted;
mod unix;

pub use inet::host;
pub use unix::peek_bytes;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use self::makers::Makers;
use crate::error::Failure;
use crate::image::sockets::{Socket, SocketState};
use crate::image::{Bytes, DescriptionId};
use crate::kernel::guardian::Guardian;
use crate::kernel::maker::{Identity, Maker};
use crate::kernel::pid_ns::Entrance;
use crate::kernel::sock_diag::{InetDiag, SockDiag, UnixDiag};
use crate::kernel::{socket, sockopt};

/// What a dump may do with sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Carry TCP connections whose peer is outside the dump.
    pub tcp_established: bool,
    /// The processes are killed once the image is durable: TCP connections to peers outside are deaf from
    /// [`SocketDumper::finish`] on, and [`SocketDumper::finish_kill`] makes their end silent.
    pub kill: bool,
    /// Carry unix sockets whose peer is outside as [`crate::image::sockets::Unix::outside`] instead of
    /// refusing; standard streams (descriptors 0, 1, 2) are always carried so.
    pub outside: bool,
    /// Inode of a PVM task's connection to its pvmd: it stays a socket whose peer is outside, and its queue is
    /// left to who asked for it.
    pub pvmd: Option<u64>,
}

/// A socket met, and where.
pub(crate) struct Met {
    pub fd: OwnedFd,
    pub ino: u64,
    /// First process and descriptor it was found under.
    pub pid: i32,
    pub number: i32,
    /// Some process has it as a standard stream.
    pub standard: bool,
    pub family: i32,
    pub kind: i32,
    pub protocol: i32,
}

impl Met {
    /// "pid 12, descriptor 5", for errors.
    pub fn place(&self) -> String {
        if self.number < 0 {
            format!("pid {}, a socket in flight", self.pid)
        } else {
            format!("pid {}, descriptor {}", self.pid, self.number)
        }
    }
}

/// Turns a descriptor found in flight into a description; gets the dumper to add sockets with.
pub type Describe<'a> = dyn FnMut(&mut SocketDumper, OwnedFd) -> Result<DescriptionId> + 'a;

/// Reads the sockets of a dump.
pub struct SocketDumper {
    options: Options,
    guardian: Arc<Guardian>,
    met: Vec<Met>,
    by_ino: HashMap<u64, u32>,
    defaults: options::Defaults,
    /// What each socket leads to whose peer is outside; known after [`SocketDumper::finish`].
    outside: HashMap<u32, String>,
    /// What could not be carried and does not matter much, for people.
    pub warnings: Vec<String>,
    pub(crate) held: tcp::Held,
    /// Lives in the pid namespace of the dumped processes, when that is not ours.
    pub(crate) inside: Option<Maker>,
    /// Inodes of sockets whose queues were read without kernel memory, and why.
    pub(crate) unaided: HashMap<u64, String>,
    pub(crate) multicast: multicast::Candidates,
    /// Made when it is needed; or why it cannot be had.
    unaccepted: OnceCell<Result<unaccepted::Reader, String>>,
}

impl Drop for SocketDumper {
    /// Lets connections that were held for a kill go on.
    fn drop(&mut self) {
        tcp::release(self);
    }
}

impl crate::dump::files::Sockets for SocketDumper {
    fn socket(&mut self, pid: i32, fd: i32, socket: BorrowedFd<'_>) -> Result<u32> {
        let own = socket.try_clone_to_owned().context("dup of a socket")?;
        self.add(pid, fd, own)
    }

    fn outside(&mut self, index: u32) -> Option<String> {
        self.outside.get(&index).cloned()
    }
}

/// sock_diag's view, asked for once a dump.
#[derive(Default)]
pub(crate) struct Diag {
    /// By inode.
    pub unix: HashMap<u64, UnixDiag>,
    pub tcp: Vec<InetDiag>,
    pub udp: Vec<InetDiag>,
}

impl SocketDumper {
    /// `guardian` undoes what is done to the sockets meanwhile.
    pub fn new(options: Options, guardian: &Arc<Guardian>) -> Self {
        Self {
            options,
            guardian: Arc::clone(guardian),
            met: Vec::new(),
            by_ino: HashMap::new(),
            defaults: options::Defaults::default(),
            outside: HashMap::new(),
            warnings: Vec::new(),
            held: tcp::Held::default(),
            inside: None,
            unaided: HashMap::new(),
            multicast: multicast::Candidates::default(),
            unaccepted: OnceCell::new(),
        }
    }

    /// What reads queues in kernel memory, or why it cannot be had.
    pub(crate) fn unaccepted(&self) -> Result<&unaccepted::Reader, String> {
        let inside = self.inside.as_ref().map(Maker::pid);
        let made = || unaccepted::Reader::new(inside).map_err(|e| format!("{e:#}"));
        self.unaccepted
            .get_or_init(made)
            .as_ref()
            .map_err(String::clone)
    }

    /// Asks sockets for their peers in the pid namespace of this task. Call it from a single-threaded program.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN.
    pub fn ask_inside(&mut self, tid: i32) -> Result<()> {
        let ours = Identity {
            pid: None,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: Vec::new(),
        };
        self.inside = Some(Maker::start(&ours, Some(&Entrance::of(tid)?))?);
        Ok(())
    }

    /// Takes a socket of a stopped process: `fd` is a duplicate of its descriptor `number` (-1: found in
    /// flight). Returns its index in `Manifest::sockets`; the same socket has one index.
    ///
    /// # Errors
    /// A family, type or protocol that cannot be carried, named.
    pub fn add(&mut self, pid: i32, number: i32, fd: OwnedFd) -> Result<u32> {
        let ino = inode(&fd)?;
        let standard = (0..=2).contains(&number);
        if let Some(&index) = self.by_ino.get(&ino) {
            if let Some(m) = self.met.get_mut(index as usize) {
                m.standard |= standard;
            }
            return Ok(index);
        }
        let get = |name, what| {
            sockopt::get_int(&fd, libc::SOL_SOCKET, name)
                .with_context(|| format!("pid {pid}, descriptor {number}: getsockopt({what})"))
        };
        let met = Met {
            ino,
            pid,
            number,
            standard,
            family: get(libc::SO_DOMAIN, "SO_DOMAIN")?,
            kind: get(libc::SO_TYPE, "SO_TYPE")?,
            protocol: get(libc::SO_PROTOCOL, "SO_PROTOCOL")?,
            fd,
        };
        check_carried(&met)?;
        let index = u32::try_from(self.met.len()).context("too many sockets")?;
        self.by_ino.insert(ino, index);
        self.met.push(met);
        Ok(index)
    }

    /// Why sockets added cannot be carried, of processes that run: nothing that stands in a queue is looked at, and
    /// nothing is changed.
    #[must_use]
    pub fn refusals(&self) -> Vec<anyhow::Error> {
        let Ok(diag) = self.diagnose() else {
            return Vec::new();
        };
        let one = |met: &Met| {
            let mut warnings = Vec::new();
            match met.family {
                libc::AF_UNIX => unix::read(self, met, &diag, &mut warnings, Vec::new()).map(drop),
                _ if (met.family, met.kind) == (libc::AF_INET, libc::SOCK_STREAM)
                    || (met.family, met.kind) == (libc::AF_INET6, libc::SOCK_STREAM) =>
                {
                    tcp::read(self, met, &diag, &mut warnings).map(drop)
                }
                _ => Ok(()),
            }
        };
        let all = self.met.iter().filter_map(|met| one(met).err());
        all.filter(|e| Failure::of(e) == Failure::Refused).collect()
    }

    /// Descriptors that stand in front of the queues of unix sockets of a process that runs; nothing is consumed, nor
    /// does the process see it.
    #[must_use]
    pub fn in_flight(&self) -> Vec<OwnedFd> {
        let unix = |met: &&Met| met.family == libc::AF_UNIX && !self.is_pvmd(met);
        self.met
            .iter()
            .filter(unix)
            .flat_map(unix::in_flight)
            .collect()
    }

    /// Reads options, names, peers and queues of all sockets added. `describe` is called for each
    /// descriptor found in flight; it may add sockets.
    ///
    /// # Errors
    /// What cannot be carried, naming process and descriptor; nothing stays changed then.
    pub fn finish(&mut self, describe: &mut Describe<'_>) -> Result<Vec<Socket>> {
        if self.met.is_empty() {
            return Ok(Vec::new());
        }
        // Queues of unix sockets first: descriptors in flight may be sockets, which come behind.
        let mut queues = Vec::new();
        let mut i = 0;
        while i < self.met.len() {
            let queue = if self
                .met
                .get(i)
                .is_some_and(|m| m.family == libc::AF_UNIX && !self.is_pvmd(m))
            {
                unix::read_queue(self, i, describe)?
            } else {
                Vec::new()
            };
            queues.push(queue);
            i += 1;
        }
        let diag = self.diagnose()?;
        let mut sockets = Vec::new();
        for (met, queue) in std::mem::take(&mut self.met).into_iter().zip(queues) {
            let options = self
                .defaults
                .read(&met)
                .with_context(|| format!("{}: socket options", met.place()))?;
            sockets.push((met, options, queue));
        }
        let (met, rest): (Vec<_>, Vec<_>) =
            sockets.into_iter().map(|(m, o, q)| (m, (o, q))).unzip();
        self.met = met;
        let mut sockets = Vec::new();
        for (i, (options, queue)) in rest.into_iter().enumerate() {
            let Some(met) = self.met.get(i) else { break };
            let mut warnings = Vec::new();
            self.no_choice(met)?;
            let state = match met.family {
                libc::AF_UNIX => {
                    SocketState::Unix(unix::read(self, met, &diag, &mut warnings, queue)?)
                }
                libc::AF_NETLINK => SocketState::Netlink(netlink::read(met, &mut warnings)?),
                _ if met.kind == libc::SOCK_STREAM => {
                    SocketState::Tcp(tcp::read(self, met, &diag, &mut warnings)?)
                }
                _ => SocketState::Inet(inet::read(self, met, &diag, &mut warnings)?),
            };
            if let SocketState::Unix(u) = &state
                && let Some(what) = &u.outside
                && !self.is_pvmd(met)
            {
                self.outside.insert(i as u32, what.clone());
            }
            sockets.push(Socket {
                ino: met.ino,
                family: met.family,
                kind: met.kind,
                protocol: met.protocol,
                options,
                state,
            });
            self.warnings.append(&mut warnings);
        }
        tcp::read_connections(self, &mut sockets)?;
        Ok(sockets)
    }

    /// Refuses a socket that shares its port with others among which a program chooses, where kernel memory can be read.
    fn no_choice(&self, met: &Met) -> Result<()> {
        let shares = matches!(met.family, libc::AF_INET | libc::AF_INET6)
            && sockopt::get_int(&met.fd, libc::SOL_SOCKET, libc::SO_REUSEPORT).unwrap_or(0) != 0;
        if shares
            && let Ok(reader) = self.unaccepted()
            && reader
                .is_chosen_by_program(met.fd.as_fd())
                .with_context(|| format!("{}: who chooses among its port's sockets", met.place()))?
        {
            return Err(Failure::Refused.because(format!(
                "{}: a program chooses among the sockets of its port (SO_ATTACH_REUSEPORT_CBPF), which cannot be carried; let it be \
                 detached first (SO_DETACH_REUSEPORT_BPF)",
                met.place()
            )));
        }
        Ok(())
    }

    /// For a dump that kills: call it when the image is durable, just before the processes are killed, with
    /// a pidfd of each. It is the point of no return: connections end without a word from here on,
    /// and the guardian kills the processes if we die first. It keeps connections with a peer outside
    /// until they are restored (net/tcp.rs).
    ///
    /// # Errors
    /// The guardian is gone: nothing must be killed then, for peers would notice.
    pub fn finish_kill(&mut self, pidfds: &[BorrowedFd<'_>]) -> Result<()> {
        tcp::hold_until_dead(self, pidfds)
    }

    fn diagnose(&self) -> Result<Diag> {
        let has = |family, kind| {
            self.met
                .iter()
                .any(|m| m.family == family && (kind == 0 || m.kind == kind))
        };
        let mut diag = Diag::default();
        if !has(libc::AF_UNIX, 0) && !has(libc::AF_INET, 0) && !has(libc::AF_INET6, 0) {
            return Ok(diag);
        }
        let ask = SockDiag::open().context(
            "sock_diag: socket(AF_NETLINK); the kernel needs CONFIG_UNIX_DIAG and CONFIG_INET_DIAG",
        )?;
        if has(libc::AF_UNIX, 0) {
            let all = ask
                .unix()
                .context("sock_diag: list of unix sockets; the kernel needs CONFIG_UNIX_DIAG")?;
            diag.unix = all.into_iter().map(|x| (u64::from(x.ino), x)).collect();
        }
        for family in [libc::AF_INET, libc::AF_INET6] {
            if has(family, libc::SOCK_STREAM) {
                let mut tcp = ask.inet(family, libc::IPPROTO_TCP).context(
                    "sock_diag: list of TCP sockets; the kernel needs CONFIG_INET_TCP_DIAG",
                )?;
                diag.tcp.append(&mut tcp);
            }
            if has(family, libc::SOCK_DGRAM) {
                // Only the shutdown state comes from here: a kernel without it is no reason to refuse.
                diag.udp
                    .append(&mut ask.inet(family, libc::IPPROTO_UDP).unwrap_or_default());
            }
        }
        Ok(diag)
    }

    /// Whether it is the connection that [`Options::pvmd`] names.
    pub(crate) fn is_pvmd(&self, met: &Met) -> bool {
        self.options.pvmd == Some(met.ino)
    }

    pub(crate) fn index_of(&self, ino: u64) -> Option<&Met> {
        self.by_ino
            .get(&ino)
            .and_then(|i| self.met.get(*i as usize))
    }
}

/// Refuses a connection with an urgent byte that was not read: it has a place between the others, and none to put it back.
fn no_urgent_byte(met: &Met) -> Result<()> {
    if met.kind == libc::SOCK_STREAM && socket::poll_now(&met.fd)? & libc::POLLPRI != 0 {
        return Err(Failure::Refused.because(format!(
            "{}: an urgent byte (MSG_OOB) has come that was not read, which cannot be carried; let the program read it first",
            met.place()
        )));
    }
    Ok(())
}

/// Inode number of an open file: names a socket.
fn inode(fd: impl AsFd) -> Result<u64> {
    let fd = fd.as_fd();
    Ok(nix::sys::stat::fstat(fd)
        .with_context(|| format!("fstat of our descriptor {}", fd.as_raw_fd()))?
        .st_ino)
}

fn check_carried(m: &Met) -> Result<()> {
    const SO_NETNS_COOKIE: i32 = 71;
    let what = match m.family {
        libc::AF_UNIX => return Ok(()),
        libc::AF_INET | libc::AF_INET6 => match (m.kind, m.protocol) {
            (libc::SOCK_STREAM, libc::IPPROTO_TCP) | (libc::SOCK_DGRAM | libc::SOCK_RAW, _) => {
                let ours = socket::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
                let theirs = sockopt::get(&m.fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, 8);
                let own = sockopt::get(&ours, libc::SOL_SOCKET, SO_NETNS_COOKIE, 8);
                if let (Ok(a), Ok(b)) = (theirs, own)
                    && a != b
                {
                    return Err(Failure::Refused.because(format!(                        "{}: the socket belongs to another network namespace; run mistctl in it: nsenter -t {} -n mistctl ...",
                        m.place(),
                        m.pid)));
                }
                return Ok(());
            }
            (libc::SOCK_STREAM, 262) => "an MPTCP socket".to_owned(),
            (kind, protocol) => format!("an internet socket of type {kind}, protocol {protocol}"),
        },
        // Those that keep nothing for a socket but its address and groups.
        libc::AF_NETLINK
            if matches!(
                m.protocol,
                libc::NETLINK_ROUTE
                    | libc::NETLINK_SOCK_DIAG
                    | libc::NETLINK_AUDIT
                    | libc::NETLINK_KOBJECT_UEVENT
            ) =>
        {
            return Ok(());
        }
        libc::AF_NETLINK => format!("a netlink socket of protocol {}", m.protocol),
        libc::AF_PACKET => "a packet socket".to_owned(),
        libc::AF_VSOCK => "a vsock socket".to_owned(),
        libc::AF_ALG => "a kernel crypto (AF_ALG) socket".to_owned(),
        other => format!("a socket of address family {other}"),
    };
    Err(Failure::Refused.because(format!(
        "{}: {what} cannot be carried; let the program close it first",
        m.place()
    )))
}

/// Sockets of an image, rebuilt in this process.
#[derive(Default)]
pub struct Restorer {
    sockets: Vec<Socket>,
    fds: Vec<Option<OwnedFd>>,
    by_ino: HashMap<u64, usize>,
    /// Ends of connections whose socket was closed: dropped once what they had sent is sent again.
    partners: HashMap<usize, OwnedFd>,
    unix: unix::Plan,
    tcp: tcp::Pending,
    /// What did not come back and does not matter much, for people.
    pub warnings: Vec<String>,
}

/// Finds the descriptor of a description that has been rebuilt.
pub type FdOf<'a> = dyn Fn(DescriptionId) -> Result<BorrowedFd<'a>> + 'a;

impl Restorer {
    /// Makes every socket: bound, listening, connected, with empty queues. `makers` make unix sockets. TCP connections are made in
    /// repair mode and say nothing yet.
    ///
    /// # Errors
    /// An address in use or not of this host, a missing privilege, an image that contradicts itself; all
    /// that was made is closed.
    pub fn build(sockets: &[Socket], makers: &mut Makers<'_>) -> Result<Self> {
        let mut r = Self {
            sockets: sockets.to_vec(),
            ..Self::default()
        };
        r.fds.resize_with(sockets.len(), || None);
        for (i, s) in sockets.iter().enumerate() {
            if r.by_ino.insert(s.ino, i).is_some() {
                bail!("the image is damaged: socket inode {} appears twice", s.ino);
            }
            check_image(s).with_context(|| format!("socket {i} of the image"))?;
        }
        unix::build(&mut r, makers)?;
        for i in 0..sockets.len() {
            let Some(s) = r.sockets.get(i).cloned() else {
                break;
            };
            let made = match &s.state {
                SocketState::Inet(inet) => Some(inet::build(&s, inet, &mut r.warnings)),
                SocketState::Netlink(n) => Some(netlink::build(&s, n, &mut r.warnings)),
                SocketState::Unix(_) | SocketState::Tcp(_) => None,
            };
            if let Some(fd) = made {
                r.put(i, fd.with_context(|| format!("socket {i} of the image"))?);
            }
        }
        tcp::build(&mut r)?;
        Ok(r)
    }

    /// The socket with this index of `Manifest::sockets`; None for one whose peer was outside: put
    /// another descriptor in its place.
    pub fn fd(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.fds.get(index as usize)?.as_ref().map(AsFd::as_fd)
    }

    /// Puts what was queued back into the queues, then shutdown states and options.
    ///
    /// # Errors
    /// A description in flight that `fd_of` does not know, or a send that failed.
    pub fn fill(&mut self, fd_of: &FdOf<'_>, makers: &mut Makers<'_>) -> Result<()> {
        unix::fill(self, fd_of, makers)?;
        for i in 0..self.sockets.len() {
            let Some(s) = self.sockets.get(i) else { break };
            if let (SocketState::Inet(inet), Some(Some(fd))) = (&s.state, self.fds.get(i)) {
                inet::fill(s, inet, fd, &mut self.warnings)
                    .with_context(|| format!("socket {i} of the image"))?;
            }
        }
        Ok(())
    }

    /// Lets TCP connections speak: the last thing before, or with, the release of the processes. Closes
    /// our copies of all sockets. Returns warnings.
    pub fn activate(mut self) -> Vec<String> {
        tcp::activate(&mut self);
        self.warnings
    }

    pub(crate) fn put(&mut self, index: usize, fd: OwnedFd) {
        if let Some(slot) = self.fds.get_mut(index) {
            *slot = Some(fd);
        }
    }
}

/// Rejects combinations that no dump writes, before any of it is used.
fn check_image(s: &Socket) -> Result<()> {
    let fits = match &s.state {
        SocketState::Unix(u) => {
            s.family == libc::AF_UNIX
                && u.name.len() <= unix::PATH_MAX
                && u.queue.iter().all(|m| {
                    m.descriptions.len() <= socket::SCM_MAX_FD
                        && m.from.as_ref().is_none_or(|f| f.len() <= unix::PATH_MAX)
                })
        }
        SocketState::Inet(i) => {
            inet::family_fits(s.family, &i.local)
                && inet::family_fits(s.family, &i.peer)
                && i.memberships.iter().all(multicast::is_sound)
        }
        SocketState::Tcp(t) => {
            s.kind == libc::SOCK_STREAM
                && inet::family_fits(s.family, &t.local)
                && inet::family_fits(s.family, &t.peer)
        }
        SocketState::Netlink(_) => s.family == libc::AF_NETLINK,
    };
    if !fits || s.options.iter().any(|o| o.value.len() > 32 * 1024) {
        bail!("the image is damaged: its parts contradict each other");
    }
    Ok(())
}

pub(crate) fn bytes(v: Vec<u8>) -> Option<Bytes> {
    (!v.is_empty()).then_some(Bytes(v))
}
