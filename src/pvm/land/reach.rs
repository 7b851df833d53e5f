//! Memory of the body, by way of its own system calls: pages that are filled lazily come when it touches them,
//! which they would not for ptrace or /proc/PID/mem.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kernel::remote::Remote;

/// What is copied by one call.
const MOST: usize = 1 << 16;

/// A file of ours that the body has open too, under the same number.
pub struct Bridge(File);

impl Bridge {
    /// Make it before the body is made.
    pub fn new() -> Result<Self> {
        let fd: OwnedFd = memfd_create(c"mist", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
        Ok(Self(fd.into()))
    }
}

/// The memory of one body.
pub struct Reach<'a> {
    bridge: &'a Bridge,
    body: &'a mut Remote,
}

impl<'a> Reach<'a> {
    pub fn new(bridge: &'a Bridge, body: &'a mut Remote) -> Self {
        Self { bridge, body }
    }

    /// The body itself.
    pub fn body(&mut self) -> &mut Remote {
        self.body
    }

    /// Up to `len` bytes from `addr` on, as many as are mapped.
    ///
    /// # Errors
    /// When there is nothing.
    pub fn read_some(&mut self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let len = len.min(MOST);
        let got = self.transfer(libc::SYS_pwrite64, addr, len)?;
        let mut bytes = vec![0; got];
        self.bridge
            .0
            .read_exact_at(&mut bytes, 0)
            .context("memfd: read")?;
        Ok(bytes)
    }

    /// `N` bytes at `addr`.
    ///
    /// # Errors
    /// When they are not there.
    pub fn read<const N: usize>(&mut self, addr: u64) -> Result<[u8; N]> {
        let bytes = self.read_some(addr, N)?;
        bytes
            .as_slice()
            .try_into()
            .with_context(|| format!("the program has no {N} bytes at {addr:#x}"))
    }

    pub fn read_u64(&mut self, addr: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(addr)?))
    }

    pub fn read_u32(&mut self, addr: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read(addr)?))
    }

    /// Writes where the program could.
    ///
    /// # Errors
    /// When it could not.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        let mut at = addr;
        for piece in bytes.chunks(MOST) {
            self.bridge
                .0
                .write_all_at(piece, 0)
                .context("memfd: write")?;
            let got = self.transfer(libc::SYS_pread64, at, piece.len())?;
            if got != piece.len() {
                bail!("the program's memory ends after {got} bytes at {at:#x}");
            }
            at += got as u64;
        }
        Ok(())
    }

    fn transfer(&mut self, nr: i64, addr: u64, len: usize) -> Result<usize> {
        let fd = self.bridge.0.as_raw_fd();
        let args = [fd.into(), addr.into(), (len as u64).into(), 0u64.into()];
        let got = self.body.call(nr, &args)?;
        usize::try_from(got).map_err(|_| {
            anyhow::Error::new(std::io::Error::from_raw_os_error(-got as i32))
                .context(format!("{len} bytes of the program's memory at {addr:#x}"))
        })
    }
}
