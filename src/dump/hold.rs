//! Stopping processes so that it does not show.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::process;
use super::resume::{self, Tail, Watch};
use crate::error::Failure;
use crate::image::threads::Resume;
use crate::kernel::apart::Postponed;
use crate::kernel::arch::Regs;
use crate::kernel::batch::Held;
use crate::kernel::mem::Mem;
use crate::kernel::proc_file::{self, LastId};
use crate::kernel::sched::Urgent;
use crate::kernel::time_ns::host_monotonic_ns;
use crate::kernel::tracee::{Stop, Tracee};

/// How long a thread may take to stop. They take some ten microseconds.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const VFORK_PATIENCE: Duration = Duration::from_secs(2);
/// How often a thread may be found in code that a mistctl before us has left.
const TRIES: usize = 200;

/// A process all of whose threads stand still. Dropped without [`HeldProcess::release`], its threads
/// are put back and let go all the same.
pub struct HeldProcess {
    pub pid: i32,
    pub mem: Mem,
    /// Leader first (unless it is a zombie, then any other).
    pub threads: Vec<Held>,
    /// When the first of its threads was asked to stop.
    pub since: Instant,
    tail: Tail,
    addressees: Addressees,
    released: bool,
}

impl HeldProcess {
    /// Seizes and stops every thread. `signal` of the group stop is kept in each [`Held`].
    pub fn stop(pid: i32) -> Result<Self> {
        let via = process::living_thread(pid);
        let mut program = auxv(via);
        let mem = Mem::open(via).map_err(|e| gone_or(pid, e))?;
        wait_for_vfork(pid)?;
        let tail = Tail::find(via, &mem);
        // Clocks are compared from here on.
        let _urgent = Urgent::new();
        let tids = thread_ids(pid)?;
        let addressees = Addressees::before(pid, &tids);
        let mut watch = Watch::before(pid, &tids, &mem);
        let mut held = Self {
            pid,
            mem,
            threads: Vec::new(),
            since: Instant::now(),
            tail,
            addressees,
            released: false,
        };
        let mut known: BTreeSet<i32> = BTreeSet::new();
        // Until what the stops have done to calls is put right.
        let _postponed = Postponed::new();
        // Asked to stop.
        let mut asked = Vec::new();
        loop {
            let all = thread_ids(pid)?.into_iter();
            let mut new: Vec<i32> = all.filter(|tid| !known.contains(tid)).collect();
            if new.is_empty() && asked.is_empty() {
                break;
            }
            // They come when nobody else is left, and then nobody waits for one before all are asked.
            let is_last = |tid: &i32| held.addressees.reached || held.addressees.contains(*tid);
            let last = new.iter().all(is_last);
            if !last {
                new.retain(|tid| !is_last(tid));
            }
            let (fragile, mut rest): (Vec<i32>, Vec<i32>) =
                new.into_iter().partition(|tid| watch.is_fragile(*tid));
            for tid in fragile {
                // By now it may be about to fork.
                if last || held.addressees.reached || !watch.last_look(tid) {
                    rest.push(tid);
                } else if !held.addressees.has_become(tid) {
                    known.insert(tid);
                    let Some(t) = seize(pid, tid)? else { continue };
                    interrupt(&t)?;
                    // In whose call a stop shows is put right before the next is stopped.
                    held.take(t, &mut program, &mut watch)?;
                    held.addressees.reached = held.addressees.has_become(tid);
                }
            }
            let mut seized = Vec::with_capacity(rest.len());
            for tid in rest {
                if last || held.addressees.reached || !held.addressees.has_become(tid) {
                    known.insert(tid);
                    seized.extend(seize(pid, tid)?);
                }
            }
            // From here on each of them may be stopped.
            for t in &seized {
                watch.last_look(t.tid);
            }
            for t in &seized {
                interrupt(t)?;
            }
            asked.extend(seized);
            if held.addressees.reached && !last {
                continue;
            }
            held.addressees.reached |= last;
            for t in std::mem::take(&mut asked) {
                held.take(t, &mut program, &mut watch)?;
            }
        }
        if held.threads.is_empty() {
            return Err(Failure::NoSuchProcess.because(format!("process {pid} has ended")));
        }
        // Of a single thread that was seen when it had stopped.
        if held.threads.len() > 1 && runs_another(&held.mem, held.threads[0].tracee.tid, &program) {
            return Err(Failure::Busy.because(format!(
                "process {pid} executes another program right now; nothing was changed, try again"
            )));
        }
        let leader = held
            .threads
            .iter()
            .position(|h| h.tracee.tid == pid)
            .unwrap_or(0);
        held.threads.swap(0, leader);
        resume::settle(&mut held.threads, &watch, &held.mem, &mut held.tail)?;
        Ok(held)
    }

    /// Waits for the stop of a thread that was asked to, and puts right what that did to its call. `program` and
    /// `watch` tell of the program that ran before.
    fn take(&mut self, t: Tracee, program: &mut Option<Vec<u8>>, watch: &mut Watch) -> Result<()> {
        let pid = self.pid;
        let Some(stop) = wait_stopped(t, pid)? else {
            return Ok(());
        };
        if self.threads.is_empty() && runs_another(&self.mem, t.tid, program) {
            // It has executed another program since: what we saw is of the one before.
            *program = auxv(t.tid);
            self.mem = Mem::open(t.tid).map_err(|e| gone_or(pid, e))?;
            self.tail = Tail::find(t.tid, &self.mem);
            *watch = Watch::default();
        }
        self.threads
            .extend(hold(t, stop, pid, &self.mem, &mut self.tail)?);
        Ok(())
    }

    /// Where the ELF image of its vDSO ends; None where that is not known.
    pub fn vdso_ends(&self) -> Option<u64> {
        self.tail.begins()
    }

    /// The part of its vDSO's dead end that a batch may use.
    pub fn tail(&self) -> Range<u64> {
        self.tail.free()
    }

    /// What in the dead end of its vDSO signal handlers return to, from low to high.
    pub fn returned_to(&self) -> Vec<Range<u64>> {
        self.tail.returned_to()
    }

    /// Mappings that are ours and no part of the program.
    pub fn ours(&self) -> Vec<Range<u64>> {
        self.tail.ours()
    }

    /// The main thread, or, when that has ended, another.
    pub fn leader(&self) -> &Held {
        &self.threads[0]
    }

    /// The id under which /proc shows what its threads share: a main thread that has ended shows nothing of it.
    pub fn via(&self) -> i32 {
        self.leader().tracee.tid
    }

    /// Lets every thread go on as if nothing had happened; `signal` is sent first when not 0.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// Leaves it group-stopped, as SIGSTOP does.
    pub fn release_stopped(mut self) -> Result<()> {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGSTOP,
        )
        .with_context(|| format!("stopping process {}", self.pid))?;
        self.let_go()
    }

    /// Kills it while it stands: none of its instructions runs again.
    pub fn kill(mut self) -> Result<()> {
        self.released = true;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGKILL,
        )
        .with_context(|| format!("killing process {}", self.pid))?;
        // The leader's end is reported last.
        for h in self.threads.iter().rev() {
            while let Ok(s) = h.tracee.wait() {
                if matches!(s, Stop::Killed(_) | Stop::Exited(_)) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        let _postponed = Postponed::new();
        let mut first = Ok(());
        let renewed = resume::renew(&mut self.threads, &self.mem, &mut self.tail);
        // As long as they are traced a signal that is ignored breaks off the calls of those that are not.
        let addressees = &self.addressees;
        self.threads
            .sort_by_key(|h| !addressees.contains(h.tracee.tid));
        for h in &self.threads {
            let r = h.release(0);
            if first.is_ok() {
                first = r;
            }
        }
        let finished = renewed.finish();
        first.and(finished)
    }
}

impl Drop for HeldProcess {
    fn drop(&mut self) {
        let _ = self.let_go();
    }
}

/// Whether the process of thread `tid`, which stands, has executed another program since `auxv` was read and its memory
/// opened.
fn runs_another(mem: &Mem, tid: i32, auxv_then: &Option<Vec<u8>>) -> bool {
    mem.is_over() || auxv(tid) != *auxv_then
}

/// Where its program and its vDSO lie: elsewhere after each exec.
fn auxv(tid: i32) -> Option<Vec<u8>> {
    proc_file::read(format!("/proc/{tid}/auxv")).ok()
}

fn gone_or(pid: i32, e: anyhow::Error) -> anyhow::Error {
    let cause = e.downcast_ref::<io::Error>();
    // Files in /proc of a process that is just ending are there, but lead to no process.
    let denied = cause.is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    let ending = cause.and_then(io::Error::raw_os_error) == Some(libc::ESRCH)
        || denied && process::is_ending(pid);
    match cause.map(io::Error::kind) {
        _ if ending => Failure::NoSuchProcess.because(format!("process {pid} is just ending")),
        Some(io::ErrorKind::NotFound) => {
            Failure::NoSuchProcess.because(format!("there is no process {pid}"))
        }
        Some(io::ErrorKind::PermissionDenied) => Failure::Refused.because(format!(
            "process {pid} is not yours to dump (see `mistctl check` for what mistctl may do)"
        )),
        _ => e,
    }
}

fn thread_ids(pid: i32) -> Result<Vec<i32>> {
    let dir = format!("/proc/{pid}/task");
    let entries =
        std::fs::read_dir(&dir).map_err(|e| gone_or(pid, anyhow!(e).context(dir.clone())))?;
    let mut ids = Vec::new();
    for e in entries {
        // A thread that ends while we read is no error.
        if let Some(tid) = e.ok().and_then(|e| e.file_name().to_str()?.parse().ok()) {
            ids.push(tid);
        }
    }
    Ok(ids)
}

/// Threads that signals are likely to be sent to: the main thread, and parents of children.
///
/// The kernel drops a signal that its process ignores, unless the thread it is sent to is traced (sig_ignored in
/// kernel/signal.c): then it wakes any thread that runs, and so breaks off a call of which nobody tells us, should
/// yet another thread be quicker to take the signal. So those are stopped first that may be in such a call, and
/// those last that others send to: SIGCHLD goes to the very thread that forked. They are let go first.
struct Addressees {
    pid: i32,
    tids: BTreeSet<i32>,
    ids: LastId,
    /// The last that the kernel has given away: as long as it is the same nobody has forked.
    last_id: Option<i32>,
    /// One of them is traced, or asked to be.
    reached: bool,
}

impl Addressees {
    fn before(pid: i32, tids: &[i32]) -> Self {
        let ids = LastId::open();
        let last_id = ids.read();
        let tids = tids.iter().copied();
        Self {
            pid,
            tids: tids
                .filter(|tid| *tid == pid || is_parent(pid, *tid))
                .collect(),
            ids,
            last_id,
            reached: false,
        }
    }

    fn contains(&self, tid: i32) -> bool {
        self.tids.contains(&tid)
    }

    /// Whether a thread that was none is one by now.
    fn has_become(&mut self, tid: i32) -> bool {
        let may_be = self.last_id.is_none() || self.ids.read() != self.last_id;
        let is = may_be && is_parent(self.pid, tid);
        if is {
            self.tids.insert(tid);
        }
        is
    }
}

fn is_parent(pid: i32, tid: i32) -> bool {
    let children = proc_file::read(format!("/proc/{pid}/task/{tid}/children"));
    children.is_ok_and(|c| !c.is_empty())
}

fn interrupt(t: &Tracee) -> Result<()> {
    t.interrupt()
        .with_context(|| format!("interrupting thread {}", t.tid))
}

fn seize(pid: i32, tid: i32) -> Result<Option<Tracee>> {
    let mut again = false;
    loop {
        let e = match Tracee::seize(tid, 0) {
            Ok(t) => return Ok(Some(t)),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => e,
        };
        let status = proc_file::status(tid);
        match status.ok() {
            // A leader that called pthread_exit: it is carried by its other threads.
            Some(s) if s.state.starts_with('Z') => return Ok(None),
            Some(s) if s.tracerpid != 0 => {
                if let Some(tracer) = process::tracer(tid) {
                    return Err(process::is_traced(pid, tracer));
                }
            }
            // Somebody may have let it go since.
            Some(_) if !again => again = true,
            Some(_) => {
                return Err(Failure::Refused.with(anyhow!(e).context(format!(
                    "process {pid} may not be traced by you; run mistctl as root or as its owner \
                     (`mistctl check` tells what is missing)"
                ))));
            }
            None => return Ok(None),
        }
    }
}

/// What is to be known of a stopped thread; None when it has ended.
fn hold(
    tracee: Tracee,
    mut stop: Stop,
    pid: i32,
    mem: &Mem,
    tail: &mut Tail,
) -> Result<Option<Held>> {
    for _ in 0..TRIES {
        let stopped_at = host_monotonic_ns();
        let stopped_by = match stop {
            Stop::Interrupt { signal } if signal != libc::SIGTRAP => Some(signal),
            _ => None,
        };
        let regs: Regs = tracee.regs()?;
        let sigmask = tracee.sigmask()?;
        let mut held = Held {
            tracee,
            regs,
            program: regs,
            resume: Resume::Run,
            stopped_at,
            deadline: None,
            tick: None,
            noted: None,
            sigmask,
            stopped_by,
        };
        if resume::first_act(&mut held, mem, tail)? {
            return Ok(Some(held));
        }
        tracee.cont(0)?;
        std::thread::sleep(Duration::from_millis(1));
        interrupt(&tracee)?;
        let Some(next) = wait_stopped(tracee, pid)? else {
            return Ok(None);
        };
        stop = next;
    }
    Err(Failure::Busy.because(format!(
        "thread {} of process {pid} still runs what another mistctl has put into its vDSO; nothing was \
         changed, try again",
        tracee.tid
    )))
}

/// Waits for the stop that our interrupt makes (None: the thread has ended), but not for ever: a thread that waits in the kernel
/// and cannot be interrupted (a vfork, a dead file server) is left alone.
fn wait_stopped(t: Tracee, pid: i32) -> Result<Option<Stop>> {
    let begun = Instant::now();
    loop {
        match t.wait_timeout(LOOK_EVERY)? {
            Some(s @ Stop::Interrupt { .. }) => return Ok(Some(s)),
            Some(Stop::Exited(_) | Stop::Killed(_)) => return Ok(None),
            Some(Stop::Signal(s)) => t.cont(s)?,
            Some(Stop::Syscall | Stop::Event(_)) => t.cont(0)?,
            // Of a main thread that ends before others its tracer is not told.
            None if process::has_ended(t.tid) => return Ok(None),
            None if begun.elapsed() < PATIENCE => {}
            None => {
                let path = format!("/proc/{pid}/task/{}/wchan", t.tid);
                let place = proc_file::text(path).unwrap_or_default();
                return Err(Failure::Busy.because(format!(
                    "thread {} of process {pid} does not stop: it waits in the kernel ({}), as a \
                     parent does for its vfork child or a program for a dead file server, or its \
                     control group is frozen; nothing was changed, try again when that is over",
                    t.tid,
                    if place.is_empty() { "unknown" } else { &place },
                )));
            }
        }
    }
}

/// A parent in vfork cannot be stopped until its child has exec'd or ended: wait a while, before
/// anything stands still.
fn wait_for_vfork(pid: i32) -> Result<()> {
    let begun = Instant::now();
    loop {
        let Some(tid) = vfork_of(pid) else {
            return Ok(());
        };
        if begun.elapsed() > VFORK_PATIENCE {
            return Err(Failure::Busy.because(format!(
                "thread {tid} of process {pid} waits in vfork for its child to call exec or to end, and \
                 cannot be stopped; nothing was changed, try again when the child has done that"
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The thread of a process that waits in vfork for its child, which has the same memory until then.
pub fn vfork_of(pid: i32) -> Option<i32> {
    let threads = thread_ids(pid).unwrap_or_default();
    threads.into_iter().find(|tid| in_vfork(pid, *tid))
}

fn in_vfork(pid: i32, tid: i32) -> bool {
    const FORKS: [i64; 3] = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
    let read =
        |name: &str| proc_file::text(format!("/proc/{pid}/task/{tid}/{name}")).unwrap_or_default();
    let nr = read("syscall")
        .split_whitespace()
        .next()
        .and_then(|w| w.parse::<i64>().ok());
    // The function that waits may be part of the one that clones.
    let waits = |place: &str| place.contains("vfork") || place.trim() == "kernel_clone";
    nr.is_some_and(|nr| FORKS.contains(&nr)) && waits(&read("wchan"))
}
