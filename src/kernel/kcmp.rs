//! Do two descriptors mean the same open file description? (kcmp(2))

use std::cmp::Ordering;
use std::os::fd::RawFd;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

const KCMP_FILE: libc::c_int = 0;
const KCMP_EPOLL_TFD: libc::c_int = 7;

/// struct kcmp_epoll_slot (linux/kcmp.h).
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

fn raw(a: i32, b: i32, what: libc::c_int, i: u64, j: u64) -> nix::Result<libc::c_long> {
    // SAFETY: kcmp takes integers only, but for KCMP_EPOLL_TFD, whose caller passes the address of a live slot.
    Errno::result(unsafe { libc::syscall(libc::SYS_kcmp, a, b, what, i, j) })
}

fn ordering(r: libc::c_long) -> Result<Ordering> {
    match r {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => bail!("kcmp gives no order on this kernel"),
    }
}

/// Compares the descriptions behind descriptor `i` of process `a` and `j` of process `b`, in an order that
/// stays the same as long as this kernel runs.
pub fn files(a: i32, i: RawFd, b: i32, j: RawFd) -> Result<Ordering> {
    let r = raw(a, b, KCMP_FILE, i as u64, j as u64).with_context(|| {
        format!("kcmp(KCMP_FILE) of fd {i} of process {a} and fd {j} of process {b}")
    })?;
    ordering(r)
}

/// What processes may have in common.
#[derive(Debug, Clone, Copy)]
pub enum Common {
    Memory = 1,
    Descriptors = 2,
    /// Directories and umask.
    Directories = 3,
}

/// Compares what two processes have, in an order that stays the same as long as this kernel runs. What has ended has
/// nothing, and all that have nothing are equal.
pub fn common(a: i32, b: i32, what: Common) -> Result<Ordering> {
    let r = raw(a, b, what as libc::c_int, 0, 0)
        .with_context(|| format!("kcmp({what:?}) of {a} and {b}"))?;
    ordering(r)
}

/// Compares descriptor `fd` of process `a` with what epoll descriptor `epoll` of process `b` has registered
/// under number `tfd` (the `nth` of those, for a number can be used again while its first file lives on).
/// None: nothing is registered there.
pub fn epoll_target(
    a: i32,
    fd: RawFd,
    b: i32,
    epoll: RawFd,
    tfd: RawFd,
    nth: u32,
) -> Result<Option<Ordering>> {
    let slot = EpollSlot {
        efd: epoll as u32,
        tfd: tfd as u32,
        toff: nth,
    };
    match raw(a, b, KCMP_EPOLL_TFD, fd as u64, &raw const slot as u64) {
        Ok(r) => ordering(r).map(Some),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e).with_context(|| {
            format!("kcmp(KCMP_EPOLL_TFD) of fd {tfd} in epoll fd {epoll} of process {b}")
        }),
    }
}
