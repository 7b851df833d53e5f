//! A descriptor made inside a process, of its memory, without its descriptor table ever having had it.
//!
//! Code in the dead tail of the vDSO (see [`super::batch`]) makes a helper that shares the memory and has a
//! descriptor table of its own. The helper makes the one system call, we take the descriptor from it, and it exits;
//! the process reaps it. If we vanish, all of that happens by itself.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::arch::Asm;
use super::batch::{Held, enter, leader_mask, park, reap, set_mask, step_calls};
use super::mem::Mem;
use super::pidfd;
use super::tracee::{Stop, Tracee};

/// Has `leader`'s process make the system call `nr`, which returns a descriptor, and takes that. `tail` is dead
/// executable memory.
///
/// # Errors
/// When the process may not have another child, or the call fails; it is held as before.
pub fn descriptor(
    leader: &Held,
    mem: &Mem,
    tail: std::ops::Range<u64>,
    nr: i64,
    args: &[u64],
) -> Result<OwnedFd> {
    let t = leader.tracee;
    let code = code(leader, &tail, nr, args);
    let room = (tail.end - tail.start) as usize;
    if code.len() + 16 > room {
        bail!(
            "process {}: {room} bytes of dead space in its vDSO are too few",
            t.tid
        );
    }
    mem.write(leader_mask(&tail), &leader.sigmask.to_le_bytes())?;
    mem.write(tail.start, code.bytes())?;
    enter(leader, tail.start)?;
    t.set_options(libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE)?;
    let got = follow(&t);
    park(&t)?;
    leader.restore()?;
    t.set_options(0)?;
    mem.write(tail.start, &vec![0; room])?;
    got
}

fn code(leader: &Held, tail: &std::ops::Range<u64>, nr: i64, args: &[u64]) -> Asm {
    let mut a = Asm::new();
    // No signal at its end: only a wait that asks for such children sees it.
    a.syscall(libc::SYS_clone, &[libc::CLONE_VM as u64, 0, 0, 0, 0]);
    let failed = a.jump_if_error();
    let parent = a.jump_if_nonzero();
    a.syscall(nr, args);
    a.syscall(libc::SYS_exit_group, &[0]);
    a.land(parent);
    reap(&mut a);
    a.land_far(failed);
    set_mask(&mut a, leader_mask(tail));
    let (rax, rip) = leader.regs.resume_point();
    a.jump_to_program(&leader.regs, rax, rip);
    a
}

/// From the clone to the end of the wait for it.
fn follow(t: &Tracee) -> Result<OwnedFd> {
    let mut helper = None;
    let mut ends = 0;
    while ends < 2 {
        t.cont_to_syscall()?;
        match t.wait()? {
            Stop::Syscall => ends += 1,
            Stop::Event(libc::PTRACE_EVENT_CLONE) => {
                helper = Some(Tracee {
                    tid: t.event_message()?,
                });
            }
            Stop::Interrupt { .. } | Stop::Event(_) => {}
            other => bail!("thread {} ended while it worked for us: {other:?}", t.tid),
        }
    }
    let Some(helper) = helper else {
        let errno = -(t.regs()?.rax as i64) as i32;
        return Err(std::io::Error::from_raw_os_error(errno)).with_context(|| {
            format!(
                "process {} may not have another child, not even for a moment",
                t.tid
            )
        });
    };
    let got = take(&helper);
    // Whatever came of it, it exits, and is waited for.
    helper.cont(0)?;
    loop {
        match helper.wait()? {
            Stop::Exited(_) | Stop::Killed(_) => break,
            Stop::Signal(s) => helper.cont(s)?,
            Stop::Interrupt { .. } | Stop::Syscall | Stop::Event(_) => helper.cont(0)?,
        }
    }
    step_calls(t, 1)?;
    got
}

fn take(helper: &Tracee) -> Result<OwnedFd> {
    // Its first stop, before its first instruction.
    helper.wait()?;
    step_calls(helper, 1)?;
    let fd = helper.regs()?.rax as i64;
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd as i32).into());
    }
    let pidfd = pidfd::open(helper.tid)?;
    pidfd::get_fd(pidfd.as_fd(), fd as i32).context("pidfd_getfd")
}
