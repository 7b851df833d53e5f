//! How the threads of a rebuilt process go on: in the middle of the calls they slept in.
//!
//! All but few of them are left to the kernel, which issues a call again that ended with one of its
//! restart codes, or ends it with EINTR where a signal has come meanwhile. For nanosleep, poll and
//! futex with a time-out the kernel remembers when they end; so we let the thread begin such a call
//! with the time it has left, and stop it in there. The rest goes through trampolines in the dead end
//! of the vDSO, as in a dump.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::image::process::Process;
use crate::image::threads::{Resume, Thread};
use crate::kernel::arch::{
    ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTNOINTR, ERESTARTSYS, Regs,
    trampoline::{self, Trampoline},
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

/// Bytes of the vDSO's dead end that stay for trampolines which calls share.
const SPARE: usize = 64;

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
    // Signal handlers return to what is there already.
    let dead = bytes.get((start - vdso.0) as usize..).unwrap_or_default();
    let kept = dead.iter().position(|b| *b != 0);
    let mut place = Place {
        start,
        lowest: kept.map_or(vdso.1, |i| start + i as u64),
        shared: BTreeMap::new(),
        apart: Vec::new(),
    };
    let mut order: Vec<_> = threads.iter().zip(&p.threads).collect();
    order.sort_by_key(|(_, t)| loss(t));
    for (r, t) in order {
        let regs = go_on(r.tracee, t, mem, &mut place, after)
            .with_context(|| format!("setting thread {} going", t.tid))?;
        if !t.xstate.is_empty() {
            r.tracee.set_xstate(&t.xstate)?;
        }
        r.tracee.set_regs(&regs)?;
        r.tracee.set_sigmask(t.sigmask)?;
    }
    // With many threads the first of them was long ago.
    let now = host_monotonic_ns();
    for apart in place.apart {
        let end = now.saturating_add(apart.left);
        if apart.noted {
            mem.write(apart.due.rip + trampoline::NOTE_AT, &end.to_le_bytes())?;
        }
        after.due.push(Due { end, ..apart.due });
    }
    Ok(())
}

/// Who gets room first: those whom it would show without, and then those that would end latest.
fn loss(t: &Thread) -> (u8, Reverse<i64>) {
    match t.resume {
        Resume::Partial { .. } => (0, Reverse(0)),
        Resume::Timed { nr, left_ns } if calls::socket_option(nr).is_none() => {
            (1, Reverse(left_ns))
        }
        _ => (2, Reverse(0)),
    }
}

/// The dead end of the vDSO; trampolines stand from `lowest` on.
struct Place {
    start: u64,
    lowest: u64,
    /// Trampolines without a note, by the call and where they lead.
    shared: BTreeMap<(u64, u64), u64>,
    apart: Vec<Apart>,
}

/// A call whose end is to be said: its trampoline has a note, or not.
struct Apart {
    due: Due,
    left: i64,
    noted: bool,
}

impl Place {
    /// The address of a trampoline with so many bytes, which does not depend on the address.
    fn take(&mut self, len: usize) -> Option<u64> {
        let at = self.lowest.checked_sub(len as u64)? & !7;
        // What the next dump needs stays free.
        (at >= self.start + batch::ROOM).then(|| {
            self.lowest = at;
            at
        })
    }

    /// A call in a trampoline, with these registers, is to end when no time is `left`.
    fn ends(&mut self, tid: i32, regs: &Regs, how: TimeIsUp, left: i64, noted: bool) {
        let due = Due {
            tid,
            nr: regs.orig_rax,
            rip: regs.rip,
            end: 0,
            how,
        };
        self.apart.push(Apart { due, left, noted });
    }

    /// A trampoline for a call that goes on as it is, so that it can be told from those which the program makes after
    /// it. As long as there is room for one each it has a note (true).
    fn apart(&mut self, regs: &Regs, nr: u64, mem: &Mem) -> Result<Option<(Trampoline, bool)>> {
        let emit = |at, note| trampoline::emit(at, regs, nr, &[], None, note, &[], &[]);
        let len = |note| emit(0, note).bytes.len();
        let room = self.lowest.saturating_sub(self.start + batch::ROOM) as usize;
        let note = (room >= len(Some(0)) + SPARE).then_some(0);
        let known = self.shared.get(&(nr, regs.rip)).copied();
        let at = match known.filter(|_| note.is_none()) {
            Some(at) => at,
            None => match self.take(len(note)) {
                Some(at) => at,
                None => return Ok(None),
            },
        };
        if note.is_none() {
            self.shared.insert((nr, regs.rip), at);
        }
        let t = emit(at, note);
        mem.write(at, &t.bytes)?;
        Ok(Some((t, note.is_some())))
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
        Resume::Timed { nr, left_ns } => (nr, left_ns),
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
                let how = s.time_is_up(nr);
                after.sockets.shorten(s, tracee.tid, nr, left)?;
                if let Some((t, noted)) = place.apart(&regs, nr, mem)? {
                    regs = t.regs;
                    place.ends(tracee.tid, &regs, how, left, noted);
                }
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
    let note = socket.as_ref().map(|_| 0);
    let Some(sketch) = calls::rest(0, &regs, &t.resume, left, note, mem)? else {
        return Ok(regs);
    };
    let Some(at) = place.take(sketch.bytes.len()) else {
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
    if let Some(t) = calls::rest(at, &regs, &t.resume, left, note, mem)? {
        mem.write(at, &t.bytes)?;
        regs = t.regs;
    }
    if let Some(s) = socket {
        let how = s.time_is_up(nr);
        after.sockets.shorten(s, tracee.tid, regs.orig_rax, left)?;
        place.ends(tracee.tid, &regs, how, left, true);
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
