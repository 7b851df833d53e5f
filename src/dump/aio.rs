//! Contexts of asynchronous I/O (io_setup(2)): events that were not read yet. Requests that are under way are the
//! kernel's, and waited for.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::hold::HeldProcess;
use crate::error::Failure;
use crate::image::aio::{EVENT, IoRing};
use crate::image::memory::{Backing, Vma};
use crate::kernel::kmem::KernelMemory;
use crate::kernel::kmem::aio::{self, IoContext};
use crate::kernel::maps::{self, Name};

/// How long requests that are under way may take while the process stands and makes no new ones: what a disk is asked
/// for takes some milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// Whether the file of this name is the ring of a context.
pub fn is_ring(path: &[u8]) -> bool {
    path.starts_with(b"/[aio]")
}

/// Refuses what cannot be carried while process `pid`, which has such rings, still runs. `tid`: a thread of it.
///
/// # Errors
/// [`Failure::Refused`].
pub fn check(pid: i32, tid: i32) -> Result<()> {
    let contexts = contexts(pid, tid)?;
    if let Some(c) = contexts.iter().find(|c| c.polls) {
        return Err(polls(pid, c));
    }
    // What goes away meanwhile is none of it.
    for m in maps::read(tid).unwrap_or_default() {
        if matches!(m.name(), Name::File(path) if is_ring(path)) {
            whole(pid, &contexts, (m.start, m.end), m.offset)?;
        }
    }
    Ok(())
}

/// What is in the rings of a process that stands still.
///
/// # Errors
/// [`Failure::Refused`]; [`Failure::Busy`] when requests are under way for too long.
pub fn read(held: &HeldProcess, vmas: &mut [Vma]) -> Result<()> {
    let is_ring = |v: &&mut Vma| matches!(v.backing, Backing::Aio { .. });
    let mut rings: Vec<&mut Vma> = vmas.iter_mut().filter(is_ring).collect();
    if rings.is_empty() {
        return Ok(());
    }
    let pid = held.pid;
    let contexts = idle(pid, held.via())?;
    for v in &mut rings {
        let c = whole(pid, &contexts, (v.start, v.end), v.offset)?;
        // struct aio_ring of fs/aio.c: id, nr, head. The program may write to it; the kernel takes the remainder.
        let mut head = [0; 4];
        held.mem.read(c.id + 8, &mut head)?;
        let head = u32::from_le_bytes(head).checked_rem(c.events).unwrap_or(0);
        let count = (c.tail + c.events - head)
            .checked_rem(c.events)
            .unwrap_or(0);
        let mut unread = Vec::new();
        for i in 0..count {
            let place = u64::from((head + i) % c.events);
            unread.extend(
                held.mem
                    .read_vec(c.id + EVENT * (1 + place), EVENT as usize)?,
            );
        }
        v.backing = Backing::Aio {
            ring: IoRing {
                requests: c.requests,
                events: c.events,
                head,
                unread: unread.into(),
            },
        };
    }
    Ok(())
}

/// The context whose ring is mapped at `start` to `end`, from `offset` on.
fn whole(
    pid: i32,
    contexts: &[IoContext],
    (start, end): (u64, u64),
    offset: u64,
) -> Result<&IoContext> {
    let mut whole = contexts.iter().filter(|c| c.len == end - start);
    let own = whole.find(|c| c.id == start && offset == 0);
    own.ok_or_else(|| {
        Failure::Refused.because(format!(
            "process {pid} maps a ring of asynchronous I/O at {start:#x}-{end:#x} that is no whole context of its own (one of the \
             process that it was forked from, or one taken apart), which cannot be carried; let the program unmap it first"
        ))
    })
}

/// Contexts of a process that stands still, with no request under way.
fn idle(pid: i32, tid: i32) -> Result<Vec<IoContext>> {
    let begun = Instant::now();
    loop {
        let all = contexts(pid, tid)?;
        let Some(c) = all.iter().find(|c| c.under_way > 0) else {
            return Ok(all);
        };
        if c.polls {
            return Err(polls(pid, c));
        }
        if begun.elapsed() > PATIENCE {
            return Err(Failure::Busy.because(format!(
                "process {pid} has {} requests of asynchronous I/O (io_submit) under way in its context at {:#x}, and they did \
                 not end within {} s; try again",
                c.under_way,
                c.id,
                PATIENCE.as_secs()
            )));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn contexts(pid: i32, tid: i32) -> Result<Vec<IoContext>> {
    KernelMemory::get()
        .and_then(|kernel| aio::contexts(kernel, tid))
        .map_err(|e| {
            let why = format!(
                "process {pid} has a context of asynchronous I/O (io_setup), and whether requests are under way in it only kernel \
                 memory tells; run mistctl as root, or let the program destroy it first"
            );
            Failure::Refused.with(e.context(why))
        })
}

fn polls(pid: i32, c: &IoContext) -> anyhow::Error {
    Failure::Refused.because(format!(
        "process {pid} waits for a descriptor in its context of asynchronous I/O at {:#x} (IOCB_CMD_POLL), which cannot be \
         carried; let the program cancel that first",
        c.id
    ))
}
