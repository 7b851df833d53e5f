//! What the shim knows, all in one page: a task that a message wakes finds little of what it had in its caches and
//! translations, so what a message touches lies in few lines of it.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use pvm_abi::block::Block;
use pvm_abi::table::{Header, Table};

use crate::notices::{Handler, Notices};
use crate::real::Real;

/// What mistctl reads, and writes to, and what the shim keeps to itself.
#[repr(C, align(4096))]
pub struct Page {
    block: Block,
    own: Own,
}

#[repr(C, align(64))]
struct Own {
    /// Of the mapped table, or [`NO_TABLE`].
    header: AtomicPtr<Header>,
    local: UnsafeCell<Local>,
    real: UnsafeCell<Real>,
}

// SAFETY: libpvm is not for several threads at a time, and this is only used below its calls.
unsafe impl Sync for Own {}

static PAGE: Page = Page {
    block: Block::new(),
    own: Own {
        header: AtomicPtr::new((&raw const NO_TABLE).cast_mut()),
        local: UnsafeCell::new(Local::new()),
        real: UnsafeCell::new(Real::NONE),
    },
};

/// What mistctl reads, and writes to.
pub static BLOCK: &Block = &PAGE.block;

/// Where it is, for mistctl. (The block itself under this name, which everybody sees, would be looked up in a table of
/// addresses by the shim, too.)
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static mist_shim_block: &Block = &PAGE.block;

/// The header of a table that is not there.
static NO_TABLE: Header = Header::new();

/// What the shim knows that nobody else has to. What every message touches comes first.
#[repr(C)]
pub struct Local {
    /// In libpvm, as opposed to outside or in a callback.
    pub inside: bool,
    /// pvmmcast is on the stack: what it sends is to R.
    pub in_mcast: bool,
    /// Housekeeping is going on.
    pub housekeeping: bool,
    /// The layout of this libpvm: not looked at yet, or whether it fits.
    pub layout: Option<bool>,
    /// Real mroutes on the stack: libpvm's only sends and receives in the first.
    pub in_mroute: u32,
    /// Counts messages that libpvm has got.
    pub delivered: u32,
    /// Stack pointer of the callback that is running.
    pub callback: u64,
    /// Message handlers of the program.
    pub handlers: Vec<Handler>,
    /// The pvm_recvf of the program, when it has one.
    pub recvf: crate::real::Match,
    /// libpvm's own match function.
    pub def_match: crate::real::Match,
    /// V of the task that gets our output, our children's output, our traces, our children's traces.
    pub sinks: [u32; 4],
    /// Requests and notices.
    pub notices: Notices,
    /// Context ids that the program has.
    pub contexts: Vec<crate::calls::Given>,
    /// Who has (or had) a direct route with this task, by R.
    pub routes: Vec<c_int>,
    /// A gate whose lease ended, and which incarnation was found alive: V, the entry's R and next, and
    /// the R to send to.
    pub resolved: Option<(u32, u32, u32, u32)>,
    /// A gate whose lease ended while both incarnations live: V, and when to ask again (as leases count).
    pub looked: Option<(u32, u64)>,
}

impl Local {
    const fn new() -> Local {
        Local {
            inside: false,
            in_mcast: false,
            housekeeping: false,
            layout: None,
            in_mroute: 0,
            delivered: 0,
            callback: 0,
            handlers: Vec::new(),
            recvf: None,
            def_match: None,
            sinks: [0; 4],
            notices: Notices::new(),
            contexts: Vec::new(),
            routes: Vec::new(),
            resolved: None,
            looked: None,
        }
    }
}

/// Lends the shim's state to `f`, which must not call libpvm or the program.
#[inline]
pub fn with<T>(f: impl FnOnce(&mut Local) -> T) -> T {
    // SAFETY: one thread (see Own); `f` does not come back here, as it calls neither libpvm nor
    // the program.
    f(unsafe { &mut *PAGE.own.local.get() })
}

/// libpvm's functions and variables as far as they are known; [`crate::real`] looks for them.
#[inline]
pub fn known() -> &'static Real {
    // SAFETY: written once, by `know`, when nobody has used anything of it.
    unsafe { &*PAGE.own.real.get() }
}

/// Keeps what has been found; to be called once.
pub fn know(real: Real) {
    // SAFETY: one thread; who asked before got a value with nothing in it, and has not kept it.
    unsafe { *PAGE.own.real.get() = real };
}

/// The header of the table; that of an empty one, where there is no table.
#[inline]
pub fn header() -> &'static Header {
    // SAFETY: NO_TABLE, or the beginning of a mapping that is never taken away.
    unsafe { &*PAGE.own.header.load(Relaxed) }
}

/// The table, when there is one.
#[inline]
pub fn table() -> Option<&'static Table> {
    let header = PAGE.own.header.load(Relaxed);
    if std::ptr::eq(header, &NO_TABLE) {
        None
    } else {
        // SAFETY: the mapping of a whole table, which is never taken away.
        Some(unsafe { &*header.cast::<Table>() })
    }
}

/// Uses this table (or none, null) from now on; returns the one before.
pub fn use_table(new: *const Table) -> *const Table {
    let none = &raw const NO_TABLE;
    let new = if new.is_null() { none } else { new.cast() };
    let old = PAGE.own.header.swap(new.cast_mut(), SeqCst);
    if std::ptr::eq(old, none) {
        std::ptr::null()
    } else {
        old.cast_const().cast()
    }
}

/// The table, when there is one and something has been written to it.
#[inline]
pub fn moved() -> Option<&'static Table> {
    if header().generation.load(SeqCst) == 0 {
        None
    } else {
        table()
    }
}

/// The table's generation, for [`Block::seen`].
#[inline]
pub fn generation() -> u64 {
    header().generation.load(SeqCst)
}

/// Whether mistctl wants something looked at, or the table has changed.
#[inline]
pub fn attention() -> bool {
    ((BLOCK.attention.load(Relaxed) | BLOCK.held.load(Relaxed)) != 0)
        | (BLOCK.seen.load(Relaxed) != generation())
}

/// Whether libpvm does nothing else already, and nothing is to be done before it sends or receives.
#[inline(always)]
pub fn alone() -> bool {
    let busy = with(|local| local.in_mroute)
        | BLOCK.wait.load(Relaxed)
        | BLOCK.sending_count.load(Relaxed)
        | BLOCK.sending_more.load(Relaxed)
        | BLOCK.attention.load(Relaxed)
        | BLOCK.held.load(Relaxed);
    busy == 0
}

/// Whether nothing moves, nothing has moved, and nobody is to be waited for. A sender says first where it sends to (see
/// `pass_gates`).
#[inline(always)]
pub fn steady() -> bool {
    let header = header();
    let generation = header.generation.load(SeqCst);
    (BLOCK.hold_any.load(SeqCst) == 0)
        & (generation == BLOCK.seen.load(Relaxed))
        & header.nothing_moved(generation)
}
