//! The calls whose arguments or answers carry tids outside of messages.
//!
//! Only a call that comes from outside is translated: what libpvm's functions ask of each other is in R.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use pvm_abi::block::{Call, flag};
use pvm_abi::table::State;
use pvm_abi::{HELPER_PID, is_task, mbox_flags, place};

use crate::border::{NO_MEM, SYS_ERR, housekeep, wait_open};
use crate::hosts::{self, WAIT_ID_HOSTS};
use crate::inside::{
    DONT_ROUTE, Inside, ROUTE_DIRECT, answer, argument, as_v, left, outside, wait_for_name,
};
use crate::notices::{self, TASK_EXIT};
use crate::real::{Handler, Match, MboxInfo, Real, TaskInfo, real};
use crate::state::{BLOCK, moved, with};

/// pvm_setopt and pvm_getopt
const ROUTE: c_int = 1;
const OUTPUT_TID: c_int = 4;
const TRACE_TID: c_int = 6;
const SELF_OUTPUT_TID: c_int = 12;
const SELF_TRACE_TID: c_int = 14;
const NO_RESET: c_int = 25;

fn is_sink(what: c_int) -> bool {
    matches!(
        what,
        OUTPUT_TID | TRACE_TID | SELF_OUTPUT_TID | SELF_TRACE_TID
    )
}

/// Translates `count` answers in place.
///
/// # Safety
/// `tids` is null or has `count` elements.
unsafe fn answers(tids: *mut c_int, count: c_int) {
    if moved().is_none() || tids.is_null() || count <= 0 {
        return;
    }
    // SAFETY: the caller's promise.
    for tid in unsafe { std::slice::from_raw_parts_mut(tids, count as usize) } {
        *tid = answer(*tid);
    }
}

/// Waits until all of them have names.
///
/// # Safety
/// As for [`answers`].
unsafe fn wait_for_names(tids: *const c_int, count: c_int) {
    if moved().is_none() || tids.is_null() || count <= 0 {
        return;
    }
    // SAFETY: the caller's promise.
    for tid in unsafe { std::slice::from_raw_parts(tids, count as usize) } {
        if is_task(*tid as u32) {
            wait_for_name(*tid as u32);
        }
    }
}

/// The real function `$name`, or an error to the caller.
macro_rules! real_or_return {
    ($name:ident) => {
        match real().and_then(|real| Some((real, real.$name?))) {
            Some(found) => found,
            None => return SYS_ERR,
        }
    };
}

/// See pvm3.h: V.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_mytid() -> c_int {
    let (_, pvm_mytid) = real_or_return!(pvm_mytid);
    let inside = Inside::enter(Call::Mytid);
    // SAFETY: as the caller's.
    let tid = unsafe { pvm_mytid() };
    if inside.from_outside && tid as u32 == BLOCK.r.load(Relaxed) {
        BLOCK.v.load(Relaxed) as c_int
    } else {
        tid
    }
}

/// See pvm3.h: the V of the parent.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_parent() -> c_int {
    let (_, pvm_parent) = real_or_return!(pvm_parent);
    let inside = Inside::enter(Call::Parent);
    // SAFETY: as the caller's.
    let tid = unsafe { pvm_parent() };
    if inside.from_outside {
        answer(tid)
    } else {
        tid
    }
}

/// See pvm3.h. The list was translated when it came; a task alone is its own list.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_siblings(tids: *mut *mut c_int) -> c_int {
    let (real, pvm_siblings) = real_or_return!(pvm_siblings);
    let inside = Inside::enter(Call::Siblings);
    // SAFETY: as the caller's; on success libpvm has set a list of `count` tids, which is its own
    // static one when it is not the one its parent sent.
    unsafe {
        let count = pvm_siblings(tids);
        let sent = real.var.pvmsibtids.as_ref().copied();
        if inside.from_outside
            && count == 1
            && !tids.is_null()
            && sent != Some(*tids)
            && **tids as u32 == BLOCK.r.load(Relaxed)
        {
            **tids = BLOCK.v.load(Relaxed) as c_int;
        }
        count
    }
}

/// The parent tells who was spawned together: R, as its pvmd told it.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_tc_siblings(mid: c_int) -> c_int {
    let (real, pvm_tc_siblings) = real_or_return!(pvm_tc_siblings);
    // SAFETY: as the caller's; libpvm has set its variables to what the message said.
    unsafe {
        let result = pvm_tc_siblings(mid);
        if let (Some(list), Some(count)) =
            (real.var.pvmsibtids.as_ref(), real.var.pvmnsibs.as_ref())
        {
            answers(*list, *count);
        }
        result
    }
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_spawn(
    file: *mut c_char,
    argv: *mut *mut c_char,
    flags: c_int,
    host: *mut c_char,
    count: c_int,
    tids: *mut c_int,
) -> c_int {
    let (_, pvm_spawn) = real_or_return!(pvm_spawn);
    let inside = Inside::enter(Call::Spawn);
    notices::children_follow();
    // SAFETY: as the caller's; the array has room for `count` tids.
    unsafe {
        let result = pvm_spawn(file, argv, flags, host, count, tids);
        if inside.from_outside && result > 0 {
            wait_for_names(tids, result);
            answers(tids, result);
        }
        result
    }
}

/// See pvm3.h. Without mist's agents, and with each task once.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_tasks(
    at: c_int,
    count: *mut c_int,
    list: *mut *mut TaskInfo,
) -> c_int {
    let (real, pvm_tasks) = real_or_return!(pvm_tasks);
    let inside = Inside::enter(Call::Tasks);
    if !inside.from_outside {
        // SAFETY: as the caller's.
        return unsafe { pvm_tasks(at, count, list) };
    }
    let (mut n, mut first) = (0, std::ptr::null_mut());
    // SAFETY: the two places are valid; on success libpvm set them to its list.
    let result = unsafe { pvm_tasks(argument(at), &mut n, &mut first) };
    if result < 0 {
        return result;
    }
    let mut shown = 0;
    if !first.is_null() && n > 0 {
        // SAFETY: libpvm's list has `n` elements. It frees their names by its own count, so the ones
        // that are not shown are moved behind the others.
        let tasks = unsafe { std::slice::from_raw_parts_mut(first, n as usize) };
        for task in 0..tasks.len() {
            if shows(real, tasks, task) {
                tasks.swap(shown, task);
                shown += 1;
            }
        }
        for task in tasks.iter_mut().take(shown) {
            // SAFETY: the name is libpvm's copy of it.
            unsafe { as_of_old(task) };
            task.tid = answer(task.tid);
            task.ptid = answer(task.ptid);
        }
    }
    // SAFETY: null or the caller's places.
    unsafe {
        if let Some(count) = count.as_mut() {
            *count = shown as c_int;
        }
        if let Some(list) = list.as_mut() {
            *list = first;
        }
    }
    result
}

/// Whether one of the tasks is to be seen: not mist's own, nor an incarnation that is not (or not any more) its
/// task's present one.
fn shows(real: &Real, tasks: &[TaskInfo], at: usize) -> bool {
    let Some(task) = tasks.get(at) else {
        return false;
    };
    if task.pid == HELPER_PID {
        return false;
    }
    let r = task.tid as u32;
    let known = moved().and_then(|table| table.v_of(r));
    // SAFETY: libpvm's list holds null or a string.
    if known.is_none() && unsafe { spawned_as(task) }.is_some() {
        // What is to become a task.
        return false;
    }
    let v = known.unwrap_or(r);
    match moved().and_then(|table| table.entry(v)) {
        None => r == v,
        Some(entry) if entry.state == State::Hidden => false,
        // The last step of a move: the old incarnation has ended, its task is the new one.
        Some(entry) if entry.state.is_closed() && entry.next == r => {
            let old = entry.r as c_int;
            !tasks.iter().any(|task| task.tid == old)
                // SAFETY: the real function; we are inside libpvm, and not below mroute.
                && real.pvm_pstat.is_some_and(|pstat| unsafe { pstat(old) } < 0)
        }
        Some(entry) => entry.r == r,
    }
}

/// Who spawned the task, and the name that it had before it came, of one that has moved.
///
/// # Safety
/// The name is null or a string.
unsafe fn spawned_as(task: &TaskInfo) -> Option<(u32, &[u8])> {
    if task.a_out.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    place::spawned_as(unsafe { CStr::from_ptr(task.a_out) }.to_bytes())
}

/// Shows a task that has moved with the parent and by the name that it had before.
///
/// # Safety
/// The name is null or a string that may be written.
unsafe fn as_of_old(task: &mut TaskInfo) {
    // SAFETY: the caller's promise; the name is an end of the string, so there is room for it at the beginning.
    unsafe {
        if let Some((parent, name)) = spawned_as(task) {
            let (from, len) = (name.as_ptr(), name.len());
            task.ptid = parent as c_int;
            std::ptr::copy(from, task.a_out.cast(), len);
            *task.a_out.add(len) = 0;
        }
    }
}

/// Asks about, or does something to, another task; not while it is neither here nor there.
fn of_task(real: &Real, inside: &Inside, tid: c_int) -> c_int {
    if !inside.from_outside || moved().is_none() || !is_task(tid as u32) {
        return tid;
    }
    wait_open(real, tid as u32);
    argument(tid)
}

macro_rules! of_task {
    ($($name:ident(tid $(, $arg:ident)*) = $call:ident;)*) => {$(
        /// See pvm3.h.
        ///
        /// # Safety
        /// As libpvm's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(tid: c_int $(, $arg: c_int)*) -> c_int {
            let (real, function) = real_or_return!($name);
            let inside = Inside::enter(Call::$call);
            let tid = of_task(real, &inside, tid);
            // SAFETY: plain numbers.
            unsafe { function(tid $(, $arg)*) }
        }
    )*};
}

of_task! {
    pvm_pstat(tid) = Pstat;
    pvm_kill(tid) = Kill;
    pvm_sendsig(tid, signal) = Sendsig;
}

/// See pvm3.h. A host is asked after itself, a task where it is now.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_hostsync(
    host: c_int,
    clock: *mut c_void,
    delta: *mut c_void,
) -> c_int {
    let (_, pvm_hostsync) = real_or_return!(pvm_hostsync);
    let inside = Inside::enter(Call::Hostsync);
    let host = if inside.from_outside {
        argument(host)
    } else {
        host
    };
    // SAFETY: as the caller's.
    unsafe { pvm_hostsync(host, clock, delta) }
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_notify(
    what: c_int,
    tag: c_int,
    count: c_int,
    about: *mut c_int,
) -> c_int {
    let (real, pvm_notify) = real_or_return!(pvm_notify);
    let inside = Inside::enter(Call::Notify);
    if !inside.from_outside {
        // SAFETY: as the caller's.
        return unsafe { pvm_notify(what, tag, count, about) };
    }
    let kind = what & !notices::CANCEL;
    let has_list = matches!(
        kind,
        TASK_EXIT | notices::HOST_DELETE | notices::ROUTE_DELETE
    );
    let mut list: Vec<u32> = Vec::new();
    if has_list && count > 0 && !about.is_null() {
        if list.try_reserve_exact(count as usize).is_err() {
            return NO_MEM;
        }
        // SAFETY: the caller's array has `count` elements.
        let about = unsafe { std::slice::from_raw_parts(about, count as usize) };
        list.extend(about.iter().map(|tid| *tid as u32));
    }
    // SAFETY: libpvm's variable, when it is there.
    let ctx = unsafe { real.var.pvmmyctx.as_ref() }.copied().unwrap_or(0);
    // libpvm may deliver a notice before it returns (a route that is not there), so it has to be known
    // before; and is forgotten again when the request was refused.
    notices::asked(what, ctx, tag, count, &list);
    let takes_back = what & notices::CANCEL != 0;
    if takes_back {
        // What a new pvmd has not been asked yet cannot be taken back there.
        housekeep(real);
    }
    // A request is taken back as it was made, also about an incarnation that has ended.
    let before = |tid: &u32| match kind {
        TASK_EXIT | notices::HOST_DELETE if takes_back => {
            notices::taken_back(what, ctx, tag, *tid).map(|r| r as c_int)
        }
        _ => None,
    };
    let now = |tid: &u32| before(tid).unwrap_or_else(|| argument(*tid as c_int));
    let mut now: Vec<c_int> = list.iter().map(now).collect();
    let result = if moved().is_some() && has_list && kind != notices::HOST_DELETE {
        // SAFETY: a copy of the caller's array.
        unsafe { pvm_notify(what, tag, count, now.as_mut_ptr()) }
    } else {
        // SAFETY: as the caller's.
        unsafe { pvm_notify(what, tag, count, about) }
    };
    if result < 0 {
        notices::refused(what, ctx, tag, &list);
    } else if what == notices::HOST_ADD && count != 0 {
        // Behind the request: who is not in the answer is told of.
        hosts::list(real, WAIT_ID_HOSTS);
    }
    result
}

/// See pvm3.h: owners are V.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_getmboxinfo(
    pattern: *mut c_char,
    count: *mut c_int,
    classes: *mut *mut MboxInfo,
) -> c_int {
    let (_, pvm_getmboxinfo) = real_or_return!(pvm_getmboxinfo);
    let inside = Inside::enter(Call::Getmboxinfo);
    let (mut n, mut first) = (0, std::ptr::null_mut());
    // SAFETY: the two places are valid; on success libpvm set them to its list.
    unsafe {
        let result = pvm_getmboxinfo(pattern, &mut n, &mut first);
        if result >= 0 {
            if inside.from_outside && moved().is_some() && !first.is_null() && n > 0 {
                for class in std::slice::from_raw_parts_mut(first, n as usize) {
                    answers(class.owners, class.entries);
                    if !class.flags.is_null() && class.entries > 0 {
                        let flags =
                            std::slice::from_raw_parts_mut(class.flags, class.entries as usize);
                        flags
                            .iter_mut()
                            .for_each(|flags| *flags = mbox_flags(*flags));
                    }
                }
            }
            if let Some(count) = count.as_mut() {
                *count = n;
            }
            if let Some(classes) = classes.as_mut() {
                *classes = first;
            }
        }
        result
    }
}

/// See pvm3.h. Without mist's agents.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_getnoresets(tids: *mut *mut c_int, count: *mut c_int) -> c_int {
    let (_, pvm_getnoresets) = real_or_return!(pvm_getnoresets);
    let inside = Inside::enter(Call::Getnoresets);
    let (mut n, mut first) = (0, std::ptr::null_mut());
    // SAFETY: the two places are valid, and libpvm sets them.
    unsafe {
        let result = pvm_getnoresets(&mut first, &mut n);
        if inside.from_outside && result >= 0 && !first.is_null() && n > 0 {
            // libpvm keeps the list, and its true length.
            n = without_agents(std::slice::from_raw_parts_mut(first, n as usize)) as c_int;
            answers(first, n);
        }
        if let Some(tids) = tids.as_mut() {
            *tids = first;
        }
        if let Some(count) = count.as_mut() {
            *count = n;
        }
        result
    }
}

/// Puts the tids that are not those of agents first; how many these are.
fn without_agents(tids: &mut [c_int]) -> usize {
    let Some(table) = moved() else {
        return tids.len();
    };
    let is_agent = |tid: c_int| {
        let entry = table.entry(tid as u32);
        entry.is_some_and(|entry| entry.state == State::Hidden)
    };
    let mut shown = 0;
    for at in 0..tids.len() {
        if !tids.get(at).copied().is_some_and(is_agent) {
            tids.swap(shown, at);
            shown += 1;
        }
    }
    shown
}

/// The console's reset; all it asks and does below is in R.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvmreset(
    mytid: c_int,
    kill: c_int,
    class: *mut c_char,
    index: c_int,
) -> c_int {
    let (_, pvmreset) = real_or_return!(pvmreset);
    let inside = Inside::enter(Call::Reset);
    let mytid = if inside.from_outside {
        argument(mytid)
    } else {
        mytid
    };
    // SAFETY: as the caller's.
    unsafe { pvmreset(mytid, kill, class, index) }
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_getopt(what: c_int) -> c_int {
    let (_, pvm_getopt) = real_or_return!(pvm_getopt);
    let inside = Inside::enter(Call::Getopt);
    // SAFETY: a plain number.
    let value = unsafe { pvm_getopt(what) };
    if !inside.from_outside {
        value
    } else if what == ROUTE && value == DONT_ROUTE && !direct() {
        BLOCK.route.load(Relaxed)
    } else if is_sink(what) {
        answer(value)
    } else {
        value
    }
}

fn direct() -> bool {
    BLOCK.flags.load(Relaxed) & flag::DIRECT_ROUTES != 0
}

/// See pvm3.h. A route that is asked for is answered as if it were granted; messages go through pvmd.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_setopt(what: c_int, value: c_int) -> c_int {
    let (real, pvm_setopt) = real_or_return!(pvm_setopt);
    let inside = Inside::enter(Call::Setopt);
    if what == ROUTE && !direct() && (DONT_ROUTE..=ROUTE_DIRECT).contains(&value) {
        return BLOCK.route.swap(value, SeqCst);
    }
    let translate = inside.from_outside && is_sink(what);
    let given = if translate { argument(value) } else { value };
    // SAFETY: plain numbers.
    let old = unsafe { pvm_setopt(what, given) };
    if BLOCK.r.load(Relaxed) != 0 {
        notices::remember_sinks();
    }
    if what == NO_RESET {
        // SAFETY: libpvm's variable, when it is there.
        match unsafe { real.var.pvmnoreset.as_ref() } {
            Some(0) | None => BLOCK.flags.fetch_and(!flag::NO_RESET, SeqCst),
            Some(_) => BLOCK.flags.fetch_or(flag::NO_RESET, SeqCst),
        };
    }
    if translate { answer(old) } else { old }
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_catchout(file: *mut c_void) -> c_int {
    let (_, pvm_catchout) = real_or_return!(pvm_catchout);
    let _inside = Inside::enter(Call::Catchout);
    // SAFETY: as the caller's.
    unsafe { pvm_catchout(file) }
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_exit() -> c_int {
    let (real, pvm_exit) = real_or_return!(pvm_exit);
    let _inside = Inside::enter(Call::Exit);
    // SAFETY: as the caller's; then libpvm's variable.
    unsafe {
        let result = pvm_exit();
        if *real.var.pvmmytid == -1 && BLOCK.r.load(Relaxed) != 0 {
            left();
        }
        result
    }
}

/// See pvm3.h. A handler of the program runs outside libpvm; libpvm's own do not.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_addmhf(src: c_int, tag: c_int, ctx: c_int, handler: Handler) -> c_int {
    let (_, pvm_addmhf) = real_or_return!(pvm_addmhf);
    let inside = Inside::enter(Call::Addmhf);
    // SAFETY: as the caller's.
    let mhid = unsafe { pvm_addmhf(src, tag, ctx, handler) };
    if inside.from_outside && mhid >= 0 {
        let handler = notices::Handler {
            mhid,
            src,
            tag,
            ctx,
        };
        with(|local| local.handlers.push(handler));
    }
    mhid
}

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_delmhf(mhid: c_int) -> c_int {
    let (_, pvm_delmhf) = real_or_return!(pvm_delmhf);
    let _inside = Inside::enter(Call::Delmhf);
    // SAFETY: a plain number.
    let result = unsafe { pvm_delmhf(mhid) };
    if result >= 0 {
        with(|local| local.handlers.retain(|handler| handler.mhid != mhid));
    }
    result
}

/// See pvm3.h. The program's function runs outside libpvm.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_recvf(new: Match) -> Match {
    let pvm_recvf = real().and_then(|real| real.pvm_recvf)?;
    let _inside = Inside::enter(Call::Recvf);
    let def_match = with(|local| local.def_match);
    let same = |a: Match, b: Match| a.map(|f| f as usize) == b.map(|f| f as usize);
    let own = new.is_some() && !same(new, def_match);
    // SAFETY: the program's function, or ours in its stead.
    let old = unsafe { pvm_recvf(if own { Some(matches) } else { new }) };
    let old = with(|local| {
        let users = std::mem::replace(&mut local.recvf, if own { new } else { None });
        if same(old, Some(matches)) {
            users
        } else {
            local.def_match = old;
            old
        }
    });
    if own {
        BLOCK.flags.fetch_or(flag::RECVF, SeqCst);
    } else {
        BLOCK.flags.fetch_and(!flag::RECVF, SeqCst);
    }
    old
}

/// Stands for the program's match function.
unsafe extern "C" fn matches(mid: c_int, tid: c_int, tag: c_int) -> c_int {
    match with(|local| local.recvf) {
        // SAFETY: the program's function, called as libpvm would.
        Some(function) => outside(|| unsafe { function(mid, tid, tag) }),
        None => SYS_ERR,
    }
}

/// See pvm3.h: names the task by its V.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_perror(text: *mut c_char) -> c_int {
    let (_, pvm_perror) = real_or_return!(pvm_perror);
    // SAFETY: as the caller's.
    as_v(|| unsafe { pvm_perror(text) })
}
