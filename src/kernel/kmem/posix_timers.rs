//! What timer_gettime(2) does not tell: whether a timer was set to a time of day (TIMER_ABSTIME) or for a while.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::KernelMemory;
use super::threads::Threads;

/// More timers than a process has.
const MOST: usize = 1 << 20;

/// The timers of a process that go by CLOCK_REALTIME itself, by their ids: when each is due, in nanoseconds. Those that were
/// set for a while go by CLOCK_MONOTONIC inside the kernel, for nobody's setting of the clock may change them
/// (kernel/time/hrtimer.c).
///
/// # Errors
/// When kernel memory cannot be read, or the kernel keeps this otherwise.
pub fn by_time_of_day(kernel: &KernelMemory, tid: i32) -> Result<BTreeMap<i32, i64>> {
    let threads = Threads::get().context("kernel memory cannot be read")?;
    let signal = kernel.pointer(threads.find(tid)?.0, "task_struct", "signal")?;
    let link = kernel.field(0, "k_itimer", "list")?;
    let mut at = kernel.pointer(signal, "signal_struct", "posix_timers")?;
    let (mut found, mut seen) = (BTreeMap::new(), 0);
    while at != 0 {
        let timer = at.wrapping_sub(link);
        // A union, which begins with the struct hrtimer of what is no CPU clock.
        let hrtimer = kernel.field(timer, "k_itimer", "it")?;
        let clock = kernel.u32(kernel.field(timer, "k_itimer", "it_clock")?)? as i32;
        if clock == libc::CLOCK_REALTIME {
            let base = kernel.pointer(hrtimer, "hrtimer", "base")?;
            let by = kernel.u32(kernel.field(base, "hrtimer_clock_base", "clockid")?)? as i32;
            if by == libc::CLOCK_REALTIME {
                let id = kernel.u32(kernel.field(timer, "k_itimer", "it_id")?)?;
                let due = kernel.u64(kernel.field(hrtimer, "hrtimer", "_softexpires")?)?;
                found.insert(id as i32, due as i64);
            }
        }
        // struct hlist_node begins with the next one.
        at = kernel.u64(at)?;
        seen += 1;
        if seen > MOST {
            bail!("the kernel's list of timers of thread {tid} does not end");
        }
    }
    Ok(found)
}
