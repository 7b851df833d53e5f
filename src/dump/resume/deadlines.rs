//! When a sleeping call was to time out.
//!
//! As root from the kernel itself ([`crate::kernel::kmem::threads`]): from the thread's restart block, once it was
//! stopped, where the kernel keeps the end there; else from the timer on its stack right before the stop, if the
//! thread's count of sleeps says that the stop ended this very sleep. Else, and without that right, by what is
//! never early: the time left that the kernel has written, counted from when we saw the stop; the beginning of the
//! sleep (the scheduler's, se.exec_start) plus the time-out; the whole time-out once more. The beginning is good to
//! some ten microseconds on hardware; a virtual machine's scheduler does not count the time its host took away, so
//! there the sleep ends late by what was taken while it lasted.

use std::collections::BTreeMap;

use crate::kernel::arch::{ERESTART_RESTARTBLOCK, NR_RESTART_SYSCALL, Regs};
use crate::kernel::calls::{self, Broken};
use crate::kernel::kmem::threads::{Look, Task, Threads};
use crate::kernel::mem::Mem;
use crate::kernel::proc_file;
use crate::kernel::socket_timeout;
use crate::kernel::time_ns::host_monotonic_ns;
use crate::kernel::timer_list::Ticks;

/// What threads were doing right before they were stopped.
#[derive(Debug, Default)]
pub struct Watch {
    pid: i32,
    kernel: Option<&'static Threads>,
    /// When some thread may be in a call that its socket's time-out ends.
    ticks: Option<Ticks>,
    seen: BTreeMap<i32, Seen>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The call, also when restart_syscall goes on with it.
    nr: u64,
    /// To be looked at right before it is stopped.
    task: Option<Task>,
    look: Option<Look>,
    /// When it was asked to stop: CLOCK_MONOTONIC. A call that was to be over by then was not the one that is broken off.
    asked: i64,
    /// Without the right to look: when it went to sleep, CLOCK_MONOTONIC.
    since: Option<i64>,
    /// And how often it had gone to sleep. The stop adds one; more say that this was an earlier call.
    sleeps: Option<u64>,
    /// Time-out in its arguments.
    timeout: Option<i64>,
}

/// How far an estimate may be late, nanoseconds. A call whose end lies no further ahead may be over, and what the stop
/// broke off a new one that had not gone to sleep yet.
const LATE: i64 = 20_000_000;

impl Seen {
    /// An end that was estimated, where it is surely that of the call which the stop broke off.
    fn lies_ahead(&self, end: i64) -> Option<i64> {
        (end > self.asked.saturating_add(LATE)).then_some(end)
    }
}

impl Watch {
    /// Looks at the threads of a process that still runs. Costs some microseconds a thread.
    pub fn before(pid: i32, tids: &[i32], mem: &Mem) -> Self {
        let mut watch = Self {
            pid,
            kernel: Threads::get(),
            ..Self::default()
        };
        let mut sockets = false;
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
            let socket = calls::socket_option(nr).is_some();
            sockets |= socket;
            if timeout.is_none()
                && !socket
                && !calls::shows_stop(nr)
                && calls::transfer(nr, &regs).is_none()
            {
                continue;
            }
            let mut s = Seen {
                nr,
                task: None,
                look: None,
                asked: 0,
                since: None,
                sleeps: None,
                timeout: timeout.and_then(|(t, _)| calls::argument(t, &regs, mem).ok()),
            };
            if let Some(kernel) = watch.kernel {
                s.task = kernel.find(tid).ok();
            } else if let Some(sched) = Sched::read(pid, tid) {
                // What goes on with an earlier call began before this sleep.
                s.since = (!restarted).then_some(sched.exec_start);
                s.sleeps = Some(sched.sleeps);
            }
            watch.seen.insert(tid, s);
        }
        let mut offsets = Offsets::default();
        for (tid, s) in &mut watch.seen {
            s.since = s
                .since
                .and_then(|at| Some(at + offsets.of_task(pid, *tid)?));
        }
        if sockets {
            watch.ticks = socket_timeout::tick_ns().and_then(|tick| Ticks::read(tick).ok());
        }
        watch
    }

    /// Whether a stop may show in the call that this thread is in: it is looked at, stopped and put right before
    /// another is stopped.
    pub fn is_fragile(&self, tid: i32) -> bool {
        self.seen.contains_key(&tid)
    }

    /// To be called right before a thread is stopped: what it sleeps for. False when it does not sleep, or not any more.
    pub fn last_look(&mut self, tid: i32) -> bool {
        let Some(s) = self.seen.get_mut(&tid) else {
            return false;
        };
        if let (Some(kernel), Some(task)) = (self.kernel, s.task) {
            s.look = kernel.look(task).ok();
            s.asked = host_monotonic_ns();
            return s.look.as_ref().is_some_and(|l| l.asleep);
        }
        let same = Sched::read(self.pid, tid).map(|now| now.sleeps) == s.sleeps;
        if !same {
            // By now it sleeps in another call.
            s.since = None;
        }
        s.asked = host_monotonic_ns();
        same
    }

    /// The call that a thread in restart_syscall goes on with.
    pub fn restarted(&self, tid: i32, program: &Regs, mem: &Mem) -> u64 {
        call_in_code(program, mem)
            .or_else(|| self.seen.get(&tid).map(|s| s.nr))
            .unwrap_or_else(|| call_by_arguments(program, mem))
    }

    /// When call `nr` of a thread that was stopped in it is to time out. `left` is the end by what the kernel has
    /// written as left.
    pub fn end(&self, tid: i32, nr: u64, program: &Regs, left: Option<i64>) -> Option<i64> {
        match calls::timeout(nr, program) {
            Some((_, Broken::RestartBlock)) => self.by_restart_block(tid, nr, program).or(left),
            _ => self.slept_until(tid, |l| l.until).or(left),
        }
        .or_else(|| {
            let s = self.last_sleep(tid, nr)?;
            s.lies_ahead(s.since?.saturating_add(s.timeout?))
        })
    }

    /// The tick that ends a thread's call by the time-out of its socket: when it is, and its number.
    pub fn tick(&self, tid: i32) -> Option<(i64, i64)> {
        let ticks = self.ticks?;
        let end = self.slept_until(tid, |l| Some(ticks.at(l.until_tick?)))?;
        Some((end, ticks.number_at(end)))
    }

    /// Since when a thread sleeps in a call that the time-out of its socket, of `whole` nanoseconds, is to end: to the
    /// tick, by what the kernel says.
    pub fn socket_begin(&self, tid: i32, whole: i64) -> Option<i64> {
        let ticks = self.ticks?;
        let end = self.slept_until(tid, |l| Some(ticks.at(l.asked_tick?)))?;
        Some(end - whole)
    }

    /// When that is likely to be where nothing is known of it, for a call `nr` and a time-out of `whole` nanoseconds.
    pub fn socket_end(&self, tid: i32, nr: u64, whole: i64) -> Option<i64> {
        let s = self.last_sleep(tid, nr)?;
        let since = s.since?;
        let end = self
            .ticks
            .map_or(since.saturating_add(whole), |t| t.end(since, whole));
        s.lies_ahead(end)
    }

    fn by_restart_block(&self, tid: i32, nr: u64, program: &Regs) -> Option<i64> {
        if program.rax as i64 != -ERESTART_RESTARTBLOCK {
            return None;
        }
        let kernel = self.kernel?;
        let known = self.seen.get(&tid).and_then(|s| s.task);
        let task = known.or_else(|| kernel.find(tid).ok())?;
        let look = kernel.look(task).ok()?;
        match nr as i64 {
            libc::SYS_futex => look.futex_until(program.arg(0)),
            libc::SYS_poll => look.poll_until(program.arg(0)),
            libc::SYS_nanosleep => look.sleep_until(program.arg(1)),
            libc::SYS_clock_nanosleep => look.sleep_until(program.arg(3)),
            _ => None,
        }
    }

    /// The end of the sleep that the stop broke off: CLOCK_MONOTONIC.
    fn slept_until(&self, tid: i32, end: impl Fn(&Look) -> Option<i64>) -> Option<i64> {
        let s = self.seen.get(&tid)?;
        let stopped = self.kernel?.look(s.task?).ok()?;
        let look = s.look.filter(|l| l.was_the_last_sleep(&stopped))?;
        end(&look).filter(|end| *end > s.asked)
    }

    /// What was seen of the sleep that the stop broke off, in call `nr`.
    fn last_sleep(&self, tid: i32, nr: u64) -> Option<&Seen> {
        let s = self.seen.get(&tid).filter(|s| s.nr == nr)?;
        let now = Sched::read(self.pid, tid)?;
        (now.sleeps <= s.sleeps? + 1).then_some(s)
    }
}

/// The system call a thread sleeps in, with its arguments (/proc/PID/syscall).
fn in_call(pid: i32, tid: i32) -> Option<(u64, Regs)> {
    let text = proc_file::text(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
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
    let place = proc_file::text(format!("/proc/{pid}/task/{tid}/wchan")).ok()?;
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

/// The call that a thread in restart_syscall made, where it stands in front of its `syscall`:
/// mov eax, nr.
fn call_in_code(r: &Regs, mem: &Mem) -> Option<u64> {
    let code = mem.read_vec(r.rip.checked_sub(7)?, 7).ok()?;
    match *code {
        [0xb8, a, b, c, d, 0x0f, 0x05] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => None,
    }
}

/// The call that a thread in restart_syscall made, by what its arguments look like.
fn call_by_arguments(r: &Regs, mem: &Mem) -> u64 {
    const SMALL: u64 = 4096;
    let is_address = |v: u64| v >= SMALL && (v as i64) > 0;
    // struct timespec, and no pointer or two ints.
    let is_time = |at: u64| {
        mem.read_u64(at).is_ok_and(|s| s < 1 << 31)
            && mem.read_u64(at + 8).is_ok_and(|n| n < 1_000_000_000)
    };
    let futex_flags = libc::FUTEX_PRIVATE_FLAG as u64 | libc::FUTEX_CLOCK_REALTIME as u64;
    let nr = if !is_address(r.arg(0)) || r.arg(0) >> 31 == 1 && r.arg(1) <= 1 {
        libc::SYS_clock_nanosleep
    } else if is_address(r.arg(1)) || r.arg(1) == 0 && is_time(r.arg(0)) {
        libc::SYS_nanosleep
    } else if r.arg(1) == 0
        || r.arg(1) & futex_flags != 0
            && r.arg(0).is_multiple_of(4)
            && (r.arg(3) == 0 || is_time(r.arg(3)))
    {
        libc::SYS_futex
    } else {
        libc::SYS_poll
    };
    nr as u64
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
    fn read(pid: i32, tid: i32) -> Option<Self> {
        Self::of(&format!("/proc/{pid}/task/{tid}/sched"))
    }

    fn of(path: &str) -> Option<Self> {
        let text = proc_file::text(path).ok()?;
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
        let stat = proc_file::text(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
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
            // In this order, for it may be taken anew at any moment: a difference too large makes calls late, not early.
            let began = Sched::of("/proc/thread-self/sched")?.exec_start;
            Some(host_monotonic_ns() - began)
        })
        .min();
    let _ = sched_setaffinity(me, &ours);
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
