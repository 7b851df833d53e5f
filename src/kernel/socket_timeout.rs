//! The time-out of a socket (SO_RCVTIMEO, SO_SNDTIMEO), for a call that has slept a part of it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::calls::TimeIsUp;
use super::guardian::{Guardian, Undo};
use super::time_ns::host_monotonic_ns;
use super::timer_list::Ticks;
use super::{calls, pidfd, proc_file, sock_diag, sockopt};

/// How long to wait for a thread to be back in its call. It does nothing else on the way there.
const PATIENCE: Duration = Duration::from_millis(20);

/// A socket of another process, and the time-out it has for a call.
#[derive(Debug)]
pub struct SocketTimeout {
    socket: OwnedFd,
    option: i32,
    whole: [u8; 16],
    /// It was connecting already when the call was made.
    again: bool,
}

/// Sockets whose time-outs are changed for the moment in which calls read them: each once, however many threads of
/// however many processes wait for it.
#[derive(Debug, Default)]
pub struct Shortened {
    /// By SO_COOKIE and option.
    sockets: BTreeMap<(u64, i32), Short>,
    waiting: Vec<Waiting>,
    guardian: Option<Guardian>,
}

/// A thread that is to begin its call.
#[derive(Debug)]
struct Waiting {
    tid: i32,
    nr: u64,
    left_ns: i64,
    socket: (u64, i32),
    time_is_up: TimeIsUp,
}

#[derive(Debug)]
struct Short {
    socket: SocketTimeout,
    now_ns: i64,
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
    // TICK_NSEC (include/linux/jiffies.h), which need not be whole microseconds.
    const SECOND: i64 = 1_000_000_000;
    let hz = (SECOND / 1000 + us / 2)
        .checked_div(us)
        .filter(|hz| *hz > 0)?;
    Some((SECOND + hz / 2) / hz)
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
            again: false,
        };
        Ok((s.whole_ns() > 0).then_some(s))
    }

    /// For a call on a socket that was connecting already when the call was made, or not.
    pub fn connecting_again(self, again: bool) -> Self {
        Self { again, ..self }
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

    /// How call `nr` ends when it has timed out.
    pub fn time_is_up(&self, nr: u64) -> TimeIsUp {
        let domain = sockopt::get(&self.socket, libc::SOL_SOCKET, libc::SO_DOMAIN, 4).ok();
        let domain = domain.and_then(|d| Some(i32::from_ne_bytes(d.try_into().ok()?)));
        calls::time_is_up(nr, domain.unwrap_or(libc::AF_UNSPEC), self.again)
    }

    /// Whether a connect is not the one that has sent the first SYN. It sleeps `since` then, which is exact but for the
    /// kernel's ticks, or else by its `end`, with clocks that are coarse by an eighth: one that timed out came before by
    /// the whole time.
    pub fn connects_again(&self, nr: u64, since: Option<i64>, end: i64) -> bool {
        const TICKS: i64 = 3;
        let whole = self.whole_ns();
        let (since, unsure) = match (since, tick_ns()) {
            (Some(since), Some(tick)) => (since, TICKS * tick),
            _ => (end.saturating_sub(whole), whole / 2),
        };
        nr as i64 == libc::SYS_connect
            && sock_diag::connecting_ns(&self.socket)
                .is_some_and(|age| host_monotonic_ns() - age < since.saturating_sub(unsure))
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
    pub fn shorten(&mut self, s: SocketTimeout, tid: i32, nr: u64, left_ns: i64) -> Result<()> {
        let cookie = sockopt::get(&s.socket, libc::SOL_SOCKET, libc::SO_COOKIE, 8)
            .context("reading the cookie of a socket")?;
        let cookie = cookie.try_into().map_or(0, u64::from_ne_bytes);
        // 0 would be never.
        let left_ns = left_ns.max(1000);
        let socket = (cookie, s.option);
        self.waiting.push(Waiting {
            tid,
            nr,
            left_ns,
            socket,
            time_is_up: s.time_is_up(nr),
        });
        let first = match self.sockets.entry(socket) {
            // What `s` has read is what it was shortened to.
            Entry::Occupied(known) => {
                let known = known.into_mut();
                if left_ns > known.now_ns {
                    known.socket.set(&calls::timeval(left_ns as u64))?;
                    known.now_ns = left_ns;
                }
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
        Ok(())
    }

    /// For calls that are to end at the tick with this `number`, in `left_ns`, and not behind it.
    pub fn to_tick(
        &mut self,
        s: SocketTimeout,
        tid: i32,
        nr: u64,
        left_ns: i64,
        number: i64,
    ) -> Result<()> {
        let Some(tick) = tick_ns() else {
            return self.shorten(s, tid, nr, left_ns);
        };
        let wait = Ticks::wait(tick, left_ns, number).unwrap_or_else(|| {
            let to_next = left_ns % tick + 20_000;
            std::thread::sleep(Duration::from_nanos(to_next as u64));
            let left = left_ns - to_next;
            Ticks::wait(tick, left, number).unwrap_or(left)
        });
        self.shorten(s, tid, nr, wait)
    }

    /// How a thread's call is to end when its time is up, where that of another on its socket is longer.
    pub fn overtaken(&self, tid: i32) -> Option<TimeIsUp> {
        let w = self.waiting.iter().find(|w| w.tid == tid)?;
        let longest = self.sockets.get(&w.socket)?.now_ns;
        (longest > w.left_ns).then_some(w.time_is_up)
    }

    /// Waits until the threads, which were let go, are in their calls, and gives the sockets their own time-outs.
    pub fn put_back(&mut self) -> Result<()> {
        for w in self.waiting.drain(..) {
            let path = format!("/proc/{}/syscall", w.tid);
            let want = format!("{} ", w.nr);
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
