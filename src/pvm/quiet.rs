//! The quiet point of a task: where it stands still without having half said, or half heard, anything.
//!
//! Outside libpvm, or in a call that waits for messages, in select() with nothing to write. The write set alone
//! does not tell: a task that waits for an answer of its pvmd, or is between the list of a multicast's
//! receivers and the message itself, waits in select() just so. The shim says which it is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvm_abi::block::state;

use crate::dump::HeldProcess;
use crate::error::Failure;
use crate::kernel::arch::{ERESTARTNOHAND, Regs};
use crate::kernel::batch::Held;
use crate::kernel::maps;
use crate::kernel::mem::Mem;
use crate::pvm::asked::{self, Waits};
use crate::pvm::block::{Freezable, TaskBlock};
use crate::pvm::capture::Task;

/// How long a task is waited for, unless told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The first wait between two looks; each is twice as long as the one before, up to the last.
const FIRST_WAIT: Duration = Duration::from_micros(100);
const LAST_WAIT: Duration = Duration::from_millis(10);

/// Stops the task at its next quiet point.
///
/// # Errors
/// When there is none within `limit`, which is [`Failure::Busy`]; those of [`HeldProcess::stop`]. The task runs
/// on.
pub fn stop(task: &Task, limit: Duration) -> Result<HeldProcess> {
    let block = &task.block;
    let until = Instant::now() + limit;
    let mut wait = FIRST_WAIT;
    loop {
        // Looked at first while it runs: a task in the middle of something is not stopped for nothing.
        let why = match freezable(block)? {
            Freezable::No(why) => why,
            Freezable::Outside | Freezable::IfInSelect => {
                let held = HeldProcess::stop(block.pid())?;
                match look(&held, task)? {
                    None => return Ok(held),
                    Some(why) => {
                        held.release()?;
                        why
                    }
                }
            }
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(never(block, limit, why));
        }
        std::thread::sleep(wait.min(left));
        wait = (wait * 2).min(LAST_WAIT);
    }
}

/// Why a task that stands still may not be frozen where it is; None: it may.
///
/// # Errors
/// When its memory cannot be read.
pub fn look(held: &HeldProcess, task: &Task) -> Result<Option<&'static str>> {
    let block = &task.block;
    if block.state()? != state::ENROLLED || block.r()? != task.r.0 {
        return Err(Failure::Busy.because(format!(
            "process {} has left the virtual machine meanwhile; nothing was changed, try again",
            held.pid
        )));
    }
    match freezable(block)? {
        Freezable::Outside => Ok(None),
        Freezable::No(why) => Ok(Some(why)),
        Freezable::IfInSelect => {
            let stack = block.stack()?;
            let Some(caller) = caller(held, stack)? else {
                return Ok(Some("none of its threads is where libpvm was called"));
            };
            Ok(match waits_to_read(&caller.program, &held.mem)? {
                true if !task.begins_whole()? => Some("it is in the middle of a large message"),
                true => None,
                false => Some("it goes through messages"),
            })
        }
    }
}

/// What the block says; a question that may stay open for ever can be asked again.
fn freezable(block: &TaskBlock) -> Result<Freezable> {
    Ok(match (block.freezable()?, asked::waits(block)?) {
        (Freezable::No(_), Waits::ForInfo) => Freezable::IfInSelect,
        (Freezable::No(_), Waits::ToTake) => Freezable::No(
            "it waits in pvm_recvinfo for an entry of the mailbox that it will take away (PvmMboxReadAndDelete)",
        ),
        (freezable, _) => freezable,
    })
}

fn never(block: &TaskBlock, limit: Duration, why: &str) -> anyhow::Error {
    let tid = block.v().unwrap_or(0);
    Failure::Busy.because(format!(
        "task t{tid:x} (process {}) has not come to a point where it can be frozen within {} s: {why}; it runs \
         on as before, try again when that is over",
        block.pid(),
        limit.as_secs_f64(),
    ))
}

/// The thread that is inside libpvm: the one on whose stack the call at the bottom is.
fn caller(held: &HeldProcess, stack: u64) -> Result<Option<&Held>> {
    if let [only] = &held.threads[..] {
        return Ok(Some(only));
    }
    let maps = maps::read(held.pid)
        .with_context(|| format!("reading mappings of process {}", held.pid))?;
    let area = maps
        .iter()
        .map(|m| (m.start, m.end))
        .find(|(start, end)| *start <= stack && stack < *end);
    let Some((start, _)) = area else {
        return Ok(None);
    };
    let on_it = |h: &&Held| start <= h.program.rsp && h.program.rsp <= stack;
    Ok(held.threads.iter().find(on_it))
}

/// Whether a thread waits in select() for nothing but something to read, for more than no time.
fn waits_to_read(regs: &Regs, mem: &Mem) -> Result<bool> {
    let in_select = regs
        .syscall()
        .is_some_and(|nr| [libc::SYS_select, libc::SYS_pselect6].contains(&(nr as i64)));
    // With any other result it is on its way out.
    if !in_select || regs.rax as i64 != -ERESTARTNOHAND {
        return Ok(false);
    }
    let (count, write, time) = (regs.arg(0), regs.arg(2), regs.arg(4));
    if write != 0 {
        // Bits past the count are not looked at by the kernel either.
        let count = count.min(1 << 20) as usize;
        let set = mem
            .read_vec(write, count.div_ceil(8))
            .context("reading a write set")?;
        let bit = |i: usize| set.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 != 0);
        if (0..count).any(bit) {
            return Ok(false);
        }
    }
    if time == 0 {
        return Ok(true);
    }
    let (seconds, rest) = (mem.read_u64(time)?, mem.read_u64(time + 8)?);
    Ok(seconds != 0 || rest != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A select that a signal has interrupted, with this write set and time-out.
    fn interrupted(write: &[u64; 2], time: Option<&[u64; 2]>) -> Regs {
        Regs {
            orig_rax: libc::SYS_select as u64,
            rax: -ERESTARTNOHAND as u64,
            rdi: 70,
            rdx: write.as_ptr() as u64,
            r8: time.map_or(0, |time| time.as_ptr() as u64),
            ..Regs::default()
        }
    }

    fn waits(regs: Regs) -> bool {
        waits_to_read(&regs, &Mem::open(std::process::id() as i32).unwrap()).unwrap()
    }

    #[test]
    fn who_has_something_to_write_is_not_quiet() {
        assert!(waits(interrupted(&[0, 0], None)));
        assert!(!waits(interrupted(&[0, 1 << 5], None)));
        // Past the count.
        assert!(waits(interrupted(&[0, 1 << 6], None)));
    }

    #[test]
    fn who_only_looks_is_not_quiet() {
        assert!(waits(interrupted(&[0, 0], Some(&[0, 1]))));
        assert!(!waits(interrupted(&[0, 0], Some(&[0, 0]))));
    }

    #[test]
    fn who_is_on_his_way_out_is_not_quiet() {
        let regs = interrupted(&[0, 0], None);
        assert!(!waits(Regs { rax: 1, ..regs }));
    }
}
