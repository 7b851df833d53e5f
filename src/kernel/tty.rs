//! Terminals and pseudo terminals (ioctl_tty(2), pty(7)).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// struct termios2 (asm-generic/termbits.h), as bytes.
pub type Termios2 = [u8; 44];

/// Requests of asm-generic/ioctls.h, some of which libc lacks.
const TCGETS2: libc::c_ulong = 0x802c_542a;
const TCSETS2: libc::c_ulong = 0x402c_542b;
const TIOCGDEV: libc::c_ulong = 0x8004_5432;
const TIOCGPTPEER: libc::c_ulong = 0x5441;
const TIOCGPKT: libc::c_ulong = 0x8004_5438;
const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;
const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCGPTN: libc::c_ulong = 0x8004_5430;
const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;

fn get_int(fd: BorrowedFd<'_>, request: libc::c_ulong) -> nix::Result<i32> {
    let mut n: libc::c_int = 0;
    // SAFETY: all requests passed here write one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut n) })?;
    Ok(n)
}

fn set_int(fd: BorrowedFd<'_>, request: libc::c_ulong, n: i32) -> nix::Result<()> {
    // SAFETY: all requests passed here read one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const n) }).map(drop)
}

/// Settings of the terminal; asked of a master, those of its slave.
pub fn termios(fd: BorrowedFd<'_>) -> nix::Result<Termios2> {
    let mut t = [0u8; 44];
    // SAFETY: TCGETS2 writes one termios2, 44 bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TCGETS2, t.as_mut_ptr()) })?;
    Ok(t)
}

/// See [`termios`]; at once, without draining.
pub fn set_termios(fd: BorrowedFd<'_>, t: &Termios2) -> nix::Result<()> {
    // SAFETY: TCSETS2 reads one termios2, 44 bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TCSETS2, t.as_ptr()) }).map(drop)
}

/// Rows, columns, x pixels, y pixels.
pub fn winsize(fd: BorrowedFd<'_>) -> nix::Result<[u16; 4]> {
    let mut w = [0u16; 4];
    // SAFETY: TIOCGWINSZ writes one winsize, four u16.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, w.as_mut_ptr()) })?;
    Ok(w)
}

pub fn set_winsize(fd: BorrowedFd<'_>, w: [u16; 4]) -> nix::Result<()> {
    // SAFETY: TIOCSWINSZ reads one winsize, four u16.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, w.as_ptr()) }).map(drop)
}

/// Device number, in the kernel's 32-bit encoding, of the terminal behind `fd`, which may be /dev/tty.
pub fn device(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    get_int(fd, TIOCGDEV).map(|n| n as u32)
}

/// Number of a master's pair: its slave is /dev/pts/NUMBER.
pub fn number(master: BorrowedFd<'_>) -> nix::Result<u32> {
    get_int(master, TIOCGPTN).map(|n| n as u32)
}

/// Packet mode of a master (TIOCPKT).
pub fn packet_mode(master: BorrowedFd<'_>) -> nix::Result<bool> {
    get_int(master, TIOCGPKT).map(|n| n != 0)
}

pub fn set_packet_mode(master: BorrowedFd<'_>, on: bool) -> nix::Result<()> {
    set_int(master, libc::TIOCPKT, on.into())
}

/// Whether the slave of a master is locked (unlockpt(3)).
pub fn locked(master: BorrowedFd<'_>) -> nix::Result<bool> {
    get_int(master, TIOCGPTLCK).map(|n| n != 0)
}

pub fn set_locked(master: BorrowedFd<'_>, on: bool) -> nix::Result<()> {
    set_int(master, TIOCSPTLCK, on.into())
}

/// Exclusive mode (TIOCEXCL).
pub fn exclusive(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    get_int(fd, TIOCGEXCL).map(|n| n != 0)
}

pub fn set_exclusive(fd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: TIOCEXCL takes no argument.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCEXCL) }).map(drop)
}

/// Session that the terminal of this master controls; ENOTTY: none.
pub fn session(master: BorrowedFd<'_>) -> nix::Result<i32> {
    get_int(master, libc::TIOCGSID)
}

/// Its foreground process group.
pub fn foreground(master: BorrowedFd<'_>) -> nix::Result<i32> {
    get_int(master, libc::TIOCGPGRP)
}

/// Opens the slave of a master, wherever its file system is mounted. Not close-on-exec unless `flags` say so:
/// the kernel would show that in F_GETFL for ever.
pub fn open_peer(master: BorrowedFd<'_>, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Settings changed so that bytes pass in both directions as they are, with line mode and its ends kept.
pub fn transparent(t: &Termios2) -> Termios2 {
    let mut changed = *t;
    // c_iflag, c_oflag, c_cflag, c_lflag, then c_line and c_cc[19].
    change(&mut changed, 0, |_| 0);
    change(&mut changed, 1, |oflag| oflag & !libc::OPOST);
    change(&mut changed, 3, |lflag| lflag & libc::ICANON);
    changed
}

/// As [`transparent`], without line mode, and with reads that do not wait.
fn raw(t: &Termios2) -> Termios2 {
    const CC: usize = 17;
    let mut changed = transparent(t);
    change(&mut changed, 3, |_| 0);
    changed[CC + libc::VMIN] = 0;
    changed[CC + libc::VTIME] = 0;
    changed
}

fn change(t: &mut Termios2, word: usize, f: impl Fn(u32) -> u32) {
    if let Some(bytes) = t.chunks_exact_mut(4).nth(word) {
        let old = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        bytes.copy_from_slice(&f(old).to_ne_bytes());
    }
}

/// Lets what was written to the other side arrive: a poll that finds nothing waits for the kernel's worker
/// (drivers/tty/n_tty.c, n_tty_poll).
pub fn settle(fd: BorrowedFd<'_>) -> PollFlags {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN | PollFlags::POLLOUT)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(_) => polled[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::empty(),
    }
}

/// What stands in a pair and has not been read.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub to_slave: Vec<u8>,
    pub to_master: Vec<u8>,
}

/// Most that is taken in each direction; the kernel keeps 64 KiB and a line or two.
const MOST: usize = 80 * 1024;

/// What stands in a pair. It cannot be read without being taken, so it is taken and put back; that is done by a
/// process of its own, which goes on when this one is killed. Nobody else may use the pair meanwhile.
/// `termios`: the pair's settings, which are as before afterwards.
pub fn peek(master: BorrowedFd<'_>, termios: &Termios2) -> anyhow::Result<Waiting> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    super::fds::set_pipe_size(write.as_fd(), 4 * MOST)?;
    // All memory that the child needs: it must not allocate, for another thread may hold the lock.
    let mut to_slave = vec![0; MOST];
    let mut to_master = vec![0; MOST];
    // SAFETY: the child makes system calls only, on memory that was there before, and leaves by _exit.
    let child = match Errno::result(unsafe { libc::fork() })? {
        0 => {
            let all = nix::sys::signal::SigSet::all();
            let _ = all.thread_block();
            let _ = nix::unistd::setsid();
            let taken = take_and_put_back(master, termios, &mut to_slave, &mut to_master);
            let (a, b, error) = match taken {
                Ok((a, b)) => (a, b, 0),
                Err(e) => (0, 0, e as i32),
            };
            let mut header = [0u8; 24];
            header[..8].copy_from_slice(&(error as u64).to_ne_bytes());
            header[8..16].copy_from_slice(&(a as u64).to_ne_bytes());
            header[16..].copy_from_slice(&(b as u64).to_ne_bytes());
            for part in [&header[..], &to_slave[..a], &to_master[..b]] {
                let _ = nix::unistd::write(&write, part);
            }
            // SAFETY: see above.
            unsafe { libc::_exit(0) }
        }
        child => nix::unistd::Pid::from_raw(child),
    };
    drop(write);
    let mut answer = Vec::new();
    let got = std::io::Read::read_to_end(&mut std::fs::File::from(read), &mut answer);
    nix::sys::wait::waitpid(child, None)?;
    got?;
    let mut words = [0u64; 3];
    for (word, bytes) in words.iter_mut().zip(answer.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into()?);
    }
    let [error, a, b] = words.map(|w| w as usize);
    if error != 0 {
        return Err(Errno::from_raw(error as i32).into());
    }
    let part = |from: usize, n: usize| answer.get(24 + from..24 + from + n).map(<[u8]>::to_vec);
    match (part(0, a), part(a, b)) {
        (Some(to_slave), Some(to_master)) => Ok(Waiting {
            to_slave,
            to_master,
        }),
        _ => anyhow::bail!("the process that looks into a terminal died"),
    }
}

/// Runs in a child of its own: no allocation, no locks.
fn take_and_put_back(
    master: BorrowedFd<'_>,
    termios: &Termios2,
    to_slave: &mut [u8],
    to_master: &mut [u8],
) -> nix::Result<(usize, usize)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    let slave = open_peer(master, flags)?;
    let slave = slave.as_fd();
    // What cannot be put back (output stopped by ^S) is not taken.
    let (m, s) = (settle(master), settle(slave));
    if !m.contains(PollFlags::POLLOUT) || !s.contains(PollFlags::POLLOUT) {
        return Err(Errno::EBUSY);
    }
    set_termios(master, &raw(termios))?;
    let a = take(slave, to_slave);
    let b = take(master, to_master);
    set_termios(master, &transparent(termios))?;
    put(master, &to_slave[..a]);
    settle(slave);
    put(slave, &to_master[..b]);
    settle(master);
    set_termios(master, termios)?;
    Ok((a, b))
}

/// Reads what is there, without waiting whatever the descriptor's flags.
fn take(fd: BorrowedFd<'_>, into: &mut [u8]) -> usize {
    let mut n = 0;
    while n < into.len() && settle(fd).contains(PollFlags::POLLIN) {
        match super::fds::readable(fd) {
            Ok(1..) => {}
            _ => break,
        }
        match nix::unistd::read(fd, &mut into[n..]) {
            Ok(0) | Err(_) => break,
            Ok(more) => n += more,
        }
    }
    n
}

/// Writes it all, as long as there is room.
fn put(fd: BorrowedFd<'_>, mut bytes: &[u8]) {
    while !bytes.is_empty() && settle(fd).contains(PollFlags::POLLOUT) {
        match nix::unistd::write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(_) => break,
        }
    }
}
