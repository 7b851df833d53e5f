//! A stop must not show: how a thread that was stopped in a system call goes on, here and in a
//! restored process.
//!
//! The kernel lets calls that a tracer's stop broke off go on by themselves, if they end with one of
//! its restart codes. Others return to the program, with EINTR or with less than was asked. So, as the
//! first act after a thread's stop, EINTR is turned into the restart code -ERESTARTNOHAND (which still
//! becomes EINTR when there is a signal with a handler), and a short count into a trampoline for the
//! rest. Time-outs that were the kernel's only memory of the time left are renewed right before the
//! release, in trampolines, too; should we die before that, such a call waits its whole time again.

mod deadlines;
mod tail;

use std::os::unix::fs::FileTypeExt;

use anyhow::Result;

pub use deadlines::Watch;
pub use tail::Tail;

use crate::image::threads::Resume;
use crate::kernel::arch::trampoline::{self, Common};
use crate::kernel::arch::{self, ERESTARTNOHAND, NR_RESTART_SYSCALL, Regs};
use crate::kernel::batch::Held;
use crate::kernel::calls::{self, Broken};
use crate::kernel::mem::Mem;
use crate::kernel::proc_file;
use crate::kernel::socket_timeout::{self, Shortened, SocketTimeout};
use crate::kernel::time_ns::host_monotonic_ns;
use crate::kernel::waker::{self, Due};

const EINTR: i64 = libc::EINTR as i64;

/// What the stop did to a thread; its registers are put right at once. False for a thread that still
/// runs code that a mistctl which died has left in the vDSO: let it finish that.
pub fn first_act(held: &mut Held, mem: &Mem, tail: &mut Tail) -> Result<bool> {
    let mut seen = held.regs;
    if tail.holds(seen.rip) {
        let code = tail.code(seen.rip, mem)?;
        let mut code = code.as_slice();
        if let [0x0f, 0x05, behind @ ..] = code {
            // On its way into the call.
            (seen.orig_rax, seen.rax) = (seen.rax, -ERESTARTNOHAND as u64);
            seen.rip += 2;
            code = behind;
        }
        let broken = seen.syscall().is_some() && calls::is_broken(&seen);
        let probe = Regs {
            rax: if broken { -EINTR as u64 } else { seen.rax },
            ..seen
        };
        let Some(mut out) = trampoline::run_out(code, &probe) else {
            return Ok(false);
        };
        if broken {
            held.noted = trampoline::noted(seen.orig_rax, held.stopped_at);
            let done = out.rax;
            out.rax = -ERESTARTNOHAND as u64;
            let nr = out.syscall().unwrap_or(out.orig_rax);
            out.orig_rax = nr;
            held.program = out;
            held.resume = if (done as i64) > 0 {
                Resume::Partial {
                    nr,
                    done,
                    left_ns: None,
                }
            } else {
                Resume::Timed {
                    nr,
                    left_ns: 0,
                    again: trampoline::leads_connect_again(code, &probe),
                }
            };
            if -(held.regs.rax as i64) == EINTR && held.stopped_by.is_none() {
                held.regs.rax = -ERESTARTNOHAND as u64;
                held.tracee.set_regs(&held.regs)?;
            }
            return Ok(true);
        }
        // The call is over: out of the trampoline, with what it returned.
        held.regs = out;
        held.tracee.set_regs(&held.regs)?;
        seen = out;
    }
    held.program = seen;
    let Some(nr) = seen.syscall() else {
        return Ok(true);
    };
    let result = seen.rax as i64;
    if result == -EINTR && held.stopped_by.is_none() {
        let socket = || {
            calls::socket_option(nr).is_some()
                && socket_timeout::is_socket(held.tracee.tid, seen.arg(0) as i32)
        };
        if calls::shows_stop(nr) || socket() {
            held.program.rax = -ERESTARTNOHAND as u64;
            held.regs = held.program;
            held.tracee.set_regs(&held.regs)?;
            // With a time-out of its arguments or of its socket; [`settle`] finds out.
            held.resume = Resume::timed(nr);
        }
    } else if calls::is_broken(&seen) {
        held.resume = Resume::Again { nr };
        if let Some((_, broken)) = calls::timeout(nr, &seen)
            && broken != Broken::Updated
        {
            held.resume = Resume::timed(nr);
        }
        if nr == NR_RESTART_SYSCALL {
            held.resume = Resume::timed(nr);
        }
    } else if result > 0
        && let Some(t) = calls::transfer(nr, &seen)
        && calls::asked(t, &seen, mem).is_ok_and(|(all, _)| (result as u64) < all)
        && waits(held.tracee.tid, nr, &seen)
    {
        held.program.rax = -ERESTARTNOHAND as u64;
        held.resume = Resume::Partial {
            nr,
            done: result as u64,
            left_ns: None,
        };
        if place(held, 0, mem, tail, false, 0)? {
            held.tracee.set_regs(&held.regs)?;
        }
    }
    Ok(true)
}

/// Whether such a call would have waited to transfer all: a pipe, socket or terminal that blocks.
fn waits(tid: i32, nr: u64, r: &Regs) -> bool {
    if nr as i64 == libc::SYS_getrandom {
        return true;
    }
    let fd = r.arg(0) as i32;
    let kind = std::fs::metadata(format!("/proc/{tid}/fd/{fd}")).map(|m| m.file_type());
    if !kind.is_ok_and(|k| k.is_fifo() || k.is_socket() || k.is_char_device()) {
        return false;
    }
    let info = proc_file::text(format!("/proc/{tid}/fdinfo/{fd}")).unwrap_or_default();
    let flags = info
        .lines()
        .find_map(|l| l.strip_prefix("flags:"))
        .and_then(|v| i32::from_str_radix(v.trim(), 8).ok());
    flags.is_some_and(|f| f & libc::O_NONBLOCK == 0)
}

/// Once all threads stand: when their calls are to time out, and trampolines for what they have yet
/// to transfer, so that from now on our death shows as little as our going on.
pub fn settle(threads: &mut [Held], watch: &Watch, mem: &Mem, tail: &mut Tail) -> Result<()> {
    tail.forget();
    for h in threads.iter() {
        if tail.holds(h.regs.rip) {
            tail.keep(&h.regs, mem);
        }
        keep_frames(h, mem, tail);
    }
    for h in threads.iter_mut() {
        let tid = h.tracee.tid;
        if let Resume::Timed { nr, .. } = &mut h.resume
            && *nr == NR_RESTART_SYSCALL
        {
            *nr = watch.restarted(tid, &h.program, mem);
            // The kernel asks its restart block, not this.
            h.program.orig_rax = *nr;
        }
        let (Resume::Timed { nr, .. } | Resume::Again { nr } | Resume::Partial { nr, .. }) =
            h.resume
        else {
            continue;
        };
        match calls::timeout(nr, &h.program) {
            // Of what it sleeps for the kernel knows only when it ends at the latest.
            Some(_) if h.noted.is_some() => h.deadline = h.noted,
            Some((t, broken)) => {
                let left = time_left(nr, t, broken, &h.program, mem);
                let left = left.map(|l| h.stopped_at.saturating_add(l));
                h.deadline = watch.end(tid, nr, &h.program, left);
            }
            None => {
                let may_be = h.program.rax as i64 == -ERESTARTNOHAND
                    && !matches!(h.resume, Resume::Again { .. });
                let socket = match may_be {
                    true => SocketTimeout::of(tid, nr, h.program.arg(0) as i32),
                    false => Ok(None),
                };
                match (socket, &h.resume) {
                    (Ok(Some(s)), _) => {
                        (h.deadline, h.tick) = socket_end(h, &s, nr, watch);
                        let end = h.deadline.unwrap_or(h.stopped_at);
                        let since = watch.socket_begin(tid, s.whole_ns());
                        // Of one that we let go on before, it has been found out then.
                        if let Resume::Timed { again, .. } = &mut h.resume
                            && !tail.holds(h.regs.rip)
                        {
                            *again = s.connects_again(nr, since, end);
                        }
                    }
                    (_, Resume::Partial { .. }) => {}
                    _ => h.resume = Resume::Again { nr },
                }
            }
        }
    }
    // For the others the time of those who were stopped first has gone on.
    let stood = threads.iter().map(|h| h.stopped_at).max().unwrap_or(0);
    for h in threads.iter_mut() {
        if let Resume::Timed { nr, left_ns, .. } = &mut h.resume {
            *left_ns = match (h.deadline, calls::timeout(*nr, &h.program)) {
                (Some(d), _) => (d - stood).max(0),
                (None, Some((t, _))) => calls::argument(t, &h.program, mem).unwrap_or(0),
                (None, None) => 0,
            };
        }
        if let Resume::Partial { left_ns, .. } = &mut h.resume {
            *left_ns = h.deadline.map(|d| (d - stood).max(0));
        }
        if matches!(h.resume, Resume::Partial { .. })
            && !tail.holds(h.regs.rip)
            && place(h, 0, mem, tail, false, 0)?
        {
            h.tracee.set_regs(&h.regs)?;
        }
    }
    place_the_rest(threads, mem, tail)
}

/// Those for which the vDSO has no room get it elsewhere in the process; what nobody uses there any more goes.
fn place_the_rest(threads: &mut [Held], mem: &Mem, tail: &mut Tail) -> Result<()> {
    let mut room = 0;
    for h in threads.iter() {
        if matches!(h.resume, Resume::Partial { .. })
            && !tail.holds(h.regs.rip)
            && let Some(sketch) = calls::rest(0, &h.program, &h.resume, 0, mem)?
        {
            room += sketch.bytes.len() as u64;
        }
    }
    let Some(leader) = threads.first() else {
        return Ok(());
    };
    // Without room the program sees a short count.
    if tail.tidy(leader, mem).is_err() || room == 0 || tail.extend(leader, mem, room).is_err() {
        return Ok(());
    }
    for h in threads.iter_mut() {
        if matches!(h.resume, Resume::Partial { .. })
            && !tail.holds(h.regs.rip)
            && place(h, 0, mem, tail, false, 0)?
        {
            h.tracee.set_regs(&h.regs)?;
        }
    }
    Ok(())
}

/// When a socket's time-out ends a thread's call, and the number of the tick that does it where that is known.
fn socket_end(h: &Held, s: &SocketTimeout, nr: u64, watch: &Watch) -> (Option<i64>, Option<i64>) {
    let (tid, whole) = (h.tracee.tid, s.whole_ns());
    // What is noted may be of an earlier part.
    let partial = matches!(h.resume, Resume::Partial { .. });
    let noted = h.noted.filter(|_| !partial || !s.time_is_up(nr).restarts);
    let end = match (watch.tick(tid), noted) {
        // In a restored process the tick may come later than the call is to end.
        (Some((end, number)), noted) if noted.is_none_or(|noted| end <= noted) => {
            return (Some(end), Some(number));
        }
        (_, Some(noted)) => Some(noted),
        _ => watch.socket_end(tid, nr, whole),
    };
    (end.or(Some(h.stopped_at.saturating_add(whole))), None)
}

/// What is left of a time-out, as the kernel has written it where the program wanted to know.
fn time_left(nr: u64, t: calls::Timeout, broken: Broken, program: &Regs, mem: &Mem) -> Option<i64> {
    if broken == Broken::Updated {
        return calls::argument(t, program, mem).ok();
    }
    let at = match nr as i64 {
        libc::SYS_nanosleep => program.arg(1),
        libc::SYS_clock_nanosleep => program.arg(3),
        _ => return None,
    };
    let first = Regs {
        rdi: at,
        ..Regs::default()
    };
    let rest = calls::Timeout::Timespec(0);
    (at != 0)
        .then(|| calls::argument(rest, &first, mem).ok())
        .flatten()
}

/// A signal frame on a thread's stack may lead back into a trampoline: that one stays.
fn keep_frames(h: &Held, mem: &Mem, tail: &mut Tail) {
    const FRAMES: u64 = 64 * 1024;
    if !tail.in_use(mem) {
        return;
    }
    let mut stack = vec![0; FRAMES as usize];
    let mut got = 0;
    while got < stack.len() {
        let at = h.regs.rsp + got as u64;
        let end = (stack.len()).min(got + (arch::PAGE - at % arch::PAGE) as usize);
        if mem.read(at, &mut stack[got..end]).is_err() {
            break;
        }
        got = end;
    }
    for w in stack[..got].chunks_exact(8) {
        let value = w.try_into().map_or(0, u64::from_le_bytes);
        if tail.holds(value) {
            let there = Regs {
                rip: value,
                ..Regs::default()
            };
            tail.keep_frame(&there, mem);
        }
    }
}

/// Writes a trampoline for the rest of a thread's call and points the thread there.
/// The `last` time no batch comes before the release.
/// So much `room` of the tail stays for others.
fn place(
    h: &mut Held,
    left: i64,
    mem: &Mem,
    tail: &mut Tail,
    last: bool,
    room: u64,
) -> Result<bool> {
    let Some(sketch) = calls::rest(0, &h.program, &h.resume, left, mem)? else {
        return Ok(false);
    };
    let len = sketch.bytes.len();
    let at = match h.resume {
        // A short count would show; that the next dump may have to wait does not.
        Resume::Partial { .. } if last => tail.take_last(len),
        _ => tail.take(len, room),
    };
    let Some(at) = at else {
        return Ok(false);
    };
    let Some(t) = calls::rest(at, &h.program, &h.resume, left, mem)? else {
        return Ok(false);
    };
    mem.write(at, &t.bytes)?;
    h.regs = t.regs;
    Ok(true)
}

/// Right before the release: time-outs get what is left of them now. Where the tail has no room for a trampoline of its
/// own, the call waits its whole time again, and somebody else ends it.
/// What is to be done once the threads run is returned.
pub fn renew(threads: &mut [Held], mem: &Mem, tail: &mut Tail) -> Renewed {
    let mut sockets = Shortened::default();
    let mut common = common(threads, tail);
    let mut due = Vec::new();
    // Those first that would lose most without room.
    let mut order: Vec<&mut Held> = threads.iter_mut().collect();
    order.sort_by_key(|h| {
        let partial = matches!(h.resume, Resume::Partial { .. });
        std::cmp::Reverse((partial, h.deadline))
    });
    for h in order {
        let now = host_monotonic_ns();
        let left = h.deadline.map(|d| (d - now).max(0));
        match (&h.resume, left) {
            (Resume::Partial { nr, .. }, left) => {
                let nr = *nr;
                if !tail.holds(h.regs.rip) {
                    // Without room the program sees a short count.
                    let _ = place(h, 0, mem, tail, true, 0);
                }
                let fd = h.program.arg(0) as i32;
                if let Some(left) = left
                    && tail.holds(h.regs.rip)
                    && let Ok(Some(s)) = SocketTimeout::of(h.tracee.tid, nr, fd)
                {
                    // The rest of a message is another call. It is in that, or right in front of it.
                    let called = h.regs.syscall().or_else(|| Regs::called(h.regs.rax));
                    let called = called.unwrap_or(nr);
                    let _ = shorten(&mut sockets, s, h, called, left);
                    note(h, called, now + left);
                }
            }
            (Resume::Again { nr }, Some(left)) => {
                if let Some((t, Broken::Updated)) = calls::timeout(*nr, &h.program) {
                    let _ = overwrite(t, &h.program, left, mem);
                }
            }
            (Resume::Timed { nr, .. }, Some(left)) => {
                let nr = *nr;
                match calls::timeout(nr, &h.program) {
                    Some((_, Broken::RestartBlock)) => {}
                    // Who ends it has been told.
                    Some(_) if h.noted.is_some() => {}
                    Some((t, _)) if tail.holds(h.regs.rip) => retime(t, h, left, mem, tail),
                    Some(_) => {
                        let placed = place(h, left, mem, tail, true, common.room());
                        if !placed.unwrap_or(false) && go_back(h, mem, tail, &mut common) {
                            note(h, nr, now + left);
                            due.push(Due {
                                tid: h.tracee.tid,
                                nr,
                                rip: h.regs.rip,
                                end: now + left,
                                how: calls::own_time_is_up(nr),
                            });
                        }
                    }
                    None => {
                        let fd = h.program.arg(0) as i32;
                        let socket = SocketTimeout::of(h.tracee.tid, nr, fd);
                        if let Ok(Some(s)) = socket
                            && let s = s.connecting_again(h.resume.connects_again())
                            && shorten(&mut sockets, s, h, nr, left).is_ok()
                            && (tail.holds(h.regs.rip) || go_back(h, mem, tail, &mut common))
                        {
                            note(h, nr, now + left);
                        }
                    }
                }
            }
            _ => {}
        }
    }
    let overtaken = threads.iter().filter_map(|h| {
        Some(Due {
            tid: h.tracee.tid,
            nr: h.regs.syscall()?,
            rip: tail.holds(h.regs.rip).then_some(h.regs.rip)?,
            end: h.deadline?,
            how: sockets.overtaken(h.tracee.tid)?,
        })
    });
    due.extend(overtaken);
    Renewed { sockets, due }
}

/// What is to be done once threads run that wait for sockets with a time-out.
pub struct Renewed {
    sockets: Shortened,
    due: Vec<Due>,
}

impl Renewed {
    /// Gives sockets their own time-outs again. Calls that these would end late are ended by somebody else.
    pub fn finish(mut self) -> Result<()> {
        let put_back = self.sockets.put_back();
        // Without it they end late.
        let _ = waker::start(&self.due);
        put_back
    }
}

/// The socket's time-out gets what is `left` of it for this thread's call.
fn shorten(sockets: &mut Shortened, s: SocketTimeout, h: &Held, nr: u64, left: i64) -> Result<()> {
    match h.tick {
        Some(number) => sockets.to_tick(s, h.tracee.tid, nr, left, number),
        None => sockets.shorten(s, h.tracee.tid, nr, left),
    }
}

/// Trampolines that threads share: those that stand, and those that may be wanted.
fn common(threads: &[Held], tail: &Tail) -> Common {
    let mut common = Common::default();
    for h in threads {
        if matches!(h.resume, Resume::Timed { .. }) && tail.holds(h.regs.rip) && h.noted.is_some() {
            common.knows(&h.resume, &h.program, &h.regs);
        }
    }
    for h in threads {
        let Resume::Timed { nr, .. } = h.resume else {
            continue;
        };
        let by_itself = matches!(
            calls::timeout(nr, &h.program),
            Some((_, Broken::RestartBlock))
        );
        if !by_itself && h.deadline.is_some() && !tail.holds(h.regs.rip) {
            common.may_want(&h.resume, &h.program);
        }
    }
    common
}

/// Lets a call go on as it is through a trampoline, so that it can be told from those which the program makes after it.
fn go_back(h: &mut Held, mem: &Mem, tail: &mut Tail, common: &mut Common) -> bool {
    match common.place(&h.resume, &h.program, mem, |len| tail.take(len, 0)) {
        Ok(Some(regs)) => {
            h.regs = regs;
            true
        }
        _ => false,
    }
}

/// For a later dump: when the call ends that a thread in a trampoline makes.
fn note(h: &mut Held, nr: u64, end: i64) {
    let noted = trampoline::note(nr, end, host_monotonic_ns());
    match h.regs.syscall() {
        Some(_) => h.regs.orig_rax = noted,
        // In front of it.
        None => h.regs.rax = noted,
    }
    // What is noted and who ends it agree.
    h.deadline = Some(end);
}

/// The time-out in a trampoline that the thread is in already.
fn retime(t: calls::Timeout, h: &mut Held, left: i64, mem: &Mem, tail: &Tail) {
    match t {
        calls::Timeout::Millis(i) => {
            if let Some(r) = Regs::ARGS.get(i) {
                h.regs.set(*r, calls::millis(left));
            }
        }
        calls::Timeout::Timespec(i) | calls::Timeout::Timeval(i) => {
            if tail.holds(h.regs.arg(i)) {
                let _ = overwrite(t, &h.regs, left, mem);
            }
        }
    }
}

fn overwrite(t: calls::Timeout, r: &Regs, left: i64, mem: &Mem) -> Result<()> {
    let left = left.max(0) as u64;
    match t {
        calls::Timeout::Millis(_) => Ok(()),
        calls::Timeout::Timespec(i) => mem.write(r.arg(i), &calls::timespec(left)),
        calls::Timeout::Timeval(i) => mem.write(r.arg(i), &calls::timeval(left)),
    }
}
