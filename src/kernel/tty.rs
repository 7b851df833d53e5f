//! Terminals and pseudo terminals (ioctl_tty(2), pty(7)).

mod waiting;

pub use waiting::{Waiting, make_room, peek, put};

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

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

/// Gives up the controlling terminal of the session that we lead: the first leader without one that opens it gets it.
pub fn give_up(fd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: TIOCNOTTY takes no argument; the disposition that is put back is the one that was found. The kernel
    // sends the group in its foreground, which is ours, a SIGHUP.
    unsafe {
        let before = libc::signal(libc::SIGHUP, libc::SIG_IGN);
        let done = Errno::result(libc::ioctl(fd.as_raw_fd(), libc::TIOCNOTTY));
        libc::signal(libc::SIGHUP, before);
        done.map(drop)
    }
}

/// Throws away what stands in a terminal (TCFLSH): TCIFLUSH, TCOFLUSH.
fn flush(fd: BorrowedFd<'_>, which: i32) -> nix::Result<()> {
    // SAFETY: TCFLSH takes an integer.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCFLSH, which) }).map(drop)
}

/// Stops and starts output (TCXONC): TCOOFF, TCOON.
fn flow(fd: BorrowedFd<'_>, action: i32) -> nix::Result<()> {
    // SAFETY: TCXONC takes an integer.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCXONC, action) }).map(drop)
}
