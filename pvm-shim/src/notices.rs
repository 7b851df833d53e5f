//! Bodies of pvmd's messages that carry tids: exit notices, collected output, routes. What only a move
//! would show is kept from the program here.

use std::ffi::{CString, c_int};
use std::sync::atomic::Ordering::SeqCst;

use pvm_abi::block::flag;
use pvm_abi::{
    CTX_TC, CTX_TM, NOOP_LATE, NOOP_MAGIC, NOOP_MARKER, TID_HOST, TID_PVMD, WAIT_ID_IGNORE,
    WAIT_ID_LATE, is_task,
};

use crate::border::{deliver, send_own};
use crate::hosts::{self, WAIT_ID_HOSTS, WAIT_ID_NEW_HOSTS};
use crate::inside::{r_of, v_of};
use crate::layout::{MM_PACK, Pmsg, TC_NOOP, TC_OUTPUT, TM_NOTIFY, TM_SETOPT, get_int, set_int};
use crate::real::{Real, real};
use crate::state::{BLOCK, moved, with};

/// Kinds of pvm_notify, and the flag that takes one back.
pub const TASK_EXIT: c_int = 1;
pub const HOST_DELETE: c_int = 2;
pub const HOST_ADD: c_int = 3;
pub const ROUTE_ADD: c_int = 4;
pub const ROUTE_DELETE: c_int = 5;
pub const CANCEL: c_int = 256;

/// Second integer of an output message: the task ended, was spawned, has started.
const OUTPUT_EOF: i32 = 0;
const OUTPUT_SPAWN: i32 = -1;

/// TM_SETOPT: where output and traces go.
const SET_OUTPUT: c_int = 1;
const SET_TRACE: c_int = 4;

/// A notify request of the program that has not been answered.
struct Asked {
    what: c_int,
    ctx: c_int,
    tag: c_int,
    /// The task (V) or host it is about; 0 for additions.
    about: u32,
    /// The incarnation that the pvmd was asked about.
    asked_r: u32,
    /// Host additions left, -1 for ever.
    count: c_int,
    /// It was asked again for another incarnation of this task, so the answer may come twice.
    again: bool,
    /// It has been answered once.
    spent: bool,
    /// The program has taken it back, which its pvmd answers at once as if it had happened.
    taken_back: bool,
}

/// A message handler of the program.
pub struct Handler {
    /// Its id.
    pub mhid: c_int,
    /// Of which messages: -1 any.
    pub src: c_int,
    pub tag: c_int,
    pub ctx: c_int,
}

impl Handler {
    /// Whether such a message goes to it. (libpvm lets no two overlap.)
    pub fn handles(&self, src: c_int, tag: c_int, ctx: c_int) -> bool {
        let fits = |want: c_int, has: c_int| want == -1 || want == has;
        fits(self.src, src) && fits(self.tag, tag) && fits(self.ctx, ctx)
    }
}

/// Requests and notices.
pub struct Notices {
    asked: Vec<Asked>,
    /// Context and tag of output the program collects itself.
    outputs: Vec<(c_int, c_int)>,
    /// Whose beginning of output has been shown: V, and bits for the two messages that say so.
    begun: Vec<(u32, u8)>,
    held: Vec<*mut Pmsg>,
    /// This task's last incarnation, as long as there may be output that has reached it and is still to come here.
    late: u32,
    /// Hosts, by the tids of their pvmds' host parts, that a program which asked for additions knows of.
    hosts: Vec<u32>,
}

impl Notices {
    /// None yet.
    pub const fn new() -> Notices {
        Notices {
            asked: Vec::new(),
            outputs: Vec::new(),
            begun: Vec::new(),
            held: Vec::new(),
            late: 0,
            hosts: Vec::new(),
        }
    }

    fn collects(&self, ctx: c_int, tag: c_int) -> bool {
        ctx == CTX_TC && tag == TC_OUTPUT || self.outputs.contains(&(ctx, tag))
    }
}

/// The program asked to be notified of `about` (V or hosts).
pub fn asked(what: c_int, ctx: c_int, tag: c_int, count: c_int, about: &[u32]) {
    with(|local| {
        let asked = &mut local.notices.asked;
        let kind = what & !CANCEL;
        if matches!(kind, HOST_ADD | ROUTE_ADD) {
            asked.retain(|old| (old.what, old.ctx, old.tag) != (kind, ctx, tag));
        }
        // A notice taken back is answered at once, so its entry has to stay until then.
        let keep = what & CANCEL == 0 && (count != 0 || !matches!(kind, HOST_ADD | ROUTE_ADD));
        let new = |about, asked_r| Asked {
            what: kind,
            ctx,
            tag,
            about,
            asked_r,
            count,
            again: false,
            spent: false,
            taken_back: false,
        };
        if keep {
            match kind {
                HOST_ADD | ROUTE_ADD => asked.push(new(0, 0)),
                _ => asked.extend(about.iter().map(|about| new(*about, r_of(*about)))),
            }
        }
        BLOCK.notifies.store(asked.len() as u32, SeqCst);
    });
}

/// The program takes back a request about `about` (V or a host): which incarnation its pvmd was asked about, none when
/// there is no such request.
pub fn taken_back(what: c_int, ctx: c_int, tag: c_int, about: u32) -> Option<u32> {
    let kind = what & !CANCEL;
    let open = |asked: &&mut Asked| {
        (asked.what, asked.ctx, asked.tag, asked.about) == (kind, ctx, tag, about)
            && !asked.spent
            && !asked.taken_back
    };
    with(|local| {
        let asked = local.notices.asked.iter_mut().find(open)?;
        asked.taken_back = true;
        Some(asked.asked_r)
    })
}

/// How far the program knows the hosts, if it has asked for additions.
pub fn hosts<T>(f: impl FnOnce(&mut Vec<u32>) -> T) -> T {
    with(|local| f(&mut local.notices.hosts))
}

/// Context and tag of every request to be told of new hosts.
pub fn wants_hosts() -> Vec<(c_int, c_int)> {
    let wants = |asked: &&Asked| asked.what == HOST_ADD && !asked.spent;
    with(|local| {
        let asked = local.notices.asked.iter().filter(wants);
        asked.map(|asked| (asked.ctx, asked.tag)).collect()
    })
}

/// A request that [`asked`] noted was refused.
pub fn refused(what: c_int, ctx: c_int, tag: c_int, about: &[u32]) {
    with(|local| {
        let asked = &mut local.notices.asked;
        for tid in about {
            let made =
                |old: &Asked| (old.what, old.ctx, old.tag, old.about) == (what, ctx, tag, *tid);
            if let Some(at) = asked.iter().rposition(made) {
                asked.swap_remove(at);
            }
        }
        BLOCK.notifies.store(asked.len() as u32, SeqCst);
    });
}

/// What to do with a message.
enum Verdict {
    Pass,
    Drop,
    Hold,
    /// Drop it, and ask again about this entry's present incarnation.
    AskAgain(usize, u32),
}

/// Looks at a message that has just come in, and either translates its body and returns false, or takes
/// it over and returns true.
///
/// # Safety
/// `up` is a message of libpvm that nothing else refers to; libpvm's layout fits.
pub unsafe fn take_over(real: &Real, up: *mut Pmsg) -> bool {
    // SAFETY: the layout fits.
    let (src, ctx, tag, wid) = unsafe { ((*up).src as u32, (*up).ctx, (*up).tag, (*up).wid) };
    // libpvm itself tells of routes, and of this task's own exit.
    // SAFETY: as above.
    let own = unsafe { (*up).flag } & MM_PACK != 0;
    if (ctx, tag) == (CTX_TC, TC_NOOP) {
        // SAFETY: as above.
        unsafe { note_late(real, up) };
    }
    let late = wid == WAIT_ID_LATE && is_task(src);
    if src & TID_PVMD == 0 && !own && !late {
        return false;
    }
    let verdict = if late {
        // SAFETY: as above.
        unsafe { arrived_late(up, ctx, tag) }
    } else if ctx == CTX_TM && matches!(wid, WAIT_ID_HOSTS | WAIT_ID_NEW_HOSTS) {
        // SAFETY: as above.
        unsafe { hosts::listed(real, up, wid == WAIT_ID_NEW_HOSTS) };
        Verdict::Drop
    } else if ctx == CTX_TM && wid == WAIT_ID_IGNORE {
        Verdict::Drop
    } else if ctx == CTX_TM {
        Verdict::Pass
    } else {
        // SAFETY: as above.
        unsafe {
            match notice(real, up, own, ctx, tag) {
                Some(verdict) => verdict,
                None if !own && with(|local| local.notices.collects(ctx, tag)) => {
                    match with(|local| local.notices.late) {
                        0 => output(up),
                        _ => Verdict::Hold,
                    }
                }
                None => Verdict::Pass,
            }
        }
    };
    match verdict {
        Verdict::Pass => return false,
        Verdict::Hold => {
            with(|local| local.notices.held.push(up));
            BLOCK.held.fetch_add(1, SeqCst);
            return true;
        }
        Verdict::AskAgain(at, r) => ask_again(real, at, r),
        Verdict::Drop => {}
    }
    if let Some(umbuf_free) = real.umbuf_free {
        // SAFETY: nothing else refers to the message.
        unsafe { umbuf_free(up) };
    }
    true
}

/// What stands in the connection of a task that has moved: from here on some of what is printed comes by another way,
/// and until the notice of the old incarnation's end.
///
/// # Safety
/// As for [`take_over`].
unsafe fn note_late(real: &Real, up: *mut Pmsg) {
    // SAFETY: the layout fits.
    let (src, word) = unsafe { ((*up).src as u32, |at| get_int(up, at)) };
    let late = with(|local| local.notices.late);
    if (word(0), word(1)) == (Some(NOOP_MAGIC), Some(NOOP_LATE)) {
        let r1 = word(2).unwrap_or(0);
        with(|local| local.notices.late = r1);
    } else if late != 0 && src & TID_PVMD != 0 && word(0) == Some(late) {
        with(|local| local.notices.late = 0);
        release(real);
    }
}

/// What a pvmd had sent to the old incarnation, and somebody has passed on.
///
/// # Safety
/// As for [`take_over`].
unsafe fn arrived_late(up: *mut Pmsg, ctx: c_int, tag: c_int) -> Verdict {
    // SAFETY: the layout fits.
    unsafe {
        let about = get_int(up, 0).unwrap_or(0);
        (*up).src = (TID_PVMD | about & TID_HOST) as c_int;
        (*up).wid = 0;
    }
    let (collects, told) = with(|local| {
        let notices = &local.notices;
        let same = |asked: &Asked| (asked.ctx, asked.tag) == (ctx, tag);
        (notices.collects(ctx, tag), notices.asked.iter().any(same))
    });
    match (collects, told) {
        // SAFETY: as above.
        (true, _) => unsafe { output(up) },
        // It has been asked for again.
        (false, true) => Verdict::Drop,
        (false, false) => Verdict::Pass,
    }
}

/// Where a task stands that a notice is about.
enum Stands {
    /// The incarnation is its task's present one.
    Present,
    /// The task has moved on; its present one.
    MovedOn(u32),
    /// The task is moving.
    Moving,
}

fn stands(r: u32, v: u32) -> Stands {
    match moved().and_then(|table| table.entry(v)) {
        Some(entry) if entry.state.is_closed() => Stands::Moving,
        Some(entry) if entry.r != r => Stands::MovedOn(entry.r),
        _ => Stands::Present,
    }
}

/// A notice the program asked for with pvm_notify.
///
/// # Safety
/// As for [`take_over`].
unsafe fn notice(real: &Real, up: *mut Pmsg, own: bool, ctx: c_int, tag: c_int) -> Option<Verdict> {
    // SAFETY: the layout fits.
    let first = unsafe { get_int(up, 0) }?;
    let about = v_of(first);
    let find = |spent: bool| {
        with(|local| {
            local.notices.asked.iter().position(|asked| {
                (asked.ctx, asked.tag, asked.spent) == (ctx, tag, spent)
                    && match asked.what {
                        // How many, and no tid.
                        HOST_ADD => first & TID_HOST == 0,
                        ROUTE_ADD => true,
                        _ => asked.about == about,
                    }
            })
        })
    };
    let Some(at) = find(false) else {
        // The second answer to a request that was made twice. Of additions there may be more.
        let at = find(true)?;
        with(|local| {
            let asked = &mut local.notices.asked;
            if asked.get(at).is_some_and(|asked| asked.what != HOST_ADD) {
                asked.swap_remove(at);
            }
            BLOCK.notifies.store(asked.len() as u32, SeqCst);
        });
        return Some(Verdict::Drop);
    };
    let (what, asked_r, taken_back) = with(|local| {
        local.notices.asked.get(at).map_or((0, 0, false), |asked| {
            (asked.what, asked.asked_r, asked.taken_back)
        })
    });
    let tells_tid = matches!(what, TASK_EXIT | ROUTE_ADD | ROUTE_DELETE);
    // The answer to what was taken back is wanted now, whatever it is about.
    if what == TASK_EXIT && !own && !taken_back {
        match stands(first, about) {
            Stands::Present => {}
            Stands::Moving => return Some(Verdict::Hold),
            Stands::MovedOn(r) if asked_r == r => return Some(Verdict::Drop),
            Stands::MovedOn(r) => return Some(Verdict::AskAgain(at, r)),
        }
    }
    if tells_tid && about != first {
        // SAFETY: as above.
        unsafe { set_int(up, 0, about) };
    }
    if what == HOST_ADD {
        // SAFETY: as above.
        unsafe { hosts::told(up) };
    }
    answered(real, at);
    Some(Verdict::Pass)
}

fn answered(real: &Real, at: usize) {
    let enough = with(|local| {
        let asked = &mut local.notices.asked;
        let entry = asked.get_mut(at)?;
        let mut enough = None;
        match entry.what {
            ROUTE_ADD => {}
            HOST_ADD if entry.count < 0 => {}
            HOST_ADD if entry.count > 1 => entry.count -= 1,
            _ if entry.again => {
                entry.spent = true;
                enough = (entry.what == HOST_ADD).then_some((entry.ctx, entry.tag));
            }
            _ => {
                asked.swap_remove(at);
            }
        }
        BLOCK.notifies.store(asked.len() as u32, SeqCst);
        enough
    });
    if let Some((ctx, tag)) = enough {
        // For its pvmd there is no end to them (see `table_changed`).
        ask(real, HOST_ADD, ctx, tag, 0, 0);
    }
}

fn ask_again(real: &Real, at: usize, r: u32) {
    let request = with(|local| {
        local.notices.asked.get_mut(at).map(|asked| {
            asked.asked_r = r;
            (asked.what, asked.ctx, asked.tag, asked.count)
        })
    });
    if let Some((what, ctx, tag, count)) = request {
        ask(real, what, ctx, tag, count, r);
    }
}

/// Sends a TM_NOTIFY as pvm_notify does, but for another context.
fn ask(real: &Real, what: c_int, ctx: c_int, tag: c_int, count: c_int, about: u32) {
    let counted = what == HOST_ADD;
    // SAFETY: only packs.
    unsafe {
        send_own(real, TID_PVMD as c_int, TM_NOTIFY, CTX_TM, 0, |int, _| {
            int(what);
            int(ctx);
            int(tag);
            int(if counted { count } else { 1 });
            if !counted {
                int(about as c_int);
            }
        });
    }
}

/// Output of another task, or its beginning or end.
///
/// # Safety
/// As for [`take_over`].
unsafe fn output(up: *mut Pmsg) -> Verdict {
    // SAFETY: the layout fits.
    let (Some(r), Some(what)) = (unsafe { get_int(up, 0) }, unsafe { get_int(up, 1) }) else {
        return Verdict::Pass;
    };
    if !is_task(r) {
        return Verdict::Pass;
    }
    let v = v_of(r);
    let what = what as i32;
    if what == OUTPUT_EOF {
        match stands(r, v) {
            Stands::Moving => return Verdict::Hold,
            Stands::MovedOn(_) => return Verdict::Drop,
            Stands::Present => with(|local| local.notices.begun.retain(|(begun, _)| *begun != v)),
        }
    } else if what < 0 {
        let bit = if what == OUTPUT_SPAWN { 1 } else { 2 };
        let known = with(|local| {
            let begun = &mut local.notices.begun;
            match begun.iter_mut().find(|(begun, _)| *begun == v) {
                Some((_, bits)) => std::mem::replace(bits, *bits | bit) & bit != 0,
                None => {
                    begun.push((v, bit));
                    false
                }
            }
        });
        if known {
            return Verdict::Drop;
        }
    }
    if v != r {
        // SAFETY: as above.
        unsafe { set_int(up, 0, v) };
    }
    Verdict::Pass
}

/// Looks again at what was held back.
pub fn release(real: &Real) {
    let held = with(|local| std::mem::take(&mut local.notices.held));
    for up in held {
        BLOCK.held.fetch_sub(1, SeqCst);
        // SAFETY: held messages are libpvm's, and only the list that was just taken referred to them.
        unsafe {
            if !take_over(real, up) {
                deliver(real, up);
            }
        }
    }
}

/// Sends the markers mistctl asked for.
pub fn send_markers(real: &Real) {
    for (asked, done) in BLOCK.marker_asked.iter().zip(&BLOCK.marker_done) {
        let word = asked.load(SeqCst);
        if word == 0 || word == done.load(SeqCst) {
            continue;
        }
        let (v, r) = (BLOCK.v.load(SeqCst), BLOCK.r.load(SeqCst));
        // SAFETY: only packs.
        let sent = unsafe {
            send_own(real, word as u32 as c_int, TC_NOOP, CTX_TC, 0, |int, _| {
                for value in [NOOP_MAGIC, NOOP_MARKER, (word >> 32) as u32, v, r] {
                    int(value as c_int);
                }
            })
        };
        if sent {
            done.store(word, SeqCst);
        }
    }
}

/// The table has changed: output and traces follow their collectors. When a new incarnation has taken
/// over, its requests, which went with the old one, are made again.
pub fn table_changed(real: &Real, taken_over: bool) {
    if taken_over {
        let me = BLOCK.v.load(SeqCst);
        let requests: Vec<_> = with(|local| {
            let asked = local.notices.asked.iter_mut();
            asked
                .filter(|asked| {
                    // A second answer that is still to come may be on its way: it is not asked for a third time.
                    let open = asked.about != me && !asked.spent;
                    open && matches!(asked.what, TASK_EXIT | HOST_DELETE | HOST_ADD)
                })
                .map(|asked| {
                    asked.again = true;
                    asked.asked_r = r_of(asked.about);
                    let request = (asked.what, asked.ctx, asked.tag, asked.asked_r);
                    (request, asked.taken_back)
                })
                .collect()
        });
        // Additions without end: what the old pvmd has told may be unread yet, so they are counted here.
        for ((what, ctx, tag, about), taken_back) in &requests {
            ask(real, *what, *ctx, *tag, -1, *about);
            if *taken_back {
                ask(real, *what | CANCEL, *ctx, *tag, 0, *about);
            }
        }
        // Behind them, so that each host is in the one or the other.
        if requests.iter().any(|((what, ..), _)| *what == HOST_ADD) {
            hosts::list(real, WAIT_ID_NEW_HOSTS);
        }
    }
    let sinks = with(|local| local.sinks);
    // SAFETY: libpvm's variables, when they are there.
    let (own, children) = unsafe { (real.var.pvmtrc.as_mut(), real.var.pvmctrc.as_mut()) };
    let (Some(own), Some(children)) = (own, children) else {
        return;
    };
    let [own_out, child_out, own_trace, child_trace] = sinks;
    follow(&mut children.outtid, child_out);
    follow(&mut children.trctid, child_trace);
    for (tid, sink, option) in [
        (&mut own.outtid, own_out, SET_OUTPUT),
        (&mut own.trctid, own_trace, SET_TRACE),
    ] {
        if follow(tid, sink)
            && let Ok(text) = CString::new(format!("{:x}", *tid))
        {
            // SAFETY: only packs. The answer is dropped for its wait id.
            unsafe {
                send_own(
                    real,
                    TID_PVMD as c_int,
                    TM_SETOPT,
                    CTX_TM,
                    WAIT_ID_IGNORE,
                    |int, string| {
                        int(option);
                        string(&text);
                    },
                );
            }
        }
    }
}

/// Before children are spawned: they are told where their collector is now.
pub fn children_follow() {
    let [_, child_out, _, child_trace] = with(|local| local.sinks);
    let Some(real) = real().filter(|_| moved().is_some()) else {
        return;
    };
    // SAFETY: libpvm's variable, when it is there.
    if let Some(children) = unsafe { real.var.pvmctrc.as_mut() } {
        follow(&mut children.outtid, child_out);
        follow(&mut children.trctid, child_trace);
    }
}

fn follow(tid: &mut c_int, sink: u32) -> bool {
    let now = r_of(sink) as c_int;
    let moves = is_task(sink) && matches!(stands(now as u32, sink), Stands::Present) && *tid != now;
    if moves {
        *tid = now;
    }
    moves
}

/// Notes, in V, where output and traces go, and whether this task collects some.
pub fn remember_sinks() {
    let Some(real) = real() else { return };
    // SAFETY: libpvm's variables, when they are there.
    let (own, children) = unsafe { (real.var.pvmtrc.as_ref(), real.var.pvmctrc.as_ref()) };
    let (Some(own), Some(children)) = (own, children) else {
        return;
    };
    let tids = [own.outtid, children.outtid, own.trctid, children.trctid];
    let me = BLOCK.r.load(SeqCst);
    let sinks = tids.map(|tid| {
        if tid as u32 == me {
            BLOCK.v.load(SeqCst)
        } else {
            v_of(tid as u32)
        }
    });
    let collects = me != 0 && children.outtid as u32 == me;
    let key = (children.outctx, children.outtag);
    with(|local| {
        local.sinks = sinks;
        if collects && !local.notices.outputs.contains(&key) {
            local.notices.outputs.push(key);
        }
    });
    if collects {
        BLOCK.flags.fetch_or(flag::COLLECTOR, SeqCst);
    }
}

/// The task has left the virtual machine.
pub fn forget() {
    let old = with(|local| std::mem::replace(&mut local.notices, Notices::new()));
    for up in old.held {
        if let Some(umbuf_free) = real().and_then(|real| real.umbuf_free) {
            // SAFETY: nothing else refers to a held message.
            unsafe { umbuf_free(up) };
        }
    }
    with(|local| {
        local.handlers.clear();
        local.routes.clear();
    });
    BLOCK.held.store(0, SeqCst);
    BLOCK.notifies.store(0, SeqCst);
}
