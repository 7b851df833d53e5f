//! Time namespaces (time_namespaces(7)): processes that go on seeing the clocks of another boot or host.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};

use super::proc_file;

/// How far CLOCK_MONOTONIC and CLOCK_BOOTTIME of a namespace are ahead of the host's, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offsets {
    pub monotonic: i128,
    pub boottime: i128,
}

/// How far our CLOCK_MONOTONIC is ahead of the host's, once that is known.
static AHEAD: AtomicI64 = AtomicI64::new(UNKNOWN);
const UNKNOWN: i64 = i64::MIN;

const CLONE_NEWTIME: i32 = 0x80;
const SECOND: i128 = 1_000_000_000;

impl Offsets {
    /// Those of a process ("self" is us); none on a kernel without time namespaces.
    pub fn of(who: &str) -> Self {
        proc_file::text(format!("/proc/{who}/timens_offsets"))
            .map(|text| Self::parse(&text))
            .unwrap_or_default()
    }

    /// Ours, as they are when that is asked first.
    pub fn ours() -> Self {
        static OURS: OnceLock<Offsets> = OnceLock::new();
        *OURS.get_or_init(|| Self::of("self"))
    }

    fn parse(text: &str) -> Self {
        let mut me = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(clock), Some(s), Some(ns)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let (Ok(s), Ok(ns)) = (s.parse::<i64>(), ns.parse::<i64>()) else {
                continue;
            };
            let total = i128::from(s) * SECOND + i128::from(ns);
            match clock {
                "monotonic" => me.monotonic = total,
                "boottime" => me.boottime = total,
                _ => {}
            }
        }
        me
    }

    /// From now on our children have these offsets, whatever ours are. Once only, and not for us.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN and CAP_SYS_TIME.
    pub fn for_children(self) -> Result<()> {
        // What /proc says from now on is about them.
        ahead();
        unshare(CloneFlags::from_bits_retain(CLONE_NEWTIME)).context("making a time namespace")?;
        let line = |clock: &str, ns: i128| {
            format!(
                "{clock} {} {}\n",
                ns.div_euclid(SECOND),
                ns.rem_euclid(SECOND)
            )
        };
        let text = line("monotonic", self.monotonic) + &line("boottime", self.boottime);
        std::fs::write("/proc/self/timens_offsets", text)
            .context("setting the clocks of a time namespace (/proc/self/timens_offsets)")
    }
}

/// Joins the time namespace of our children. What was computed from the clocks before is void.
///
/// # Errors
/// Needs CAP_SYS_ADMIN, and a single thread.
pub fn join() -> Result<()> {
    let path = "/proc/self/ns/time_for_children";
    let file = std::fs::File::open(path).with_context(|| format!("opening {path}"))?;
    setns(file, CloneFlags::from_bits_retain(CLONE_NEWTIME)).context("joining a time namespace")?;
    moved();
    Ok(())
}

/// We are in another time namespace than we were, or than our parent is.
pub fn moved() {
    AHEAD.store(UNKNOWN, Ordering::Relaxed);
}

fn ahead() -> i64 {
    let known = AHEAD.load(Ordering::Relaxed);
    if known != UNKNOWN {
        return known;
    }
    let ahead = i64::try_from(Offsets::of("self").monotonic).unwrap_or(0);
    AHEAD.store(ahead, Ordering::Relaxed);
    ahead
}

/// CLOCK_MONOTONIC of the host, nanoseconds: what the kernel counts time-outs by, in whichever time namespace we are.
pub fn host_monotonic_ns() -> i64 {
    // First, for it may take a while: the moment is that of the return.
    let ahead = ahead();
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
        let ours = t.tv_sec() * SECOND as i64 + t.tv_nsec();
        ours.saturating_sub(ahead)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read() {
        let o = Offsets::parse("monotonic          -5 500000000\nboottime   7 0\n");
        assert_eq!(o.monotonic, -4_500_000_000);
        assert_eq!(o.boottime, 7_000_000_000);
        assert_eq!(Offsets::parse("nonsense"), Offsets::default());
    }
}
