//! Threads: making them, what the kernel keeps for each, their registers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::ids::Ids;
use super::signals;
use crate::image::process::{Creds, EndedLeader, Process};
use crate::image::threads::Thread;
use crate::kernel::arch::Regs;
use crate::kernel::proc_file;
use crate::kernel::remote::{Arg, Remote};
use crate::kernel::sched::SchedAttr;
use crate::kernel::vacancy;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// How long a main thread may take to end: it does so at once, if it gets a processor.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes every thread but the leader, in order; they stand still.
pub fn make(leader: &mut Remote, p: &Process, ids: &Ids) -> Result<Vec<Remote>> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let mut all = Vec::new();
    for t in p.others() {
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
        // set_tid, set_tid_size, cgroup. The id stands behind it.
        let wanted = ids.wanted(t.tid);
        let made = leader
            .clone_thread(flags as u64, wanted)
            .map_err(|e| match (wanted, e.downcast::<std::io::Error>()) {
                (Some(id), Ok(e)) => vacancy::explain(id, e),
                (None, Ok(e)) => e.into(),
                (_, Err(e)) => e,
            })
            .with_context(|| format!("making thread {}", t.tid))?;
        all.push(leader.thread(made)?);
    }
    Ok(all)
}

/// Everything of a thread but its registers. `orphaned`: its parent is us, who end when it runs.
pub fn furnish(r: &mut Remote, t: &Thread, ours: &Creds, orphaned: bool) -> Result<()> {
    let what = |s: &str| format!("{s} of thread {}", t.tid);
    let mut comm = match t.comm_raw.is_empty() {
        true => t.comm.clone().into_bytes(),
        false => t.comm_raw.to_vec(),
    };
    comm.push(0);
    r.must(
        what("name"),
        libc::SYS_prctl,
        &[libc::PR_SET_NAME.into(), Arg::In(&comm)],
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
    cached_id(r, t)?;
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
    signals::pending(r, &t.pending, Some(r.inside))?;
    super::creds::set(r, &t.creds, ours)?;
    // Our own death no longer matters to it: until it is released it dies with its tracer.
    let pdeathsig = if orphaned { 0 } else { t.pdeathsig };
    if pdeathsig != t.pdeathsig {
        r.warnings.push(format!(
            "process {}: its parent is not restored with it: it no longer gets signal {} at its parent's end \
             (PR_SET_PDEATHSIG)",
            t.tid, t.pdeathsig
        ));
    }
    r.must(
        what("parent death signal"),
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG.into(), pdeathsig.into()],
    )?;
    if let Some(policy) = &t.mempolicy {
        r.may(
            what("nodes for the memory (set_mempolicy)"),
            libc::SYS_set_mempolicy,
            &[
                u64::from(policy.mode).into(),
                Arg::In(&policy.mask()),
                policy.bits().into(),
            ],
        )?;
    }
    if t.no_tsc {
        r.must(
            what("forbidden time stamp counter (PR_SET_TSC)"),
            libc::SYS_prctl,
            &[libc::PR_SET_TSC.into(), libc::PR_TSC_SIGSEGV.into()],
        )?;
    }
    r.flush()
}

/// C libraries keep a thread's id where the kernel clears it at the thread's end: raise(3) and mutexes use that one.
fn cached_id(r: &Remote, t: &Thread) -> Result<()> {
    if r.inside == t.tid || t.clear_child_tid == 0 {
        return Ok(());
    }
    let mut cached = [0; 4];
    // It may point to anything, or nowhere.
    if r.mem().read(t.clear_child_tid, &mut cached).is_ok() && cached == t.tid.to_le_bytes() {
        let id = r.inside.to_le_bytes();
        (r.mem().write(t.clear_child_tid, &id))
            .with_context(|| format!("the id that thread {} keeps of itself", t.tid))?;
    }
    Ok(())
}

/// What is left to see of a leader that is to end before its threads run; see [`end`].
pub fn furnish_ended(r: &mut Remote, p: &Process, l: &EndedLeader, ours: &Creds) -> Result<()> {
    let comm = format!("{}\0", p.comm);
    r.must(
        "name of the main thread",
        libc::SYS_prctl,
        &[libc::PR_SET_NAME.into(), Arg::In(comm.as_bytes())],
    )?;
    super::creds::set(r, &l.creds, ours)?;
    // It would kill the whole process.
    r.must(
        "parent death signal of the main thread",
        libc::SYS_prctl,
        &[libc::PR_SET_PDEATHSIG.into(), 0u64.into()],
    )?;
    r.flush()
}

/// Lets a leader end as it had, through two bytes at `place`, and waits until it has: /proc/PID shows a zombie
/// from now on. Its threads keep the process, and die with us.
pub fn end(leader: &Remote, l: &EndedLeader, place: u64) -> Result<()> {
    let pid = leader.pid();
    let old = leader.mem().read_vec(place, SYSCALL.len())?;
    leader.mem().write(place, &SYSCALL)?;
    let regs = Regs {
        rip: place,
        rax: libc::SYS_exit as u64,
        rdi: libc::WEXITSTATUS(l.status) as u64,
        orig_rax: u64::MAX,
        eflags: 0x202,
        ..leader.tracee.regs()?
    };
    leader.tracee.set_regs(&regs)?;
    // Traced it would end for us alone: its real parent would wait in vain for the whole process.
    leader
        .tracee
        .detach(0)
        .with_context(|| format!("letting the main thread of process {pid} end"))?;
    let begun = Instant::now();
    // Nobody is told when a leader ends before its threads.
    while !is_zombie(pid) {
        if begun.elapsed() > PATIENCE {
            bail!("the main thread of process {pid} does not end");
        }
        std::thread::yield_now();
    }
    leader.mem().write(place, &old)
}

fn is_zombie(pid: i32) -> bool {
    let stat = proc_file::stat(pid);
    stat.is_ok_and(|s| s.state == 'Z')
}
