//! Memory of another process: /proc/PID/mem and process_vm_readv(2).

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

/// process_vm_readv: faster than /proc/PID/mem, but honours the pages' protection. Bytes read.
pub fn vm_read(pid: i32, addr: u64, out: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: out.as_mut_ptr().cast(),
        iov_len: out.len(),
    };
    let remote = libc::iovec {
        iov_base: addr as *mut _,
        iov_len: out.len(),
    };
    // SAFETY: `local` describes a live, writable buffer; `remote` is checked by the kernel.
    let n = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}

/// process_vm_writev. Bytes written.
pub fn vm_write(pid: i32, addr: u64, data: &[u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: data.as_ptr() as *mut _,
        iov_len: data.len(),
    };
    let remote = libc::iovec {
        iov_base: addr as *mut _,
        iov_len: data.len(),
    };
    // SAFETY: `local` describes a live buffer that is only read; `remote` is checked by the kernel.
    let n = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}
