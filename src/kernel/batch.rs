//! System calls inside a process that must come to no harm, whatever becomes of us.
//!
//! The code stands in the dead tail of the process's vDSO, written through /proc/PID/mem. It maps a
//! scratch area, runs the [`Call`]s that we put there, optionally makes a copy-on-write clone or an heir, unmaps
//! the scratch area, sets the signal mask back and jumps into the program. If we vanish at any point it
//! runs to that jump by itself; while we live we hold it before the jump and put the registers back
//! verbatim, so that the kernel restarts an interrupted call itself.
//!
//! ```text
//! tail   leader's code | one thread's code | masks
//! area   call table | results and arguments | a word of our own, and a thread's results: a page each
//! ```

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::arch::{Asm, CALL_SIZE, Call, PAGE, R, Regs};
use super::mem::Mem;
use super::sched;
use super::tracee::{Stop, Tracee};
use crate::image::threads::Resume;

/// Bytes of the two parts of a scratch area that has no more to hold.
const PART: u64 = 32 * 1024;
/// Pages at the end of the area: the leader's being a subreaper, and what a thread's calls write.
const OWN: u64 = 2 * PAGE;
/// Room for a thread's own code (three calls, the mask, the jump).
const THREAD_ROOM: u64 = 400;
/// Bytes of the vDSO's tail that a batch needs at most.
pub const ROOM: u64 = 1040;
const ALL_SIGNALS: u64 = !0;

/// How large the scratch area of a batch is.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Where what calls read and write begins; before it stands their table.
    data: u64,
    pub len: u64,
}

impl Area {
    /// For `calls` calls that read and write `data` bytes.
    #[must_use]
    pub fn holding(calls: usize, data: u64) -> Self {
        // One more call, and an empty one behind it.
        let table = ((calls as u64 + 2) * CALL_SIZE as u64).next_multiple_of(PAGE);
        let begin = table.max(PART);
        Self {
            data: begin,
            len: begin + (data.next_multiple_of(PAGE) + OWN).max(PART),
        }
    }
}

/// A thread held in a PTRACE_EVENT_STOP, and how it will go on.
#[derive(Debug, Clone)]
pub struct Held {
    pub tracee: Tracee,
    /// Set verbatim before it is let go.
    pub regs: Regs,
    /// What the program sees when it looks: `regs`, but for a thread that is in a trampoline.
    pub program: Regs,
    /// What becomes of the call that the stop broke off.
    pub resume: Resume,
    /// When it was seen to stand: CLOCK_MONOTONIC of the host, nanoseconds.
    pub stopped_at: i64,
    /// When that call is to time out: CLOCK_MONOTONIC of the host, nanoseconds.
    pub deadline: Option<i64>,
    /// The number of the kernel's tick at that moment, where one of them is to end it.
    pub tick: Option<i64>,
    /// The same as a dump or a restore before has noted it for us.
    pub noted: Option<i64>,
    pub sigmask: u64,
    /// Group-stopped by this signal.
    pub stopped_by: Option<i32>,
}

impl Held {
    /// Puts back what the program had and lets it run.
    pub fn release(&self, signal: i32) -> Result<()> {
        self.restore()?;
        self.tracee
            .detach(signal)
            .with_context(|| format!("detaching from thread {}", self.tracee.tid))
    }

    pub(super) fn restore(&self) -> Result<()> {
        // In this order: killed in between, we leave a thread in the code that sets its mask and jumps back
        // by itself, and not one in its own code with everything blocked.
        self.tracee.set_sigmask(self.sigmask)?;
        self.tracee.set_regs(&self.regs)
    }
}

/// A frozen copy-on-write copy of a process, or what shares its memory ([`Twin::Heir`]). It dies with this value, and
/// with us.
#[derive(Debug)]
pub struct Snapshot {
    tracee: Tracee,
    /// Address of `syscall; jmp exit` in it.
    stub: u64,
}

impl Snapshot {
    pub fn pid(&self) -> i32 {
        self.tracee.tid
    }

    /// Makes the copy harmless: first to go when memory is short, a session of its own.
    pub fn seclude(&self) -> Result<()> {
        // Lowering one's chance to live needs no privilege.
        std::fs::write(format!("/proc/{}/oom_score_adj", self.pid()), "1000")
            .with_context(|| format!("raising oom_score_adj of snapshot {}", self.pid()))?;
        self.call(libc::SYS_setsid, &[])?;
        Ok(())
    }

    /// Kills it, and does not wait until it has given its memory back.
    pub fn abandon(self) {
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGKILL);
        std::mem::forget(self);
    }

    fn call(&self, nr: i64, args: &[u64]) -> Result<i64> {
        let mut r = self.tracee.regs()?;
        let c = Call::new(nr, args);
        r.rax = nr as u64;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = c.args;
        r.rip = self.stub;
        r.orig_rax = u64::MAX;
        self.tracee.set_regs(&r)?;
        step_calls(&self.tracee, 1)?;
        Ok(self.tracee.regs()?.rax as i64)
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGKILL);
        while let Ok(s) = self.tracee.wait() {
            if matches!(s, Stop::Killed(_) | Stop::Exited(_)) {
                break;
            }
        }
    }
}

/// A batch that has run its calls and waits, with its scratch area still mapped, before its clean-up.
pub struct Batch<'a> {
    leader: &'a Held,
    mem: &'a Mem,
    tail: Range<u64>,
    at: u64,
    area: Area,
    /// Calls of its clean-up.
    left: usize,
    /// What made the copy and is on its way out: the clean-up waits for its end.
    helper: Option<Tracee>,
    /// Its clean-up is still to come.
    waits: bool,
    results: Vec<i64>,
}

/// What a batch makes besides its calls. No wait of the process sees either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Twin {
    None,
    /// A copy-on-write copy.
    Copy,
    /// A process without descriptors that shares the memory: when the process is killed its end does not wait until
    /// large memory has been given back. It has to go before the process runs again.
    Heir,
}

/// What became of the wish for a copy, or an heir.
#[derive(Debug)]
pub enum Cloned {
    /// None was wanted.
    NotAsked,
    Copy(Snapshot),
    /// The kernel would not (limits on processes or memory): copy memory while the process stands.
    Failed,
}

/// How often we look whether a clone was refused: of that no tracer is told.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long a process that may not clone waits for us to see it, seconds. So long it stands still when we die then.
const SHOWN: u32 = 2;

/// How the clones went.
enum Followed {
    /// By this helper, which ends now.
    Copy(Snapshot, Tracee),
    /// There was a helper, but no copy.
    Alone,
    /// There was no helper either.
    Refused,
}

/// Runs the calls that `prepare` makes (given the address of the data area) in the leader, and makes a twin of the
/// process.
///
/// `tail` is dead executable memory, `at` a hole in the address space as long as `area`, which holds those calls.
pub fn start<'a>(
    leader: &'a Held,
    mem: &'a Mem,
    tail: Range<u64>,
    (at, area): (u64, Area),
    twin: Twin,
    prepare: &dyn Fn(u64) -> Vec<Call>,
) -> Result<(Batch<'a>, Cloned)> {
    let t = leader.tracee;
    let code = leader_code(leader, &tail, at, area, twin);
    let asm = &code.asm;
    if asm.len() as u64 + THREAD_ROOM + 16 > tail.end - tail.start {
        bail!(
            "process {}: {} bytes of dead space in its vDSO are too few for {} bytes of code",
            t.tid,
            tail.end - tail.start,
            asm.len() as u64 + THREAD_ROOM + 16
        );
    }
    mem.write(leader_mask(&tail), &leader.sigmask.to_le_bytes())?;
    mem.write(tail.start, asm.bytes())?;
    enter(leader, tail.start)?;
    let mut batch = Batch {
        leader,
        mem,
        tail,
        at,
        area,
        left: 0,
        helper: None,
        waits: false,
        results: Vec::new(),
    };
    t.set_options(libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE)?;

    step_calls(&t, 1)?;
    let got = t.regs()?.rax;
    if got != at {
        batch.waits = true;
        batch.finish()?;
        bail!(
            "process {}: no room for a scratch area: {} (see its limits, and raise them: prlimit --pid {0} --as=unlimited --data=unlimited)",
            t.tid,
            std::io::Error::from_raw_os_error(-(got as i64) as i32)
        );
    }
    batch.left = 1;
    let mut calls = prepare(at + area.data);
    // Held behind the last one, it has not stored its result yet.
    calls.push(Call::new(libc::SYS_getpid, &[]));
    let mut table = Vec::with_capacity(calls.len() * CALL_SIZE);
    calls.iter().for_each(|c| c.encode(&mut table));
    if table.len() as u64 >= area.data {
        bail!("a batch of {} calls is too long", calls.len());
    }
    mem.write(at, &table)?;
    let cloned = match &code.clones {
        Some(code) => {
            t.cont(0)?;
            let cloned = follow_clones(&t, code, mem)?;
            batch.left += usize::from(!matches!(cloned, Followed::Refused));
            batch.left += usize::from(mem.read_u64(code.subreaper)? != 0);
            match cloned {
                Followed::Copy(copy, helper) => {
                    batch.helper = Some(helper);
                    Cloned::Copy(copy)
                }
                Followed::Alone | Followed::Refused => Cloned::Failed,
            }
        }
        None => {
            step_calls(&t, calls.len())?;
            Cloned::NotAsked
        }
    };
    park(&t)?;
    let mut table = vec![0; calls.len() * CALL_SIZE];
    mem.read(at, &mut table)?;
    batch.results = table
        .chunks_exact(CALL_SIZE)
        .map(|c| i64::from_le_bytes(c[64..72].try_into().unwrap_or_default()))
        .collect();
    batch.waits = true;
    Ok((batch, cloned))
}

impl Batch<'_> {
    /// Results in the order of the calls.
    pub fn results(&self) -> &[i64] {
        &self.results
    }

    /// Bytes of the data area.
    pub fn data(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.mem.read_vec(self.at + self.area.data + offset, len)
    }

    /// Runs up to three calls in another thread of the process; `prepare` is given the address of
    /// `len` zeros it may have written to, which are returned.
    pub fn in_thread(
        &self,
        thread: &Held,
        len: usize,
        prepare: &dyn Fn(u64) -> [Call; 3],
    ) -> Result<Vec<u8>> {
        // The last page of the area: the leader's results stay as they are.
        let data = self.at + self.area.len - PAGE;
        let mask_at = leader_mask(&self.tail) + 8;
        let place = self.tail.end - THREAD_ROOM - 16;
        let calls = prepare(data);
        let a = thread_code(thread, &calls, mask_at);
        if a.len() as u64 > THREAD_ROOM {
            bail!(
                "code for thread {} is {} bytes long",
                thread.tracee.tid,
                a.len()
            );
        }
        self.mem.write(data, &vec![0; len])?;
        self.mem.write(mask_at, &thread.sigmask.to_le_bytes())?;
        self.mem.write(place, a.bytes())?;
        enter(thread, place)?;
        thread.tracee.set_options(libc::PTRACE_O_TRACESYSGOOD)?;
        step_calls(&thread.tracee, calls.len())?;
        park(&thread.tracee)?;
        thread.restore()?;
        self.mem.read_vec(data, len)
    }

    /// Runs the rest, and holds the leader as it was before the batch.
    pub fn finish(mut self) -> Result<()> {
        self.clean_up()
    }

    fn clean_up(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.waits) {
            return Ok(());
        }
        let t = self.leader.tracee;
        if let Some(helper) = self.helper.take() {
            loop {
                match helper.wait()? {
                    Stop::Exited(_) | Stop::Killed(_) => break,
                    Stop::Signal(s) => helper.cont(s)?,
                    Stop::Interrupt { .. } | Stop::Syscall | Stop::Event(_) => helper.cont(0)?,
                }
            }
        }
        // wait4 of the helper, the subreaper flag; munmap.
        step_calls(&t, self.left)?;
        park(&t)?;
        self.leader.restore()?;
        t.set_options(0)?;
        let len = (self.tail.end - self.tail.start) as usize;
        self.mem.write(self.tail.start, &vec![0; len])
    }
}

impl Drop for Batch<'_> {
    /// Whatever fails meanwhile, the program keeps nothing of ours.
    fn drop(&mut self) {
        // It has ended, then.
        let _ = self.clean_up();
    }
}

fn thread_code(thread: &Held, calls: &[Call], mask_at: u64) -> Asm {
    let mut a = Asm::new();
    for c in calls {
        a.syscall(c.nr, &c.args);
    }
    set_mask(&mut a, mask_at);
    let (rax, rip) = thread.regs.resume_point();
    a.jump_to_program(&thread.regs, rax, rip);
    a
}

struct LeaderCode {
    asm: Asm,
    clones: Option<CloneCode>,
}

/// Addresses, in the code that clones.
struct CloneCode {
    /// Whether the process is a subreaper, by then: the flag is set again at the end.
    subreaper: u64,
    /// `syscall; jmp exit` for the copy.
    stub: u64,
    /// What shows that the clone was refused.
    refused: Range<u64>,
    /// The error, by then.
    error: u64,
}

pub(super) fn leader_mask(tail: &Range<u64>) -> u64 {
    tail.end - 16
}

/// wait4(rax, 0, __WALL, 0): a helper shows no signal and leaves no zombie.
pub(super) fn reap(a: &mut Asm) {
    a.mov_reg(R::Di, R::Ax);
    a.mov(R::Si, 0);
    a.mov(R::Dx, libc::__WALL as u32 as u64);
    a.mov(R::R10, 0);
    a.mov(R::Ax, libc::SYS_wait4 as u64);
    a.syscall_insn();
}

pub(super) fn set_mask(a: &mut Asm, at: u64) {
    a.syscall(
        libc::SYS_rt_sigprocmask,
        &[libc::SIG_SETMASK as u64, at, 0, 8],
    );
}

fn leader_code(leader: &Held, tail: &Range<u64>, at: u64, area: Area, twin: Twin) -> LeaderCode {
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let subreaper = at + area.len - OWN;
    let mut a = Asm::new();
    a.syscall(libc::SYS_mmap, &[at, area.len, rw, flags, u64::MAX, 0]);
    let failed = a.jump_if_error();
    // Nobody has put calls there yet if we are gone: the area is all zeros then.
    a.interpreter(at);
    let flags = match twin {
        Twin::None => None,
        Twin::Copy => Some(0),
        Twin::Heir => Some(libc::CLONE_VM),
    };
    let clones = flags.map(|flags| clone_code(&mut a, tail.start, subreaper, flags));
    a.syscall(libc::SYS_munmap, &[at, area.len]);
    a.land_far(failed);
    set_mask(&mut a, leader_mask(tail));
    let (rax, rip) = leader.regs.resume_point();
    a.jump_to_program(&leader.regs, rax, rip);
    LeaderCode { asm: a, clones }
}

/// The helper that makes the copy, and what the leader does meanwhile. `a` will stand at `start`; from `subreaper` on
/// stand zeros.
fn clone_code(a: &mut Asm, start: u64, subreaper: u64, flags: i32) -> CloneCode {
    let (error, shown) = (subreaper + 8, subreaper + 16);
    // A subreaper would become the copy's parent.
    a.syscall(
        libc::SYS_prctl,
        &[libc::PR_GET_CHILD_SUBREAPER as u64, subreaper],
    );
    a.syscall(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER as u64, 0]);
    let shared = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS;
    a.syscall(libc::SYS_clone, &[shared as u64, 0, 0, 0, 0]);
    let parent = a.jump_if_nonzero();
    // The copy has no descriptors: what the program closes once it runs has to be closed.
    a.syscall(
        libc::SYS_close_range,
        &[0, u64::from(u32::MAX), u64::from(libc::CLOSE_RANGE_UNSHARE)],
    );
    a.syscall(libc::SYS_clone, &[flags as u64, 0, 0, 0, 0]);
    let exit = a.len();
    a.syscall(libc::SYS_exit_group, &[0]);
    let stub = start + a.len() as u64;
    a.syscall_insn();
    a.raw(&[0xeb, (exit as i64 - (a.len() as i64 + 2)) as i8 as u8]);
    a.land(parent);
    let made = a.jump_unless_error();
    let refused = start + a.len() as u64;
    a.mov(R::Bx, error);
    a.raw(&[0x48, 0x89, 0x03]); // mov [rbx], rax
    a.raw(&[0x48, 0xc7, 0x43, (shown - error) as u8]); // mov qword [rbx + 8], so many seconds
    a.raw(&SHOWN.to_le_bytes());
    // Broken off, it leaves the program's restart block alone.
    a.syscall(libc::SYS_select, &[0, 0, 0, 0, shown]);
    let refused = refused..start + a.len() as u64;
    let nobody = a.jump_short();
    a.land(made);
    reap(a);
    a.land(nobody);
    a.mov(R::Bx, subreaper);
    a.raw(&[0x8b, 0x03]); // mov eax, [rbx]
    let none = a.jump_if_zero();
    a.mov_reg(R::Si, R::Ax);
    a.mov(R::Di, libc::PR_SET_CHILD_SUBREAPER as u64);
    a.mov(R::Ax, libc::SYS_prctl as u64);
    a.syscall_insn();
    a.land(none);
    CloneCode {
        subreaper,
        stub,
        refused,
        error,
    }
}

/// Points a held thread at `code` and blocks its signals, in this order: killed in between, we leave a
/// thread that sets its mask back itself.
pub(super) fn enter(thread: &Held, code: u64) -> Result<()> {
    let mut r = thread.regs;
    r.rip = code;
    r.orig_rax = u64::MAX;
    // The direction flag and a single-step flag of the program are not for us.
    r.eflags &= !0x500;
    thread.tracee.set_regs(&r)?;
    thread.tracee.set_sigmask(ALL_SIGNALS)
}

/// Lets `n` system calls run from entry to exit; the thread stays in the last one's exit stop.
pub(super) fn step_calls(t: &Tracee, n: usize) -> Result<()> {
    let mut left = 2 * n;
    while left > 0 {
        t.cont_to_syscall()?;
        match t.wait()? {
            Stop::Syscall => left -= 1,
            // A stop signal from elsewhere does not keep it from our few instructions.
            Stop::Interrupt { .. } | Stop::Event(_) => {}
            other => bail!("thread {} ended while it worked for us: {other:?}", t.tid),
        }
    }
    Ok(())
}

/// Brings a thread that is in a system call's exit (or an event) into an interrupt stop before its
/// next instruction: only there the kernel acts on restart codes in the registers.
pub(super) fn park(t: &Tracee) -> Result<()> {
    t.interrupt()
        .with_context(|| format!("interrupting thread {}", t.tid))?;
    t.cont(0)?;
    loop {
        match t.wait()? {
            Stop::Interrupt { .. } => return Ok(()),
            Stop::Syscall | Stop::Event(_) => t.cont(0)?,
            other => bail!("thread {} ended while it worked for us: {other:?}", t.tid),
        }
    }
}

/// From the call table over the clones: the helper (which shares everything) makes the copy and exits.
/// Leaves the target in its clone event, or behind the clone that was refused, and the copy held before its first
/// instruction.
fn follow_clones(t: &Tracee, code: &CloneCode, mem: &Mem) -> Result<Followed> {
    loop {
        match t.wait_timeout(LOOK_EVERY)? {
            Some(Stop::Event(libc::PTRACE_EVENT_CLONE)) => break,
            Some(Stop::Interrupt { .. } | Stop::Syscall) => t.cont(0)?,
            Some(other) => bail!("thread {} ended while it worked for us: {other:?}", t.tid),
            None if mem.read_u64(code.error)? == 0 => {}
            None => return leave_refused(t, code),
        }
    }
    let helper = Tracee {
        tid: t.event_message()?,
    };
    // It is ours alone and gone in a moment: while it copies page tables the process stands.
    sched::urge(helper.tid);
    let tracee = loop {
        match helper.wait()? {
            Stop::Event(libc::PTRACE_EVENT_CLONE) => {
                let tid = helper.event_message()?;
                helper.cont(0)?;
                break Tracee { tid };
            }
            Stop::Exited(_) | Stop::Killed(_) => return Ok(Followed::Alone),
            Stop::Interrupt { .. } | Stop::Syscall | Stop::Event(_) => helper.cont(0)?,
            Stop::Signal(s) => helper.cont(s)?,
        }
    };
    // Its first stop; it is held there.
    tracee.wait()?;
    // An heir has the code that lets it exit only as long as the process has it.
    tracee.set_options(libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL)?;
    let stub = code.stub;
    Ok(Followed::Copy(Snapshot { tracee, stub }, helper))
}

/// Out of the wait in which a process shows us that it may not clone.
fn leave_refused(t: &Tracee, code: &CloneCode) -> Result<Followed> {
    t.interrupt()
        .with_context(|| format!("interrupting thread {}", t.tid))?;
    t.wait_interrupted()?;
    let mut r = t.regs()?;
    if r.rip != code.refused.end && !code.refused.contains(&r.rip) {
        bail!(
            "process {} may not clone itself (limit on processes), and ran on before we saw it; try again",
            t.tid
        );
    }
    r.rip = code.refused.end;
    r.orig_rax = u64::MAX;
    t.set_regs(&r)?;
    Ok(Followed::Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_fits_into_its_room() {
        let far = 0x7fff_ffff_f000;
        let mut regs = Regs::default();
        for r in (0..16).filter_map(R::numbered) {
            regs.set(r, far);
        }
        regs.rip = far;
        let leader = Held {
            tracee: Tracee { tid: 1 },
            regs,
            program: regs,
            resume: Resume::Run,
            stopped_at: 0,
            deadline: None,
            tick: None,
            noted: None,
            sigmask: 0,
            stopped_by: None,
        };
        let code = leader_code(
            &leader,
            &(far..far + ROOM),
            far,
            Area::holding(1, 0),
            Twin::Copy,
        );
        let len = code.asm.len() as u64;
        assert!(len + THREAD_ROOM + 16 <= ROOM, "{len}");
        // What threads are told to make: sigaltstack, prctl, get_robust_list.
        let calls = [[0, far, 0], [40, far, 0], [1 << 22, far, far]];
        let calls = calls.map(|c| Call::new(libc::SYS_get_robust_list, &c));
        let len = thread_code(&leader, &calls, far).len() as u64;
        assert!(len <= THREAD_ROOM, "{len}");
    }
}
