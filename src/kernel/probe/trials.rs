//! One function per feature that tries it. What could do harm is tried in a forked child, which only issues
//! system calls: other threads of this process may have held locks at the fork.

use std::io::{self, Read, Write};

use libc::c_long;

mod foreign;
mod memory;
mod processes;
mod sockets;
mod vdso;

pub use foreign::foreign;
pub use memory::{
    UFFD_EVENTS, UFFD_MOVE, huge_pages, pagemap_scan, soft_dirty, uffd_api, userfaultfd, wp_async,
};
pub use processes::{map_files, set_mm_map, set_tid, timer_ids, unshare};
pub use sockets::{sock_diag, tcp_repair};
pub use vdso::{move_vdso, vdso_tail};

const PAGE: usize = 4096;

/// What a child tells its parent.
pub type Words = [i64; 8];

/// A system call by number: its result, or minus errno.
fn sys(nr: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the callers pass addresses of live, long enough objects of their own.
    let r = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if r == -1 { -i64::from(errno()) } else { r }
}

fn errno() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

fn checked(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::from_raw_os_error((-result) as i32))
    } else {
        Ok(result)
    }
}

fn bad(message: &str) -> io::Error {
    io::Error::other(message.to_owned())
}

/// Runs `f` in a forked child and returns what it returns. The child is gone afterwards.
fn in_child(f: impl FnOnce() -> Words) -> io::Result<Words> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the child issues system calls only, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let mut bytes = [0u8; 64];
        for (to, word) in bytes.chunks_exact_mut(8).zip(f()) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let _ = (&writer).write_all(&bytes);
        // SAFETY: ends the child at once, without destructors that belong to the parent.
        unsafe { libc::_exit(0) }
    }
    drop(writer);
    let mut bytes = Vec::new();
    let read = reader.read_to_end(&mut bytes);
    let mut status = 0;
    // SAFETY: our own child, and a valid place for its status.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 && errno() == libc::EINTR {}
    read?;
    let mut words = Words::default();
    if bytes.len() != 64 {
        return Err(bad(&format!(
            "the trial was killed by signal {}",
            libc::WTERMSIG(status)
        )));
    }
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = from.try_into().map(i64::from_ne_bytes).unwrap_or_default();
    }
    Ok(words)
}

/// One number out of a child, negative for an error.
fn one(f: impl FnOnce() -> i64) -> io::Result<i64> {
    let [r, ..] = in_child(|| [f(), 0, 0, 0, 0, 0, 0, 0])?;
    checked(r)
}
