//! The time-out of a socket (SO_RCVTIMEO, SO_SNDTIMEO), for a call that has slept a part of it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::arch::Regs;
use super::arch::trampoline::Wait;
use super::guardian::{Guardian, Undo};
use super::time_ns::Offsets;
use super::timer_list::Ticks;
use super::tracee::monotonic_ns;
use super::{calls, pidfd, proc_file, sockopt};

/// How long to wait for a thread to be back in its call. It does nothing else on the way there.
const PATIENCE: Duration = Duration::from_millis(20);

/// A socket of another process whose time-out is changed for the moment in which a call reads it.
#[derive(Debug)]
pub struct SocketTimeout {
    socket: OwnedFd,
    option: i32,
    tid: i32,
    nr: u64,
    whole: [u8; 16],
    guardian: Option<Guardian>,
}

/// CLOCK_MONOTONIC as others see it. What is noted in a process for a later dump is in the host's own, whichever time
/// namespace the writer and the reader are in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Monotonic {
    /// How far the program's is ahead of ours.
    pub program_ns: i64,
    /// How far ours is ahead of the host's.
    pub ours_ns: i64,
}

impl Monotonic {
    /// What we see, where no time namespace waits for our children.
    pub fn ours() -> Self {
        Self {
            program_ns: 0,
            ours_ns: i64::try_from(Offsets::of("self").monotonic).unwrap_or(0),
        }
    }

    /// To be noted for a moment of our clock.
    pub fn note(self, at: i64) -> i64 {
        at.saturating_sub(self.ours_ns)
    }

    /// The moment that was noted, on our clock.
    pub fn noted(self, note: i64) -> i64 {
        note.saturating_add(self.ours_ns)
    }
}

/// Whether that descriptor is a socket.
pub fn is_socket(pid: i32, fd: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
        .is_ok_and(|l| l.to_string_lossy().starts_with("socket:"))
}

/// Nanoseconds of one tick of the clock that sockets time out by: what the kernel makes of a microsecond.
pub fn tick_ns() -> Option<i64> {
    let socket = super::socket::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).ok()?;
    let least = calls::timeval(1000);
    sockopt::set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &least).ok()?;
    let value = sockopt::get(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16).ok()?;
    let us = value
        .get(8..16)
        .and_then(|b| b.try_into().ok())
        .map(i64::from_le_bytes)?;
    (us > 0).then_some(us * 1000)
}

/// times(2).
fn clock_ticks() -> i64 {
    // SAFETY: without a place for it nothing but the result is given.
    unsafe { libc::times(std::ptr::null_mut()) }
}

impl SocketTimeout {
    /// For thread `tid`, in call `nr` on descriptor `fd` of its process. None when that socket has no
    /// time-out for this call.
    pub fn of(tid: i32, nr: u64, fd: i32) -> Result<Option<Self>> {
        let Some(option) = calls::socket_option(nr) else {
            return Ok(None);
        };
        let process = pidfd::open_thread(tid)?;
        let socket = pidfd::get_fd(process.as_fd(), fd)
            .with_context(|| format!("taking descriptor {fd} of thread {tid}"))?;
        let value = sockopt::get(&socket, libc::SOL_SOCKET, option, 16)
            .with_context(|| format!("reading the time-out of descriptor {fd} of thread {tid}"))?;
        let Ok(whole) = <[u8; 16]>::try_from(value) else {
            return Ok(None);
        };
        let s = Self {
            socket,
            option,
            tid,
            nr,
            whole,
            guardian: None,
        };
        Ok((s.whole_ns() > 0).then_some(s))
    }

    /// The program's own time-out, nanoseconds.
    pub fn whole_ns(&self) -> i64 {
        let word = |i: usize| {
            self.whole
                .get(i..i + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, i64::from_le_bytes)
        };
        word(0)
            .saturating_mul(1_000_000_000)
            .saturating_add(word(8).saturating_mul(1000))
    }

    /// A wait in `program`'s call that is precise where the socket's time-out is not, and ends in `left_ns`. The
    /// process's clock and a note's are those that `clocks` tells. None for calls that cannot wait so.
    pub fn wait(&self, program: &Regs, left_ns: i64, clocks: Monotonic) -> Option<Wait> {
        const FD_MAX: u32 = 512;
        /// times(2): USER_HZ of them are a second.
        const CLOCK_TICK_NS: i64 = 10_000_000;
        let fd = u32::try_from(program.arg(0) as i32)
            .ok()
            .filter(|fd| *fd < FD_MAX)?;
        let (writes, probe) = calls::socket_wait(self.nr, program)?;
        // Others may seem ready to be written to when they are not.
        let stream = || {
            let kind = sockopt::get(&self.socket, libc::SOL_SOCKET, libc::SO_TYPE, 4).ok();
            kind.is_some_and(|k| k == libc::SOCK_STREAM.to_ne_bytes())
        };
        if writes && !stream() {
            return None;
        }
        let left_ns = left_ns.max(0);
        let end = monotonic_ns().saturating_add(left_ns);
        // It may be behind by a tick of the kernel's.
        let clock = clock_ticks() + left_ns / CLOCK_TICK_NS - 1;
        Some(Wait {
            fd,
            writes,
            left: calls::timespec(left_ns as u64),
            end: calls::timespec(end.saturating_add(clocks.program_ns).max(0) as u64),
            note: clocks.note(end),
            clock,
            probe,
        })
    }

    fn set(&self, value: &[u8; 16]) -> Result<()> {
        sockopt::set(&self.socket, libc::SOL_SOCKET, self.option, value)
            .context("setting the time-out of a socket")
    }

    /// Until [`SocketTimeout::put_back`], calls that begin time out after this; 0 would be never.
    /// The guardian puts it back if we die.
    pub fn shorten(&mut self, left_ns: i64) -> Result<()> {
        let guardian = Guardian::start().context("starting a guardian")?;
        let undo = Undo::Options(vec![(libc::SOL_SOCKET, self.option, self.whole.to_vec())]);
        guardian.protect(&self.socket, &undo)?;
        self.guardian = Some(guardian);
        self.set(&calls::timeval(left_ns.max(1000) as u64))
    }

    /// The same for calls that are to end at the first tick in or behind `left_ns`, and begin now.
    pub fn shorten_to_next_tick(&mut self, left_ns: i64) -> Result<()> {
        let tick = tick_ns();
        let ticks = tick.and_then(|t| Ticks::read(t).ok());
        let whole = |t: i64, ticks: Ticks| Ticks::wait(t, ticks.next(monotonic_ns(), left_ns));
        self.shorten(match (tick, ticks) {
            (Some(t), Some(ticks)) => whole(t, ticks),
            _ => left_ns,
        })
    }

    /// The same for calls that are to end at the tick in `left_ns`, and not behind it.
    pub fn shorten_to_tick(&mut self, left_ns: i64) -> Result<()> {
        self.shorten(tick_ns().map_or(left_ns, |tick| Ticks::wait(tick, left_ns)))
    }

    /// Waits until the thread, which was let go, is in its call, and gives the socket its own time-out.
    pub fn put_back(&self) -> Result<()> {
        let path = format!("/proc/{}/syscall", self.tid);
        let want = format!("{} ", self.nr);
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            match proc_file::text(&path) {
                Ok(text) if text.starts_with(&want) => break,
                // A sleep, for to yield would not let it run when we come before it (kernel/sched.rs).
                Ok(_) => std::thread::sleep(Duration::from_micros(20)),
                Err(_) => break,
            }
        }
        self.set(&self.whole)?;
        if let Some(g) = &self.guardian {
            g.forget_all()?;
        }
        Ok(())
    }
}
