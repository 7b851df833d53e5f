//! What stands in a pseudo terminal, taken out and put back (drivers/tty/{pty,n_tty,tty_buffer}.c).
//!
//! Each direction has a queue of flip buffers and, behind it, the buffer of the reader's line discipline. What
//! has reached that buffer has been through the terminal's modes: edited, echoed, cut into lines. What still
//! stands in the flip buffers has not; it goes through when the reader makes room. And what is echoed waits
//! with the slave when the master's queue is full. All of that can only be read by taking it, and put back by
//! writing it again, in the same modes or in none.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Termios2, flow, flush, open_peer, packet_mode, set_packet_mode, set_termios};
use crate::image::files::Stopped;
use crate::kernel::fds;

/// What stands in a pair and has not been read.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub to_slave: Vec<u8>,
    /// How many bytes at the end of `to_slave` have not been through the terminal's modes yet.
    pub unseen: usize,
    /// Ends of file (^D) in the part that has: how many bytes stand before each.
    pub ends: Vec<u32>,
    pub to_master: Vec<u8>,
    /// Whether the slave's output is stopped, and by what.
    pub stopped: Stopped,
    /// TIOCPKT_* of a master in packet mode that has not read them.
    pub status: u8,
}

/// Most that is taken in each direction. With many small buffers left from earlier the kernel keeps 40 KiB.
const MOST: usize = 128 * 1024;
/// N_TTY_BUF_SIZE: what a line discipline keeps; one less is filled.
const DISCIPLINE: usize = 4096;
/// The largest write that fills one of the kernel's buffers (TTY_BUFFER_PAGE, of which it holds two) and the
/// smallest (MIN_TTYB_SIZE).
const PIECES: [usize; 2] = [1792, 256];

const IFLAG: usize = 0;
const OFLAG: usize = 1;
const LFLAG: usize = 3;
/// How long the kernel's worker takes, and more.
const MOMENT: Duration = Duration::from_micros(500);

/// TIOCPKT_* (asm-generic/ioctls.h).
mod packet {
    pub const FLUSHREAD: u8 = 1;
    pub const FLUSHWRITE: u8 = 2;
    pub const STOP: u8 = 4;
    pub const START: u8 = 8;
    pub const NOSTOP: u8 = 16;
    pub const DOSTOP: u8 = 32;
    pub const IOCTL: u8 = 64;
}

/// Where c_cc begins.
const CC: usize = 17;

impl Waiting {
    fn with_room() -> Self {
        Self {
            to_slave: Vec::with_capacity(MOST),
            ends: Vec::with_capacity(DISCIPLINE),
            to_master: Vec::with_capacity(MOST),
            ..Self::default()
        }
    }
}

/// What stands in a pair. It cannot be read without being taken, so it is taken and put back; that is done by a
/// process of its own, which goes on when this one is killed. Nobody else may use the pair meanwhile.
/// `termios`: the pair's settings, which are as before afterwards.
pub fn peek(master: BorrowedFd<'_>, termios: &Termios2) -> anyhow::Result<Waiting> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // All memory that the child needs: it must not allocate, for another thread may hold the lock.
    let mut waiting = Waiting::with_room();
    // SAFETY: the child makes system calls only, on memory that was there before, and leaves by _exit.
    let child = match Errno::result(unsafe { libc::fork() })? {
        0 => {
            let all = nix::sys::signal::SigSet::all();
            let _ = all.thread_block();
            let _ = nix::unistd::setsid();
            let error = take_and_put_back(master, termios, &mut waiting).err();
            answer(write.as_fd(), error, &waiting);
            // SAFETY: see above.
            unsafe { libc::_exit(0) }
        }
        child => nix::unistd::Pid::from_raw(child),
    };
    drop(write);
    let mut answer = Vec::new();
    let got = std::fs::File::from(read).read_to_end(&mut answer);
    nix::sys::wait::waitpid(child, None)?;
    got?;
    understand(&answer)
        .unwrap_or_else(|| anyhow::bail!("the process that looks into a terminal died"))
}

/// Runs in the child: no allocation.
fn answer(to: BorrowedFd<'_>, error: Option<Errno>, w: &Waiting) {
    let words = [
        error.map_or(0, |e| e as i32 as u32),
        w.to_slave.len() as u32,
        w.unseen as u32,
        w.ends.len() as u32,
        w.to_master.len() as u32,
        w.stopped as u32,
        w.status.into(),
    ];
    let send = |mut bytes: &[u8]| {
        // Signals are blocked; nobody reads when mistctl has died.
        while let Ok(n @ 1..) = nix::unistd::write(to, bytes) {
            bytes = &bytes[n..];
        }
    };
    words.iter().for_each(|w| send(&w.to_ne_bytes()));
    send(&w.to_slave);
    w.ends.iter().for_each(|e| send(&e.to_ne_bytes()));
    send(&w.to_master);
}

fn understand(mut bytes: &[u8]) -> Option<anyhow::Result<Waiting>> {
    let word = |bytes: &mut &[u8]| {
        let (first, rest) = bytes.split_first_chunk::<4>()?;
        *bytes = rest;
        Some(u32::from_ne_bytes(*first))
    };
    let mut next = || word(&mut bytes);
    let (error, to_slave, unseen, ends) = (next()?, next()?, next()?, next()?);
    let (to_master, stopped, status) = (next()?, next()?, next()?);
    if error != 0 {
        return Some(Err(Errno::from_raw(error as i32).into()));
    }
    let (to_slave, mut rest) = bytes.split_at_checked(to_slave as usize)?;
    let ends = (0..ends)
        .map(|_| word(&mut rest))
        .collect::<Option<Vec<u32>>>()?;
    (rest.len() == to_master as usize).then(|| {
        Ok(Waiting {
            to_slave: to_slave.to_vec(),
            unseen: unseen as usize,
            ends,
            to_master: rest.to_vec(),
            stopped: match stopped {
                0 => Stopped::No,
                1 => Stopped::Program,
                _ => Stopped::Typed,
            },
            status: status as u8,
        })
    })
}

/// Runs in a child of its own: no allocation, no locks.
fn take_and_put_back(
    master: BorrowedFd<'_>,
    termios: &Termios2,
    w: &mut Waiting,
) -> nix::Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    let slave = open_peer(master, flags)?;
    let slave = slave.as_fd();
    let packet = packet_mode(master)?;
    let before = fds::flags(master)?;
    fds::set_flags(master, before | libc::O_NONBLOCK)?;
    let taken = take(master, slave, termios, packet, w);
    let put = put(master, slave, termios, packet, w);
    fds::set_flags(master, before)?;
    taken.and(put).map(drop)
}

/// Takes everything out.
fn take(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios2,
    packet: bool,
    w: &mut Waiting,
) -> nix::Result<()> {
    if packet {
        let mut status = [0];
        if polled(master, PollFlags::POLLPRI) && nix::unistd::read(master, &mut status)? == 1 {
            w.status = status[0];
        }
        set_packet_mode(master, false)?;
    }
    take_output(master, slave, &mut w.to_master)?;
    if !polled(slave, PollFlags::POLLOUT) {
        flow(slave, libc::TCOON)?;
        w.stopped = Stopped::Program;
        if !polled(slave, PollFlags::POLLOUT) {
            // Output starts when no character can stop it any more.
            let mut unstoppable = *termios;
            change(&mut unstoppable, IFLAG, |i| i & !libc::IXON);
            set_termios(master, &unstoppable)?;
            w.stopped = Stopped::Typed;
        }
        take_output(master, slave, &mut w.to_master)?;
    }
    // From here on the kernel's worker moves what has not been through the modes in as it is.
    let finished = fds::readable(slave)?;
    let mut raw = inert(termios, 0);
    change(&mut raw, LFLAG, |l| l & !libc::ICANON);
    set_termios(master, &raw)?;
    let seen = fds::readable(slave)?;
    read_all(slave, &mut w.to_slave)?;
    w.unseen = w.to_slave.len().saturating_sub(seen);
    if is_canonical(termios) {
        find_ends(termios, finished, seen, w);
    }
    Ok(())
}

/// Finds the ends of file among the first `seen` bytes for the slave, and takes them out. They stand there as zeros,
/// like zeros that were typed; `finished` is how many bytes belong to lines that have an end, without them.
fn find_ends(termios: &Termios2, finished: usize, seen: usize, w: &mut Waiting) {
    let seen = &w.to_slave[..seen.min(w.to_slave.len())];
    let newline = seen.iter().rposition(|c| ends_line(termios, *c));
    let least = newline.map_or(0, |i| i + 1);
    let zeros = |to: usize| seen[..to].iter().filter(|c| **c == 0).count();
    // The last place that fits.
    let fits = |end: &usize| {
        let is_end = *end == least || seen[*end - 1] == 0;
        is_end && *end >= finished && zeros(*end) >= *end - finished
    };
    let Some(end) = (least..=seen.len()).rev().find(fits) else {
        // A line that was begun in another mode reads as if it had an end.
        w.ends.push(finished.min(seen.len()) as u32);
        return;
    };
    let mut marks = end - finished;
    let mut i = 0;
    while marks > 0 && i < w.to_slave.len() {
        if w.to_slave[i] == 0 {
            w.to_slave.remove(i);
            w.ends.push(i as u32);
            marks -= 1;
        } else {
            i += 1;
        }
    }
}

/// What the master would read, and what the slave would echo if there were room.
fn take_output(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    into: &mut Vec<u8>,
) -> nix::Result<()> {
    loop {
        let before = into.len();
        read_all(master, into)?;
        // A write, be it of nothing, lets the slave echo first.
        match nix::unistd::write(slave, &[]) {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(e) => return Err(e),
        }
        if into.len() == before && !polled(master, PollFlags::POLLIN) {
            return Ok(());
        }
    }
}

/// Reads what is there, as far as there is room for it without an allocation.
fn read_all(fd: BorrowedFd<'_>, into: &mut Vec<u8>) -> nix::Result<()> {
    while polled(fd, PollFlags::POLLIN) && !matches!(fds::readable(fd), Ok(0) | Err(_)) {
        if read_more(fd, into)? == 0 {
            break;
        }
    }
    Ok(())
}

/// One read; how many bytes it gave.
fn read_more(fd: BorrowedFd<'_>, into: &mut Vec<u8>) -> nix::Result<usize> {
    let before = into.len();
    if into.capacity() - before < DISCIPLINE {
        return Err(Errno::ENOBUFS);
    }
    into.resize(before + DISCIPLINE, 0);
    let got = nix::unistd::read(fd, &mut into[before..]);
    into.truncate(before + *got.as_ref().unwrap_or(&0));
    match got {
        Err(Errno::EAGAIN | Errno::EIO) => Ok(0),
        other => other,
    }
}

fn ends_line(termios: &Termios2, c: u8) -> bool {
    let special = |i: usize| termios[CC + i] != 0 && termios[CC + i] == c;
    c == b'\n'
        || special(libc::VEOL)
        || special(libc::VEOL2) && word(termios, LFLAG) & libc::IEXTEN != 0
}

/// Puts what was taken into an empty pair, with everything about it as it was. Both descriptors are
/// non-blocking. Gives how many bytes found no room.
pub fn put(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios2,
    packet: bool,
    w: &Waiting,
) -> nix::Result<usize> {
    let seen = w.to_slave.len().saturating_sub(w.unseen);
    let (seen, unseen) = w.to_slave.split_at(seen);
    let end = end_of_file(termios, seen);
    let mut modes = inert(termios, if w.ends.is_empty() { 0 } else { end });
    if packet {
        // Flow control that goes and comes is told to the master; what contains these characters can not do
        // without.
        let stops = |b: &[u8]| b.iter().any(|c| matches!(c, 0x11 | 0x13));
        if has_flow(termios) && !stops(seen) {
            change(&mut modes, IFLAG, |i| i | libc::IXON);
            modes[CC + libc::VSTART] = termios[CC + libc::VSTART];
            modes[CC + libc::VSTOP] = termios[CC + libc::VSTOP];
        }
        set_termios(master, &modes)?;
        set_packet_mode(master, true)?;
        if w.status & packet::FLUSHREAD != 0 {
            flush(slave, libc::TCIFLUSH)?;
        }
        if w.status & packet::FLUSHWRITE != 0 {
            flush(slave, libc::TCOFLUSH)?;
        }
    }
    set_termios(master, &modes)?;
    let (first, rest) = w.to_master.split_at(w.to_master.len().min(DISCIPLINE - 1));
    let mut lost = write_all(slave, first);
    arrive(master, first.len());
    lost += write_all(slave, rest);
    let mut at = 0;
    for &e in &w.ends {
        let e = (e as usize).clamp(at, seen.len());
        lost += write_all(master, &seen[at..e]) + write_all(master, &[end]);
        at = e;
    }
    lost += write_all(master, &seen[at..]);
    let lines = if is_canonical(termios) {
        let newline = seen.iter().rposition(|c| ends_line(termios, *c));
        let end = w.ends.last().map_or(0, |e| *e as usize);
        newline.map_or(0, |i| i + 1).max(end)
    } else {
        seen.len()
    };
    arrive(slave, lines);
    // The beginning of a line is not told. A poll waits for it when there is nothing else; else it comes in the same
    // go as what stands before it.
    if lines < seen.len() && polled(slave, PollFlags::POLLIN) {
        std::thread::sleep(MOMENT);
    }
    set_termios(master, termios)?;
    lost += write_all(master, unseen);
    match w.stopped {
        Stopped::No => {}
        Stopped::Program => flow(slave, libc::TCOOFF)?,
        // Obeyed before what stands in front of it is read.
        Stopped::Typed if can_stop(termios) => {
            lost += write_all(master, &[termios[CC + libc::VSTOP]]);
        }
        Stopped::Typed => flow(slave, libc::TCOOFF)?,
    }
    if packet {
        tell(master, slave, termios, w)?;
    }
    Ok(lost)
}

/// Makes the terminal tell its master once more what that has not read.
fn tell(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios2,
    w: &Waiting,
) -> nix::Result<()> {
    let wants = |bit: u8| w.status & bit != 0;
    if wants(packet::DOSTOP) || wants(packet::NOSTOP) || wants(packet::IOCTL) {
        let mut other = *termios;
        if has_flow(termios) {
            other[CC + libc::VSTOP] = 0;
        } else {
            change(&mut other, IFLAG, |i| i | libc::IXON);
            (other[CC + libc::VSTART], other[CC + libc::VSTOP]) = (0x11, 0x13);
        }
        // That would forget where lines end.
        if wants(packet::IOCTL) && w.to_slave.is_empty() {
            change(&mut other, LFLAG, |l| l | libc::EXTPROC);
        }
        set_termios(master, &other)?;
        set_termios(master, termios)?;
    }
    let stopped = w.stopped != Stopped::No;
    if wants(packet::STOP) && !stopped || wants(packet::START) {
        flow(slave, libc::TCOOFF)?;
    }
    if wants(packet::START) && !stopped {
        flow(slave, libc::TCOON)?;
    }
    Ok(())
}

/// Whether there is a character that stops output.
fn can_stop(termios: &Termios2) -> bool {
    word(termios, IFLAG) & libc::IXON != 0 && termios[CC + libc::VSTOP] != 0
}

/// ^S and ^Q, as packet mode understands them.
fn has_flow(termios: &Termios2) -> bool {
    word(termios, IFLAG) & libc::IXON != 0
        && termios[CC + libc::VSTART] == 0x11
        && termios[CC + libc::VSTOP] == 0x13
}

/// Writes it all; how many bytes found no room. In pieces that leave none of the kernel's buffers half empty:
/// whatever pieces it was written in, it fits.
fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> usize {
    for piece in PIECES {
        while let piece @ [_, ..] = &bytes[..bytes.len().min(piece)] {
            match nix::unistd::write(to, piece) {
                Ok(n @ 1..) => bytes = &bytes[n..],
                _ => break,
            }
        }
    }
    bytes.len()
}

/// Waits until the line discipline has so many bytes to read. The kernel's worker brings them, and nothing else
/// tells when it has.
fn arrive(reader: BorrowedFd<'_>, bytes: usize) {
    const TURNS: u32 = 100;
    for _ in 0..TURNS {
        if fds::readable(reader).is_ok_and(|n| n >= bytes) {
            break;
        }
        std::thread::sleep(MOMENT);
    }
}

/// Leaves the kernel with small buffers to use again, as a program does that has written much in small pieces:
/// they hold what no new pair would. For empty pairs, both descriptors non-blocking.
pub fn make_room(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios2,
) -> nix::Result<()> {
    let mut raw = inert(termios, 0);
    change(&mut raw, LFLAG, |l| l & !libc::ICANON);
    set_termios(master, &raw)?;
    let zeros = [0; PIECES[1]];
    let mut read = Vec::with_capacity(MOST);
    for (from, to) in [(master, slave), (slave, master)] {
        while nix::unistd::write(from, &zeros).is_ok_and(|n| n > 0) {}
        read_all(to, &mut read)?;
        read.clear();
    }
    Ok(())
}

/// A character for the end of a file that stands for nothing else in `bytes`.
fn end_of_file(termios: &Termios2, bytes: &[u8]) -> u8 {
    std::iter::once(4)
        .chain(1..=255)
        .find(|c| !ends_line(termios, *c) && !bytes.contains(c))
        .unwrap_or(4)
}

/// Settings changed so that bytes pass in both directions as they are; lines end where they did, and files with
/// `end` if that is not 0.
fn inert(t: &Termios2, end: u8) -> Termios2 {
    let mut changed = *t;
    change(&mut changed, IFLAG, |_| 0);
    change(&mut changed, OFLAG, |o| o & !libc::OPOST);
    change(&mut changed, LFLAG, |l| {
        l & (libc::ICANON | libc::EXTPROC | libc::IEXTEN)
    });
    for i in 0..19 {
        changed[CC + i] = match i {
            libc::VEOL | libc::VEOL2 => t[CC + i],
            libc::VEOF => end,
            libc::VMIN => 1,
            _ => 0,
        };
    }
    changed
}

/// Whether reads give lines.
fn is_canonical(t: &Termios2) -> bool {
    word(t, LFLAG) & (libc::ICANON | libc::EXTPROC) == libc::ICANON
}

/// c_iflag, c_oflag, c_cflag, c_lflag, then c_line and c_cc[19].
fn word(t: &Termios2, i: usize) -> u32 {
    let bytes = t.chunks_exact(4).nth(i).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

fn change(t: &mut Termios2, i: usize, f: impl Fn(u32) -> u32) {
    let new = f(word(t, i));
    if let Some(bytes) = t.chunks_exact_mut(4).nth(i) {
        bytes.copy_from_slice(&new.to_ne_bytes());
    }
}

/// Whether a terminal is ready so. A poll that finds nothing to read waits for the kernel's worker to bring
/// what was written to the other side (n_tty_poll).
fn polled(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut polled = [PollFd::new(fd, what)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|n| n > 0)
        && polled[0].revents().is_some_and(|r| r.intersects(what))
}
