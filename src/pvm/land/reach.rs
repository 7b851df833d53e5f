//! Memory of the body, which does nothing by itself meanwhile. Pages that are filled lazily come when it touches them by
//! its own system calls, which they would not for ptrace or /proc/PID/mem; what is written, it writes: where it could.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kernel::arch::PAGE;
use crate::kernel::body;
use crate::kernel::remote::Remote;

/// What is looked at in one go, bytes.
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

/// The memory of one body. What is written is there behind [`Reach::finish`].
pub struct Reach<'a> {
    bridge: &'a Bridge,
    body: &'a mut Remote,
    /// Pages that have been looked at, as they are to be: every call takes the body some stops.
    pages: HashMap<u64, Vec<u8>>,
    /// What is to be written, in this order.
    writes: Vec<(u64, Vec<u8>)>,
}

impl<'a> Reach<'a> {
    pub fn new(bridge: &'a Bridge, body: &'a mut Remote) -> Self {
        Self {
            bridge,
            body,
            pages: HashMap::new(),
            writes: Vec::new(),
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
            // It fails where it would have to wait for the page.
            if self.body.mem().read(base, &mut page).is_err() {
                self.fetch(base, &mut page)?;
            }
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

    /// A page that the body gets at.
    fn fetch(&mut self, base: u64, page: &mut [u8]) -> Result<()> {
        let what = || format!("the page of the program's memory at {base:#x}");
        let fd = self.bridge.0.as_raw_fd();
        let args = [fd.into(), base.into(), PAGE.into(), 0u64.into()];
        let got = self.body.call(libc::SYS_pwrite64, &args)?;
        body::check("pwrite", got).with_context(what)?;
        ensure!(got as u64 == PAGE, "half of {}", what());
        let read = self.bridge.0.read_exact_at(page, 0);
        read.context("memfd: read")
    }

    /// Has something written that is mapped.
    ///
    /// # Errors
    /// When it is not.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        let mut at = addr;
        while !rest.is_empty() {
            let offset = (at % PAGE) as usize;
            let (piece, behind) = rest.split_at(rest.len().min(PAGE as usize - offset));
            let base = at - offset as u64;
            self.page(base)?;
            let page = self.pages.get_mut(&base);
            if let Some(there) = page.and_then(|p| p.get_mut(offset..offset + piece.len())) {
                there.copy_from_slice(piece);
            }
            self.writes.push((at, piece.to_vec()));
            at += piece.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Writes what is to be written where the program could.
    ///
    /// # Errors
    /// When it could not.
    pub fn finish(self) -> Result<()> {
        let fd = self.bridge.0.as_raw_fd();
        let mut offset = 0;
        for (at, bytes) in &self.writes {
            let len = bytes.len() as u64;
            let stored = self.bridge.0.write_all_at(bytes, offset);
            stored.context("memfd: write")?;
            // Within a page: all of it, or nothing.
            let what = format!("writing {len} bytes of its memory at {at:#x}");
            let args = [fd.into(), (*at).into(), len.into(), offset.into()];
            self.body.must(what, libc::SYS_pread64, &args)?;
            offset += len;
        }
        self.body.flush()
    }
}
