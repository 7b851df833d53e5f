//! Signals that came while a process stood still and was looked at, and the timers that sent them.

use std::time::Instant;

use anyhow::Result;

use super::hold::HeldProcess;
use super::threads;
use crate::image::process::Process;
use crate::image::signals::PendingSignal;

/// Adds the signals that have come since the others were read. What their timers had left was asked for in between, not
/// before `begun`: they are put to where they are now that they have sent them. Else a timer that expired before it was
/// asked would be lost, and one that expired after it would do so twice.
pub fn signals(held: &HeldProcess, p: &mut Process, begun: Instant) -> Result<()> {
    let mut late = come_since(&mut p.pending, threads::pending(held.leader(), true)?);
    for (t, held) in p.threads.iter_mut().zip(&held.threads) {
        late.extend(come_since(&mut t.pending, threads::pending(held, false)?));
    }
    let elapsed = begun.elapsed().as_nanos() as i64;
    for signal in &late {
        expired(signal, p, elapsed);
    }
    Ok(())
}

/// Nobody takes a signal meanwhile: the new ones stand behind those that were there.
fn come_since(known: &mut Vec<PendingSignal>, now: Vec<PendingSignal>) -> Vec<PendingSignal> {
    let late: Vec<_> = now.iter().skip(known.len()).cloned().collect();
    *known = now;
    late
}

/// The timer that has sent a signal.
fn expired(signal: &PendingSignal, p: &mut Process, elapsed: i64) {
    // siginfo_t: si_signo, si_errno, si_code; si_timerid.
    let word = |at: usize| {
        let bytes = signal.info.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, i32::from_ne_bytes)
    };
    const SI_KERNEL: i32 = 0x80;
    match word(8) {
        libc::SI_TIMER => {
            for t in p.posix_timers.iter_mut().filter(|t| t.id == word(16)) {
                if t.interval_ns == 0 {
                    t.left_ns = 0;
                } else if t.left_ns <= elapsed {
                    t.left_ns += t.interval_ns;
                }
            }
        }
        SI_KERNEL => {
            const SIGNALS: [i32; 3] = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF];
            let which = SIGNALS.iter().position(|s| *s == word(0));
            // One with an interval is started again when its signal is taken.
            let its = |t: &&mut crate::image::signals::ITimer| Some(t.which as usize) == which;
            p.itimers.iter_mut().filter(its).for_each(|t| t.left_us = 0);
        }
        _ => {}
    }
}
