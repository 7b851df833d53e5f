//! Processes that stand, ready to run, and would outlive us: whoever is to decide then finds them stopped.
//!
//! Every thread has a SIGSTOP pending that it will take before its next instruction, and no longer dies with its
//! tracer. When the tracer dies the kernel lets the threads go, and they stop. When it does not, it takes the
//! SIGSTOPs away again, and nobody ever sees them.

use anyhow::{Context, Result, bail};

use crate::image::process::Process;
use crate::kernel::remote::{DYING_WITH_US, OPTIONS};
use crate::kernel::tracee::{Stop, Tracee, queue_signal};

/// Whether the signals that these processes have pending allow it: a SIGSTOP takes away a SIGCONT.
pub fn possible(processes: &[Process]) -> bool {
    let mut all = processes.iter().flat_map(|p| {
        p.pending
            .iter()
            .chain(p.threads.iter().flat_map(|t| &t.pending))
    });
    all.all(|s| s.info.get(..4) != Some(&libc::SIGCONT.to_le_bytes()))
}

/// Parks a thread of process `pid`; its registers and mask are the program's already.
pub fn park(pid: i32, t: Tracee) -> Result<()> {
    let parking = || format!("parking thread {}", t.tid);
    queue_signal(pid, t.tid, libc::SIGSTOP).with_context(parking)?;
    // Let go in a signal's stop it would take that signal; in this one it takes none.
    t.interrupt().with_context(parking)?;
    t.cont(0)?;
    loop {
        match t.wait()? {
            Stop::Interrupt { .. } => break,
            Stop::Syscall | Stop::Event(_) => t.cont(0)?,
            other => bail!("thread {} ended while it was parked: {other:?}", t.tid),
        }
    }
    t.set_options(OPTIONS & !DYING_WITH_US)
}

/// Takes a thread's SIGSTOP away; false: the program has ended by a signal of its own.
pub fn unpark(pid: i32, t: Tracee) -> Result<bool> {
    // A SIGCONT takes away those of all threads, and only one of them would be told.
    let park_again = || {
        queue_signal(pid, t.tid, libc::SIGSTOP)
            .with_context(|| format!("letting thread {} run", t.tid))
    };
    park_again()?;
    t.cont(0)?;
    loop {
        match t.wait()? {
            // Who sends a SIGCONT means the same, and has taken the SIGSTOP away.
            Stop::Signal(libc::SIGSTOP | libc::SIGCONT) => return Ok(true),
            // Those with lower numbers come first.
            Stop::Signal(s) => t.cont(s)?,
            // By a SIGCONT that came just now, it may be.
            Stop::Interrupt { .. } => {
                park_again()?;
                t.cont(0)?;
            }
            Stop::Syscall | Stop::Event(_) => t.cont(0)?,
            Stop::Exited(_) | Stop::Killed(_) => return Ok(false),
        }
    }
}
