//! Threads: registers, and what the kernel keeps for each.

use anyhow::{Context, Result, bail};

use super::queries::ThreadAnswers;
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::signals::PendingSignal;
use crate::image::threads::Thread;
use crate::kernel::batch::Held;
use crate::kernel::mem::Mem;
use crate::kernel::proc_file;
use crate::kernel::sched;
use crate::kernel::thread_status::ThreadStatus;

/// Refuses a thread whose calls are filtered.
pub fn unfiltered(pid: i32, tid: i32, status: &ThreadStatus) -> Result<()> {
    if status.seccomp != 0 {
        return Err(Failure::Refused.because(format!(
            "thread {tid} of process {pid} has a seccomp filter, which cannot be carried; start the \
             program without its sandbox"
        )));
    }
    Ok(())
}

/// Everything of a held thread that can be seen from outside, but for its `status` where that was read; [`complete`]
/// adds the rest.
pub fn read(pid: i32, held: &Held, status: Option<ThreadStatus>) -> Result<Thread> {
    let t = held.tracee;
    if held.regs.is_32bit() {
        return Err(Failure::Refused.because(format!(
            "process {pid} is a 32-bit program (thread {}); mistctl carries 64-bit programs only",
            t.tid
        )));
    }
    if t.has_user_dispatch() {
        return Err(Failure::Refused.because(format!(
            "thread {} of process {pid} gets its own system calls as signals (PR_SET_SYSCALL_USER_DISPATCH, as under \
             Wine), which cannot be carried",
            t.tid
        )));
    }
    let status = match status {
        Some(known) => known,
        None => self::status(pid, t.tid)?,
    };
    let (comm, comm_raw) = comm(pid, t.tid)?;
    unfiltered(pid, t.tid, &status)?;
    let (robust_list, robust_list_len) = t.robust_list()?;
    Ok(Thread {
        tid: t.tid,
        regs: held.program.to_bytes().into(),
        xstate: t.xstate()?.into(),
        resume: held.resume.clone(),
        comm,
        comm_raw,
        sigmask: held.sigmask,
        pending: pending(held, false)?,
        altstack: Default::default(),
        rseq: t.rseq()?,
        robust_list,
        robust_list_len,
        clear_child_tid: 0,
        sched: sched::get(t.tid)?,
        cpus_allowed: sched::affinity(t.tid)?.into(),
        timer_slack_ns: number(&format!("/proc/{}/timerslack_ns", t.tid)).unwrap_or(50_000),
        pdeathsig: 0,
        no_tsc: false,
        mempolicy: None,
        creds: status.creds,
    })
}

/// Adds what the thread itself was asked.
pub fn complete(thread: &mut Thread, a: &ThreadAnswers) {
    thread.altstack = a.altstack;
    thread.clear_child_tid = a.clear_child_tid;
    thread.pdeathsig = a.pdeathsig;
    thread.no_tsc = a.no_tsc;
    thread.mempolicy = a.mempolicy.clone();
}

pub fn pending(held: &Held, shared: bool) -> Result<Vec<PendingSignal>> {
    let all = held.tracee.pending(shared)?;
    Ok(all
        .into_iter()
        .map(|info| PendingSignal { info: info.into() })
        .collect())
}

/// A thread that stands inside a restartable sequence goes on at its abort handler: after the stop it
/// may run on another CPU, and what it has computed so far would be wrong (rseq(2), kernel/rseq.c).
pub fn abort_rseq(held: &mut Held, mem: &Mem) -> Result<()> {
    const CS_OFFSET: u64 = 8;
    let Some(area) = held.tracee.rseq()? else {
        return Ok(());
    };
    let cs = mem.read_u64(area.pointer + CS_OFFSET)?;
    if cs == 0 {
        return Ok(());
    }
    // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip. A stale pointer to
    // unmapped memory is the program's business until the kernel looks at it.
    let mut b = [0u8; 32];
    if mem.read(cs, &mut b).is_err() {
        return Ok(());
    }
    let word = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap_or_default());
    let (start, len, abort) = (word(8), word(16), word(24));
    if held.regs.rip.wrapping_sub(start) < len {
        held.regs.rip = abort;
        held.program.rip = abort;
        // In this order: killed in between, we leave a thread that stands at its abort handler, and not
        // one inside a section that the kernel knows nothing of.
        held.tracee.set_regs(&held.regs)?;
        mem.write(area.pointer + CS_OFFSET, &0u64.to_le_bytes())?;
    }
    Ok(())
}

pub fn status(pid: i32, tid: i32) -> Result<ThreadStatus> {
    ThreadStatus::read(format!("/proc/{pid}/task/{tid}/status"))
}

/// A thread's name, and its bytes where they are not UTF-8.
fn comm(pid: i32, tid: i32) -> Result<(String, Bytes)> {
    let path = format!("/proc/{pid}/task/{tid}/comm");
    let mut text = proc_file::read(&path).with_context(|| format!("reading {path}"))?;
    if text.ends_with(b"\n") {
        text.pop();
    }
    Ok(match String::from_utf8(text) {
        Ok(comm) => (comm, Bytes::default()),
        Err(e) => {
            let shown = String::from_utf8_lossy(e.as_bytes()).into_owned();
            (shown, Bytes(e.into_bytes()))
        }
    })
}

pub fn number(path: &str) -> Result<u64> {
    let text = proc_file::text(path).with_context(|| format!("reading {path}"))?;
    match text.trim().parse() {
        Ok(n) => Ok(n),
        Err(_) => bail!("{path} holds {:?}, not a number", text.trim()),
    }
}
