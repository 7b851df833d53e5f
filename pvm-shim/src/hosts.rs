//! Hosts that are added while a task is on its way: no pvmd tells it of them. The old one has told what it told, and
//! the new one tells of those that come after it was asked.

use std::ffi::c_int;

use pvm_abi::{CTX_TM, TID_PVMD};

use crate::border::{deliver_new, send_own};
use crate::layout::{Pmsg, TM_CONFIG, body};
use crate::notices;
use crate::real::Real;

/// Wait id of a question of the shim's which hosts there are: the program asked to be told of others.
pub const WAIT_ID_HOSTS: c_int = 0x484f_5354;
/// Wait id of the same question in a new place: it is told of those it has not heard of.
pub const WAIT_ID_NEW_HOSTS: c_int = 0x4e48_5354;

/// Asks the pvmd which hosts there are; [`listed`] gets the answer.
pub fn list(real: &Real, wid: c_int) {
    // SAFETY: packs nothing.
    unsafe { send_own(real, TID_PVMD as c_int, TM_CONFIG, CTX_TM, wid, |_, _| {}) };
}

/// The answer. It stands behind every notice of those additions that came before it.
///
/// # Safety
/// `up` is a message of libpvm; libpvm's layout fits.
pub unsafe fn listed(real: &Real, up: *mut Pmsg, again: bool) {
    // SAFETY: the caller's promise.
    let all = unsafe { body(up) }.and_then(|bytes| hosts(&bytes));
    let known = notices::hosts(|known| known.clone());
    let mut new = all.unwrap_or_default();
    new.retain(|host| !known.contains(host));
    // Of one who knows none it is not known what he knows.
    if !again || known.is_empty() {
        notices::hosts(|known| known.extend(new));
    } else if !new.is_empty() {
        for (ctx, tag) in notices::wants_hosts() {
            // SAFETY: as above.
            unsafe { tell(real, up, (ctx, tag), &new) };
        }
    }
}

/// The program is told of new hosts.
///
/// # Safety
/// As for [`listed`].
pub unsafe fn told(up: *mut Pmsg) {
    // SAFETY: the caller's promise.
    let Some(bytes) = (unsafe { body(up) }) else {
        return;
    };
    // How many, and their tids.
    for tid in bytes.chunks_exact(4).skip(1).filter_map(int) {
        notices::hosts(|known| {
            if !known.contains(&tid) {
                known.push(tid);
            }
        });
    }
}

/// Makes a notice as pvmd makes it (gotnewhosts, ddpro.c) and libpvm receives it, and lets it come in. `like` is a
/// message of the pvmd's.
///
/// # Safety
/// As for [`listed`].
unsafe fn tell(
    real: &Real,
    like: *mut Pmsg,
    (ctx, tag): (c_int, c_int),
    new: &[u32],
) -> Option<()> {
    let (umbuf_new, fr_new, pmsg_setenc) = (real.umbuf_new?, real.fr_new?, real.pmsg_setenc?);
    let mut bytes = (new.len() as u32).to_be_bytes().to_vec();
    bytes.extend(new.iter().flat_map(|host| host.to_be_bytes()));
    let len = c_int::try_from(bytes.len()).ok()?;
    // SAFETY: a new message, whose list of pieces is an empty ring, gets one piece of its own that has room for the bytes.
    unsafe {
        let piece = fr_new(len);
        if piece.is_null() {
            return None;
        }
        let message = umbuf_new();
        if message.is_null() {
            (real.fr_unref?)(piece);
            return None;
        }
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), (*piece).dat, bytes.len());
        (*piece).len = len;
        let master = (*message).frag;
        ((*piece).link, (*piece).rlink) = (master, master);
        ((*master).link, (*master).rlink) = (piece, piece);
        ((*message).ctx, (*message).tag, (*message).len) = (ctx, tag, len);
        ((*message).enc, (*message).src, (*message).dst) = ((*like).enc, (*like).src, (*like).dst);
        pmsg_setenc(message, (*message).enc);
        deliver_new(real, message);
    }
    Some(())
}

fn int(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The hosts in an answer to TM_CONFIG: how many hosts and formats there are; of each host its tid, name,
/// architecture, speed and format.
fn hosts(body: &[u8]) -> Option<Vec<u32>> {
    let count = int(body)? as usize;
    let mut rest = body.get(8..)?;
    let mut tids = Vec::new();
    for _ in 0..count {
        tids.push(int(rest)?);
        rest = rest.get(4..)?;
        for _ in ["name", "architecture"] {
            // Filled up to whole words.
            rest = rest
                .get(4..)?
                .get((int(rest)? as usize).checked_next_multiple_of(4)?..)?;
        }
        rest = rest.get(8..)?;
    }
    Some(tids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(hosts: &[(u32, &str)]) -> Vec<u8> {
        let text = |text: &str| {
            let mut bytes = (text.len() as u32 + 1).to_be_bytes().to_vec();
            bytes.extend(text.bytes().chain([0]));
            bytes.resize(bytes.len().next_multiple_of(4), b'?');
            bytes
        };
        let mut body = [hosts.len() as u32, 1].map(u32::to_be_bytes).concat();
        for (tid, name) in hosts {
            body.extend(tid.to_be_bytes());
            body.extend([text(name), text("LINUX64")].concat());
            body.extend([1000, 0x408c41].map(u32::to_be_bytes).concat());
        }
        body
    }

    #[test]
    fn the_hosts_of_an_answer_are_read() {
        let body = answer(&[(0x40000, "h0"), (0x80000, "another")]);
        assert_eq!(hosts(&body), Some(vec![0x40000, 0x80000]));
    }

    #[test]
    fn one_that_is_cut_short_tells_of_none() {
        let body = answer(&[(0x40000, "h0"), (0x80000, "another")]);
        for len in 0..body.len() {
            assert_eq!(hosts(&body[..len]), None, "{len}");
        }
        assert_eq!(hosts(&[0xff; 64]), None);
    }
}
