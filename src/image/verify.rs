//! What a manifest must fulfil before anything is done with it.
//!
//! Images are hostile input: every number that refers to something is checked here, once, so that a restore
//! may follow it. What the kernel checks itself when it is asked to (credentials, scheduling, registers) is
//! left to the kernel. The same checks run before an image is written: a dump that succeeds can be opened.

mod resources;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context, Result, ensure};

use super::memory::{Backing, MemPolicy};
use super::pages::PAGE;
use super::process::{MmLayout, State};
use super::signals::PendingSignal;
use super::{FORMAT_NAME, FORMAT_VERSION, Manifest, Process, SpaceId, Thread, Vma};

/// End of the user's half of the address space with four levels of page tables (Documentation/arch/x86/x86_64/mm.rst).
const USER_END: u64 = 1 << 47;
/// PID_MAX_LIMIT (linux/threads.h).
const PID_MAX: i32 = 4 << 20;
/// Bytes of struct user_regs_struct (sys/user.h).
const REGS: usize = 27 * 8;
/// Bytes of an XSAVE area: legacy region and header at least; with AMX some 11 KiB.
const XSTATE: std::ops::RangeInclusive<usize> = 576..=64 * 1024;
/// Bytes of siginfo_t.
const SIGINFO: usize = 128;
/// _NSIG.
const SIGNALS: i32 = 64;
/// RLIM_NLIMITS.
const LIMITS: u32 = 16;
/// Most of each in one image, or in one process.
const PROCESSES_MAX: usize = 1 << 16;
const THREADS_MAX: usize = 1 << 16;
const VMAS_MAX: usize = 1 << 20;
const FDS_MAX: usize = 1 << 20;
/// sysctl fs.nr_open cannot be larger.
const FD_MAX: i32 = 1 << 30;
/// Bytes of a path, with room for what a lossy conversion makes longer.
const PATH_MAX: usize = 3 * 4096;

/// Ranges of addresses that may have pages, by space; sorted, without overlaps, adjacent ones joined.
pub(super) type Allowed = BTreeMap<SpaceId, Vec<(u64, u64)>>;

/// Checks everything a manifest says that can be checked without the kernel, and returns where pages may be.
pub(super) fn check(manifest: &Manifest) -> Result<Allowed> {
    ensure!(
        manifest.format == FORMAT_NAME && manifest.version == FORMAT_VERSION,
        "its format is {:?} version {}",
        manifest.format,
        manifest.version
    );
    let origin = &manifest.origin;
    for s in [
        &origin.mistctl,
        &origin.hostname,
        &origin.kernel,
        &origin.machine,
        &origin.boot_id,
    ] {
        text("origin", s, 1024)?;
    }
    let n = manifest.processes.len();
    ensure!(n > 0 && n <= PROCESSES_MAX, "it has {n} processes");
    resources::check(manifest)?;

    let mut allowed = Allowed::new();
    let mut ids = HashSet::new();
    let mut parents = HashSet::new();
    for (i, process) in manifest.processes.iter().enumerate() {
        let mut check = || -> Result<()> {
            if i > 0 {
                ensure!(
                    parents.contains(&process.ppid),
                    "its parent {} is not among the processes before it",
                    process.ppid
                );
            }
            self::process(manifest, process)?;
            self::threads(process, &mut ids)?;
            spaces(process, &mut allowed)
        };
        check().with_context(|| format!("process {}", process.pid))?;
        if !matches!(process.state, State::Zombie { .. }) {
            parents.insert(process.pid);
        }
    }
    for (i, memory) in manifest.shared_memory.iter().enumerate() {
        let range = (0, memory.size.next_multiple_of(PAGE as u64));
        let taken = allowed.insert(memory.space, vec![range]).is_some();
        ensure!(
            !taken,
            "shared memory {i}: space {} is used twice",
            memory.space
        );
    }
    Ok(allowed)
}

fn process(manifest: &Manifest, p: &Process) -> Result<()> {
    id("pid", p.pid)?;
    // A parent, group or session outside the pid namespace is 0.
    for (what, n) in [("ppid", p.ppid), ("pgid", p.pgid), ("sid", p.sid)] {
        ensure!((0..=PID_MAX).contains(&n), "{what} {n} is impossible");
    }
    text("comm", &p.comm, 64)?;
    for note in &p.notes {
        text("note", note, 64 * 1024)?;
    }
    ensure!(
        (-1..=SIGNALS).contains(&p.exit_signal),
        "exit signal {} is impossible",
        p.exit_signal
    );
    ensure!(p.umask <= 0o777, "umask {:o} is impossible", p.umask);
    ensure!(
        (-1000..=1000).contains(&p.oom_score_adj) && (0..=2).contains(&p.dumpable),
        "oom_score_adj {} or dumpable {} is impossible",
        p.oom_score_adj,
        p.dumpable
    );
    match p.state {
        State::Zombie { .. } => {
            ensure!(
                p.threads.is_empty() && p.vmas.is_empty() && p.fds.is_empty() && p.locks.is_empty(),
                "it is dead and has threads, memory or descriptors"
            );
            return signals(p);
        }
        State::Stopped { signal } => self::signal("stopped by", signal)?,
        State::Running => {}
    }
    for (what, file) in [("exe", p.exe), ("cwd", p.cwd), ("root", p.root)] {
        index(what, file, manifest.files.len())?;
    }
    vmas(manifest, &p.vmas)?;
    layout(&p.mm)?;

    ensure!(p.fds.len() <= FDS_MAX, "it has {} descriptors", p.fds.len());
    let mut numbers = HashSet::new();
    for fd in &p.fds {
        ensure!(
            (0..FD_MAX).contains(&fd.fd),
            "descriptor {} is impossible",
            fd.fd
        );
        ensure!(numbers.insert(fd.fd), "descriptor {} is there twice", fd.fd);
        index(
            "open file description",
            fd.description,
            manifest.descriptions.len(),
        )
        .with_context(|| format!("descriptor {}", fd.fd))?;
    }
    for (description, lock) in &p.locks {
        index(
            "open file description of a lock",
            *description,
            manifest.descriptions.len(),
        )?;
        resources::lock(lock)?;
    }
    signals(p)
}

fn signals(p: &Process) -> Result<()> {
    let mut seen = BTreeSet::new();
    for action in &p.sigactions {
        signal("action for", action.signal)?;
        ensure!(
            seen.insert(action.signal),
            "two actions for signal {}",
            action.signal
        );
    }
    pending(&p.pending)?;
    let mut seen = BTreeSet::new();
    for timer in &p.itimers {
        ensure!(
            (0..=2).contains(&timer.which)
                && seen.insert(timer.which)
                && timer.left_us >= 0
                && timer.interval_us >= 0,
            "interval timer {} is impossible or there twice",
            timer.which
        );
    }
    let mut seen = HashSet::new();
    for timer in &p.posix_timers {
        ensure!(
            timer.id >= 0
                && seen.insert(timer.id)
                && (0..=SIGNALS).contains(&timer.signal)
                && timer.left_ns >= 0
                && timer.interval_ns >= 0,
            "timer {} is impossible or there twice",
            timer.id
        );
    }
    // Linux's largest SEMMSL; and far more sets than anybody has.
    ensure!(
        p.semaphores.len() <= 4096 && p.semaphores.iter().all(|s| s.adjustments.len() <= 65536),
        "its semaphores are too many"
    );
    ensure!(
        p.lock_future & !(libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32 == 0,
        "mlockall({:#x}) is impossible",
        p.lock_future
    );
    let mut seen = BTreeSet::new();
    for limit in &p.limits {
        ensure!(
            limit.resource < LIMITS && seen.insert(limit.resource) && limit.soft <= limit.hard,
            "limit {} is impossible or there twice",
            limit.resource
        );
    }
    Ok(())
}

fn pending(queue: &[PendingSignal]) -> Result<()> {
    for signal in queue {
        ensure!(
            signal.info.len() == SIGINFO,
            "a pending signal has {} bytes of siginfo_t instead of {SIGINFO}",
            signal.info.len()
        );
    }
    Ok(())
}

fn threads(p: &Process, ids: &mut HashSet<i32>) -> Result<()> {
    if matches!(p.state, State::Zombie { .. }) {
        ensure!(ids.insert(p.pid), "its pid is there twice");
        return Ok(());
    }
    let n = p.threads.len();
    ensure!(n > 0 && n <= THREADS_MAX, "it has {n} threads");
    if p.ended_leader.is_some() {
        // So that none of its threads has its id.
        ensure!(ids.insert(p.pid), "its pid is there twice");
    } else {
        ensure!(
            p.threads.first().is_some_and(|t| t.tid == p.pid),
            "its first thread is not the leader"
        );
    }
    for t in &p.threads {
        id("tid", t.tid)?;
        ensure!(ids.insert(t.tid), "thread id {} is there twice", t.tid);
        thread(t).with_context(|| format!("thread {}", t.tid))?;
    }
    Ok(())
}

fn thread(t: &Thread) -> Result<()> {
    ensure!(
        t.regs.len() == REGS,
        "{} bytes of registers instead of {REGS}",
        t.regs.len()
    );
    ensure!(
        XSTATE.contains(&t.xstate.len()) && t.xstate.len().is_multiple_of(8),
        "{} bytes of extended state",
        t.xstate.len()
    );
    text("comm", &t.comm, 64)?;
    ensure!(
        t.comm_raw.len() <= 64 && !t.comm_raw.contains(&0),
        "the name of thread {} is none",
        t.tid
    );
    pending(&t.pending)?;
    if let Some(rseq) = t.rseq {
        ensure!(rseq.pointer < USER_END, "rseq at {:#x}", rseq.pointer);
    }
    ensure!(
        t.robust_list < USER_END && t.clear_child_tid < USER_END,
        "robust list or clear_child_tid outside the address space"
    );
    ensure!(
        t.cpus_allowed.len() <= 8192,
        "{} bytes of CPU mask",
        t.cpus_allowed.len()
    );
    policy(t.mempolicy.as_ref())?;
    ensure!(
        (0..=SIGNALS).contains(&t.pdeathsig),
        "pdeathsig {} is impossible",
        t.pdeathsig
    );
    // NGROUPS_MAX.
    ensure!(
        t.creds.groups.len() <= 65536,
        "{} groups",
        t.creds.groups.len()
    );
    Ok(())
}

fn policy(policy: Option<&MemPolicy>) -> Result<()> {
    let words = policy.map_or(0, |p| p.nodes.len());
    // MAX_NUMNODES is 1024 at most.
    ensure!(words <= 64, "{words} words of nodes");
    Ok(())
}

fn vmas(manifest: &Manifest, vmas: &[Vma]) -> Result<()> {
    ensure!(vmas.len() <= VMAS_MAX, "it has {} mappings", vmas.len());
    let mut end = 0;
    for vma in vmas {
        let check = || -> Result<()> {
            ensure!(
                vma.start < vma.end && vma.end <= USER_END && whole(vma.start) && whole(vma.end),
                "it ends at {:#x}",
                vma.end
            );
            ensure!(
                vma.start >= end,
                "it overlaps the one before it or is out of order"
            );
            ensure!(
                (0..=7).contains(&vma.prot),
                "protection {:#x} is impossible",
                vma.prot
            );
            let sized = match &vma.backing {
                Backing::Anonymous => false,
                Backing::File { file } => {
                    index("file", *file, manifest.files.len())?;
                    true
                }
                Backing::Shared { memory } => {
                    index("shared memory", *memory, manifest.shared_memory.len())?;
                    true
                }
                Backing::Aio { ring } => {
                    ring.check(vma.end - vma.start)?;
                    ensure!(vma.shared && vma.offset == 0, "its ring is not whole");
                    false
                }
                Backing::Kernel { which } => {
                    text("kernel mapping", which, 32)?;
                    false
                }
            };
            let reach = vma.offset.checked_add(vma.end - vma.start);
            ensure!(
                !sized || (whole(vma.offset) && reach.is_some_and(|n| n <= i64::MAX as u64)),
                "offset {:#x} is impossible",
                vma.offset
            );
            ensure!(
                vma.flags
                    .iter()
                    .all(|f| f.len() == 2 && f.bytes().all(|b| b.is_ascii_alphanumeric())),
                "its flags are not pairs of letters"
            );
            policy(vma.policy.as_ref())?;
            if let Some(name) = &vma.name {
                text("name", name, 256)?;
            }
            let mut from = vma.start;
            for &(start, stop) in &vma.guards {
                ensure!(
                    from <= start && start < stop && stop <= vma.end && whole(start) && whole(stop),
                    "guard pages at {start:#x}-{stop:#x} are outside or out of order"
                );
                from = stop;
            }
            Ok(())
        };
        check().with_context(|| format!("mapping at {:#x}", vma.start))?;
        end = vma.end;
    }
    Ok(())
}

fn layout(mm: &MmLayout) -> Result<()> {
    let all = [
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
    ];
    ensure!(
        all.iter().all(|a| *a <= USER_END),
        "its memory layout reaches outside the address space"
    );
    ensure!(
        mm.auxv.len() <= 1024 && mm.auxv.len().is_multiple_of(2),
        "its auxiliary vector has {} words",
        mm.auxv.len()
    );
    Ok(())
}

/// Notes where a process's space may have pages. Processes may share a space (vfork) if they map the same.
fn spaces(p: &Process, allowed: &mut Allowed) -> Result<()> {
    if matches!(p.state, State::Zombie { .. }) {
        return Ok(());
    }
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for vma in &p.vmas {
        match ranges.last_mut() {
            Some(last) if last.1 == vma.start => last.1 = vma.end,
            _ => ranges.push((vma.start, vma.end)),
        }
    }
    if let Some(other) = allowed.get(&p.space) {
        ensure!(
            *other == ranges,
            "it shares space {} with a process that maps something else",
            p.space
        );
    } else {
        allowed.insert(p.space, ranges);
    }
    Ok(())
}

fn whole(address: u64) -> bool {
    address.is_multiple_of(PAGE as u64)
}

fn id(what: &str, n: i32) -> Result<()> {
    ensure!((1..=PID_MAX).contains(&n), "{what} {n} is impossible");
    Ok(())
}

fn signal(what: &str, n: i32) -> Result<()> {
    ensure!(
        (1..=SIGNALS).contains(&n),
        "{what} signal {n}, which does not exist"
    );
    Ok(())
}

fn index(what: &str, i: u32, len: usize) -> Result<()> {
    ensure!(
        (i as usize) < len,
        "{what} {i} does not exist (there are {len})"
    );
    Ok(())
}

/// A string that goes to the kernel or to people.
fn text(what: &str, s: &str, max: usize) -> Result<()> {
    ensure!(
        s.len() <= max && !s.contains('\0'),
        "{what} has {} bytes, more than {max}, or a zero byte",
        s.len()
    );
    Ok(())
}
