//! eventfd, signalfd, timerfd, and pidfds of processes that are gone.

use std::os::fd::{BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Builder;
use crate::image::files::TimerFd;
use crate::kernel::fds;

pub(super) fn event(count: u64, semaphore: bool) -> Result<OwnedFd> {
    let mut flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    if semaphore {
        flags |= EfdFlags::EFD_SEMAPHORE;
    }
    let event = EventFd::from_flags(flags).context("eventfd")?;
    if count > 0 {
        event.write(count).context("eventfd write")?;
    }
    Ok(event.into())
}

pub(super) fn signal(mask: u64) -> Result<OwnedFd> {
    fds::signalfd(mask).context("signalfd")
}

/// How a timerfd is started.
#[derive(Debug, Clone)]
pub(super) struct Arm {
    flags: i32,
    value_ns: i64,
    interval_ns: i64,
    ticks: u64,
}

impl Arm {
    pub(super) fn start(&self, fd: BorrowedFd<'_>) -> Result<()> {
        // One that has expired and was not read is started again by the read (fs/timerfd.c): nothing is
        // left of it, and a value of 0 would stop it for good.
        let (flags, value_ns) = match self.value_ns {
            0 => (0, self.interval_ns),
            value => (self.flags, value),
        };
        if value_ns != 0 {
            fds::timerfd_settime(fd, flags, value_ns, self.interval_ns)
                .context("timerfd_settime")?;
        }
        if self.ticks > 0 {
            // Arming clears them, so they come after it.
            match fds::timerfd_set_ticks(fd, self.ticks) {
                // A kernel without CONFIG_CHECKPOINT_RESTORE: the program gets its expiry, not their number.
                Err(nix::errno::Errno::ENOTTY) => {
                    fds::timerfd_settime(fd, 0, 1, self.interval_ns).context("timerfd_settime")?;
                }
                other => other.context("TFD_IOC_SET_TICKS")?,
            }
        }
        Ok(())
    }
}

impl Builder<'_> {
    /// A timer, not yet running, and what starts it.
    pub(super) fn timer(&self, timer: &TimerFd) -> Result<(OwnedFd, Option<Arm>)> {
        if timer.left_ns < 0 || timer.interval_ns < 0 {
            bail!("a timer with a negative time");
        }
        let fd = fds::timerfd(timer.clock).with_context(|| {
            format!(
                "timerfd_create of clock {} (alarm clocks need CAP_WAKE_ALARM)",
                timer.clock
            )
        })?;
        if timer.left_ns == 0 && timer.ticks == 0 {
            return Ok((fd, None));
        }
        // An absolute deadline stays what it is where the clock can be compared; else what was left counts.
        let origin = &self.manifest.origin;
        let then = match timer.clock {
            libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => Some(origin.realtime_ns),
            libc::CLOCK_MONOTONIC if self.surroundings.same_clocks => Some(origin.monotonic_ns),
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM if self.surroundings.same_clocks => {
                Some(origin.boottime_ns)
            }
            _ => None,
        };
        let absolute = timer.settime_flags & libc::TFD_TIMER_ABSTIME != 0;
        let deadline = then
            .filter(|_| absolute && timer.left_ns > 0)
            .and_then(|t| i64::try_from(t.saturating_add(timer.left_ns.into())).ok())
            .filter(|&t| t > 0);
        let arm = match deadline {
            Some(deadline) => Arm {
                flags: timer.settime_flags,
                value_ns: deadline,
                interval_ns: timer.interval_ns,
                ticks: timer.ticks,
            },
            None => Arm {
                flags: 0,
                value_ns: timer.left_ns,
                interval_ns: timer.interval_ns,
                ticks: timer.ticks,
            },
        };
        Ok((fd, Some(arm)))
    }
}
