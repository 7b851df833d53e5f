//! Memory: pages that are there, that were written to, huge ones.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{PAGE, bad, checked, one, sys};
use crate::kernel::pagemap::Pagemap;

/// Anonymous memory of our own; unmapped when dropped.
pub(super) struct Memory {
    pub(super) start: u64,
    len: usize,
}

impl Memory {
    pub(super) fn new(len: usize) -> io::Result<Memory> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a fresh mapping, wherever there is room.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Memory {
                start: p as u64,
                len,
            })
        }
    }

    fn end(&self) -> u64 {
        self.start + self.len as u64
    }

    fn pages(&self) -> io::Result<Pagemap> {
        Pagemap::open(std::process::id() as i32).map_err(io::Error::other)
    }

    fn touch(&self) {
        for offset in (0..self.len).step_by(PAGE) {
            // SAFETY: within the mapping, which nobody else knows.
            unsafe { std::ptr::write_volatile((self.start as usize + offset) as *mut u8, 1) }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { libc::munmap(self.start as *mut _, self.len) };
    }
}
/// Finds a populated page by the PAGEMAP_SCAN ioctl.
pub fn pagemap_scan() -> io::Result<()> {
    let memory = Memory::new(2 * PAGE)?;
    memory.touch();
    let mut found = false;
    let scanned = memory
        .pages()?
        .populated(memory.start, memory.end(), &mut |_, _| {
            found = true;
            Ok(())
        });
    scanned.map_err(io::Error::other)?;
    match found {
        false => Err(bad("finds no page")),
        true => Ok(()),
    }
}

/// A userfaultfd, made by the system call for faults of kernel and user mode.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let fd = checked(sys(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]))?;
    // SAFETY: a descriptor that the kernel has just given us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// UFFDIO_API with these features; returns all that the kernel has.
pub fn uffd_api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    let mut api = [0xaa_u64, features, 0];
    checked(sys(
        libc::SYS_ioctl,
        [
            fd.as_raw_fd() as u64,
            UFFDIO_API,
            api.as_mut_ptr() as u64,
            0,
            0,
            0,
        ],
    ))?;
    Ok(api[1])
}

pub const UFFD_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6; // fork, remap, remove, unmap
const UFFD_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_WP_ASYNC: u64 = 1 << 15;
pub const UFFD_MOVE: u64 = 1 << 16;

/// Tracks a written page with WP_ASYNC and PAGEMAP_SCAN, without a fault handler.
pub fn wp_async() -> io::Result<()> {
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const REGISTER_MODE_WP: u64 = 2;
    let fd = userfaultfd()?;
    uffd_api(&fd, UFFD_WP_ASYNC | UFFD_WP_UNPOPULATED)?;
    let memory = Memory::new(2 * PAGE)?;
    memory.touch();
    let mut range = [memory.start, memory.len as u64, REGISTER_MODE_WP, 0];
    checked(sys(
        libc::SYS_ioctl,
        [
            fd.as_raw_fd() as u64,
            UFFDIO_REGISTER,
            range.as_mut_ptr() as u64,
            0,
            0,
            0,
        ],
    ))?;
    let pages = memory.pages()?;
    let written = |protect| {
        let scanned = pages.written(memory.start, memory.end(), protect);
        scanned.map_err(io::Error::other)
    };
    written(true)?;
    let before = written(false)?;
    memory.touch();
    match (before, written(false)?) {
        (false, true) => Ok(()),
        _ => Err(bad("does not report written pages")),
    }
}

/// Soft-dirty bits: cleared by clear_refs, set by a write.
pub fn soft_dirty() -> io::Result<()> {
    let memory = Memory::new(PAGE)?;
    memory.touch();
    let at = memory.start / PAGE as u64 * 8;
    let dirty = |fd: i64| {
        let mut entry = 0u64;
        let r = sys(
            libc::SYS_pread64,
            [fd as u64, &raw mut entry as u64, 8, at, 0, 0],
        );
        if r < 0 { r } else { (entry >> 55 & 1) as i64 }
    };
    let works = one(|| {
        let open = |path: &std::ffi::CStr, flags: i32| {
            sys(
                libc::SYS_openat,
                [
                    libc::AT_FDCWD as u64,
                    path.as_ptr() as u64,
                    flags as u64,
                    0,
                    0,
                    0,
                ],
            )
        };
        let (clear, pagemap) = (
            open(c"/proc/self/clear_refs", libc::O_WRONLY),
            open(c"/proc/self/pagemap", libc::O_RDONLY),
        );
        if clear < 0 || pagemap < 0 {
            return clear.min(pagemap);
        }
        let cleared = sys(
            libc::SYS_write,
            [clear as u64, c"4".as_ptr() as u64, 1, 0, 0, 0],
        );
        if cleared < 0 {
            return cleared;
        }
        let before = dirty(pagemap);
        memory.touch();
        i64::from(before == 0 && dirty(pagemap) == 1)
    })?;
    if works == 1 {
        Ok(())
    } else {
        Err(bad("not built into this kernel"))
    }
}

/// Gets memory backed by huge pages.
pub fn huge_pages() -> io::Result<()> {
    let huge = || -> io::Result<u64> {
        let text = fs::read_to_string("/proc/self/smaps_rollup")?;
        let field = text.lines().find_map(|l| l.strip_prefix("AnonHugePages:"));
        Ok(field
            .and_then(|f| f.split_whitespace().next()?.parse().ok())
            .unwrap_or(0))
    };
    let before = huge()?;
    let memory = Memory::new(4 << 20)?;
    checked(sys(
        libc::SYS_madvise,
        [
            memory.start,
            memory.len as u64,
            libc::MADV_HUGEPAGE as u64,
            0,
            0,
            0,
        ],
    ))?;
    memory.touch();
    if huge()? > before {
        Ok(())
    } else {
        Err(bad("the kernel gave small pages"))
    }
}
