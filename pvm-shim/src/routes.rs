//! Old direct routes of a task that has moved.
//!
//! A route is kept under the R of the incarnation that opened it. Once a message comes from a later
//! incarnation, nothing more can be sent over the old one's route; what it still holds was sent before, and
//! has to be delivered before. So it is read to its end first.

use std::ffi::c_int;

use pvm_abi::CTX_TC;

use crate::border::deliver_new;
use crate::inside::v_of;
use crate::layout::{Frag, Pmsg, TC_CONACK, TC_CONREQ, Ttpcb};
use crate::real::{Errno, Real, complain};
use crate::state::{moved, with};

/// Bytes of a fragment's header, and of the message header behind the first.
const FRAGMENT_HEADER: usize = 16;
const MESSAGE_HEADER: usize = 32;
/// Flags of a fragment: first, last of its message.
const FIRST: u8 = 1;
const LAST: u8 = 2;
/// States of a route.
const OPEN: c_int = 3;
const DEAD: c_int = 5;
/// How long the end of a route whose peer has gone may take to come, in ms.
const PATIENCE: c_int = 10_000;

/// Notes who has a route with this task.
///
/// # Safety
/// `up` is a message of libpvm; its layout fits.
pub unsafe fn note(up: *mut Pmsg) {
    // SAFETY: the caller's promise.
    let (src, ctx, tag) = unsafe { ((*up).src, (*up).ctx, (*up).tag) };
    if ctx == CTX_TC && matches!(tag, TC_CONREQ | TC_CONACK) {
        with(|local| {
            if !local.routes.contains(&src) {
                local.routes.push(src);
            }
        });
    }
}

/// A message has come from `src` (R): delivers first what older routes of the same task hold.
pub fn drain_older(real: &Real, src: u32) {
    if moved().is_none() || with(|local| local.routes.is_empty()) {
        return;
    }
    let v = v_of(src);
    let older: Vec<c_int> = with(|local| {
        let routes = local.routes.iter().copied();
        routes
            .filter(|r| *r as u32 != src && v_of(*r as u32) == v)
            .collect()
    });
    for r in older {
        with(|local| local.routes.retain(|route| *route != r));
        let (Some(find), Some(dead)) = (real.ttpcb_find, real.ttpcb_dead) else {
            return;
        };
        let _errno = Errno::keep();
        // SAFETY: libpvm is enrolled, so its list of routes is there. The route is closed the way libpvm
        // does when it reads the end itself; mroute takes it off the list.
        unsafe {
            let route = find(r);
            if route.is_null() || (*route).tid != r || (*route).state == DEAD {
                continue;
            }
            if (*route).state == OPEN {
                read_to_end(real, route);
            }
            dead(route);
        }
    }
}

/// Reads and delivers until the end of the route.
///
/// # Safety
/// `route` is an open route of libpvm.
unsafe fn read_to_end(real: &Real, route: *mut Ttpcb) {
    // SAFETY: the fragment is ours from next_fragment on.
    unsafe {
        while let Some(fragment) = next_fragment(real, route) {
            if let Some(message) = append(real, route, fragment) {
                deliver_new(real, message);
            }
        }
    }
}

/// The next whole fragment, with its headers; libpvm may have read a part of it already.
///
/// # Safety
/// As for [`read_to_end`].
unsafe fn next_fragment(real: &Real, route: *mut Ttpcb) -> Option<*mut Frag> {
    let (fr_new, fr_unref) = (real.fr_new?, real.fr_unref?);
    // SAFETY: the fragment in the route is libpvm's, with room as its `max` says; it is replaced by a
    // larger one as libpvm does, before its body is read.
    unsafe {
        let size = real
            .var
            .pvmfrgsiz
            .as_ref()
            .map_or(4096, |size| (*size).max(256));
        if (*route).fragment.is_null() {
            (*route).fragment = fr_new(size);
        }
        let mut fragment = (*route).fragment;
        if fragment.is_null() || !fill((*route).fd, fragment, FRAGMENT_HEADER) {
            return None;
        }
        let whole = FRAGMENT_HEADER.checked_add(word((*fragment).dat, 8) as usize)?;
        let used = (*fragment).dat.offset_from((*fragment).buf.cast()) as usize;
        if whole > ((*fragment).max as usize).saturating_sub(used) {
            let larger = fr_new(c_int::try_from(whole).ok()?);
            if larger.is_null() {
                return None;
            }
            let len = (*fragment).len as usize;
            std::ptr::copy_nonoverlapping((*fragment).dat, (*larger).dat, len.min(whole));
            (*larger).len = (*fragment).len;
            fr_unref(fragment);
            fragment = larger;
            (*route).fragment = larger;
        }
        if !fill((*route).fd, fragment, whole) {
            return None;
        }
        (*route).fragment = std::ptr::null_mut();
        Some(fragment)
    }
}

/// Appends a fragment to its message; the message, when it is complete.
///
/// # Safety
/// `fragment` is a whole one that nobody else refers to.
unsafe fn append(real: &Real, route: *mut Ttpcb, fragment: *mut Frag) -> Option<*mut Pmsg> {
    let (umbuf_new, pmsg_setenc, fr_unref) = (real.umbuf_new?, real.pmsg_setenc?, real.fr_unref?);
    // SAFETY: lists of libpvm are rings with a head; what is taken out is put in elsewhere or freed.
    unsafe {
        let header = (*fragment).dat;
        let (dst, src) = (word(header, 0) as c_int, word(header, 4) as c_int);
        let flags = *header.add(12);
        let head = (*route).partial;
        let mut skip = FRAGMENT_HEADER;
        let message;
        if flags & FIRST != 0 {
            skip += MESSAGE_HEADER;
            if ((*fragment).len as usize) < skip {
                fr_unref(fragment);
                return None;
            }
            message = umbuf_new();
            if message.is_null() {
                fr_unref(fragment);
                return None;
            }
            let header = header.add(FRAGMENT_HEADER);
            (*message).enc = word(header, 0) as c_int;
            (*message).tag = word(header, 4) as c_int;
            (*message).ctx = word(header, 8) as c_int;
            (*message).wid = word(header, 16) as c_int;
            (*message).crc = word(header, 20) as c_int;
            (*message).src = src;
            (*message).dst = dst;
            (*message).rlink = (*head).rlink;
            (*message).link = head;
            (*(*head).rlink).link = message;
            (*head).rlink = message;
        } else {
            let mut at = (*head).link;
            while at != head && (*at).src != src {
                at = (*at).link;
            }
            if at == head {
                fr_unref(fragment);
                return None;
            }
            message = at;
        }
        (*fragment).dat = (*fragment).dat.add(skip);
        (*fragment).len -= skip as c_int;
        let master = (*message).frag;
        (*fragment).rlink = (*master).rlink;
        (*fragment).link = master;
        (*(*master).rlink).link = fragment;
        (*master).rlink = fragment;
        (*message).len += (*fragment).len;
        if flags & LAST == 0 {
            return None;
        }
        (*(*message).link).rlink = (*message).rlink;
        (*(*message).rlink).link = (*message).link;
        (*message).link = std::ptr::null_mut();
        (*message).rlink = std::ptr::null_mut();
        pmsg_setenc(message, (*message).enc);
        Some(message)
    }
}

/// Reads into a fragment until it holds `want` bytes; false at the end.
///
/// # Safety
/// The fragment has room for `want` bytes.
unsafe fn fill(fd: c_int, fragment: *mut Frag, want: usize) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        while ((*fragment).len as usize) < want {
            let have = (*fragment).len as usize;
            match libc::read(fd, (*fragment).dat.add(have).cast(), want - have) {
                0 => return false,
                got if got > 0 => (*fragment).len += got as c_int,
                _ => match *libc::__errno_location() {
                    libc::EINTR => {}
                    libc::EAGAIN => {
                        let mut poll = libc::pollfd {
                            fd,
                            events: libc::POLLIN,
                            revents: 0,
                        };
                        if libc::poll(&mut poll, 1, PATIENCE) == 0 {
                            complain(
                                "a direct route of a task that has moved does not end; what is left in it is lost",
                            );
                            return false;
                        }
                    }
                    _ => return false,
                },
            }
        }
        true
    }
}

/// A big-endian integer.
///
/// # Safety
/// Four bytes can be read `at` bytes behind `from`.
unsafe fn word(from: *const u8, at: usize) -> u32 {
    // SAFETY: the caller's promise.
    u32::from_be_bytes(unsafe { *from.add(at).cast::<[u8; 4]>() })
}
