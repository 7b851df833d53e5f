//! What threads of a process share, as /proc shows it; and what cannot be carried.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use procfs::ProcError;
use procfs::process::{Process as Proc, Stat, Status};

use super::maps::Flags;
use super::tables::Tables;
use super::{aio, namespace, queries, ready, threads};
use crate::error::{Classify, Failure};
use crate::image::process::{EndedLeader, Limit, MmLayout, Process, State};
use crate::kernel::maps::{self, Name};
use crate::kernel::thread_status::ThreadStatus;
use crate::kernel::{proc_file, waker};

/// Refuses what no dump can carry, before anything is stopped. What was read of its mappings for that.
pub fn check(pid: i32, inside: &[i32], with_tree: bool) -> Result<Flags> {
    let refuse = |what: String| Err(Failure::Refused.because(what));
    let asked_for = inside.first() == Some(&pid);
    let status = match proc_file::status(pid) {
        Ok(s) => s,
        Err(ProcError::NotFound(_)) if !asked_for => {
            return came_and_went(pid).map(|()| Flags::default());
        }
        Err(e @ ProcError::NotFound(_)) => {
            return Err(e)
                .or_failure(Failure::NoSuchProcess)
                .with_context(|| format!("there is no process {pid}"));
        }
        Err(e) => return Err(e).with_context(|| format!("reading the state of process {pid}")),
    };
    if status.tgid == 0 {
        // Its parent has just taken it: nothing names it any more.
        return match asked_for {
            true => Err(Failure::NoSuchProcess.because(format!("process {pid} has ended"))),
            false => Ok(Flags::default()),
        };
    }
    if status.tgid != pid {
        return refuse(format!(
            "{pid} is a thread of process {}; dump that process",
            status.tgid
        ));
    }
    let (via, status) = match living_thread(pid) {
        via if via == pid => (pid, status),
        via => match proc_file::status(via) {
            Ok(s) => (via, s),
            // The thread has ended since: whoever stops the process finds another, or none.
            Err(ProcError::NotFound(_)) => return Ok(Flags::default()),
            Err(e) => return Err(e).with_context(|| format!("reading the state of process {pid}")),
        },
    };
    if status.state.starts_with('Z') {
        if asked_for {
            return Err(Failure::NoSuchProcess.because(format!(
                "process {pid} has ended and waits for its parent to take its status"
            )));
        }
        return Ok(Flags::default());
    }
    if status.vmsize.is_none() && !asked_for {
        // A child on its way out.
        return Ok(Flags::default());
    }
    if status.vmsize.is_none() {
        // include/linux/sched.h
        const PF_KTHREAD: u32 = 0x0020_0000;
        let kernel = proc_file::stat(pid).is_ok_and(|s| s.flags & PF_KTHREAD != 0);
        return match (kernel, asked_for) {
            (true, _) => refuse(format!(
                "process {pid} ({}) is a kernel thread",
                status.name
            )),
            (false, true) => {
                Err(Failure::NoSuchProcess.because(format!("process {pid} is just ending")))
            }
            // It is found dead, or gone, when the tree stands still.
            (false, false) => Ok(Flags::default()),
        };
    }
    if !with_tree && let Some(child) = tree(pid, true).get(1) {
        return Err(has_children(pid, &status.name, Some(*child)));
    }
    if ancestors().contains(&pid) {
        return refuse(format!(
            "process {pid} ({}) is the shell or another ancestor that this mistctl runs in; dump it \
             from elsewhere",
            status.name
        ));
    }
    if is_frozen(via, &status) {
        return Err(Failure::Busy.because(format!(
            "process {pid} ({}) is frozen with its control group, as by `docker pause`, and can do nothing for a dump; \
             nothing was changed, thaw it first",
            status.name
        )));
    }
    let flags = ready::wait(via)?;
    if let Some(tracer) = tracer(via) {
        return Err(is_traced(pid, tracer));
    }
    crate::kernel::caps::caller()?.may_dump(pid)?;
    if !flags.vdso && !flags.is_empty() && has_no_vdso(via) {
        return refuse(format!(
            "process {pid} ({}) has no vDSO (it unmaps it, as valgrind does, or the kernel was started with vdso=0), \
             and mistctl works from there; run the program without that",
            status.name
        ));
    }
    if flags.aio {
        aio::check(pid, via)?;
    }
    let first = inside.first().map_or(via, |first| living_thread(*first));
    namespace::check(pid, via, first)?;
    Ok(flags)
}

/// Whether a process lacks it for good. One that executes a program has its mappings one after the other, and while one
/// ends, /proc shows the first of them only.
fn has_no_vdso(pid: i32) -> bool {
    const MOMENT: Duration = Duration::from_secs(1);
    const LOOK_EVERY: Duration = Duration::from_millis(1);
    let begun = Instant::now();
    loop {
        let maps = maps::read(pid).unwrap_or_default();
        if maps.is_empty() || maps.iter().any(|m| m.name() == Name::Special("vdso")) {
            return false;
        }
        if begun.elapsed() > MOMENT {
            return true;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether a thread stands in the freezer of its control group: it would be waited for until it is thawed.
fn is_frozen(tid: i32, status: &Status) -> bool {
    // Whoever waits among the signals without being stopped is in the freezer, which may be part of get_signal.
    const PLACES: [&str; 3] = ["do_freezer_trap", "get_signal", "__refrigerator"];
    let place = proc_file::text(format!("/proc/{tid}/wchan")).unwrap_or_default();
    status.state.starts_with(['S', 'D']) && PLACES.contains(&place.trim_end())
}

/// The error for a process that is to be dumped without its children.
pub fn has_children(pid: i32, comm: &str, child: Option<i32>) -> anyhow::Error {
    let child = child.map(|c| format!(" (process {c})")).unwrap_or_default();
    Failure::Refused.because(format!(
        "process {pid} ({comm}) has children{child}, which it would miss after a restore; dump them with it: --tree"
    ))
}

/// The error for a process that traces `tracee`, which no restore could have it do again.
pub fn traces(pid: i32, comm: &str, tracee: Option<i32>) -> anyhow::Error {
    let tracee = tracee.map_or("another process".to_owned(), |t| format!("process {t}"));
    Failure::Refused.because(format!(
        "process {pid} ({comm}) traces {tracee}, as debuggers do, which it would lose by a restore; have it let that go first"
    ))
}

/// The main thread of a process, or, when that has ended, another that has not: what threads share is shown
/// by living ones only (/proc/TID/...).
pub fn living_thread(pid: i32) -> i32 {
    if !has_ended(pid) {
        return pid;
    }
    let tasks = Proc::new(pid).and_then(|p| p.tasks());
    let mut tids = tasks.into_iter().flatten().flatten().map(|t| t.tid);
    tids.find(|tid| !has_ended(*tid)).unwrap_or(pid)
}

/// Whether a thread is a zombie, or not there at all.
pub fn has_ended(tid: i32) -> bool {
    let stat = proc_file::stat(tid);
    stat.map_or(true, |s| matches!(s.state, 'Z' | 'X'))
}

/// Whether a process has ended, or is on its way out: none of its threads comes back to its program. Its memory is let
/// go before it is a zombie, and files in /proc that would lead there are root's from then on, so that looking at it
/// fails as it does for a stranger's process.
pub fn is_ending(pid: i32) -> bool {
    // include/linux/sched.h
    const PF_EXITING: u32 = 0x4;
    let Ok(tasks) = Proc::new(pid).and_then(|p| p.tasks()) else {
        return true;
    };
    let ends = |s: &Stat| matches!(s.state, 'Z' | 'X') || s.flags & PF_EXITING != 0;
    (tasks.flatten()).all(|t| proc_file::stat(t.tid).map_or(true, |s| ends(&s)))
}

/// Whether a process has ended with all its threads: none of its descriptors is open any more.
pub fn is_over(pid: i32) -> bool {
    let Ok(tasks) = Proc::new(pid).and_then(|p| p.tasks()) else {
        return true;
    };
    tasks.flatten().all(|t| has_ended(t.tid))
}

/// What an error in looking at a process is: where that is ending, it is that.
pub fn ending_or(pid: i32, e: anyhow::Error) -> anyhow::Error {
    match is_ending(pid) {
        true => Failure::NoSuchProcess.with(e.context(format!("process {pid} is just ending"))),
        false => e,
    }
}

/// Who traces a thread, once nobody does any more who does so for a moment only: a mist-waker, which ends its call.
pub fn tracer(tid: i32) -> Option<i32> {
    const MOMENT: Duration = Duration::from_secs(1);
    const LOOK_EVERY: Duration = Duration::from_micros(200);
    let begun = Instant::now();
    loop {
        let status = proc_file::status(tid).ok()?;
        let tracer = Some(status.tracerpid).filter(|pid| *pid != 0)?;
        let name = proc_file::text(format!("/proc/{tracer}/comm")).unwrap_or_default();
        if name.trim_end().as_bytes() != waker::NAME.to_bytes() || begun.elapsed() > MOMENT {
            return Some(tracer);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

pub fn is_traced(pid: i32, by: i32) -> anyhow::Error {
    Failure::Busy.because(format!(
        "process {pid} is being traced by process {by} (a debugger or another mistctl); nothing \
         was changed, try again when that has ended"
    ))
}

/// A child that /proc does not show has come and gone, or is there and not shown to us.
pub fn came_and_went(pid: i32) -> Result<()> {
    match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) {
        Err(nix::errno::Errno::ESRCH) => Ok(()),
        _ => Err(Failure::Refused.because(format!(
            "process {pid}, a descendant, is not to be seen in /proc (is it another user's, and /proc mounted with hidepid?): it would be missing after a restore; run mistctl as root"
        ))),
    }
}

fn ancestors() -> Vec<i32> {
    let mut all = vec![std::process::id() as i32];
    let mut at = nix::unistd::getppid().as_raw();
    while at > 1 && !all.contains(&at) {
        all.push(at);
        at = proc_file::stat(at).map_or(0, |s| s.ppid);
    }
    // The init of a pid namespace is not one's shell.
    all
}

/// The process and, with `tree`, all its descendants: parents before children.
pub fn tree(pid: i32, tree: bool) -> Vec<i32> {
    let mut all = vec![pid];
    let mut next = 0;
    while tree && next < all.len() {
        let of = all[next];
        next += 1;
        let Ok(tasks) = Proc::new(of).and_then(|p| p.tasks()) else {
            continue;
        };
        for t in tasks.flatten() {
            let Ok(children) = t.children() else { continue };
            for c in children {
                if !all.contains(&(c as i32)) && c != std::process::id() {
                    all.push(c as i32);
                }
            }
        }
    }
    all
}

/// What can be read of a process from outside, through its thread `via` (None: it is a zombie). Mappings,
/// threads, descriptors and the answers to [`queries::Queries`] are added by the caller.
pub fn read(
    pid: i32,
    via: Option<i32>,
    tables: &mut Tables,
) -> Result<(Process, queries::Queries, Option<ThreadStatus>)> {
    let ctx = || format!("reading the state of process {pid}");
    let stat = proc_file::stat(pid).with_context(ctx)?;
    let mut p = empty(&stat);
    let Some(via) = via else {
        p.state = State::Zombie {
            status: stat.exit_code.unwrap_or(0),
        };
        return Ok((p, queries::Queries::default(), None));
    };
    let mut stat = stat;
    if via != pid {
        p.ended_leader = Some(EndedLeader {
            status: stat.exit_code.unwrap_or(0),
            creds: threads::status(pid, pid)?.creds,
        });
        // The numbers of the address space are shown by living threads only.
        stat = proc_file::stat(via).with_context(ctx)?;
    }
    let status = threads::status(pid, via)?;
    let timers = proc_file::text(format!("/proc/{via}/timers")).unwrap_or_default();
    p.posix_timers = queries::parse_timers(&timers)?;
    p.umask = status.umask.unwrap_or(0o22);
    p.limits = limits(via)?;
    let personality = proc_file::text(format!("/proc/{via}/personality")).with_context(ctx)?;
    p.personality = u64::from_str_radix(personality.trim(), 16).with_context(ctx)?;
    let adj = proc_file::text(format!("/proc/{via}/oom_score_adj")).with_context(ctx)?;
    p.oom_score_adj = adj.trim().parse().with_context(ctx)?;
    // Kernels without core dumps have no such file.
    let filter = proc_file::text(format!("/proc/{via}/coredump_filter")).ok();
    p.coredump_filter = filter.and_then(|f| u32::from_str_radix(f.trim(), 16).ok());
    p.mm = mm_layout(via, &stat)?;
    p.exe = link(via, "exe", tables)?;
    p.cwd = link(via, "cwd", tables)?;
    p.root = link(via, "root", tables)?;
    let queries = queries::Queries {
        timers: p.posix_timers.iter().map(|t| t.id).collect(),
        is_init: status.is_init,
        locked: status.locked,
        ..queries::Queries::default()
    };
    Ok((p, queries, Some(status)))
}

fn empty(stat: &Stat) -> Process {
    Process {
        pid: stat.pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
        state: State::Running,
        comm: stat.comm.clone(),
        exit_signal: stat.exit_signal.unwrap_or(libc::SIGCHLD),
        threads: Vec::new(),
        space: 0,
        vmas: Vec::new(),
        mm: MmLayout::default(),
        exe: 0,
        cwd: 0,
        root: 0,
        fds: Vec::new(),
        locks: Vec::new(),
        sigactions: Vec::new(),
        pending: Vec::new(),
        itimers: Vec::new(),
        posix_timers: Vec::new(),
        limits: Vec::new(),
        umask: 0,
        personality: 0,
        oom_score_adj: 0,
        dumpable: 1,
        child_subreaper: false,
        thp_disable: false,
        thp_advised: false,
        coredump_filter: None,
        mdwe: 0,
        mce_kill: None,
        membarrier: 0,
        merge_memory: false,
        lock_future: 0,
        semaphores: Vec::new(),
        notes: Vec::new(),
        ended_leader: None,
    }
}

fn mm_layout(pid: i32, stat: &Stat) -> Result<MmLayout> {
    let path = format!("/proc/{pid}/auxv");
    let auxv = proc_file::read(&path).with_context(|| format!("reading {path}"))?;
    Ok(MmLayout {
        start_code: stat.startcode,
        end_code: stat.endcode,
        start_data: stat.start_data.unwrap_or(0),
        end_data: stat.end_data.unwrap_or(0),
        start_brk: stat.start_brk.unwrap_or(0),
        brk: 0,
        start_stack: stat.startstack,
        arg_start: stat.arg_start.unwrap_or(0),
        arg_end: stat.arg_end.unwrap_or(0),
        env_start: stat.env_start.unwrap_or(0),
        env_end: stat.env_end.unwrap_or(0),
        auxv: auxv
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
            .collect(),
    })
}

fn link(pid: i32, which: &str, tables: &mut Tables) -> Result<u32> {
    let link = format!("/proc/{pid}/{which}");
    let target = std::fs::read_link(&link).with_context(|| format!("reading {link}"))?;
    let meta = std::fs::metadata(&link).with_context(|| format!("looking through {link}"))?;
    let Some(text) = target.to_str() else {
        return Err(Failure::Refused.because(format!(
            "process {pid}: its {} is {}, whose name is not UTF-8; rename it before the dump",
            match which {
                "exe" => "program",
                "cwd" => "current directory",
                _ => "root directory",
            },
            target.display()
        )));
    };
    let bare = text.strip_suffix(" (deleted)").unwrap_or(text);
    let deleted = meta.nlink() == 0;
    Ok(tables.file(if deleted { bare } else { text }, &meta, deleted))
}

/// Resource limits by the names /proc/PID/limits uses; prlimit(2) on another user's process needs
/// CAP_SYS_RESOURCE.
const LIMITS: [(&str, u32); 16] = [
    ("Max cpu time", libc::RLIMIT_CPU),
    ("Max file size", libc::RLIMIT_FSIZE),
    ("Max data size", libc::RLIMIT_DATA),
    ("Max stack size", libc::RLIMIT_STACK),
    ("Max core file size", libc::RLIMIT_CORE),
    ("Max resident set", libc::RLIMIT_RSS),
    ("Max processes", libc::RLIMIT_NPROC),
    ("Max open files", libc::RLIMIT_NOFILE),
    ("Max locked memory", libc::RLIMIT_MEMLOCK),
    ("Max address space", libc::RLIMIT_AS),
    ("Max file locks", libc::RLIMIT_LOCKS),
    ("Max pending signals", libc::RLIMIT_SIGPENDING),
    ("Max msgqueue size", libc::RLIMIT_MSGQUEUE),
    ("Max nice priority", libc::RLIMIT_NICE),
    ("Max realtime priority", libc::RLIMIT_RTPRIO),
    ("Max realtime timeout", libc::RLIMIT_RTTIME),
];

fn limits(pid: i32) -> Result<Vec<Limit>> {
    let path = format!("/proc/{pid}/limits");
    let text = proc_file::text(&path).with_context(|| format!("reading {path}"))?;
    let value = |s: Option<&str>| match s {
        Some("unlimited") => Some(u64::MAX),
        Some(n) => n.parse().ok(),
        None => None,
    };
    let mut all = Vec::new();
    for (name, resource) in LIMITS {
        let Some(line) = text.lines().find(|l| l.starts_with(name)) else {
            continue;
        };
        let mut words = line[name.len()..].split_whitespace();
        if let (Some(soft), Some(hard)) = (value(words.next()), value(words.next())) {
            all.push(Limit {
                resource,
                soft,
                hard,
            });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::mpsc::channel;

    use nix::sys::ptrace;
    use nix::sys::wait::waitpid;
    use nix::unistd::{Pid, gettid};

    use super::*;

    #[test]
    fn who_ends_a_call_is_waited_for_and_nobody_else() {
        for (name, waits) in [("mist-waker", true), ("debugger", false)] {
            let mut target = Command::new("sleep")
                .arg("1000")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let pid = Pid::from_raw(target.id() as i32);
            let (held, is_held) = channel();
            let (found, is_found) = channel();
            let me = gettid();
            let tracer_thread = std::thread::Builder::new().name(name.to_owned());
            let tracer_thread = tracer_thread.spawn(move || {
                ptrace::seize(pid, ptrace::Options::empty()).unwrap();
                ptrace::interrupt(pid).unwrap();
                waitpid(pid, None).unwrap();
                held.send(()).unwrap();
                let call = format!("/proc/self/task/{me}/syscall");
                let sleeps = format!("{} ", libc::SYS_clock_nanosleep);
                // Until it is waited for, or given up.
                while is_found.try_recv().is_err()
                    && !proc_file::text(&call).is_ok_and(|c| c.starts_with(&sleeps))
                {
                    std::thread::yield_now();
                }
                ptrace::detach(pid, None).unwrap();
            });
            is_held.recv().unwrap();
            let tracer = tracer(pid.as_raw());
            let _ = found.send(());
            tracer_thread.unwrap().join().unwrap();
            target.kill().unwrap();
            target.wait().unwrap();
            assert_eq!(tracer.is_none(), waits, "{name}: {tracer:?}");
        }
    }
}
