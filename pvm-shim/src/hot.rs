//! What every message passes, as short as it can be and all in one page (see [`crate::state`]); whatever is not as
//! usual is done elsewhere, from the beginning.

use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering::Relaxed;

use pvm_abi::block::{Call, wait};
use pvm_abi::{CTX_TC, TID_PVMD, WAIT_ID_LATE, is_task};

use crate::border;
use crate::calls::plain;
use crate::inside::{self, Sending};
use crate::layout::{MM_PACK, Pmsg};
use crate::state::{BLOCK, alone, attention, generation, header, known, steady, with};

// The section begins with a page, as all functions of this module are in the same object as this.
std::arch::global_asm!(
    ".pushsection .text.mist_hot, \"ax\", @progbits",
    ".p2align 12",
    ".popsection"
);

type Ints = *mut c_int;
type Any = *mut c_void;

macro_rules! hot {
    ($($name:ident($($arg:ident: $type:ty),*) = $call:ident;)*) => {$(
        /// Passes on; see pvm3.h.
        ///
        /// # Safety
        /// As libpvm's.
        #[unsafe(no_mangle)]
        #[unsafe(link_section = ".text.mist_hot")]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> c_int {
            mod unusual {
                use super::*;
                plain! { #[cold] $name($($arg: $type),*) = $call; }
            }
            match known().$name {
                Some(function) if inside::enter_alone(Call::$call) => {
                    // SAFETY: the caller's arguments.
                    let result = unsafe { function($($arg),*) };
                    inside::leave(result)
                }
                // SAFETY: as above.
                _ => unsafe { unusual::$name($($arg),*) },
            }
        }
    )*};
}

hot! {
    pvm_send(tid: c_int, tag: c_int) = Send;
    pvm_recv(tid: c_int, tag: c_int) = Recv;
    pvm_psend(tid: c_int, tag: c_int, buf: Any, len: c_int, kind: c_int) = Psend;
    pvm_precv(tid: c_int, tag: c_int, buf: Any, len: c_int, kind: c_int, rtid: Ints, rtag: Ints, rlen: Ints) = Precv;
    pvm_nrecv(tid: c_int, tag: c_int) = Nrecv;
    pvm_probe(tid: c_int, tag: c_int) = Probe;
    pvm_trecv(tid: c_int, tag: c_int, tmout: *mut libc::timeval) = Trecv;
}

/// Every message that has been received whole comes here.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.mist_hot")]
pub unsafe extern "C" fn mesg_input(up: *mut Pmsg) -> c_int {
    // SAFETY: libpvm's message, of which nothing is read unless the layout fits.
    unsafe {
        match known().mesg_input {
            Some(mesg_input)
                if with(|local| local.layout == Some(true) && local.handlers.is_empty())
                    && header().nothing_moved(generation())
                    && is_plain(&*up) =>
            {
                with(|local| local.delivered = local.delivered.wrapping_add(1));
                mesg_input(up)
            }
            _ => border::mesg_input_checked(up),
        }
    }
}

/// A message of another task to the program, or libpvm's to its own task when that has asked for nothing.
#[inline(always)]
fn is_plain(message: &Pmsg) -> bool {
    message.src as u32 & TID_PVMD == 0
        && message.ctx != CTX_TC
        && message.wid != WAIT_ID_LATE
        && (message.flag & MM_PACK == 0 || BLOCK.notifies.load(Relaxed) == 0)
}

/// Sends a message (`mid` not 0) or receives some.
///
/// # Safety
/// As libpvm's.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.mist_hot")]
pub unsafe extern "C" fn mroute(
    mid: c_int,
    dtid: c_int,
    tag: c_int,
    tmout: *mut libc::timeval,
) -> c_int {
    if let Some(mroute) = known().mroute
        && inside::within()
        && alone()
    {
        let what = if mid == 0 {
            // SAFETY: null or a timeval, by mroute's contract.
            unsafe { border::receives(tmout) }
        } else {
            if is_task(dtid as u32) {
                Sending::only(dtid as u32);
            }
            wait::SEND
        };
        if steady() {
            BLOCK.wait.store(what, Relaxed);
            with(|local| local.in_mroute = 1);
            // SAFETY: the caller's arguments.
            let result = unsafe { mroute(mid, dtid, tag, tmout) };
            with(|local| local.in_mroute = 0);
            BLOCK.wait.store(wait::NONE, Relaxed);
            Sending::none();
            return if attention() {
                border::housekeep_after(result)
            } else {
                result
            };
        }
        Sending::none();
    }
    // SAFETY: the caller's arguments.
    unsafe { border::mroute_gated(mid, dtid, tag, tmout) }
}
