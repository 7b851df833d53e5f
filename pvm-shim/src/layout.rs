//! The parts of libpvm's structures the shim looks into (PVM 3.4's pmsg.h, pvmfrag.h, pvmtev.h), and the
//! check that the libpvm at hand really has them.

use std::ffi::{CStr, c_char, c_int, c_void};

use pvm_abi::{CTX_TM, TID_PVMD};

use crate::real::Real;

/// `struct pmsg`: a message.
#[repr(C)]
pub struct Pmsg {
    pub link: *mut Pmsg,
    pub rlink: *mut Pmsg,
    codef: *mut c_void,
    pub frag: *mut Frag,
    cfrag: *mut Frag,
    refs: c_int,
    pub mid: c_int,
    pub len: c_int,
    pub ctx: c_int,
    pub tag: c_int,
    pub wid: c_int,
    pub src: c_int,
    pub dst: c_int,
    pub enc: c_int,
    pub flag: c_int,
    cpos: c_int,
    pub crc: c_int,
}

/// `struct frag`: a piece of a message's body, or the head of the list of them.
#[repr(C)]
pub struct Frag {
    pub link: *mut Frag,
    pub rlink: *mut Frag,
    pub buf: *mut c_char,
    pub dat: *mut u8,
    pub max: c_int,
    pub len: c_int,
}

/// `struct ttpcb`: a direct route.
#[repr(C)]
pub struct Ttpcb {
    link: *mut Ttpcb,
    rlink: *mut Ttpcb,
    pub tid: c_int,
    pub state: c_int,
    pub fd: c_int,
    own_address: libc::sockaddr_in,
    peer_address: libc::sockaddr_in,
    /// Head of the messages that are not complete.
    pub partial: *mut Pmsg,
    /// The fragment that is not complete, or null.
    pub fragment: *mut Frag,
}

/// `struct Pvmtracer`: where output and traces go.
#[repr(C)]
pub struct Tracer {
    pub trctid: c_int,
    pub trcctx: c_int,
    pub trctag: c_int,
    pub outtid: c_int,
    pub outctx: c_int,
    pub outtag: c_int,
}

/// Bit of a message's flags: it was packed here, not received.
pub const MM_PACK: c_int = 1;

/// First message code of TM_, TC_ and SM_ messages; all have bit 31.
pub const TM_CONNECT: c_int = 0x8001_0001_u32 as c_int;
pub const TM_CONFIG: c_int = TM_CONNECT + 5;
pub const TM_NOTIFY: c_int = TM_CONNECT + 14;
pub const TM_SETOPT: c_int = TM_CONNECT + 21;
pub const TC_CONREQ: c_int = 0x8003_0001_u32 as c_int;
pub const TC_CONACK: c_int = TC_CONREQ + 1;
pub const TC_TASKEXIT: c_int = TC_CONREQ + 2;
pub const TC_NOOP: c_int = TC_CONREQ + 3;
pub const TC_OUTPUT: c_int = TC_CONREQ + 4;
pub const TC_SIBLINGS: c_int = TC_CONREQ + 11;
pub const SM_FIRST: c_int = 0x8004_0001_u32 as c_int;

/// What `TM_CONNECT` is answered with first (TDPROTOCOL).
const PROTOCOL: u32 = 1318;

/// Address of the `at`-th integer of a message's body, when it lies in the first piece.
///
/// # Safety
/// `up` is a message of libpvm, and the layout has been checked.
unsafe fn int_at(up: *mut Pmsg, at: usize) -> Option<*mut [u8; 4]> {
    // SAFETY: a message has a master frag, whose link is the first piece or itself (then without buf).
    unsafe {
        let master = (*up).frag;
        if master.is_null() {
            return None;
        }
        let first = (*master).link;
        if first.is_null() || (*first).buf.is_null() {
            return None;
        }
        // libpvm's messages to its own task are still as they were packed: the length of the piece is
        // not set yet, but it has room for what libpvm packs.
        let used = (*first).dat.offset_from((*first).buf.cast());
        let length = if (*up).flag & MM_PACK != 0 {
            (*first).max as isize - used
        } else {
            (*first).len as isize
        };
        if length < 4 * at as isize + 4 {
            return None;
        }
        Some((*first).dat.add(4 * at).cast())
    }
}

/// The `at`-th integer of a body in pvmd's encoding (big-endian).
///
/// # Safety
/// As for [`int_at`].
pub unsafe fn get_int(up: *mut Pmsg, at: usize) -> Option<u32> {
    // SAFETY: int_at gave four bytes within the piece.
    unsafe { int_at(up, at).map(|bytes| u32::from_be_bytes(*bytes)) }
}

/// The whole body of a message that was received.
///
/// # Safety
/// As for [`int_at`].
pub unsafe fn body(up: *mut Pmsg) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    // SAFETY: the pieces are a ring that begins and ends at the master, each with `len` bytes at `dat`.
    unsafe {
        let master = (*up).frag;
        if master.is_null() {
            return None;
        }
        let mut piece = (*master).link;
        while !piece.is_null() && piece != master {
            let len = (*piece).len.max(0) as usize;
            bytes.try_reserve(len).ok()?;
            bytes.extend_from_slice(std::slice::from_raw_parts((*piece).dat, len));
            piece = (*piece).link;
        }
    }
    Some(bytes)
}

/// Overwrites the `at`-th integer of a body.
///
/// # Safety
/// As for [`int_at`].
pub unsafe fn set_int(up: *mut Pmsg, at: usize, value: u32) {
    // SAFETY: int_at gave four bytes within the piece, which belongs to this message alone.
    unsafe {
        if let Some(bytes) = int_at(up, at) {
            *bytes = value.to_be_bytes();
        }
    }
}

/// Checks [`Pmsg`] and [`Frag`] on the first message of an enrolment, the answer to TM_CONNECT, whose
/// contents are known.
///
/// # Safety
/// `up` is what libpvm gave to mesg_input.
pub unsafe fn fits(real: &Real, up: *mut Pmsg) -> bool {
    let (Some(midtobuf), Some(bufinfo), Some(version)) =
        (real.midtobuf, real.pvm_bufinfo, real.pvm_version)
    else {
        return false;
    };
    // SAFETY: the integers read first lie within any struct pmsg there ever was; only when all of them
    // are as expected are its pointers followed. pvm_version returns a constant string.
    unsafe {
        let message = &*up;
        if message.tag != TM_CONNECT || message.ctx != CTX_TM || message.src as u32 != TID_PVMD {
            return false;
        }
        let (mut len, mut tag, mut src) = (0, 0, 0);
        if midtobuf(message.mid) != up
            || bufinfo(message.mid, &mut len, &mut tag, &mut src) != 0
            || (len, tag, src) != (message.len, message.tag, message.src)
        {
            return false;
        }
        let version = version();
        route_fits(real)
            && !version.is_null()
            && CStr::from_ptr(version).to_bytes().starts_with(b"3.4.")
            && get_int(up, 0) == Some(PROTOCOL)
            && (*(*(*up).frag).link).len == message.len
            && (*(*(*up).frag).link).link == (*up).frag
            && message.flag & MM_PACK == 0
            && message.link.is_null() == message.rlink.is_null()
    }
}

/// Checks [`Ttpcb`] on a new one, whose contents are known.
fn route_fits(real: &Real) -> bool {
    let (Some(ttpcb_new), Some(ttpcb_delete)) = (real.ttpcb_new, real.ttpcb_delete) else {
        return false;
    };
    // SAFETY: a new route is on no list and has no socket, so taking it away again frees what new made.
    unsafe {
        let route = ttpcb_new();
        if route.is_null() {
            return false;
        }
        let partial = (*route).partial;
        let fits = (*route).fd == -1
            && ((*route).tid, (*route).state) == (0, 0)
            && (*route).fragment.is_null()
            && !partial.is_null()
            && (*partial).link == partial
            && (*partial).rlink == partial;
        ttpcb_delete(route);
        fits
    }
}

/// A `struct timeval` of no time.
pub const NO_TIME: libc::timeval = libc::timeval {
    tv_sec: 0,
    tv_usec: 0,
};
