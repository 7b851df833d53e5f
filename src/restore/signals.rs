//! Signal dispositions, queued signals and timers.

use anyhow::Result;

use crate::image::process::Process;
use crate::image::signals::{PendingSignal, PosixTimer};
use crate::kernel::remote::{Arg, Remote};

const SIGNALS: i32 = 64;

/// Dispositions of the whole process; what the image does not name is the default, whatever we have.
pub fn actions(body: &mut Remote, p: &Process) -> Result<()> {
    for signal in 1..=SIGNALS {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        let a = p
            .sigactions
            .iter()
            .find(|a| a.signal == signal)
            .copied()
            .unwrap_or_default();
        let bytes: Vec<u8> = [a.handler, a.flags, a.restorer, a.mask]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        body.must(
            format!("disposition of signal {signal}"),
            libc::SYS_rt_sigaction,
            &[signal.into(), Arg::In(&bytes), 0u64.into(), 8u64.into()],
        )?;
    }
    Ok(())
}

/// Queues signals again; all are blocked until the program runs. `tid`: for this thread alone.
pub fn pending(body: &mut Remote, signals: &[PendingSignal], tid: Option<i32>) -> Result<()> {
    for s in signals {
        let signal = s
            .info
            .get(..4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, i32::from_le_bytes);
        let pid = body.pid_inside();
        let what = format!("queueing signal {signal}");
        let info = Arg::In(&s.info);
        match tid {
            Some(tid) => body.may(
                what,
                libc::SYS_rt_tgsigqueueinfo,
                &[pid.into(), tid.into(), signal.into(), info],
            )?,
            None => body.may(
                what,
                libc::SYS_rt_sigqueueinfo,
                &[pid.into(), signal.into(), info],
            )?,
        }
    }
    Ok(())
}

fn timespec(ns: i64) -> [u8; 16] {
    let mut b = [0; 16];
    b[..8].copy_from_slice(&(ns / 1_000_000_000).to_le_bytes());
    b[8..].copy_from_slice(&(ns % 1_000_000_000).to_le_bytes());
    b
}

/// When a timer that was set to a time of day is due, as seen at `then`: what has been before has sent its signal.
fn due(t: &PosixTimer, then: i128) -> Option<i64> {
    let due = i128::from(t.due_ns.filter(|due| *due > 0)?);
    let interval = i128::from(t.interval_ns.max(1));
    let passed = match then - due {
        early if early < 0 => 0,
        late => late / interval + 1,
    };
    i64::try_from(due + passed * interval).ok()
}

/// Makes POSIX timers with their ids and starts all timers; the last thing before the program runs.
/// `then` was the time of day when the image was made; `tid_of` gives the present id of a thread of the image.
pub fn timers(
    body: &mut Remote,
    p: &Process,
    then: i128,
    tid_of: &dyn Fn(i32) -> i32,
) -> Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
    const TIMER_ABSTIME: u64 = 1;
    if !p.posix_timers.is_empty() {
        body.must(
            "choosing the ids of timers (Linux 6.16)",
            libc::SYS_prctl,
            &[
                PR_TIMER_CREATE_RESTORE_IDS.into(),
                1u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    for t in &p.posix_timers {
        // struct sigevent: value, signo, notify, tid.
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&t.value.to_le_bytes());
        event[8..12].copy_from_slice(&t.signal.to_le_bytes());
        event[12..16].copy_from_slice(&t.notify.to_le_bytes());
        event[16..20].copy_from_slice(&tid_of(t.tid).to_le_bytes());
        let id = t.id.to_le_bytes();
        body.must(
            format!("making timer {}", t.id),
            libc::SYS_timer_create,
            &[t.clock.into(), Arg::In(&event), Arg::In(&id)],
        )?;
    }
    if !p.posix_timers.is_empty() {
        body.must(
            "choosing no more ids of timers",
            libc::SYS_prctl,
            &[
                PR_TIMER_CREATE_RESTORE_IDS.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    for t in p.posix_timers.iter().filter(|t| t.left_ns != 0) {
        let (flags, value) = match due(t, then) {
            Some(due) => (TIMER_ABSTIME, due),
            None => (0, t.left_ns),
        };
        let spec = [timespec(t.interval_ns), timespec(value)].concat();
        body.must(
            format!("starting timer {}", t.id),
            libc::SYS_timer_settime,
            &[t.id.into(), flags.into(), Arg::In(&spec), 0u64.into()],
        )?;
    }
    for t in &p.itimers {
        let left_us = if t.left_us != 0 {
            t.left_us
        } else {
            t.interval_us
        };
        let spec: Vec<u8> = [
            t.interval_us / 1_000_000,
            t.interval_us % 1_000_000,
            left_us / 1_000_000,
            left_us % 1_000_000,
        ]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
        body.must(
            format!("starting interval timer {}", t.which),
            libc::SYS_setitimer,
            &[t.which.into(), Arg::In(&spec), 0u64.into()],
        )?;
    }
    body.flush()
}
