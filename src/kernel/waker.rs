//! A process that ends calls in time.
//!
//! How long a call on a socket sleeps is counted by a clock that is the coarser the longer the time is
//! (calc_wheel_index in kernel/time/timer.c), so what is left of a time-out cannot be said exactly: a call that goes
//! on with a part of it ends up to some hundredths of a second late, and one of hours later still. And of many calls with
//! a time-out of their own not each can be given the rest of it: there is no room for what follows. So a process stays
//! behind that stops the thread when its time is up, lets the call return what a time-out returns, and is gone when
//! no call is left. Without it they end by the time-out that the kernel knows of, late.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, chdir, fork, setsid};

use super::apart::Postponed;
use super::arch::{ERESTARTNOHAND, Regs, trampoline};
use super::calls::TimeIsUp;
use super::sched::Urgent;
use super::time_ns::{self, host_monotonic_ns};
use super::tracee::{Stop, Tracee};
use super::{calls, fds, guardian, pidfd, proc_file};

/// Name of the process (/proc/PID/comm).
pub const NAME: &std::ffi::CStr = c"mist-waker";
/// How often it looks which of the calls are over.
const LOOK_EVERY: i64 = 1_000_000_000;
/// And at how many before it sees whose time is up.
const LOOKS_AT_ONCE: usize = 16;
/// How soon it tries again to stop a thread that somebody else holds, at first.
const TRY_AGAIN: i64 = 500_000;
/// A stop takes some ten microseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// A call and its end.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    pub tid: i32,
    pub nr: u64,
    /// Behind its `syscall` instruction, which is a place that only this call comes by.
    pub rip: u64,
    /// When it ends: [`host_monotonic_ns`].
    pub end: i64,
    pub how: TimeIsUp,
}

/// Starts it, where there is anything to do. It needs nobody and nobody needs to wait for it.
///
/// # Errors
/// No process can be made.
pub fn start(due: &[Due]) -> Result<()> {
    if due.is_empty() {
        return Ok(());
    }
    // SAFETY: the child forks again and leaves; that one runs `serve` only, which allocates (glibc makes malloc usable
    // after fork) but takes no lock that another thread of ours may hold.
    match unsafe { fork() }.context(super::ONE_MORE)? {
        ForkResult::Child => {
            // SAFETY: as above.
            if matches!(unsafe { fork() }, Ok(ForkResult::Child)) {
                serve(due);
            }
            // SAFETY: ends this process without running our parent's destructors.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            let _ = waitpid(child, None);
            Ok(())
        }
    }
}

/// A call that is waited for.
struct Watched {
    due: Due,
    /// When to try next.
    at: i64,
    /// When to look whether it is over.
    look_at: i64,
    /// How often it had slept when it was first seen in the call, where more of it tells that its time begins anew.
    slept: Option<Vec<u8>>,
    /// To be told when it ends; there may be more threads than descriptors.
    thread: Option<OwnedFd>,
}

fn serve(due: &[Due]) {
    fds::close_all_but(&[]);
    let _ = (setsid(), chdir("/"));
    guardian::rename(NAME);
    let _ = SigSet::empty().thread_set_mask();
    time_ns::moved();
    let (descriptors, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let mut all: Vec<Watched> = due
        .iter()
        .zip(0..)
        .map(|(due, i)| Watched {
            due: *due,
            at: due.end,
            look_at: 0,
            slept: None,
            thread: match i < descriptors / 2 {
                true => pidfd::open_thread(due.tid).ok(),
                false => None,
            },
        })
        .collect();
    // Others' work would make us late.
    let _urgent = Urgent::new();
    loop {
        let mut looks = LOOKS_AT_ONCE;
        all.retain_mut(|w| {
            let now = host_monotonic_ns();
            if w.at > now {
                if w.look_at > now || looks == 0 {
                    return true;
                }
                looks -= 1;
            }
            w.look_at = now + LOOK_EVERY;
            let place = place(&w.due);
            if matches!(place, Place::InCall) && w.due.how.restarts {
                let slept = slept(w.due.tid);
                if *w.slept.get_or_insert_with(|| slept.clone()) != slept {
                    return false;
                }
            }
            let left = match place {
                Place::Elsewhere => false,
                Place::InCall if w.at <= now => end(&w.due),
                Place::InCall | Place::Unknown => true,
            };
            // The longer it has been held the less it matters when exactly it is let go.
            w.at = w.due.end.max(now + (now - w.due.end) / 8 + TRY_AGAIN);
            left
        });
        let Some(next) = all.iter().map(|w| w.at.min(w.look_at)).min() else {
            return;
        };
        let wait = (next - host_monotonic_ns()).clamp(0, LOOK_EVERY);
        let (known, mut ended): (Vec<usize>, Vec<PollFd>) = all
            .iter()
            .enumerate()
            .filter_map(|(i, w)| {
                Some((
                    i,
                    PollFd::new(w.thread.as_ref()?.as_fd(), PollFlags::POLLIN),
                ))
            })
            .unzip();
        let _ = ppoll(
            &mut ended,
            Some(TimeSpec::from_duration(Duration::from_nanos(wait as u64))),
            None,
        );
        let over = known.into_iter().zip(ended);
        let over = over.filter_map(|(i, p)| (p.any() == Some(true)).then_some(i));
        for i in over.collect::<Vec<_>>().into_iter().rev() {
            all.swap_remove(i);
        }
    }
}

enum Place {
    InCall,
    Elsewhere,
    /// It runs, or is stopped: where, is not told.
    Unknown,
}

/// Where a thread is (/proc/PID/syscall).
fn place(due: &Due) -> Place {
    let Ok(text) = proc_file::text(format!("/proc/{0}/task/{0}/syscall", due.tid)) else {
        return Place::Elsewhere;
    };
    let mut words = text.split_whitespace();
    let nr = words.next().and_then(|w| w.parse::<i64>().ok());
    let rip = words.next_back().map(|w| w.trim_start_matches("0x"));
    let rip = rip.and_then(|w| u64::from_str_radix(w, 16).ok());
    match (nr, rip) {
        (Some(nr), Some(rip)) if nr == due.nr as i64 && rip == due.rip => Place::InCall,
        // A dump makes it call something else meanwhile.
        (Some(nr), _) if nr >= 0 && !is_traced(due.tid) => Place::Elsewhere,
        _ => Place::Unknown,
    }
}

fn is_traced(tid: i32) -> bool {
    let status = proc_file::read(format!("/proc/{tid}/status")).unwrap_or_default();
    let mut lines = status.split(|b| *b == b'\n');
    lines.any(|l| {
        l.strip_prefix(b"TracerPid:\t")
            .is_some_and(|pid| pid != b"0")
    })
}

/// The line of /proc/PID/status that counts how often a thread has gone to sleep.
fn slept(tid: i32) -> Vec<u8> {
    let status = proc_file::read(format!("/proc/{tid}/status")).unwrap_or_default();
    let mut lines = status.split(|b| *b == b'\n');
    let line = lines.find(|l| l.starts_with(b"voluntary_ctxt_switches:"));
    line.unwrap_or_default().to_vec()
}

/// Ends a call whose time is up. Whether it is to be tried again.
fn end(due: &Due) -> bool {
    let _postponed = Postponed::new();
    let tracee = match Tracee::seize(due.tid, 0) {
        Ok(t) => t,
        // Somebody traces it, for instance for a dump.
        Err(e) => return e.raw_os_error() == Some(libc::EPERM),
    };
    let again = stop(tracee, due).unwrap_or(false);
    // It fails where the thread has ended.
    let _ = tracee.detach(0);
    again
}

fn stop(tracee: Tracee, due: &Due) -> Result<bool> {
    tracee.interrupt()?;
    loop {
        match tracee.wait_timeout(PATIENCE)? {
            // Stopped by a signal, as the call shows.
            Some(Stop::Interrupt { signal }) if signal != libc::SIGTRAP => return Ok(false),
            Some(Stop::Interrupt { .. }) => break,
            Some(Stop::Exited(_) | Stop::Killed(_)) | None => return Ok(false),
            Some(Stop::Signal(s)) => tracee.cont(s)?,
            Some(Stop::Syscall | Stop::Event(_)) => tracee.cont(0)?,
        }
    }
    let mut regs = tracee.regs()?;
    if let Some(out) = timed_out(&regs, due) {
        regs = out;
    } else if -(regs.rax as i64) == i64::from(libc::EINTR)
        && let Some(nr) = regs.syscall()
        && (calls::shows_stop(nr) || calls::socket_option(nr).is_some())
    {
        // In this moment it has gone on to another call, which our stop must not end.
        regs.rax = -ERESTARTNOHAND as u64;
    } else {
        return Ok(false);
    }
    tracee.set_regs(&regs)?;
    Ok(false)
}

/// Registers behind the call, for a thread that was stopped in it. By now it may be in the next, for which a dump since
/// has used the same place: then that is to end later.
fn timed_out(regs: &Regs, due: &Due) -> Option<Regs> {
    const SYSCALL_LEN: u64 = 2;
    let broken = regs.rip == due.rip && regs.syscall() == Some(due.nr) && calls::is_broken(regs);
    let before = regs.rip == due.rip - SYSCALL_LEN && Regs::called(regs.rax) == Some(due.nr);
    let noted = if broken { regs.orig_rax } else { regs.rax };
    let next = trampoline::noted_later(noted, due.end, host_monotonic_ns());
    ((broken || before) && !next).then_some(Regs {
        rip: due.rip,
        rax: due.how.result as u64,
        orig_rax: u64::MAX,
        ..*regs
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_call_itself_is_ended() {
        let due = Due {
            tid: 1,
            nr: 45,
            rip: 0x1002,
            end: 0,
            how: TimeIsUp {
                result: -11,
                restarts: false,
            },
        };
        let broken = Regs {
            rip: 0x1002,
            rax: -i64::from(libc::EINTR) as u64,
            orig_rax: 45,
            rdi: 7,
            ..Regs::default()
        };
        let out = timed_out(&broken, &due).unwrap();
        assert_eq!((out.rip, out.rax as i64, out.rdi), (0x1002, -11, 7));
        assert_eq!(out.syscall(), None);
        let with = |rip, rax: i64, orig_rax| Regs {
            rip,
            rax: rax as u64,
            orig_rax,
            ..broken
        };
        // It has its result, or has not begun; it is another one.
        assert!(timed_out(&with(0x1002, 12, 45), &due).is_none());
        assert!(timed_out(&with(0x1000, 45, u64::MAX), &due).is_some());
        assert!(timed_out(&with(0x2002, -4, 45), &due).is_none());
        assert!(timed_out(&with(0x1002, -4, 7), &due).is_none());
    }

    #[test]
    fn the_next_call_in_the_same_place_is_left_alone() {
        let now = host_monotonic_ns();
        let due = |end| Due {
            tid: 1,
            nr: 232,
            rip: 0x1002,
            end,
            how: calls::own_time_is_up(232),
        };
        for ahead in [0, 900_000_000, 60_000_000_000] {
            let noted = trampoline::note(232, now + ahead, now);
            let broken = Regs {
                rip: 0x1002,
                rax: -i64::from(libc::EINTR) as u64,
                orig_rax: noted,
                ..Regs::default()
            };
            let before = Regs {
                rip: 0x1000,
                rax: noted,
                orig_rax: u64::MAX,
                ..broken
            };
            for regs in [broken, before] {
                assert!(timed_out(&regs, &due(now + ahead)).is_some(), "{ahead}");
                let earlier = due(now + ahead - 10_000_000);
                assert!(timed_out(&regs, &earlier).is_none(), "{ahead}");
            }
        }
    }
}
