//! When a sleeping call was to time out.
//!
//! Best, as root: the timer that is in /proc/timer_list before the stop and not after it, to the
//! nanosecond. Timers there have no names; of several threads each gets the one closest to when its
//! sleep began plus its time-out. Else: what nanosleep has written as the time left (exact to the
//! stop), or the beginning of the sleep (the scheduler's, se.exec_start) plus the time-out. That is
//! good to some ten microseconds on hardware; a virtual machine's scheduler does not count the time
//! its host took away, so there the sleep ends late by what was taken while it lasted. And a sleep
//! that went on after an earlier stop or signal is late by as much as it had slept before that.

use std::collections::BTreeMap;

use crate::kernel::arch::{NR_RESTART_SYSCALL, Regs};
use crate::kernel::calls;
use crate::kernel::mem::Mem;
use crate::kernel::socket_timeout;
use crate::kernel::timer_list::{Ticks, TimerList};
use crate::kernel::tracee::monotonic_ns;

/// Between the end of a call's look at the clock and the timer it starts.
const CLOSE_NS: i64 = 500_000;

/// Between a thread's stop and our noticing it, when others keep the processors busy.
const NOTICED_NS: i64 = 2_000_000;

/// What threads were doing right before they were stopped.
#[derive(Debug, Default)]
pub struct Watch {
    pid: i32,
    timers: Option<TimerList>,
    /// When some thread may be in a call that its socket's time-out ends.
    ticks: Option<Ticks>,
    seen: BTreeMap<i32, Seen>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The call, also when restart_syscall goes on with it.
    nr: u64,
    restarted: bool,
    /// When it went to sleep: CLOCK_MONOTONIC.
    since: Option<i64>,
    /// How often it had gone to sleep. The stop adds one; more say that this was an earlier call.
    sleeps: Option<u64>,
    /// Time-out in its arguments.
    timeout: Option<i64>,
}

impl Watch {
    /// Looks at the threads of a process that still runs. Costs some microseconds a thread.
    pub fn before(pid: i32, tids: &[i32], mem: &Mem) -> Self {
        let mut seen = BTreeMap::new();
        for &tid in tids {
            let Some((nr, regs)) = in_call(pid, tid) else {
                continue;
            };
            let restarted = nr == NR_RESTART_SYSCALL;
            let nr = if restarted {
                match restarting(pid, tid, &regs) {
                    Some(nr) => nr,
                    None => continue,
                }
            } else {
                nr
            };
            let timeout = calls::timeout(nr, &regs);
            if timeout.is_none() && calls::socket_option(nr).is_none() {
                continue;
            }
            let sched = Sched::read(&format!("/proc/{pid}/task/{tid}/sched"));
            let s = Seen {
                nr,
                restarted,
                since: sched.map(|s| s.exec_start),
                sleeps: sched.map(|s| s.sleeps),
                timeout: timeout.and_then(|(t, _)| calls::argument(t, &regs, mem).ok()),
            };
            seen.insert(tid, s);
        }
        if seen.is_empty() {
            return Self::default();
        }
        let mut offsets = Offsets::default();
        for (tid, s) in &mut seen {
            let offset = offsets.of_task(pid, *tid);
            s.since = s.since.zip(offset).map(|(at, offset)| at + offset);
        }
        let timed = seen.values().any(|s| s.timeout.is_some());
        let timers = if timed { TimerList::read().ok() } else { None };
        let by_socket = seen.values().any(|s| s.timeout.is_none());
        let ticks = by_socket
            .then(|| Ticks::read(socket_timeout::tick_ns()?).ok())
            .flatten();
        Self {
            pid,
            timers,
            ticks,
            seen,
        }
    }

    /// Forgets what was seen of threads that have begun another call before they stopped.
    pub fn check(&mut self, tids: &[i32]) {
        for tid in tids {
            let now = Sched::read(&format!("/proc/{}/task/{tid}/sched", self.pid));
            if let Some(s) = self.seen.get(tid)
                && let (Some(before), Some(now)) = (s.sleeps, now)
                && now.sleeps > before + 1
            {
                self.seen.remove(tid);
            }
        }
    }

    /// The call that a thread in restart_syscall goes on with.
    pub fn call(&self, tid: i32) -> Option<u64> {
        self.seen.get(&tid).map(|s| s.nr)
    }

    /// When the time-out of its socket, of `whole` nanoseconds, ends a thread's call; `stopped` if nobody knows
    /// when that began.
    pub fn socket_end(&self, tid: i32, whole: i64, stopped: i64) -> i64 {
        let since = self.since(tid).unwrap_or(stopped);
        self.ticks
            .map_or(since.saturating_add(whole), |t| t.end(since, whole))
    }

    /// When the sleep of a thread began.
    pub fn since(&self, tid: i32) -> Option<i64> {
        self.seen.get(&tid)?.since
    }

    /// Deadlines of these threads, which were stopped in timed calls. `left` says for some when they end by
    /// what the kernel has said was left when they stopped, which was seen up to [`NOTICED_NS`] late.
    pub fn deadlines(
        &self,
        tids: &[i32],
        stopped: i64,
        left: &BTreeMap<i32, i64>,
    ) -> BTreeMap<i32, i64> {
        let mut found = BTreeMap::new();
        let mut timers = match (&self.timers, TimerList::read()) {
            (Some(before), Ok(after)) if !tids.is_empty() => before.vanished(&after),
            _ => Vec::new(),
        };
        let estimate = |tid: &i32| {
            left.get(tid).copied().or_else(|| {
                let s = self.seen.get(tid)?;
                Some(s.since?.saturating_add(s.timeout?))
            })
        };
        let sure =
            |tid: &i32| left.contains_key(tid) || self.seen.get(tid).is_some_and(|s| !s.restarted);
        timers.retain(|x| *x > stopped - CLOSE_NS);
        // Those whose estimate is good: closest first, but none later than a sleep that began now.
        let latest = |tid: &i32| {
            let timeout = self.seen.get(tid).and_then(|s| s.timeout);
            timeout.map_or(i64::MAX, |t| stopped.saturating_add(t))
        };
        let mut pairs: Vec<(i64, i32, i64)> = tids
            .iter()
            .filter(|t| sure(t))
            .filter_map(|t| Some((*t, estimate(t)?)))
            .flat_map(|(tid, e)| timers.iter().map(move |x| ((x - e).abs(), tid, *x)))
            .filter(|(distance, tid, x)| {
                // The scheduler's clock may have lost time during the sleep.
                let asleep = self.since(*tid).map_or(0, |s| stopped - s);
                let lost = if left.contains_key(tid) {
                    NOTICED_NS
                } else {
                    asleep / 10
                };
                *x <= latest(tid) && *distance < CLOSE_NS + lost
            })
            .collect();
        pairs.sort_unstable();
        for (_, tid, expires) in pairs {
            if !found.contains_key(&tid)
                && let Some(i) = timers.iter().position(|x| *x == expires)
            {
                timers.remove(i);
                found.insert(tid, expires);
            }
        }
        // The others are due before their estimates, in the same order.
        let mut others: Vec<(i64, i32)> = tids
            .iter()
            .filter(|t| !found.contains_key(t) && self.seen.contains_key(t))
            .map(|t| (estimate(t).unwrap_or(i64::MAX), *t))
            .collect();
        others.sort_unstable();
        for (latest, tid) in others.iter().rev() {
            let limit = latest.saturating_add(CLOSE_NS);
            if !sure(tid)
                && let Some(i) = timers.iter().rposition(|x| *x <= limit)
            {
                found.insert(*tid, timers.remove(i));
            }
        }
        for tid in tids {
            if !found.contains_key(tid)
                && let Some(e) = estimate(tid)
            {
                found.insert(*tid, e);
            }
        }
        found
    }
}

/// The system call a thread sleeps in, with its arguments (/proc/PID/syscall).
fn in_call(pid: i32, tid: i32) -> Option<(u64, Regs)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    parse(&text)
}

fn parse(text: &str) -> Option<(u64, Regs)> {
    let mut words = text.split_whitespace();
    let nr = words.next()?.parse().ok()?;
    let mut regs = Regs::default();
    for r in Regs::ARGS {
        let value = words.next()?.trim_start_matches("0x");
        regs.set(r, u64::from_str_radix(value, 16).ok()?);
    }
    Some((nr, regs))
}

/// Which call restart_syscall goes on with: the function it sleeps in tells.
fn restarting(pid: i32, tid: i32, r: &Regs) -> Option<u64> {
    let place = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan")).ok()?;
    guess(&place, r)
}

fn guess(place: &str, r: &Regs) -> Option<u64> {
    // clock_nanosleep has a small number first (negative for CPU clocks), nanosleep an address.
    let first = r.arg(0);
    let clock = first < 4096 || (first as i64) < 0 || first >> 32 == 0 && (first as i32) < 0;
    let nr = if place.contains("futex") {
        libc::SYS_futex
    } else if place.contains("poll") {
        libc::SYS_poll
    } else if place.contains("nanosleep") {
        if clock {
            libc::SYS_clock_nanosleep
        } else {
            libc::SYS_nanosleep
        }
    } else {
        return None;
    };
    Some(nr as u64)
}

/// Of /proc/PID/sched (kernel/sched/debug.c).
#[derive(Debug, Clone, Copy)]
struct Sched {
    /// The scheduler's time at which the task last began to run, which for one that sleeps is about
    /// when it went to sleep; nanoseconds.
    exec_start: i64,
    /// How often it has gone to sleep.
    sleeps: u64,
}

impl Sched {
    fn read(path: &str) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let value = |key: &str| {
            let line = text.lines().find(|l| l.starts_with(key))?;
            Some(line.split(':').nth(1)?.trim())
        };
        let (ms, fraction) = value("se.exec_start")?.split_once('.')?;
        Some(Self {
            exec_start: ms.parse::<i64>().ok()? * 1_000_000 + fraction.parse::<i64>().ok()?,
            sleeps: value("nr_voluntary_switches")?.parse().ok()?,
        })
    }
}

/// From the scheduler's clocks, one a CPU, to CLOCK_MONOTONIC.
#[derive(Default)]
struct Offsets(BTreeMap<usize, Option<i64>>);

impl Offsets {
    /// For the CPU on which a task last ran.
    fn of_task(&mut self, pid: i32, tid: i32) -> Option<i64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        // proc(5): field 39, counted behind the name, which ends with the last parenthesis.
        let behind = stat.rsplit_once(')')?.1;
        let cpu = behind.split_whitespace().nth(36)?.parse().ok()?;
        *self.0.entry(cpu).or_insert_with(|| offset_on(cpu))
    }
}

fn offset_on(cpu: usize) -> Option<i64> {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    let me = nix::unistd::Pid::from_raw(0);
    let ours = sched_getaffinity(me).ok()?;
    let mut only = CpuSet::new();
    only.set(cpu).ok()?;
    sched_setaffinity(me, &only).ok()?;
    let offset = (0..3)
        .filter_map(|_| {
            // Having slept we have just begun to run.
            std::thread::sleep(std::time::Duration::from_micros(1));
            let now = monotonic_ns();
            Some(now - Sched::read("/proc/thread-self/sched")?.exec_start)
        })
        .min();
    let _ = sched_setaffinity(me, &ours);
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(seen: &[(i32, bool, i64, i64)]) -> Watch {
        Watch {
            pid: 0,
            timers: None,
            ticks: None,
            seen: seen
                .iter()
                .map(|&(tid, restarted, since, timeout)| {
                    let s = Seen {
                        nr: 35,
                        restarted,
                        since: Some(since),
                        sleeps: None,
                        timeout: Some(timeout),
                    };
                    (tid, s)
                })
                .collect(),
        }
    }

    #[test]
    fn calls_are_read() {
        let (nr, r) = parse("230 0x1 0x0 0x7ffe 0x7fff 0x0 0x0 0x7ffe72 0x7f1b\n").unwrap();
        assert_eq!((nr, r.arg(0), r.arg(2)), (230, 1, 0x7ffe));
        assert!(parse("running\n").is_none());
        assert!(parse("-1 0x7ffe 0x7fff\n").is_none());
        assert_eq!(guess("hrtimer_nanosleep", &r), Some(230));
        let pointer = Regs {
            rdi: 0x7ffe_0000_1234,
            ..r
        };
        assert_eq!(guess("do_nanosleep", &pointer), Some(35));
    }

    #[test]
    fn without_timers_estimates_are_taken() {
        let w = watch(&[(1, false, 1000, 500)]);
        let all = w.deadlines(&[1, 2], 1200, &BTreeMap::new());
        assert_eq!(all, BTreeMap::from([(1, 1500)]));
        let left = BTreeMap::from([(1, 1277)]);
        assert_eq!(w.deadlines(&[1], 1200, &left)[&1], 1277);
    }
}
