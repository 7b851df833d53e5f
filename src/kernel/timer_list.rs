//! /proc/timer_list: the kernel's clocks (kernel/time/timer_list.c; root only).

use std::io;
use std::time::{Duration, Instant};

use super::proc_file;

/// The kernel's coarse clock (jiffies), by which sockets time out (kernel/time/timer.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticks {
    /// Nanoseconds from one to the next.
    tick: i64,
    /// CLOCK_MONOTONIC at one of them, and its number.
    at: i64,
    number: i64,
}

impl Ticks {
    /// # Errors
    /// EACCES without privilege; ENOENT where /proc has no such file; a text without ticks.
    pub fn read(tick: i64) -> io::Result<Self> {
        const TRIES: u32 = 8;
        for _ in 0..TRIES {
            let begun = Instant::now();
            let text = proc_file::text("/proc/timer_list")?;
            let took = begun.elapsed().as_nanos() as i64;
            if let Some(ticks) = Self::parse(&text, tick, took) {
                return Ok(ticks);
            }
            // Another read at once would come as close to the tick.
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// The text says what time it was when the reading began, which took so long, but counts the ticks as it goes on.
    /// None when it is not sure which of two numbers it is: shortly behind a tick, and where one came meanwhile.
    fn parse(text: &str, tick: i64, took: i64) -> Option<Self> {
        const UNSURE: i64 = 250_000;
        let number = |line: &str, prefix: &str| -> Option<i64> {
            let rest = line.trim().strip_prefix(prefix)?;
            let digits = rest
                .trim_start()
                .split(|c: char| !c.is_ascii_digit())
                .next()?;
            digits.parse().ok()
        };
        let now = text.lines().find_map(|l| number(l, "now at"))?;
        let jiffies = text.lines().filter_map(|l| number(l, "jiffies:")).max()?;
        let mut lines = text.lines();
        lines.find(|l| l.contains("tick_nohz_handler") || l.contains("tick_sched_timer"))?;
        let next = lines.find_map(|l| number(l, "# expires at"))?;
        let since = (now - next).checked_rem_euclid(tick)?;
        let at = now - since;
        (since >= UNSURE && since.saturating_add(took) < tick).then_some(Self {
            tick,
            at,
            number: jiffies,
        })
    }

    /// When a wait for `whole` nanoseconds that was begun at `since` ends: after whole ticks, and long ones with
    /// several at a time (calc_wheel_index).
    pub fn end(&self, since: i64, whole: i64) -> i64 {
        let begun = self.number_at(since);
        let ticks = whole.max(0) / self.tick + i64::from(whole % self.tick > 0);
        self.at(ended_by(begun, ticks))
    }

    /// The number of the last tick up to a moment: CLOCK_MONOTONIC.
    pub fn number_at(&self, at: i64) -> i64 {
        let ticks = at.saturating_sub(self.at).div_euclid(self.tick);
        self.number.saturating_add(ticks)
    }

    /// CLOCK_MONOTONIC at the tick with this number.
    pub fn at(&self, number: i64) -> i64 {
        let ticks = number.saturating_sub(self.number);
        self.at.saturating_add(ticks.saturating_mul(self.tick))
    }

    /// The time-out of a wait that begins now, or a little later where that is possible, and is to end at the tick with
    /// this `number`, which is in `left` nanoseconds. None when it has to begin behind the next tick, which is about to
    /// come: the wait then ends a tick later for every one that it begins later.
    pub fn wait(tick: i64, left: i64, number: i64) -> Option<i64> {
        /// From here to the beginning of the wait.
        const SOON: i64 = 300_000;
        let ticks = left.max(0) / tick + i64::from(left % tick > 0);
        let most = (ticks - 1).max(1);
        let level = level(most);
        if level == 0 {
            let late = ticks > 1 && (left - 1) % tick < SOON;
            return (!late).then_some(most * tick);
        }
        // Many end it there, and one in their middle does so when it begins later. One that is longer by the rounding of
        // the first wait would be rounded more coarsely than that.
        let middle = most - (1 << (3 * level - 1));
        let finer = (63 << (3 * (level - 1))) - 1;
        let now = number - ticks;
        let good = [middle, finer]
            .into_iter()
            .find(|n| ended_by(now, *n) == number);
        Some(good.unwrap_or(most) * tick)
    }
}

/// How coarse the kernel counts a wait for so many ticks: by 8 to the power of this (calc_wheel_index).
fn level(ticks: i64) -> u32 {
    const LEVELS: u32 = 8;
    (0..LEVELS)
        .find(|n| ticks < 63 << (3 * n))
        .unwrap_or(LEVELS)
}

/// The number of the tick that ends a wait for `ticks` which begins behind tick `begun`.
fn ended_by(begun: i64, ticks: i64) -> i64 {
    let shift = 3 * level(ticks);
    (((begun + ticks) >> shift) + 1) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_time_outs_end_at_ticks() {
        let text = "now at 1001500000 nsecs\n #0: <1>, tick_nohz_handler, S:01\n # expires at 1004000000-1004000000 nsecs\n\
            jiffies: 4003\n";
        let ticks = Ticks::parse(text, 4_000_000, 100_000).unwrap();
        assert_eq!((ticks.at, ticks.number), (1_000_000_000, 4003));
        // Ten ticks: to the one behind the tenth. 175: to the next multiple of eight.
        assert_eq!(ticks.end(1_001_000_000, 40_000_000), 1_044_000_000);
        let end = ticks.end(1_001_000_000, 700_000_000);
        assert_eq!(
            (end - ticks.at) / 4_000_000 + 4003,
            (4003 + 175) / 8 * 8 + 8
        );
        // What is left of it ends then too.
        let later = 1_201_000_000;
        let rest = Ticks::wait(4_000_000, end - later, ticks.number_at(end)).unwrap();
        // Also when it begins some ticks later.
        for late in [0, 4_000_000, 12_000_000] {
            assert_eq!(ticks.end(later + late, rest), end);
        }
        for (now, took) in [
            ("1001500000", 2_600_000),
            ("1003900000", 100_000),
            ("1000100000", 100_000),
        ] {
            let text = text.replace("1001500000", now);
            assert_eq!(Ticks::parse(&text, 4_000_000, took), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn a_wait_ends_at_its_tick(number in 0..1i64 << 40, ticks in 1..1i64 << 24, since in 1..4_000_000i64) {
            let tick = 4_000_000;
            let ticks_to = |now: i64| Ticks { tick, at: 0, number: now };
            // As a wait of the kernel's ends.
            let end = ended_by(number, ticks);
            let left = (end - number) * tick - since;
            match Ticks::wait(tick, left, end) {
                Some(rest) if end - number > 1 => proptest::prop_assert_eq!(ticks_to(number).end(since, rest), end * tick - number * tick),
                Some(_) => {}
                None => proptest::prop_assert!(tick - since <= 300_000),
            }
        }

        #[test]
        fn any_text_is_read(text in ".{0,300}") {
            let _ = Ticks::parse(&text, 4_000_000, 1000);
        }
    }
}
