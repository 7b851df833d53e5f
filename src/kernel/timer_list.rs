//! /proc/timer_list: the kernel's clocks (kernel/time/timer_list.c; root only).

use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::proc_file;
use super::time_ns::host_monotonic_ns;

/// The kernel's coarse clock (jiffies), by which sockets time out (kernel/time/timer.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticks {
    /// Nanoseconds from one to the next.
    tick: i64,
    /// CLOCK_MONOTONIC at one of them, and its number.
    at: i64,
    number: i64,
}

/// Behind a tick so long, nanoseconds, its number may not have been counted yet.
const UNSURE: i64 = 250_000;

impl Ticks {
    /// # Errors
    /// EACCES without privilege; ENOENT where /proc has no such file; a text without ticks; clocks that do not agree.
    pub fn read(tick: i64) -> io::Result<Self> {
        // Each number is then counted 2.5 times at the usual 250 a second, and one time in ten at 1000.
        const LOOKS: u32 = 24;
        const TRIES: u32 = 3;
        for _ in 0..TRIES {
            let text = proc_file::text("/proc/timer_list")?;
            let read = host_monotonic_ns();
            let Some((at, mut number)) = Self::parse(&text, tick, read) else {
                break;
            };
            for _ in 0..LOOKS {
                if number.start() == number.end() {
                    let number = *number.start();
                    return Ok(Self { tick, at, number });
                }
                // Where none is left, one was counted late.
                if number.is_empty() {
                    break;
                }
                let since = |now: i64| (now - at).rem_euclid(tick);
                let now = since(host_monotonic_ns());
                let next = if now < UNSURE { 0 } else { tick };
                std::thread::sleep(Duration::from_nanos((next + UNSURE - now) as u64));
                let (begun, counted, done) = (
                    host_monotonic_ns(),
                    ticks_in_hundredths(),
                    host_monotonic_ns(),
                );
                if since(begun) >= UNSURE && since(begun) + (done - begun) < tick {
                    number = both(
                        number,
                        numbers(counted, tick),
                        (begun - at).div_euclid(tick),
                    );
                }
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// When the last tick came before the text, and which number it may have: the text says what time it was when the
    /// reading began, but counts the ticks as it goes on, until `read`. With hundreds of timers that takes several.
    fn parse(text: &str, tick: i64, read: i64) -> Option<(i64, RangeInclusive<i64>)> {
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
        let since = now.checked_sub(next)?.checked_rem_euclid(tick)?;
        let at = now - since;
        let passed = read.checked_sub(at)?.checked_div_euclid(tick)?;
        // Shortly behind a tick it may be that of the one before.
        let late = i64::from(since < UNSURE);
        Some((
            at,
            jiffies.checked_sub(passed)?..=jiffies.checked_add(late)?,
        ))
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

/// What times(2) returns.
fn ticks_in_hundredths() -> i64 {
    let mut used = libc::tms {
        tms_utime: 0,
        tms_stime: 0,
        tms_cutime: 0,
        tms_cstime: 0,
    };
    // SAFETY: it fills the struct, which outlives the call.
    unsafe { libc::times(&raw mut used) }
}

/// The numbers of ticks for which times(2) says this: it counts them in hundredths of a second, rounded down
/// (jiffies_64_to_clock_t in kernel/time/time.c).
fn numbers(counted: i64, tick: i64) -> RangeInclusive<i64> {
    const HUNDREDTH: i64 = 10_000_000;
    let first = |counted: i64| {
        let ns = i128::from(counted) * i128::from(HUNDREDTH);
        (ns + i128::from(tick) - 1).div_euclid(i128::from(tick)) as i64
    };
    first(counted)..=first(counted + 1) - 1
}

/// What a number may be by what was known of it, and by what a tick that came `later` ones after it may have.
fn both(known: RangeInclusive<i64>, seen: RangeInclusive<i64>, later: i64) -> RangeInclusive<i64> {
    let first = *known.start().max(&(seen.start() - later));
    first..=*known.end().min(&(seen.end() - later))
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
        let parse = |text: &str, read| Ticks::parse(text, 4_000_000, read);
        let (at, number) = parse(text, 1_001_600_000).unwrap();
        assert_eq!((at, number), (1_000_000_000, 4003..=4003));
        let ticks = Ticks {
            tick: 4_000_000,
            at,
            number: 4003,
        };
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
        // It was counted at some time of the reading; or before the tick that had just come.
        assert_eq!(parse(text, 1_009_000_000), Some((at, 4001..=4003)));
        let text = text.replace("1001500000", "1000100000");
        assert_eq!(parse(&text, 1_001_600_000), Some((at, 4003..=4004)));
    }

    #[test]
    fn what_times_says_leaves_one_number() {
        for tick in [1_000_000, 3_333_333, 4_000_000, 10_000_000] {
            for number in 4_298_134_000..4_298_134_020 {
                let says = |number: i64| number * tick / 10_000_000;
                let mut known = number - 3..=number + 3;
                for later in 0..24 {
                    let seen = numbers(says(number + later), tick);
                    assert!(seen.contains(&(number + later)));
                    known = both(known, seen, later);
                }
                assert_eq!(known, number..=number);
            }
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
            let _ = Ticks::parse(&format!("now at {text}\njiffies: {text}\ntick_nohz_handler\n# expires at {text}"), 4_000_000, 1000);
        }
    }
}
