//! The functions of libpvm through which all messages pass.
//!
//! Outgoing messages go through `mroute` and `pvmmcast` (V to R, and the gate), incoming ones through
//! `mesg_input` (R to V), requests to the pvmd through `msendrecv`. libpvm calls all of them through its procedure linkage
//! table, so these definitions come first. Every message passes [`crate::hot`] before what is here.

use std::ffi::c_int;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use pvm_abi::block::{Call, state, wait};
use pvm_abi::table::{Entry, lease_clock, lease_over};
use pvm_abi::{CTX_TC, TID_HOST, is_task};

use crate::inside::{Inside, Sending, Set, enrolled, outside, r_of, v_of};
use crate::layout::{
    self, NO_TIME, Pmsg, SM_FIRST, TC_CONACK, TC_CONREQ, TC_SIBLINGS, TC_TASKEXIT, TM_CONNECT,
};
use crate::notices;
use crate::real::{Errno, Real, real};
use crate::routes;
use crate::state::{BLOCK, attention, moved, with};

/// PvmSysErr and PvmNoMem, for what cannot happen.
pub const SYS_ERR: c_int = -14;
pub const NO_MEM: c_int = -10;
/// PvmOk of pvm_pstat: the task lives; PvmNoTask: it does not.
const OK: c_int = 0;
const NO_TASK: c_int = -31;
/// How long until a task whose lease ended asks again, in milliseconds.
const ASK_AGAIN: u64 = 500;

/// How long a task at a gate reads before it looks again, in microseconds: each time an eighth longer. Hundreds of
/// tasks of a host may wait at one, and those by whom it is opened need the processors.
const GATE_LOOK: i64 = 1000;
const LONGEST_LOOK: i64 = 50_000;

/// libpvm enrols.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvmbeatask() -> c_int {
    let Some((real, pvmbeatask)) = real().and_then(|real| Some((real, real.pvmbeatask?))) else {
        return SYS_ERR;
    };
    // SAFETY: libpvm's variable.
    let before = unsafe { *real.var.pvmmytid };
    if before != -1 {
        return 0;
    }
    let _inside = Inside::enter(Call::Enrol);
    // SAFETY: the real function, called as by libpvm.
    let result = unsafe { pvmbeatask() };
    // SAFETY: as above.
    if result == 0 && unsafe { *real.var.pvmmytid } != -1 {
        enrolled();
    }
    result
}

/// A message that has been received whole.
///
/// # Safety
/// As libpvm's mesg_input.
#[cold]
#[inline(never)]
pub unsafe extern "C" fn mesg_input_checked(up: *mut Pmsg) -> c_int {
    let Some((real, mesg_input)) = real().and_then(|real| Some((real, real.mesg_input?))) else {
        return SYS_ERR;
    };
    let fits = with(|local| local.layout).unwrap_or_else(|| {
        // SAFETY: libpvm's message.
        let fits = unsafe { layout::fits(real, up) };
        with(|local| local.layout = Some(fits));
        fits
    });
    if !fits {
        // SAFETY: libpvm's message, passed on.
        return unsafe { mesg_input(up) };
    }
    // SAFETY: the layout fits.
    unsafe {
        routes::note(up);
        if is_task((*up).src as u32) {
            routes::drain_older(real, (*up).src as u32);
        }
        deliver_new(real, up)
    }
}

/// A message that has come in, whichever way.
///
/// # Safety
/// `up` is a message of libpvm that nothing else refers to.
pub unsafe fn deliver_new(real: &Real, up: *mut Pmsg) -> c_int {
    // SAFETY: a message that is taken over is not used any more.
    unsafe {
        if notices::take_over(real, up) {
            0
        } else {
            deliver(real, up)
        }
    }
}

/// Translates the sender and hands the message to libpvm.
///
/// # Safety
/// `up` is a message of libpvm that nothing else refers to.
pub unsafe fn deliver(real: &Real, up: *mut Pmsg) -> c_int {
    let Some(mesg_input) = real.mesg_input else {
        return SYS_ERR;
    };
    // SAFETY: the layout fits.
    unsafe {
        let message = &mut *up;
        if moved().is_some() && is_task(message.src as u32) && !keeps_r(real, message) {
            message.src = v_of(message.src as u32) as c_int;
        }
        let handled = with(|local| {
            local.delivered = local.delivered.wrapping_add(1);
            let mut handlers = local.handlers.iter();
            handlers.any(|handler| handler.handles(message.src, message.tag, message.ctx))
        });
        if handled {
            outside(|| mesg_input(up))
        } else {
            mesg_input(up)
        }
    }
}

/// Messages of libpvm to libpvm about routes, and those of a resource manager, are handled in R.
fn keeps_r(real: &Real, message: &Pmsg) -> bool {
    if message.ctx == CTX_TC && matches!(message.tag, TC_CONREQ | TC_CONACK | TC_TASKEXIT) {
        return true;
    }
    // SAFETY: libpvm's variable, when it is there.
    let scheduler = unsafe { real.var.pvmschedtid.as_ref() };
    message.tag >= SM_FIRST && message.tag < 0 && scheduler == Some(&message.src)
}

/// How a task waits that receives for so long.
///
/// # Safety
/// Null or a time.
#[inline]
pub unsafe fn receives(tmout: *const libc::timeval) -> u32 {
    // SAFETY: the caller's promise.
    match unsafe { tmout.as_ref() } {
        Some(time) if time.tv_sec == 0 && time.tv_usec == 0 => wait::POLL,
        _ => wait::RECEIVE,
    }
}

/// Sends a message or receives some, when something may have to be done before, or be waited for.
///
/// # Safety
/// As libpvm's mroute.
#[cold]
#[inline(never)]
pub unsafe extern "C" fn mroute_gated(
    mid: c_int,
    dtid: c_int,
    tag: c_int,
    mut tmout: *mut libc::timeval,
) -> c_int {
    let Some((real, mroute)) = real().and_then(|real| Some((real, real.mroute?))) else {
        return SYS_ERR;
    };
    let _inside = Inside::enter(Call::Internal);
    let nested = with(|local| local.in_mroute) != 0;
    let mut no_time = NO_TIME;
    if !nested {
        let delivered = with(|local| local.delivered);
        housekeep(real);
        if mid == 0 && with(|local| local.delivered) != delivered {
            // What was waited for may have come already: libpvm looks again when this returns.
            tmout = &mut no_time;
        }
    }
    let sending = Sending::mark();
    let (what, to) = if mid == 0 {
        // SAFETY: null or a timeval, by mroute's contract.
        (unsafe { receives(tmout) }, dtid)
    } else if is_task(dtid as u32) {
        let to = if in_r(real, dtid, tag) {
            Sending::add(dtid as u32);
            dtid
        } else {
            pass_gates(real, &mut [dtid], nested)
        };
        (wait::SEND, to)
    } else {
        (wait::SEND, dtid)
    };
    let result = {
        let _wait = Set::to(&BLOCK.wait, what);
        with(|local| local.in_mroute += 1);
        // SAFETY: the caller's arguments, but for the destination.
        let result = unsafe { mroute(mid, to, tag, tmout) };
        with(|local| local.in_mroute = local.in_mroute.saturating_sub(1));
        result
    };
    if !nested {
        // A nested send is only queued; it leaves in the mroute around it.
        sending.reset();
        // Whoever wants something from a task that waits in pvm_recv sends it a TC_NOOP, which makes
        // the real mroute return.
        housekeep(real);
    }
    result
}

/// Messages libpvm sends of its own to a tid it got from a pvmd.
fn in_r(real: &Real, dtid: c_int, tag: c_int) -> bool {
    // SAFETY: libpvm's variable, when it is there.
    let scheduler = unsafe { real.var.pvmschedtid.as_ref() };
    with(|local| local.in_mcast)
        || matches!(tag, TC_CONREQ | TC_CONACK)
        || (SM_FIRST..0).contains(&tag) && scheduler == Some(&dtid)
}

/// Sends to several tasks.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvmmcast(mid: c_int, tids: *mut c_int, count: c_int, tag: c_int) -> c_int {
    let Some((real, pvmmcast)) = real().and_then(|real| Some((real, real.pvmmcast?))) else {
        return SYS_ERR;
    };
    let _inside = Inside::enter(Call::Internal);
    let nested = with(|local| local.in_mroute) != 0;
    let sending = Sending::mark();
    // To the children pvm_spawn just got from its pvmd: those tids are R.
    let in_r = tag == TC_SIBLINGS && BLOCK.call.load(Relaxed) == Call::Spawn as u32;
    let mut copy: Vec<c_int> = Vec::new();
    let mut list = tids;
    if !in_r && count > 0 && !tids.is_null() {
        if copy.try_reserve_exact(count as usize).is_err() {
            return NO_MEM;
        }
        // SAFETY: the caller's array has `count` elements.
        copy.extend_from_slice(unsafe { std::slice::from_raw_parts(tids, count as usize) });
        pass_gates(real, &mut copy, nested);
        list = copy.as_mut_ptr();
    } else {
        BLOCK.sending_more.fetch_add(1, SeqCst);
    }
    let result = {
        let _wait = Set::to(&BLOCK.wait, wait::SEND);
        // What it sends is to R already.
        let outer = with(|local| std::mem::replace(&mut local.in_mcast, true));
        // SAFETY: the caller's arguments, or a copy of its list.
        let result = unsafe { pvmmcast(mid, list, count, tag) };
        with(|local| local.in_mcast = outer);
        result
    };
    if !nested {
        sending.reset();
    }
    result
}

/// Asks the pvmd (or the resource manager) and waits for the answer.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msendrecv(other: c_int, tag: c_int, context: c_int) -> c_int {
    let Some(msendrecv) = real().and_then(|real| real.msendrecv) else {
        return SYS_ERR;
    };
    let _inside = Inside::enter(Call::Internal);
    let asking = BLOCK.asking.load(Relaxed);
    let _asking = Set::to(&BLOCK.asking, asking + 1);
    if tag == TM_CONNECT {
        with(|local| local.layout = None);
    }
    // SAFETY: the caller's arguments.
    unsafe { msendrecv(other, tag, context) }
}

/// Waits until the gates of all `tids` (V) are open, says that something is on its way to them, and
/// replaces them by their incarnations. Returns the first.
pub fn pass_gates(real: &Real, tids: &mut [c_int], nested: bool) -> c_int {
    let mark = Sending::mark();
    let mut look = GATE_LOOK;
    loop {
        for tid in tids.iter() {
            Sending::add(*tid as u32);
        }
        // The order is: say so, then look at the gate; the other side closes the gate, then looks who
        // is sending (both sequentially consistent).
        let shut = tids
            .iter()
            .find_map(|tid| closed(real, *tid as u32, nested));
        match shut {
            None => break,
            Some(()) => {
                mark.reset();
                wait_at_gate(real, nested, &mut look);
            }
        }
    }
    for tid in tids.iter_mut() {
        *tid = incarnation(*tid as u32) as c_int;
    }
    tids.first().copied().unwrap_or(0)
}

/// Waits until the gate of one task is open, without sending.
pub fn wait_open(real: &Real, tid: u32) {
    let nested = with(|local| local.in_mroute) != 0;
    let mut look = GATE_LOOK;
    while closed(real, tid, nested).is_some() {
        wait_at_gate(real, nested, &mut look);
    }
}

/// The incarnation to send to; where a lease ended, the one that was found alive.
fn incarnation(v: u32) -> u32 {
    if let Some((who, _, _, r)) = with(|local| local.resolved)
        && who == v
        && moved()
            .and_then(|table| table.entry(v))
            .is_some_and(|entry| entry.state.is_closed())
    {
        return r;
    }
    r_of(v)
}

/// Says whether `v`'s gate is closed, or its host is not to be sent to yet.
fn closed(real: &Real, v: u32, nested: bool) -> Option<()> {
    if BLOCK.hold_any.load(SeqCst) != 0 {
        let host = ((r_of(v) & TID_HOST) >> 18) as usize;
        let word = BLOCK.hold_hosts.get(host / 64)?.load(SeqCst);
        if word & 1 << (host % 64) != 0 {
            return Some(());
        }
    }
    let table = moved()?;
    if table.header.gates.load(SeqCst) == 0 {
        return None;
    }
    let entry = table.entry(v)?;
    if !entry.state.is_closed() || !nested && lease_ended(real, entry) {
        None
    } else {
        Some(())
    }
}

/// A gate whose lease ended is not assumed to be open: both incarnations are asked after. While both live
/// nothing is decided, however long that takes.
fn lease_ended(real: &Real, entry: Entry) -> bool {
    let now = lease_clock();
    // One that was saved comes back: its gate is the agents' to open.
    if entry.is_saved() || !lease_over(entry.lease, now) {
        return false;
    }
    let key = (entry.v, entry.r, entry.next);
    if with(|local| {
        local
            .resolved
            .is_some_and(|(v, r, next, _)| (v, r, next) == key)
    }) {
        return true;
    }
    let asked = with(|local| local.looked);
    if asked.is_some_and(|(v, until)| v == entry.v && !lease_over(until, now)) {
        return false;
    }
    let (Some(pvm_pstat), 0) = (real.pvm_pstat, BLOCK.asking.load(Relaxed)) else {
        return false;
    };
    // SAFETY: the real function; no mroute is on the stack, so libpvm can send and receive.
    let lives = |tid: u32| match unsafe { pvm_pstat(tid as c_int) } {
        OK => Some(true),
        NO_TASK => Some(false),
        _ => None,
    };
    let found = match (lives(entry.r), entry.next) {
        (Some(false), 0) | (Some(true), 0) => Some(entry.r),
        (Some(false), next) => Some(next),
        (Some(true), next) => (lives(next) == Some(false)).then_some(entry.r),
        (None, _) => None,
    };
    match found {
        Some(r) => with(|local| local.resolved = Some((entry.v, entry.r, entry.next, r))),
        None => with(|local| local.looked = Some((entry.v, now + ASK_AGAIN))),
    }
    found.is_some()
}

/// Waits a moment, reading on: two tasks that send to each other would never get quiet otherwise.
fn wait_at_gate(real: &Real, nested: bool, look: &mut i64) {
    let _errno = Errno::keep();
    let tv_usec = *look;
    *look = (tv_usec + tv_usec / 8).min(LONGEST_LOOK);
    let mut time = libc::timeval { tv_sec: 0, tv_usec };
    let mut got = -1;
    if !nested && let Some(mroute) = real.mroute {
        housekeep(real);
        let _wait = Set::to(&BLOCK.wait, wait::GATE);
        with(|local| local.in_mroute += 1);
        // SAFETY: a receive with a time-out, as libpvm makes it.
        got = unsafe { mroute(0, 0, 0, &mut time) };
        with(|local| local.in_mroute = local.in_mroute.saturating_sub(1));
    }
    if got < 0 {
        // In a message handler libpvm cannot read; neither can it when the connection is gone.
        let _wait = Set::to(&BLOCK.wait, wait::GATE_DEAF);
        let mut time = libc::timeval { tv_sec: 0, tv_usec };
        // SAFETY: no descriptors; a valid time.
        unsafe {
            libc::select(
                0,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                &mut time,
            )
        };
    }
}

/// Does what is to be done between two messages: not between the announcement of a multicast and the
/// multicast, not below itself, and not when pvmd has been told that this task leaves.
#[inline]
pub fn housekeep(real: &Real) {
    if attention()
        && BLOCK.state.load(Relaxed) == state::ENROLLED
        && !(BLOCK.asking.load(Relaxed) != 0 && BLOCK.call.load(Relaxed) == Call::Exit as u32)
        && with(|local| !local.in_mcast && !std::mem::replace(&mut local.housekeeping, true))
    {
        housekeeping(real);
        with(|local| local.housekeeping = false);
    }
}

/// The same, behind an mroute; returns what that has returned.
#[cold]
#[inline(never)]
pub extern "C" fn housekeep_after(result: c_int) -> c_int {
    if let Some(real) = real() {
        housekeep(real);
    }
    result
}

/// What mistctl asked for, and what a change of the table makes necessary.
#[cold]
fn housekeeping(real: &Real) {
    let _errno = Errno::keep();
    if BLOCK.attention.swap(0, SeqCst) != 0 {
        notices::send_markers(real);
    }
    let generation = crate::state::generation();
    if generation != BLOCK.seen.load(SeqCst) {
        notices::table_changed(real, crate::inside::taken_over());
        BLOCK.seen.store(generation, SeqCst);
    }
    notices::release(real);
}

/// Sends a message of the shim's own, without waiting for anything.
///
/// # Safety
/// `pack` only packs into the current send buffer.
pub unsafe fn send_own(
    real: &Real,
    to: c_int,
    tag: c_int,
    ctx: c_int,
    wid: c_int,
    pack: impl FnOnce(&dyn Fn(c_int), &dyn Fn(&std::ffi::CStr)),
) -> bool {
    let (
        Some(mkbuf),
        Some(setsbuf),
        Some(freebuf),
        Some(midtobuf),
        Some(pkint),
        Some(pkstr),
        Some(mroute),
    ) = (
        real.pvm_mkbuf,
        real.pvm_setsbuf,
        real.pvm_freebuf,
        real.midtobuf,
        real.pvm_pkint,
        real.pvm_pkstr,
        real.mroute,
    )
    else {
        return false;
    };
    // SAFETY: libpvm's own way to send a message of its own: a fresh buffer, in its encoding, and back
    // to the program's buffer afterwards.
    unsafe {
        let mid = mkbuf(0);
        if mid <= 0 {
            return false;
        }
        let old = setsbuf(mid);
        pack(
            &|value| {
                let mut value = value;
                pkint(&mut value, 1, 1);
            },
            &|text| {
                pkstr(text.as_ptr().cast_mut());
            },
        );
        let up = midtobuf(mid);
        let mut sent = false;
        if !up.is_null() {
            (*up).ctx = ctx;
            (*up).wid = wid;
            let mut time = NO_TIME;
            with(|local| local.in_mroute += 1);
            sent = mroute(mid, to, tag, &mut time) >= 0;
            with(|local| local.in_mroute = local.in_mroute.saturating_sub(1));
        }
        freebuf(setsbuf(old));
        sent
    }
}
