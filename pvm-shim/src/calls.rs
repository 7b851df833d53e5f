//! The calls of the programming interface that need nothing but to be known to be under way, or not much more.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering::Relaxed;

use pvm_abi::block::{Call, flag};

use crate::border::SYS_ERR;
use crate::inside::Inside;
use crate::real::real;
use crate::state::{BLOCK, with};

type Str = *mut c_char;
type Ints = *mut c_int;
type Any = *mut c_void;

/// A context id, and the task and the incarnation of it that it was given to.
pub type Given = (c_int, u32, u32);

/// See pvm3.h.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_newcontext() -> c_int {
    let Some(function) = real().and_then(|real| real.pvm_newcontext) else {
        return SYS_ERR;
    };
    let _inside = Inside::enter(Call::Newcontext);
    // SAFETY: the caller's promise.
    let ctx = unsafe { function() };
    if ctx > 0 {
        let given = (ctx, BLOCK.v.load(Relaxed), BLOCK.r.load(Relaxed));
        with(|local| local.contexts.push(given));
    }
    ctx
}

/// See pvm3.h. One that an earlier incarnation was given has gone with that: its pvmd has taken it back, and the present
/// one has never heard of it.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvm_freecontext(ctx: c_int) -> c_int {
    let Some(function) = real().and_then(|real| real.pvm_freecontext) else {
        return SYS_ERR;
    };
    let _inside = Inside::enter(Call::Freecontext);
    let given = with(|local| {
        let at = local.contexts.iter().position(|given| given.0 == ctx)?;
        Some(local.contexts.swap_remove(at))
    });
    let (v, r) = (BLOCK.v.load(Relaxed), BLOCK.r.load(Relaxed));
    match given {
        Some((_, of, to)) if of == v && to != r => 0,
        // SAFETY: the caller's promise.
        _ => unsafe { function(ctx) },
    }
}

macro_rules! plain {
    (@body $name:ident($($arg:ident),*) = $call:ident $(, flags $flags:ident)? $(, role $role:ident)?) => {{
        let Some(function) = $crate::real::real().and_then(|real| real.$name) else {
            return $crate::border::SYS_ERR;
        };
        let inside = $crate::inside::Inside::enter(Call::$call);
        let _ = &inside;
        $(if inside.from_outside {
            BLOCK.call_flags.store($flags, Relaxed);
        })?
        // SAFETY: the caller's arguments.
        #[allow(clippy::let_and_return)]
        let result = unsafe { function($($arg),*) };
        $(if result >= 0 {
            BLOCK.flags.fetch_or(flag::$role, Relaxed);
        })?
        result
    }};
    (#[cold] $name:ident($($arg:ident: $type:ty),*) = $call:ident;) => {
        #[cold]
        #[inline(never)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> c_int {
            plain!(@body $name($($arg),*) = $call)
        }
    };
    ($($name:ident($($arg:ident: $type:ty),*) = $call:ident $(, flags $flags:ident)? $(, role $role:ident)?;)*) => {$(
        /// Passes on; see pvm3.h.
        ///
        /// # Safety
        /// As libpvm's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> c_int {
            plain!(@body $name($($arg),*) = $call $(, flags $flags)? $(, role $role)?)
        }
    )*};
}

pub(crate) use plain;

plain! {
    pvm_addhosts(names: *mut Str, count: c_int, status: Ints) = Addhosts;
    pvm_archcode(arch: Str) = Archcode;
    pvm_config(hosts: Ints, archs: Ints, list: Any) = Config;
    pvm_delete(name: Str, index: c_int) = Delete;
    pvm_delhosts(names: *mut Str, count: c_int, status: Ints) = Delhosts;
    pvm_delinfo(name: Str, index: c_int, flags: c_int) = Delinfo, flags flags;
    pvm_getfds(fds: *mut Ints) = Getfds;
    pvm_halt() = Halt;
    pvm_insert(name: Str, index: c_int, data: c_int) = Insert;
    pvm_lookup(name: Str, index: c_int, data: Ints) = Lookup;
    pvm_mcast(tids: Ints, count: c_int, tag: c_int) = Mcast;
    pvm_mstat(host: Str) = Mstat;
    pvm_putinfo(name: Str, mid: c_int, flags: c_int) = Putinfo, flags flags;
    pvm_recvinfo(name: Str, index: c_int, flags: c_int) = Recvinfo, flags flags;
    pvm_reg_hoster() = RegHoster, role HOSTER;
    pvm_reg_rm(host: Any) = RegRm, role RESOURCE_MANAGER;
    pvm_reg_tasker() = RegTasker, role TASKER;
    pvm_reg_tracer(tctx: c_int, ttag: c_int, octx: c_int, otag: c_int, mask: Str, buf: c_int, opt: c_int) = RegTracer, role TRACER;
    pvm_start_pvmd(argc: c_int, argv: *mut Str, block: c_int) = StartPvmd;
    pvm_tickle(narg: c_int, args: Ints, nresp: Ints, resp: Ints) = Tickle;
}
