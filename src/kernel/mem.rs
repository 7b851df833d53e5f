//! Memory of another process (/proc/PID/mem), and of our own by its numbers.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context, Result};

/// /proc/PID/mem: reads and writes whatever protection the pages have.
#[derive(Debug)]
pub struct Mem {
    pub pid: i32,
    file: File,
}

impl Mem {
    pub fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path)
            .with_context(|| format!("opening {path}"))?;
        Ok(Self { pid, file })
    }

    /// Whether nobody uses this memory any more: its process has executed another program, or ended.
    /// Every read gives nothing then (mem_rw in fs/proc/base.c).
    pub fn is_over(&self) -> bool {
        let mut byte = [0];
        matches!(self.file.read_at(&mut byte, 0), Ok(0))
    }

    pub fn write(&self, addr: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, addr).with_context(|| {
            format!(
                "writing {} bytes at {addr:#x} of process {}",
                data.len(),
                self.pid
            )
        })
    }

    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, addr).with_context(|| {
            format!(
                "reading {} bytes at {addr:#x} of process {}",
                out.len(),
                self.pid
            )
        })
    }

    /// Reads pages that the process itself may read: copied once, where [`Mem::read`] copies twice. Their pages are
    /// pinned for it, and those shared by fork(2) copied first: not for memory whose copies are to stay shared.
    pub fn read_pinned(&self, addr: u64, out: &mut [u8]) -> Result<()> {
        let ours = libc::iovec {
            iov_base: out.as_mut_ptr().cast(),
            iov_len: out.len(),
        };
        let theirs = libc::iovec {
            iov_base: addr as *mut _,
            iov_len: out.len(),
        };
        // SAFETY: one live range of ours that is written to, of the length told; the other one is only read, in `pid`.
        let read = unsafe { libc::process_vm_readv(self.pid, &ours, 1, &theirs, 1, 0) };
        match usize::try_from(read) {
            Ok(read) if read == out.len() => Ok(()),
            // Other memory, and what the process itself may not read.
            _ => self.read(addr, out),
        }
    }

    pub fn read_vec(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut v = vec![0; len];
        self.read(addr, &mut v)?;
        Ok(v)
    }

    pub fn read_u64(&self, addr: u64) -> Result<u64> {
        let mut b = [0; 8];
        self.read(addr, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
}

/// Bytes of a huge page on x86-64 (one entry of a page middle directory).
pub const HUGE: u64 = 2 << 20;

/// Maps private anonymous memory of ours at exactly this free range; `flags` are added.
///
/// # Errors
/// EEXIST when something is mapped there.
pub fn map_fixed(start: u64, len: u64, prot: i32, flags: i32) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | flags;
    // SAFETY: MAP_FIXED_NOREPLACE replaces nothing that is there.
    let r = unsafe { libc::mmap(start as *mut _, len as usize, prot, flags, -1, 0) };
    if r == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else if r as u64 != start {
        // A kernel that does not know the flag takes the address for a hint.
        // SAFETY: has just been mapped, and nobody knows it.
        unsafe { libc::munmap(r, len as usize) };
        Err(io::Error::from_raw_os_error(libc::EEXIST))
    } else {
        Ok(())
    }
}

/// Unmaps what [`map_fixed`] mapped.
pub fn unmap_fixed(start: u64, len: u64) {
    // SAFETY: nothing of Rust's lies in memory that was mapped by its number.
    unsafe { libc::munmap(start as *mut _, len as usize) };
}

/// madvise(2) of memory that [`map_fixed`] mapped, and of no other.
///
/// # Errors
/// Those of madvise(2).
pub(crate) fn advise_fixed(start: u64, len: u64, advice: i32) -> io::Result<()> {
    // SAFETY: nothing of Rust's lies in memory that was mapped by its number.
    match unsafe { libc::madvise(start as *mut _, len as usize, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One huge page of ours, if the machine gives us one, that can be moved away and is then made anew.
pub struct Stage {
    map: *mut u8,
    page: *mut u8,
}

impl Stage {
    pub fn new() -> io::Result<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let len = 2 * HUGE as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), len, rw, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map: *mut u8 = map.cast();
        let page = map.wrapping_add(map.align_offset(HUGE as usize));
        // SAFETY: the huge page lies within the two that were mapped. Refused, it is made of small ones.
        unsafe { libc::madvise(page.cast(), HUGE as usize, libc::MADV_HUGEPAGE) };
        Ok(Self { map, page })
    }

    pub fn addr(&self) -> u64 {
        self.page as u64
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped readable and writable as long as this value lives; anonymous memory that was moved
        // away reads zero.
        unsafe { std::slice::from_raw_parts_mut(self.page, HUGE as usize) }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, with this length; no reference to it is left.
        unsafe { libc::munmap(self.map.cast(), 2 * HUGE as usize) };
    }
}
