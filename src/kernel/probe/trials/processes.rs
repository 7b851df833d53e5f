//! Processes: ids, namespaces, layout, timers, mapped files.

use std::fs::{self, File};
use std::io;

use super::{bad, checked, one, sys};

/// Makes a process with an id of our choice (clone3(2), set_tid).
pub fn set_tid() -> io::Result<i64> {
    let max: i64 = fs::read_to_string("/proc/sys/kernel/pid_max")?
        .trim()
        .parse()
        .unwrap_or(32768);
    let mut last = bad("no free id found");
    for tid in (max - 200..max).rev() {
        let wanted = [tid as i32];
        // SAFETY: an all-zero clone_args is valid: a plain fork.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.exit_signal = libc::SIGCHLD as u64;
        args.set_tid = wanted.as_ptr() as u64;
        args.set_tid_size = 1;
        let pid = sys(
            libc::SYS_clone3,
            [
                &raw const args as u64,
                size_of_val(&args) as u64,
                0,
                0,
                0,
                0,
            ],
        );
        if pid == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        match checked(pid) {
            Ok(pid) => {
                sys(libc::SYS_wait4, [pid as u64, 0, 0, 0, 0, 0]);
                return if pid == tid {
                    Ok(pid)
                } else {
                    Err(bad("the kernel gave another id"))
                };
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// Enters new namespaces (CLONE_NEW*), and sets a clock offset when that is a time namespace.
pub fn unshare(flags: i32) -> io::Result<()> {
    one(|| {
        let r = sys(libc::SYS_unshare, [flags as u64, 0, 0, 0, 0, 0]);
        if r < 0 || flags != libc::CLONE_NEWTIME {
            return r;
        }
        let path = c"/proc/self/timens_offsets".as_ptr() as u64;
        let fd = sys(
            libc::SYS_openat,
            [libc::AT_FDCWD as u64, path, libc::O_WRONLY as u64, 0, 0, 0],
        );
        if fd < 0 {
            return fd;
        }
        let offset = c"monotonic 1 0";
        sys(
            libc::SYS_write,
            [
                fd as u64,
                offset.as_ptr() as u64,
                offset.count_bytes() as u64,
                0,
                0,
                0,
            ],
        )
    })
    .map(drop)
}
/// struct prctl_mm_map (linux/prctl.h).
#[repr(C)]
struct MmMap {
    addresses: [u64; 11],
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Sets a process's own layout (as it is already) with PR_SET_MM_MAP.
pub fn set_mm_map() -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<u64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| {
            rest.split_whitespace()
                .map(|f| f.parse().unwrap_or(0))
                .collect()
        })
        .unwrap_or_default();
    // proc_pid_stat(5) counts from 1, and the two fields up to the name are gone.
    let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
    // SAFETY: asks for the end of the heap, changes nothing.
    let brk = unsafe { libc::sbrk(0) } as u64;
    let map = MmMap {
        addresses: [
            field(26),
            field(27),
            field(45),
            field(46),
            field(47),
            brk,
            field(28),
            field(48),
            field(49),
            field(50),
            field(51),
        ],
        auxv: 0,
        auxv_size: 0,
        exe_fd: u32::MAX,
    };
    one(move || {
        let args = [
            libc::PR_SET_MM as u64,
            libc::PR_SET_MM_MAP as u64,
            &raw const map as u64,
            size_of_val(&map) as u64,
            0,
            0,
        ];
        sys(libc::SYS_prctl, args)
    })
    .map(drop)
}
/// Makes a POSIX timer with an id of our choice (PR_TIMER_CREATE_RESTORE_IDS).
pub fn timer_ids() -> io::Result<()> {
    let pr_timer_create_restore_ids = 77;
    let wanted = 4711i32;
    let got = one(|| {
        let r = sys(
            libc::SYS_prctl,
            [pr_timer_create_restore_ids, 1, 0, 0, 0, 0],
        );
        if r < 0 {
            return r;
        }
        let mut id = wanted;
        let r = sys(
            libc::SYS_timer_create,
            [libc::CLOCK_MONOTONIC as u64, 0, &raw mut id as u64, 0, 0, 0],
        );
        if r < 0 { r } else { i64::from(id) }
    })?;
    if got == i64::from(wanted) {
        Ok(())
    } else {
        Err(bad("the kernel gave another id"))
    }
}

/// Opens a mapped file through /proc/PID/map_files.
pub fn map_files() -> io::Result<()> {
    let entry = fs::read_dir("/proc/self/map_files")?
        .next()
        .ok_or_else(|| bad("is empty"))??;
    File::open(entry.path()).map(drop)
}
