//! Memory of the body, by way of its own system calls: pages that are filled lazily come when it touches them,
//! which they would not for ptrace or /proc/PID/mem.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kernel::arch::PAGE;
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

/// The memory of one body, which does nothing by itself meanwhile.
pub struct Reach<'a> {
    bridge: &'a Bridge,
    body: &'a mut Remote,
    /// Pages that have been read: every call takes the body some stops.
    pages: HashMap<u64, Vec<u8>>,
}

impl<'a> Reach<'a> {
    pub fn new(bridge: &'a Bridge, body: &'a mut Remote) -> Self {
        Self {
            bridge,
            body,
            pages: HashMap::new(),
        }
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
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = addr.wrapping_add(bytes.len() as u64);
            let offset = (at % PAGE) as usize;
            let page = match self.page(at - offset as u64) {
                Err(_) if !bytes.is_empty() => break,
                page => page?,
            };
            let end = page.len().min(offset + len - bytes.len());
            bytes.extend_from_slice(page.get(offset..end).unwrap_or_default());
        }
        Ok(bytes)
    }

    /// The page that begins at `base`.
    fn page(&mut self, base: u64) -> Result<&[u8]> {
        if !self.pages.contains_key(&base) {
            let mut page = vec![0; PAGE as usize];
            let got = self.transfer(libc::SYS_pwrite64, base, page.len())?;
            ensure!(got == page.len(), "half a page at {base:#x}");
            let read = self.bridge.0.read_exact_at(&mut page, 0);
            read.context("memfd: read")?;
            self.pages.insert(base, page);
        }
        Ok(self.pages.get(&base).map_or(&[], Vec::as_slice))
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
        for (i, byte) in bytes.iter().enumerate() {
            let at = addr + i as u64;
            let page = self.pages.get_mut(&(at - at % PAGE));
            if let Some(there) = page.and_then(|page| page.get_mut((at % PAGE) as usize)) {
                *there = *byte;
            }
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
