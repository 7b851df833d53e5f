//! The time-out of a socket (SO_RCVTIMEO, SO_SNDTIMEO), for a call that has slept a part of it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
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

/// A socket of another process, and the time-out it has for a call.
#[derive(Debug)]
pub struct SocketTimeout {
    socket: OwnedFd,
    option: i32,
    whole: [u8; 16],
}

/// Sockets whose time-outs are changed for the moment in which calls read them: each once, however many threads of
/// however many processes wait for it.
#[derive(Debug, Default)]
pub struct Shortened {
    /// By SO_COOKIE and option.
    sockets: BTreeMap<(u64, i32), Short>,
    /// Threads that are to begin these calls.
    waiting: Vec<(i32, u64)>,
    guardian: Option<Guardian>,
}

#[derive(Debug)]
struct Short {
    socket: SocketTimeout,
    now_ns: i64,
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
            whole,
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

    /// A wait in `program`'s call `nr` that is precise where the socket's time-out is not, and ends in `left_ns`. The
    /// process's clock and a note's are those that `clocks` tells. None for calls that cannot wait so.
    pub fn wait(&self, nr: u64, program: &Regs, left_ns: i64, clocks: Monotonic) -> Option<Wait> {
        const FD_MAX: u32 = 512;
        /// times(2): USER_HZ of them are a second.
        const CLOCK_TICK_NS: i64 = 10_000_000;
        let fd = u32::try_from(program.arg(0) as i32)
            .ok()
            .filter(|fd| *fd < FD_MAX)?;
        let (writes, probe) = calls::socket_wait(nr, program)?;
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
}

impl Shortened {
    /// Until [`Shortened::put_back`], calls on that socket time out after this; where several threads wait for it,
    /// after the longest of theirs. Thread `tid` is to begin its call `nr`. The guardian puts the time-out back if we
    /// die.
    fn shorten(&mut self, s: SocketTimeout, tid: i32, nr: u64, left_ns: i64) -> Result<()> {
        let cookie = sockopt::get(&s.socket, libc::SOL_SOCKET, libc::SO_COOKIE, 8)
            .context("reading the cookie of a socket")?;
        let cookie = cookie.try_into().map_or(0, u64::from_ne_bytes);
        // 0 would be never.
        let left_ns = left_ns.max(1000);
        let first = match self.sockets.entry((cookie, s.option)) {
            // What `s` has read is what it was shortened to.
            Entry::Occupied(known) => {
                let known = known.into_mut();
                if left_ns > known.now_ns {
                    known.socket.set(&calls::timeval(left_ns as u64))?;
                    known.now_ns = left_ns;
                }
                self.waiting.push((tid, nr));
                return Ok(());
            }
            Entry::Vacant(first) => first,
        };
        let guardian = match &self.guardian {
            Some(g) => g,
            None => self
                .guardian
                .insert(Guardian::start().context("starting a guardian")?),
        };
        let undo = Undo::Options(vec![(libc::SOL_SOCKET, s.option, s.whole.to_vec())]);
        guardian.protect(&s.socket, &undo)?;
        s.set(&calls::timeval(left_ns as u64))?;
        first.insert(Short {
            socket: s,
            now_ns: left_ns,
        });
        self.waiting.push((tid, nr));
        Ok(())
    }

    /// For calls that are to end at the first tick in or behind `left_ns`, and begin now.
    pub fn to_next_tick(
        &mut self,
        s: SocketTimeout,
        tid: i32,
        nr: u64,
        left_ns: i64,
    ) -> Result<()> {
        let tick = tick_ns();
        let ticks = tick.and_then(|t| Ticks::read(t).ok());
        let whole = |t: i64, ticks: Ticks| Ticks::wait(t, ticks.next(monotonic_ns(), left_ns));
        let left_ns = match (tick, ticks) {
            (Some(t), Some(ticks)) => whole(t, ticks),
            _ => left_ns,
        };
        self.shorten(s, tid, nr, left_ns)
    }

    /// For calls that are to end at the tick in `left_ns`, and not behind it.
    pub fn to_tick(&mut self, s: SocketTimeout, tid: i32, nr: u64, left_ns: i64) -> Result<()> {
        let left_ns = tick_ns().map_or(left_ns, |tick| Ticks::wait(tick, left_ns));
        self.shorten(s, tid, nr, left_ns)
    }

    /// Waits until the threads, which were let go, are in their calls, and gives the sockets their own time-outs.
    pub fn put_back(&mut self) -> Result<()> {
        for (tid, nr) in self.waiting.drain(..) {
            let path = format!("/proc/{tid}/syscall");
            let want = format!("{nr} ");
            let begun = Instant::now();
            while begun.elapsed() < PATIENCE {
                match proc_file::text(&path) {
                    Ok(text) if text.starts_with(&want) => break,
                    // A sleep, for to yield would not let it run when we come before it (kernel/sched.rs).
                    Ok(_) => std::thread::sleep(Duration::from_micros(20)),
                    Err(_) => break,
                }
            }
        }
        let mut first = Ok(());
        for (_, s) in std::mem::take(&mut self.sockets) {
            let r = s.socket.set(&s.socket.whole);
            if first.is_ok() {
                first = r;
            }
        }
        first?;
        if let Some(g) = self.guardian.take() {
            g.forget_all()?;
        }
        Ok(())
    }
}
