//! Whether the task is inside libpvm, and under which tid.
//!
//! Outside libpvm `pvmmytid` holds V, inside R. The outermost of our functions on the stack switches it;
//! a callback of the program counts as outside again, and libpvm calls it makes as inside once more.

use std::ffi::c_int;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering::{Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, compiler_fence};

use pvm_abi::block::{Call, flag, state, wait};
use pvm_abi::{AGENTS, is_task, place, table};

use crate::real::{Errno, Real, complain, real};
use crate::state::{BLOCK, moved, use_table, with};

/// PvmRoute values
pub const DONT_ROUTE: c_int = 1;
pub const ROUTE_DIRECT: c_int = 3;

/// Once, when libpvm has been found.
pub fn begin() {
    let Some(real) = real() else { return };
    // SAFETY: the variable, when it is there, is libpvm's.
    let route = unsafe { real.var.pvmrouteopt.as_mut() };
    if std::env::var_os("MIST_DIRECT_ROUTES").is_some_and(|value| value == "1") {
        BLOCK.flags.fetch_or(flag::DIRECT_ROUTES, SeqCst);
    } else if let Some(route) = route {
        BLOCK.route.store(*route, SeqCst);
        *route = DONT_ROUTE;
    }
}

/// The V of an incarnation.
pub fn v_of(r: u32) -> u32 {
    moved().and_then(|table| table.v_of(r)).unwrap_or(r)
}

/// The current incarnation of a V, whatever the state of its gate.
pub fn r_of(v: u32) -> u32 {
    if v == BLOCK.v.load(Relaxed) {
        return BLOCK.r.load(Relaxed);
    }
    moved()
        .and_then(|table| table.entry(v))
        .map_or(v, |entry| entry.r)
}

/// As [`v_of`], for an answer of libpvm: anything but the tid of a task stays as it is.
pub fn answer(tid: c_int) -> c_int {
    if is_task(tid as u32) {
        v_of(tid as u32) as c_int
    } else {
        tid
    }
}

/// As [`r_of`], for an argument of the program.
pub fn argument(tid: c_int) -> c_int {
    if is_task(tid as u32) {
        r_of(tid as u32) as c_int
    } else {
        tid
    }
}

#[inline(never)]
fn set_mytid(tid: u32) {
    if let Some(real) = real() {
        // SAFETY: `real` has a pvmmytid, which is libpvm's variable.
        unsafe {
            if *real.var.pvmmytid != -1 {
                *real.var.pvmmytid = tid as c_int;
            }
        }
    }
}

/// The stack pointer.
#[inline(always)]
fn stack() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        let stack: u64;
        // SAFETY: reads a register.
        unsafe {
            std::arch::asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags))
        };
        stack
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::mem::MaybeUninit::<u8>::uninit().as_ptr() as u64
    }
}

/// Enters libpvm if nothing of it is on the stack and the task has not moved; as [`Inside`], but [`leave`] is to be
/// called. Otherwise false, and nothing has been done.
#[inline(always)]
pub fn enter_alone(call: Call) -> bool {
    if BLOCK.depth.load(Relaxed) != 0 {
        return false;
    }
    BLOCK.stack.store(stack(), Relaxed);
    BLOCK.call.store(call as u32, Relaxed);
    BLOCK.depth.store(1, Release);
    // As in Inside::enter.
    compiler_fence(SeqCst);
    if BLOCK.r.load(Relaxed) != BLOCK.v.load(Relaxed) {
        BLOCK.call.store(Call::None as u32, Relaxed);
        BLOCK.depth.store(0, Release);
        return false;
    }
    with(|local| local.inside = true);
    true
}

/// Leaves what [`enter_alone`] entered; returns `result`.
#[inline(always)]
pub fn leave(result: c_int) -> c_int {
    if BLOCK.r.load(Relaxed) != BLOCK.v.load(Relaxed) || BLOCK.depth.load(Relaxed) != 1 {
        return leave_moved(result);
    }
    with(|local| local.inside = false);
    BLOCK.call.store(Call::None as u32, Relaxed);
    BLOCK.call_flags.store(0, Relaxed);
    compiler_fence(SeqCst);
    BLOCK.depth.store(0, Release);
    result
}

/// The same, of a task that has moved meanwhile.
#[cold]
#[inline(never)]
extern "C" fn leave_moved(result: c_int) -> c_int {
    drop(Inside { from_outside: true });
    result
}

/// Whether libpvm calls itself, below a call from outside.
#[inline(always)]
pub fn within() -> bool {
    with(|local| local.inside) && stack() <= BLOCK.stack.load(Relaxed)
}

/// A call of libpvm, from its start until it is dropped.
pub struct Inside {
    /// It came from outside (the program, or a callback of it).
    pub from_outside: bool,
}

impl Inside {
    /// Enters libpvm.
    #[inline(always)]
    pub fn enter(call: Call) -> Inside {
        let stack = stack();
        let mut depth = BLOCK.depth.load(Relaxed);
        if depth != 0 && (stack > BLOCK.stack.load(Relaxed) || !below(call, stack)) {
            abandoned();
            depth = 0;
        }
        if depth == 0 {
            BLOCK.stack.store(stack, Relaxed);
            BLOCK.call.store(call as u32, Relaxed);
        }
        BLOCK.depth.store(depth + 1, Release);
        // Whoever finds the task outside may make another incarnation of it. He stops it to look, so that only
        // the order of these instructions counts.
        compiler_fence(SeqCst);
        let from_outside = with(|local| !std::mem::replace(&mut local.inside, true));
        if from_outside {
            let r = BLOCK.r.load(Relaxed);
            if r != BLOCK.v.load(Relaxed) {
                set_mytid(r);
            }
        }
        Inside { from_outside }
    }
}

impl Drop for Inside {
    #[inline(always)]
    fn drop(&mut self) {
        if self.from_outside {
            with(|local| local.inside = false);
            let v = BLOCK.v.load(Relaxed);
            if BLOCK.r.load(Relaxed) != v {
                set_mytid(v);
            }
        }
        let depth = BLOCK.depth.load(Relaxed).saturating_sub(1);
        if depth == 0 {
            BLOCK.call.store(Call::None as u32, Relaxed);
            BLOCK.call_flags.store(0, Relaxed);
        }
        compiler_fence(SeqCst);
        BLOCK.depth.store(depth, Release);
    }
}

/// Whether this call may be below the present ones: made by libpvm itself, or by the callback that is
/// running. If not, the program left them behind.
#[inline(always)]
fn below(call: Call, stack: u64) -> bool {
    let (inside, callback, in_mroute) =
        with(|local| (local.inside, local.callback, local.in_mroute != 0));
    if !inside {
        return stack <= callback;
    }
    let bottom = BLOCK.call.load(Relaxed);
    let of = |calls: &[Call]| calls.iter().any(|call| *call as u32 == bottom);
    match call {
        Call::Enrol | Call::Internal | Call::Exit | Call::Addmhf | Call::Delmhf => true,
        Call::Setopt | Call::Getopt | Call::Putinfo | Call::Recvinfo | Call::Delinfo => true,
        Call::Recv => of(&[Call::Precv]),
        Call::Nrecv | Call::Catchout => of(&[Call::Exit]) || in_mroute,
        Call::Send => of(&[Call::Psend]) || in_mroute,
        Call::Sendsig => of(&[Call::Kill, Call::Reset]),
        Call::Kill | Call::Tasks | Call::Getnoresets => of(&[Call::Reset]),
        Call::Mytid | Call::Notify => of(&[Call::Catchout]),
        Call::Parent => of(&[Call::Siblings]),
        Call::Config | Call::Addhosts => of(&[Call::StartPvmd]),
        _ => false,
    }
}

/// The program jumped out of libpvm (longjmp from a callback or a signal): the calls that were on the
/// stack will never return.
#[cold]
fn abandoned() {
    for word in [
        &BLOCK.depth,
        &BLOCK.callbacks,
        &BLOCK.asking,
        &BLOCK.sending_count,
        &BLOCK.sending_more,
    ] {
        word.store(0, SeqCst);
    }
    BLOCK.wait.store(wait::NONE, SeqCst);
    with(|local| {
        local.inside = false;
        local.in_mroute = 0;
        local.in_mcast = false;
        local.housekeeping = false;
    });
    set_mytid(BLOCK.v.load(Relaxed));
}

/// Runs a callback of the program: outside libpvm again.
pub fn outside<T>(f: impl FnOnce() -> T) -> T {
    let stack = stack();
    let (was, outer) = with(|local| {
        (
            std::mem::replace(&mut local.inside, false),
            std::mem::replace(&mut local.callback, stack),
        )
    });
    if was {
        set_mytid(BLOCK.v.load(Relaxed));
    }
    // What libpvm below it waits for it does not wait for now.
    let _wait = Set::to(&BLOCK.wait, wait::NONE);
    let callbacks = BLOCK.callbacks.load(Relaxed);
    BLOCK.callbacks.store(callbacks + 1, SeqCst);
    let result = f();
    BLOCK.callbacks.store(callbacks, SeqCst);
    with(|local| {
        local.inside = was;
        local.callback = outer;
    });
    if was {
        set_mytid(BLOCK.r.load(Relaxed));
    }
    result
}

/// Runs something that shows `pvmmytid` to people.
pub fn as_v<T>(f: impl FnOnce() -> T) -> T {
    let was = with(|local| local.inside);
    if was {
        set_mytid(BLOCK.v.load(Relaxed));
    }
    let result = f();
    if was {
        set_mytid(BLOCK.r.load(Relaxed));
    }
    result
}

/// What [`Block::seen`] holds when a new incarnation has taken over.
const TAKEN_OVER: u64 = u64::MAX;

/// Looks whether this task itself has become another incarnation.
pub fn taken_over() -> bool {
    BLOCK.seen.load(SeqCst) == TAKEN_OVER
}

/// After libpvm has enrolled.
#[cold]
pub fn enrolled() {
    let _errno = Errno::keep();
    let Some(real) = real() else { return };
    // SAFETY: libpvm's variable.
    let r = unsafe { *real.var.pvmmytid } as u32;
    if with(|local| local.layout) != Some(true) {
        let version = real.pvm_version.map_or(std::ptr::null(), |version| {
            // SAFETY: returns a constant string.
            unsafe { version() }
        });
        complain(&format!(
            "this libpvm ({}) is not one whose messages the shim knows; task t{r:x} runs without it and cannot be moved",
            crate::real::text(version)
        ));
        if BLOCK.flags.load(SeqCst) & flag::DIRECT_ROUTES == 0
            // SAFETY: libpvm's variable, when it is there.
            && let Some(route) = unsafe { real.var.pvmrouteopt.as_mut() }
        {
            *route = BLOCK.route.load(SeqCst);
            BLOCK.flags.fetch_or(flag::DIRECT_ROUTES, SeqCst);
        }
        publish(r, r, state::UNKNOWN_LIBPVM);
        return;
    }
    map_table(r);
    wait_for_table(real, r);
    let mut v = r;
    if let Some(table) = moved() {
        if let Some(known) = table.v_of(r) {
            v = known;
        } else if let Some(entry) = table.entry(r)
            && entry.r != r
        {
            BLOCK.flags.fetch_or(flag::TID_TAKEN, SeqCst);
            complain(&format!(
                "pvmd gave this task t{r:x}, which is the name of a task that moved to t{:x}; the two will be taken for each other (mistctl makes sure of free tids when it restarts an application)",
                entry.r
            ));
        }
        BLOCK
            .seen
            .store(table.header.generation.load(SeqCst), SeqCst);
    }
    real.var.publish(&BLOCK.globals);
    publish(v, r, state::ENROLLED);
    crate::notices::remember_sinks();
    if moved().is_some() {
        // Whoever collects its output may have moved since it was spawned.
        crate::notices::table_changed(real, false);
    }
}

fn publish(v: u32, r: u32, state: u32) {
    BLOCK.pid.store(std::process::id(), SeqCst);
    BLOCK.v.store(v, SeqCst);
    BLOCK.r.store(r, SeqCst);
    BLOCK.state.store(state, SeqCst);
}

/// After libpvm has left the virtual machine.
#[cold]
pub fn left() {
    BLOCK.state.store(state::IDLE, SeqCst);
    let ours = flag::RESOURCE_MANAGER
        | flag::HOSTER
        | flag::TASKER
        | flag::TRACER
        | flag::TID_TAKEN
        | flag::COLLECTOR
        | flag::NO_RESET;
    BLOCK.flags.fetch_and(!ours, SeqCst);
    BLOCK.v.store(0, SeqCst);
    BLOCK.r.store(0, SeqCst);
    crate::notices::forget();
}

fn map_table(r: u32) {
    let old = use_table(std::ptr::null());
    if !old.is_null() {
        // SAFETY: the mapping of an earlier enrolment; nothing refers to it any more.
        unsafe { libc::munmap(old.cast_mut().cast(), table::SIZE) };
    }
    BLOCK.table.store(0, SeqCst);
    let sock = std::env::var_os("PVMSOCK");
    let anchor = place::anchor(sock.as_deref(), &place::own_address_file());
    let mapped = place::table_path(&anchor).and_then(|path| {
        let file = place::open(&path)?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        table::map_raw(fd, false)
            .map_err(std::io::Error::from_raw_os_error)
            .map(|map| (path, map))
    });
    match mapped {
        Ok((path, map)) => {
            let bytes = path.as_os_str().as_bytes();
            for (at, word) in BLOCK.table_path.iter().enumerate() {
                word.store(bytes.get(at).copied().unwrap_or(0), SeqCst);
            }
            BLOCK.table_len.store(table::SIZE as u64, SeqCst);
            BLOCK.table.store(map as u64, SeqCst);
            BLOCK.flags.fetch_and(!flag::NO_TABLE, SeqCst);
            use_table(map);
        }
        Err(error) => {
            BLOCK.flags.fetch_or(flag::NO_TABLE, SeqCst);
            complain(&format!(
                "task t{r:x} cannot use the tid table beside {} ({error}); it loses sight of tasks that move",
                anchor.display()
            ));
        }
    }
}

/// How long a host that was added may take until its agent is there, in ms.
const NEW_HOST: u64 = 30_000;

/// On a host that was added to a virtual machine with agents: waits until that of this host knows what they know.
fn wait_for_table(real: &Real, r: u32) {
    let Some(table) = crate::state::table() else {
        return;
    };
    let learned = || table.header.learned.load(SeqCst) != 0;
    if learned() || !agents(real) {
        return;
    }
    let began = table::lease_clock();
    while !learned() {
        if table::lease_over(began + NEW_HOST, table::lease_clock()) {
            complain(&format!(
                "there is no agent of mistctl on the host of task t{r:x}, which was added; the task takes those that have moved for others"
            ));
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// A task that was just spawned on a host that was added may have a real tid that is the name of another one; that
/// host's agent gives it a name of its own, which its parent has to know.
pub fn wait_for_name(r: u32) {
    let _errno = Errno::keep();
    let nameless = || {
        moved().is_some_and(|table| {
            table.v_of(r).is_none() && table.entry(r).is_some_and(|entry| entry.r != r)
        })
    };
    let began = table::lease_clock();
    while nameless() && !table::lease_over(began + NEW_HOST, table::lease_clock()) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Whether there are agents somewhere.
fn agents(real: &Real) -> bool {
    let (mut count, mut classes) = (0, std::ptr::null_mut());
    real.pvm_getmboxinfo.is_some_and(|pvm_getmboxinfo| {
        // SAFETY: a string, and two places that libpvm sets; its list is its own.
        unsafe {
            pvm_getmboxinfo(AGENTS.as_ptr().cast_mut(), &mut count, &mut classes) >= 0 && count > 0
        }
    })
}

/// A destination on its way out, in [`Block::sending`].
pub struct Sending(u32, u32);

impl Sending {
    /// What is on its way now; [`Sending::reset`] goes back to it.
    #[inline]
    pub fn mark() -> Sending {
        Sending(
            BLOCK.sending_count.load(Relaxed),
            BLOCK.sending_more.load(Relaxed),
        )
    }

    /// Says that something goes to `tid` from here on. What is read afterwards is read after it was said.
    #[inline]
    pub fn add(tid: u32) {
        let count = BLOCK.sending_count.load(Relaxed);
        match BLOCK.sending.get(count as usize) {
            Some(word) => {
                word.store(tid, Relaxed);
                BLOCK.sending_count.store(count + 1, SeqCst);
            }
            None => {
                BLOCK.sending_more.fetch_add(1, SeqCst);
            }
        }
    }

    /// As [`Sending::add`], when nothing else is on its way; [`Sending::none`] ends it.
    #[inline(always)]
    pub fn only(tid: u32) {
        if let Some(word) = BLOCK.sending.first() {
            word.store(tid, Relaxed);
        }
        BLOCK.sending_count.store(1, SeqCst);
    }

    /// Says that nothing is on its way any more.
    #[inline(always)]
    pub fn none() {
        BLOCK.sending_count.store(0, Release);
        BLOCK.sending_more.store(0, Release);
    }

    /// Says that what was added since has gone.
    #[inline]
    pub fn reset(&self) {
        BLOCK.sending_count.store(self.0, Release);
        BLOCK.sending_more.store(self.1, Release);
    }
}

/// Sets one word of the block and puts the old value back when dropped.
pub struct Set<'a>(&'a AtomicU32, u32);

impl Set<'_> {
    /// Sets `word`, which nobody else writes to.
    #[inline]
    pub fn to(word: &AtomicU32, value: u32) -> Set<'_> {
        let old = word.load(Relaxed);
        word.store(value, Release);
        Set(word, old)
    }
}

impl Drop for Set<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.store(self.1, Release);
    }
}
