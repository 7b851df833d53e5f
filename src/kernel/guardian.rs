//! A small process that puts right what we could not if we are killed.
//!
//! Some changes to a target outlive the tracer that made them: TCP_REPAIR mode, SO_PEEK_OFF, a stop.
//! Before such a change is made, the guardian is told how to undo it; it is a child in a session of its
//! own that waits at the other end of a socket. At end-of-file, which the kernel makes whatever way we
//! die, it undoes all that has not been taken back, and exits. Messages queue in the socket, so telling
//! it costs no switch to it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::socket::{self, Extra};
use super::sockopt;

/// How to undo something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undo {
    /// Set these options of the socket, in this order: level, name, value. Failures are passed over.
    Options(Vec<(i32, i32, Vec<u8>)>),
    /// Put this classic filter back (none when empty), then set the options.
    Filter(Vec<sockopt::Instruction>, Vec<(i32, i32, Vec<u8>)>),
    /// Send this signal to the process behind the pidfd.
    Signal(i32),
}

/// Names an undo that was registered; [`Guardian::forget`] takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UndoId(u32);

/// The guardian of this process; ends with it. Dropped without [`Guardian::forget`], it undoes.
#[derive(Debug)]
pub struct Guardian {
    channel: Option<OwnedFd>,
    /// To be waited for at our end; 0 once it is to stay behind.
    pid: AtomicI32,
    next: AtomicU32,
}

const OP_PROTECT: u8 = 1;
const OP_FORGET: u8 = 2;
const OP_FORGET_ALL: u8 = 3;
const OP_KEEP: u8 = 4;

impl Guardian {
    /// Starts it. Call this before anything is stopped: it is a fork.
    ///
    /// # Errors
    /// errno of socketpair(2) or fork(2).
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = socket::pair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
        // SAFETY: the child runs `watch` only, which allocates (glibc makes malloc usable after fork)
        // but takes no other lock, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            become_guardian(&theirs);
        }
        Ok(Self {
            channel: Some(ours),
            pid: AtomicI32::new(pid),
            next: AtomicU32::new(1),
        })
    }

    fn tell(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(channel) = &self.channel else {
            return Err(io::Error::from_raw_os_error(libc::EPIPE));
        };
        loop {
            let sent = socket::send(
                channel,
                message,
                &Extra {
                    fds,
                    ..Extra::default()
                },
            );
            match sent {
                Ok(_) => return Ok(()),
                // Its queue is full: wait until it has read.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait_writable(channel)?,
                Err(e) => return Err(e),
            }
        }
    }

    /// Registers how to undo what is about to be done to `fd`, a socket or a pidfd.
    ///
    /// # Errors
    /// EPIPE when the guardian is gone: then the change must not be made.
    pub fn protect(&self, fd: impl AsFd, undo: &Undo) -> io::Result<UndoId> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut m = vec![OP_PROTECT];
        m.extend_from_slice(&id.to_ne_bytes());
        encode(&mut m, undo);
        self.tell(&m, &[fd.as_fd()])?;
        Ok(UndoId(id))
    }

    /// The change is undone already, or is to stay.
    pub fn forget(&self, id: UndoId) -> io::Result<()> {
        let mut m = vec![OP_FORGET];
        m.extend_from_slice(&id.0.to_ne_bytes());
        self.tell(&m, &[])
    }

    /// All changes are undone already, or are to stay. It gives back its copies of the descriptors.
    pub fn forget_all(&self) -> io::Result<()> {
        self.tell(&[OP_FORGET_ALL], &[])
    }

    /// The point of no return of a dump that kills. All sockets that are protected enter TCP_REPAIR mode,
    /// in which their end is silent. At our end-of-file the processes behind `pidfds` are killed if
    /// they are not dead already, and the descriptors with these ids stay open, to be handed out to who
    /// asks for them at the abstract address `name`. See [`crate::net::keeper`]. Its pid is returned.
    ///
    /// # Errors
    /// EPIPE and the like, or the address cannot be opened: everything is undone at our end, as before.
    pub fn keep(&self, name: &[u8], keep: &[UndoId], pidfds: &[BorrowedFd<'_>]) -> io::Result<i32> {
        let mut m = vec![OP_KEEP];
        m.extend_from_slice(&(name.len() as u32).to_ne_bytes());
        m.extend_from_slice(name);
        for id in keep {
            m.extend_from_slice(&id.0.to_ne_bytes());
        }
        self.tell(&m, pidfds)?;
        // It answers once its address is open: a restore may come at once.
        let mut answer = [0u8; 1];
        if let Some(channel) = &self.channel {
            wait_readable(channel);
            socket::receive(channel, &mut answer, 0)?;
        }
        if answer != [1] {
            return Err(io::Error::other(
                "it could not open the address of the keeper",
            ));
        }
        Ok(self.pid.swap(0, Ordering::Relaxed))
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.channel = None;
        let pid = *self.pid.get_mut();
        if pid > 0 {
            // SAFETY: our own child; a null status is allowed.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        }
    }
}

fn wait_writable(fd: &OwnedFd) -> io::Result<()> {
    let mut p = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one pollfd.
    if unsafe { libc::poll(&mut p, 1, -1) } < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
    Ok(())
}

fn put_options(m: &mut Vec<u8>, options: &[(i32, i32, Vec<u8>)]) {
    for (level, name, value) in options {
        m.extend_from_slice(&level.to_ne_bytes());
        m.extend_from_slice(&name.to_ne_bytes());
        m.extend_from_slice(&(value.len() as u32).to_ne_bytes());
        m.extend_from_slice(value);
    }
}

fn encode(m: &mut Vec<u8>, undo: &Undo) {
    match undo {
        Undo::Options(options) => {
            m.push(0);
            put_options(m, options);
        }
        Undo::Filter(program, options) => {
            m.push(1);
            m.extend_from_slice(&(program.len() as u32).to_ne_bytes());
            m.extend(program.iter().flatten());
            put_options(m, options);
        }
        Undo::Signal(signal) => {
            m.push(2);
            m.extend_from_slice(&signal.to_ne_bytes());
        }
    }
}

/// Takes `n` bytes off the front.
fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n)?;
    *rest = tail;
    Some(head)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(take(rest, 4)?.try_into().ok()?))
}

fn decode(rest: &mut &[u8]) -> Option<Undo> {
    let mut filter = Vec::new();
    let kind = *take(rest, 1)?.first()?;
    match kind {
        2 => return Some(Undo::Signal(take_u32(rest)? as i32)),
        1 => {
            for _ in 0..take_u32(rest)? {
                filter.push(take(rest, 8)?.try_into().ok()?);
            }
        }
        _ => {}
    }
    let mut options = Vec::new();
    while !rest.is_empty() {
        let level = take_u32(rest)? as i32;
        let name = take_u32(rest)? as i32;
        let len = take_u32(rest)? as usize;
        options.push((level, name, take(rest, len)?.to_vec()));
    }
    Some(if kind == 1 {
        Undo::Filter(filter, options)
    } else {
        Undo::Options(options)
    })
}

struct Protected {
    id: u32,
    fd: OwnedFd,
    undo: Undo,
}

#[derive(Default)]
struct Keep {
    /// None when nothing is to be kept, only to be closed quietly.
    listener: Option<OwnedFd>,
    ids: Vec<u32>,
    pidfds: Vec<OwnedFd>,
}

/// Sets the name of this process, at most 15 bytes.
pub(crate) fn rename(name: &std::ffi::CStr) {
    // SAFETY: a string that ends in zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Body of the guardian's process.
fn become_guardian(channel: &OwnedFd) -> ! {
    let keep = channel.as_raw_fd();
    // SAFETY: plain calls without pointers but a static string; a failure leaves a guardian that is
    // easier to kill or holds descriptors longer, no more. Closing by range concerns descriptors whose
    // owners are gone with the other thread stacks, since this process never returns from here.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"mist-guardian".as_ptr());
        for signal in [
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGPIPE,
            libc::SIGQUIT,
        ] {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::syscall(libc::SYS_close_range, keep + 1, u32::MAX, 0);
        if keep > 0 {
            libc::syscall(libc::SYS_close_range, 0, keep - 1, 0);
        }
    }
    watch(channel);
    // SAFETY: ends this process.
    unsafe { libc::_exit(0) }
}

fn watch(channel: &OwnedFd) {
    let mut protected: Vec<Protected> = Vec::new();
    let mut keep: Option<Keep> = None;
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let mut received = match socket::receive(channel, &mut buffer, 0) {
            Ok(r) => r,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                wait_readable(channel);
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        if received.len == 0 {
            break;
        }
        let mut rest = buffer.get(..received.len).unwrap_or_default();
        match take(&mut rest, 1).and_then(|op| op.first().copied()) {
            Some(OP_PROTECT) => {
                let id = take_u32(&mut rest);
                if let (Some(id), Some(undo), Some(fd)) =
                    (id, decode(&mut rest), received.fds.pop())
                {
                    protected.push(Protected { id, fd, undo });
                }
            }
            Some(OP_FORGET) => {
                if let Some(id) = take_u32(&mut rest) {
                    protected.retain(|p| p.id != id);
                }
            }
            Some(OP_FORGET_ALL) => protected.clear(),
            Some(OP_KEEP) => {
                let mut k = Keep {
                    pidfds: std::mem::take(&mut received.fds),
                    ..Keep::default()
                };
                if let Some(len) = take_u32(&mut rest)
                    && let Some(name) = take(&mut rest, len as usize)
                {
                    while let Some(id) = take_u32(&mut rest) {
                        k.ids.push(id);
                    }
                    let mut ready = true;
                    if !k.ids.is_empty() {
                        k.listener = crate::net::keeper::listen(name).ok();
                        ready = k.listener.is_some();
                    }
                    if ready {
                        for p in &protected {
                            let _ = super::tcp_repair::on(&p.fd);
                        }
                    }
                    let _ = socket::send(channel, &[u8::from(ready)], &Extra::default());
                    if ready {
                        keep = Some(k);
                    }
                }
            }
            _ => {}
        }
    }
    if let Some(k) = keep {
        for pidfd in &k.pidfds {
            send_signal(pidfd, libc::SIGKILL);
        }
        k.pidfds.iter().for_each(wait_for_death);
        protected.retain(|p| k.ids.contains(&p.id));
        if let Some(listener) = &k.listener {
            let kept: Vec<OwnedFd> = protected.into_iter().map(|p| p.fd).collect();
            crate::net::keeper::serve(listener, &kept);
        }
        return;
    }
    for p in protected.into_iter().rev() {
        undo(&p);
    }
}

fn undo(p: &Protected) {
    let options = match &p.undo {
        Undo::Signal(signal) => {
            send_signal(&p.fd, *signal);
            return;
        }
        Undo::Filter(program, options) => {
            let _ = sockopt::set_filter(&p.fd, program);
            options
        }
        Undo::Options(options) => options,
    };
    for (level, name, value) in options {
        let _ = sockopt::set(&p.fd, *level, *name, value);
    }
}

fn send_signal(pidfd: &OwnedFd, signal: i32) {
    // SAFETY: a pidfd and a signal number; null means no siginfo.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

/// A pidfd is readable when its process has ended (pidfd_open(2)). One that hangs in the kernel is not
/// waited for longer than ten seconds.
fn wait_for_death(pidfd: &OwnedFd) {
    let mut p = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut p, 1, 10_000) };
}

fn wait_readable(fd: &OwnedFd) {
    let mut p = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut p, 1, -1) };
}
