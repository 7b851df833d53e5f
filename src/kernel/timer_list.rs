//! /proc/timer_list: every high-resolution timer of the machine (kernel/time/timer_list.c; root only).
//!
//! It names no owners. But the timer of a sleeping thread is there before the thread is stopped and
//! not while it stands, which tells to the nanosecond when the thread was to wake.

use std::collections::BTreeSet;
use std::io;

/// The timers of sleeping threads at one moment.
#[derive(Debug, Default, Clone)]
pub struct TimerList {
    /// Hashed address, and when it expires: CLOCK_MONOTONIC, nanoseconds.
    timers: BTreeSet<(u64, i64)>,
}

impl TimerList {
    /// # Errors
    /// EACCES without privilege; ENOENT where /proc has no such file.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/timer_list")?))
    }

    fn parse(text: &str) -> Self {
        let mut timers = BTreeSet::new();
        // Of the clock base: what to subtract for CLOCK_MONOTONIC.
        let mut offset = 0i64;
        let mut sleeper = None;
        for line in text.lines() {
            let line = line.trim();
            if let Some(value) = line.strip_prefix(".offset:") {
                let value = value.trim().trim_end_matches("nsecs").trim();
                // Printed as unsigned.
                offset = value
                    .parse::<u64>()
                    .map(|v| v as i64)
                    .or_else(|_| value.parse())
                    .unwrap_or(0);
            } else if let Some(value) = line.strip_prefix("# expires at ") {
                // SOFT-HARD nsecs [...]: from the first on it may fire.
                let soft = value.split('-').next().and_then(|v| v.parse::<i64>().ok());
                if let (Some(id), Some(soft)) = (sleeper.take(), soft) {
                    timers.insert((id, soft.wrapping_sub(offset)));
                }
            } else if line.starts_with('#') && line.contains("hrtimer_wakeup") {
                sleeper = line
                    .split_once('<')
                    .and_then(|(_, r)| r.split_once('>'))
                    .and_then(|(id, _)| u64::from_str_radix(id, 16).ok());
            }
        }
        Self { timers }
    }

    /// When those expire that were here and are no more in `later`, in order.
    pub fn vanished(&self, later: &Self) -> Vec<i64> {
        let mut all: Vec<i64> = self
            .timers
            .difference(&later.timers)
            .map(|(_, expires)| *expires)
            .collect();
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "now at 5 nsecs\n\ncpu: 0\n clock 0:\n  .index:      0\n  .offset:     0 nsecs\n\
        active timers:\n #0: <00000000fd047d08>, hrtimer_wakeup, S:01\n \
        # expires at 3626276752502-3626276802502 nsecs [in 308713 to 358713 nsecs]\n \
        #1: <00000000000000aa>, it_real_fn, S:01\n # expires at 7-7 nsecs [in 1 to 1 nsecs]\n \
        clock 1:\n  .offset:     1000 nsecs\nactive timers:\n \
        #0: <00000000000000bb>, hrtimer_wakeup, S:01\n # expires at 1500-1600 nsecs [in 1 to 1 nsecs]\n";

    #[test]
    fn sleepers_are_told_from_other_timers() {
        let all = TimerList::parse(TEXT);
        let none = TimerList::default();
        assert_eq!(all.vanished(&none), [500, 3626276752502]);
        assert_eq!(all.vanished(&all.clone()), [0i64; 0]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read(text in ".{0,300}") {
            let _ = TimerList::parse(&text);
        }
    }
}
