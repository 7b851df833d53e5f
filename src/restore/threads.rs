//! Threads: making them, what the kernel keeps for each, their registers.

use anyhow::{Context, Result};

use super::signals;
use crate::image::process::{Creds, Process};
use crate::image::threads::Thread;
use crate::kernel::body;
use crate::kernel::remote::{Arg, Remote};
use crate::kernel::sched::SchedAttr;

/// Makes every thread but the leader, in order; they stand still.
pub fn make(leader: &mut Remote, p: &Process, same_ids: bool) -> Result<Vec<Remote>> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let mut all = Vec::new();
    for t in p.threads.iter().skip(1) {
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
        // set_tid, set_tid_size, cgroup. The id stands behind it.
        let wanted = same_ids.then_some(t.tid);
        let tid = leader
            .clone_thread(flags as u64, wanted)
            .map_err(|e| match (wanted, e.downcast::<std::io::Error>()) {
                (Some(id), Ok(e)) => body::explain_set_tid(id, e),
                (None, Ok(e)) => e.into(),
                (_, Err(e)) => e,
            })
            .with_context(|| format!("making thread {}", t.tid))?;
        all.push(leader.thread(tid)?);
    }
    Ok(all)
}

/// Everything of a thread but its registers.
pub fn furnish(r: &mut Remote, t: &Thread, ours: &Creds) -> Result<()> {
    let what = |s: &str| format!("{s} of thread {}", t.tid);
    let comm = format!("{}\0", t.comm);
    r.must(
        what("name"),
        libc::SYS_prctl,
        &[libc::PR_SET_NAME.into(), Arg::In(comm.as_bytes())],
    )?;
    r.must(
        what("robust futex list"),
        libc::SYS_set_robust_list,
        &[t.robust_list.into(), t.robust_list_len.max(24).into()],
    )?;
    r.must(
        what("clear_child_tid"),
        libc::SYS_set_tid_address,
        &[t.clear_child_tid.into()],
    )?;
    if let Some(q) = &t.rseq {
        r.must(
            what("rseq"),
            libc::SYS_rseq,
            &[
                q.pointer.into(),
                u64::from(q.size).into(),
                0u64.into(),
                u64::from(q.signature).into(),
            ],
        )?;
    }
    if t.altstack.sp != 0 || t.altstack.size != 0 {
        let mut b = [0u8; 24];
        b[..8].copy_from_slice(&t.altstack.sp.to_le_bytes());
        // SS_ONSTACK is a state, told by the stack pointer.
        b[8..12].copy_from_slice(&(t.altstack.flags & !1).to_le_bytes());
        b[16..].copy_from_slice(&t.altstack.size.to_le_bytes());
        if t.altstack.flags & libc::SS_DISABLE == 0 {
            r.must(
                what("alternate stack"),
                libc::SYS_sigaltstack,
                &[Arg::In(&b), 0u64.into()],
            )?;
        }
    }
    let attr = SchedAttr::bytes(&t.sched);
    r.may(
        what("scheduling"),
        libc::SYS_sched_setattr,
        &[0u64.into(), Arg::In(&attr), 0u64.into()],
    )?;
    if t.sched.ioprio != 0 {
        r.may(
            what("I/O priority"),
            libc::SYS_ioprio_set,
            &[1u64.into(), 0u64.into(), t.sched.ioprio.into()],
        )?;
    }
    r.may(
        what("affinity"),
        libc::SYS_sched_setaffinity,
        &[
            0u64.into(),
            (t.cpus_allowed.len() as u64).into(),
            Arg::In(&t.cpus_allowed),
        ],
    )?;
    r.may(
        what("timer slack"),
        libc::SYS_prctl,
        &[libc::PR_SET_TIMERSLACK.into(), t.timer_slack_ns.into()],
    )?;
    signals::pending(r, &t.pending, Some(r.tracee.tid))?;
    super::creds::set(r, &t.creds, ours)?;
    // Our own death no longer matters to it: until it is released it dies with its tracer.
    r.must(
        what("parent death signal"),
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG.into(), t.pdeathsig.into()],
    )?;
    r.flush()
}
