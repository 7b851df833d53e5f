//! How the threads of a rebuilt process go on: in the middle of the calls they slept in.
//!
//! All but few of them are left to the kernel, which issues a call again that ended with one of its
//! restart codes, or ends it with EINTR where a signal has come meanwhile. For nanosleep, poll and
//! futex with a time-out the kernel remembers when they end; so we let the thread begin such a call
//! with the time it has left, and stop it in there. The rest goes through trampolines in the dead end
//! of the vDSO, or what is added to it, as in a dump.

use anyhow::{Context, Result, bail};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use crate::image::process::Process;
use crate::image::threads::{Resume, Thread};
use crate::kernel::annex;
use crate::kernel::arch::{
    ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTNOINTR, ERESTARTSYS, Regs,
    trampoline::{self, Common},
};
use crate::kernel::batch;
use crate::kernel::calls::{self, Broken, TimeIsUp, Timeout};
use crate::kernel::mem::Mem;
use crate::kernel::remote::Remote;
use crate::kernel::socket_timeout::{Shortened, SocketTimeout};
use crate::kernel::time_ns::host_monotonic_ns;
use crate::kernel::tracee::{Stop, Tracee};
use crate::kernel::vdso;
use crate::kernel::waker::{self, Due};

/// What is to be done once the threads of all processes run.
#[derive(Debug, Default)]
pub struct Afterwards {
    sockets: Shortened,
    due: Vec<Due>,
    pub warnings: Vec<String>,
}

impl Afterwards {
    /// Gives sockets their own time-outs again, and leaves behind who ends calls in time.
    pub fn finish(&mut self) -> Result<()> {
        self.sockets.put_back()?;
        if let Err(e) = waker::start(&self.due) {
            self.warnings.push(format!(
                "calls that their socket's time-out ends may end late, by some hundredths of a second or more: {e:#}"
            ));
        }
        Ok(())
    }
}

/// Registers and masks of all threads, right before they are released; `vdso` is the range of the one
/// that works here. Nothing of ours is needed in the process any more.
pub fn set(
    mem: &Mem,
    threads: &[&Remote],
    p: &Process,
    vdso: (u64, u64),
    after: &mut Afterwards,
) -> Result<()> {
    let bytes = mem.read_vec(vdso.0, vdso.1.saturating_sub(vdso.0) as usize)?;
    let start = (vdso.0 + vdso::elf_len(&bytes)?).next_multiple_of(8);
    let note = vdso.1.saturating_sub(annex::NOTE);
    // Signal handlers return to what is there already.
    let dead = bytes.get((start - vdso.0) as usize..).unwrap_or_default();
    let kept = dead.iter().position(|b| *b != 0);
    let mut place = Place {
        start,
        room: Room {
            // Behind it stands where there is more room.
            lowest: kept.map_or(note, |i| (start + i as u64).min(note)),
            floor: start + batch::ROOM,
            annex: 0..0,
        },
        common: Common::default(),
        apart: BTreeMap::new(),
    };
    for t in &p.threads {
        if let (Resume::Timed { nr, .. }, Some(regs)) = (&t.resume, Regs::from_bytes(&t.regs)) {
            let by_itself = matches!(calls::timeout(*nr, &regs), Some((_, Broken::RestartBlock)));
            // A call without a time-out of its own may have its socket's.
            if !by_itself {
                place.common.may_want(&t.resume, &regs);
            }
        }
    }
    if let Some(leader) = threads.first() {
        place.room.widen(leader, p, vdso.0, note)?;
    }
    let mut order: Vec<_> = threads.iter().zip(&p.threads).collect();
    order.sort_by_key(|(_, t)| loss(t));
    let mut all = Vec::with_capacity(order.len());
    for (r, t) in order {
        let regs = go_on(r.tracee, t, mem, &mut place, after)
            .with_context(|| format!("setting thread {} going", t.tid))?;
        if !t.xstate.is_empty() {
            r.tracee.set_xstate(&t.xstate)?;
        }
        all.push((r.tracee, regs, t.sigmask));
    }
    // With many threads the first of them was long ago.
    let now = host_monotonic_ns();
    for (due, left) in place.apart.values() {
        let end = now.saturating_add(*left);
        after.due.push(Due { end, ..*due });
    }
    for (tracee, mut regs, sigmask) in all {
        if let Some((due, left)) = place.apart.get(&tracee.tid) {
            regs.orig_rax = trampoline::note(due.nr, now.saturating_add(*left), now);
        }
        tracee.set_regs(&regs)?;
        tracee.set_sigmask(sigmask)?;
    }
    Ok(())
}

/// Who gets room first: those whom it would show without, and then those that would end latest.
fn loss(t: &Thread) -> (u8, Reverse<i64>) {
    match t.resume {
        Resume::Partial { .. } => (0, Reverse(0)),
        Resume::Timed { nr, left_ns, .. } if calls::socket_option(nr).is_none() => {
            (1, Reverse(left_ns))
        }
        _ => (2, Reverse(0)),
    }
}

/// Trampolines stand from `lowest` on. What is below the `floor` is for the next dump.
struct Room {
    lowest: u64,
    floor: u64,
    /// What is free of it.
    annex: Range<u64>,
}

impl Room {
    /// Where the vDSO has too little room for calls that have yet to transfer something, which would be seen, the
    /// process gets more.
    fn widen(&mut self, leader: &Remote, p: &Process, vdso: u64, note: u64) -> Result<()> {
        let mut wanted = 0;
        for t in &p.threads {
            if let (Resume::Partial { .. }, Some(regs)) = (&t.resume, Regs::from_bytes(&t.regs))
                && let Some(sketch) = calls::rest(0, &regs, &t.resume, 0, leader.mem())?
            {
                wanted += sketch.bytes.len() as u64;
            }
        }
        if wanted > self.lowest.saturating_sub(self.floor) & !7 {
            // Without it whoever finds none says so.
            if let Ok(annex) = annex::add_to_rebuilt(leader, vdso, note, wanted) {
                self.annex = annex::room(&annex);
            }
        }
        Ok(())
    }

    /// The address of a trampoline with so many bytes, which does not depend on the address. Others keep `spare` bytes.
    fn take(&mut self, len: usize, spare: u64) -> Option<u64> {
        let below = |end: u64| Some(end.checked_sub(len as u64)? & !7);
        if let Some(at) = below(self.lowest).filter(|at| *at >= self.floor + spare) {
            self.lowest = at;
            return Some(at);
        }
        let at = below(self.annex.end).filter(|at| *at >= self.annex.start)?;
        self.annex.end = at;
        Some(at)
    }
}

/// The dead end of the vDSO.
struct Place {
    start: u64,
    room: Room,
    common: Common,
    /// Calls that somebody is to end, and what is left of their time.
    apart: BTreeMap<i32, (Due, i64)>,
}

impl Place {
    /// A call in a trampoline, with these registers, is to end when no time is `left`.
    fn ends(&mut self, tid: i32, nr: u64, regs: &Regs, how: TimeIsUp, left: i64) {
        let due = Due {
            tid,
            nr,
            rip: regs.rip,
            end: 0,
            how,
        };
        self.apart.insert(tid, (due, left));
    }

    /// A call goes on as it is through a trampoline, so that it can be told from those which the program makes after it,
    /// until somebody ends it. False where there is no room for that.
    fn go_back(
        &mut self,
        tid: i32,
        resume: &Resume,
        regs: &mut Regs,
        how: TimeIsUp,
        left: i64,
        mem: &Mem,
    ) -> Result<bool> {
        let take = |len| self.room.take(len, 0);
        let Some(there) = self.common.place(resume, regs, mem, take)? else {
            return Ok(false);
        };
        *regs = there;
        self.ends(tid, regs.orig_rax, regs, how, left);
        Ok(true)
    }
}

fn go_on(
    tracee: Tracee,
    t: &Thread,
    mem: &Mem,
    place: &mut Place,
    after: &mut Afterwards,
) -> Result<Regs> {
    let Some(mut regs) = Regs::from_bytes(&t.regs) else {
        bail!("it has {} bytes of registers", t.regs.len())
    };
    let (nr, left) = match t.resume {
        Resume::Run => {
            regs.orig_rax = u64::MAX;
            return Ok(regs);
        }
        Resume::Timed { nr, left_ns, .. } => (nr, left_ns),
        Resume::Partial { nr, left_ns, .. } => (nr, left_ns.unwrap_or(0)),
        Resume::Again { nr } => (nr, 0),
    };
    regs.orig_rax = nr;
    if !matches!(
        -(regs.rax as i64),
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND
    ) {
        // There is no restart block in a new thread.
        regs.rax = -ERESTARTNOHAND as u64;
    }
    if let Resume::Timed { .. } = t.resume {
        match calls::timeout(nr, &regs) {
            Some((timeout, Broken::RestartBlock)) => {
                let result = begin(tracee, timeout, &regs, left, mem, place.start)?;
                regs.rax = result as u64;
                if result != -ERESTART_RESTARTBLOCK {
                    // It has ended already.
                    regs.orig_rax = u64::MAX;
                }
                return Ok(regs);
            }
            None => {
                let socket = SocketTimeout::of(tracee.tid, nr, regs.arg(0) as i32);
                let Ok(Some(s)) = socket else {
                    return Ok(regs);
                };
                let s = s.connecting_again(t.resume.connects_again());
                let how = s.time_is_up(nr);
                after.sockets.shorten(s, tracee.tid, nr, left)?;
                place.go_back(tracee.tid, &t.resume, &mut regs, how, left, mem)?;
                return Ok(regs);
            }
            Some(_) => {}
        }
    }
    // Of bytes on a socket with a time-out.
    let socket = match t.resume {
        Resume::Partial {
            left_ns: Some(_), ..
        } => SocketTimeout::of(tracee.tid, nr, regs.arg(0) as i32)?,
        _ => None,
    };
    let Some(sketch) = calls::rest(0, &regs, &t.resume, left, mem)? else {
        return Ok(regs);
    };
    let timed = matches!(t.resume, Resume::Timed { .. });
    let spare = if timed { place.common.room() } else { 0 };
    let Some(at) = place.room.take(sketch.bytes.len(), spare) else {
        let how = calls::own_time_is_up(nr);
        if timed && place.go_back(tracee.tid, &t.resume, &mut regs, how, left, mem)? {
            return Ok(regs);
        }
        after.warnings.push(format!(
            "thread {}: no room left in the vDSO to let its system call {nr} end in time; it {}",
            t.tid,
            if let Resume::Partial { done, .. } = t.resume {
                regs.rax = done;
                regs.orig_rax = u64::MAX;
                "returns what was transferred so far"
            } else {
                "waits its whole time again"
            }
        ));
        return Ok(regs);
    };
    if let Some(t) = calls::rest(at, &regs, &t.resume, left, mem)? {
        mem.write(at, &t.bytes)?;
        regs = t.regs;
    }
    if let Some(s) = socket {
        let how = s.time_is_up(nr);
        after.sockets.shorten(s, tracee.tid, regs.orig_rax, left)?;
        place.ends(tracee.tid, regs.orig_rax, &regs, how, left);
    }
    Ok(regs)
}

/// Lets a thread begin its call with the time it has left and be interrupted at once, with everything
/// but SIGKILL blocked: what the call returns is then -ERESTART_RESTARTBLOCK, and the kernel knows when
/// it ends. Or its result, if there was nothing to wait for.
fn begin(
    tracee: Tracee,
    timeout: Timeout,
    program: &Regs,
    left: i64,
    mem: &Mem,
    place: u64,
) -> Result<i64> {
    const SYSCALL: [u8; 8] = [0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc];
    let mut code = SYSCALL.to_vec();
    let mut regs = *program;
    regs.rip = place;
    regs.rax = program.orig_rax;
    regs.orig_rax = u64::MAX;
    regs.eflags = 0x202;
    let left = left.max(1);
    let (argument, value) = match timeout {
        Timeout::Millis(i) => (i, calls::millis(left)),
        Timeout::Timespec(i) => {
            code.extend(calls::timespec(left as u64));
            (i, place + SYSCALL.len() as u64)
        }
        Timeout::Timeval(i) => {
            code.extend(calls::timeval(left as u64));
            (i, place + SYSCALL.len() as u64)
        }
    };
    if let Some(r) = Regs::ARGS.get(argument) {
        regs.set(*r, value);
    }
    mem.write(place, &code)?;
    tracee.set_regs(&regs)?;
    tracee.cont_to_syscall()?;
    wait_for(tracee, |s| s == Stop::Syscall)?;
    // It has not begun yet; with this pending it will not sleep.
    tracee
        .interrupt()
        .with_context(|| format!("interrupting thread {}", tracee.tid))?;
    tracee.cont(0)?;
    wait_for(tracee, |s| matches!(s, Stop::Interrupt { .. }))?;
    let result = tracee.regs()?.rax as i64;
    mem.write(place, &vec![0; code.len()])?;
    Ok(result)
}

fn wait_for(tracee: Tracee, wanted: impl Fn(Stop) -> bool) -> Result<()> {
    loop {
        match tracee.wait()? {
            s if wanted(s) => return Ok(()),
            Stop::Interrupt { .. } => tracee.cont_to_syscall()?,
            Stop::Syscall | Stop::Event(_) => tracee.cont(0)?,
            other => bail!("it ended: {other:?}"),
        }
    }
}
