//! userfaultfd(2) of another process: filling its memory from outside.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
nix::ioctl_read!(uffdio_unregister, 0xaa, 0x01, Range);
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);
nix::ioctl_read!(uffdio_wake, 0xaa, 0x02, Range);

/// A userfaultfd, ours or another process's.
#[derive(Debug)]
pub struct Uffd(pub OwnedFd);

/// What [`Uffd::copy`] met.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    Done,
    /// The page at this many bytes into the range was there already.
    Exists(u64),
    /// The mapping is gone (unmapped or its process ended) or changing; bytes done before.
    Gone(u64),
    Again(u64),
}

impl Uffd {
    /// The handshake: which features (UFFD_FEATURE_*) are wanted.
    pub fn api(&self, features: u64) -> Result<()> {
        let mut a = UffdApi {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: `a` is a live uffdio_api.
        unsafe { uffdio_api(self.0.as_raw_fd(), &mut a) }.context("UFFDIO_API")?;
        Ok(())
    }

    /// Missing pages in the range are ours to give.
    pub fn register_missing(&self, start: u64, len: u64) -> Result<()> {
        let mut r = Register {
            range: Range { start, len },
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `r` is a live uffdio_register.
        unsafe { uffdio_register(self.0.as_raw_fd(), &mut r) }
            .with_context(|| format!("UFFDIO_REGISTER of {len} bytes at {start:#x}"))?;
        Ok(())
    }

    pub fn unregister(&self, start: u64, len: u64) -> Result<()> {
        let mut r = Range { start, len };
        // SAFETY: `r` is a live uffdio_range.
        unsafe { uffdio_unregister(self.0.as_raw_fd(), &mut r) }
            .with_context(|| format!("UFFDIO_UNREGISTER of {len} bytes at {start:#x}"))?;
        Ok(())
    }

    /// Fills missing pages at `dst` with `data` (whole pages).
    pub fn copy(&self, dst: u64, data: &[u8]) -> Result<Copied> {
        let mut done = 0u64;
        while done < data.len() as u64 {
            let rest = &data[done as usize..];
            let mut c = Copy {
                dst: dst + done,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: `c` is a live uffdio_copy whose source is `rest`; the destination is another
            // process's, or the kernel refuses it.
            let r = unsafe { uffdio_copy(self.0.as_raw_fd(), &mut c) };
            if c.copied > 0 {
                done += c.copied as u64;
                continue;
            }
            match r {
                Ok(_) => bail!("UFFDIO_COPY at {:#x} copied nothing", dst + done),
                Err(nix::errno::Errno::EEXIST) => return Ok(Copied::Exists(done)),
                Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH) => {
                    return Ok(Copied::Gone(done));
                }
                Err(nix::errno::Errno::EAGAIN) => return Ok(Copied::Again(done)),
                Err(e) => {
                    return Err(io::Error::from(e)).with_context(|| {
                        format!("UFFDIO_COPY of {} bytes at {:#x}", rest.len(), dst + done)
                    });
                }
            }
        }
        Ok(Copied::Done)
    }

    /// Wakes threads that wait for pages of the range.
    pub fn wake(&self, start: u64, len: u64) -> Result<()> {
        let mut r = Range { start, len };
        // SAFETY: `r` is a live uffdio_range.
        unsafe { uffdio_wake(self.0.as_raw_fd(), &mut r) }.context("UFFDIO_WAKE")?;
        Ok(())
    }
}
