//! userfaultfd(2) of another process: filling its memory from outside.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

use super::mem::{HUGE, Stage};

const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;

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
nix::ioctl_readwrite!(uffdio_move, 0xaa, 0x05, Copy);
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
    /// One of our own memory; without privilege, for faults that are not the kernel's.
    pub fn ours() -> io::Result<Self> {
        let make = |flags: u64| {
            // SAFETY: a call without pointers, whose result is a new descriptor or -1.
            match unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } {
                fd if fd < 0 => Err(io::Error::last_os_error()),
                fd => Ok(fd as i32),
            }
        };
        let fd =
            make((libc::O_CLOEXEC | libc::O_NONBLOCK) as u64).or_else(|_| make(UNPRIVILEGED))?;
        // SAFETY: the kernel has just given us this descriptor.
        Ok(Self(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
    }

    /// Moves the page of a stage to the missing huge page at `dst`, without a copy (Linux 6.8). The userfaultfd
    /// is one of [`Uffd::ours`].
    ///
    /// # Errors
    /// Those of UFFDIO_MOVE (ioctl_userfaultfd(2)); the pages not moved are still in the stage.
    pub fn take(&self, dst: u64, stage: &mut Stage) -> io::Result<()> {
        let mut done = 0;
        loop {
            // struct uffdio_move is laid out as struct uffdio_copy.
            let mut m = Copy {
                dst: dst + done,
                src: stage.addr() + done,
                len: HUGE - done,
                mode: 0,
                copied: 0,
            };
            // SAFETY: `m` is a live uffdio_move. Its source is the stage, which is ours alone and reads zero
            // when its page is gone; its destination is registered memory without pages.
            let r = unsafe { uffdio_move(self.0.as_raw_fd(), &mut m) };
            done += m.copied.max(0) as u64;
            match r {
                Ok(_) if done >= HUGE => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

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

    /// Writes to the range are noted, where [`super::pagemap::Pagemap::changed`] has asked for it. Needs
    /// [`TRACKING`].
    ///
    /// # Errors
    /// errno of UFFDIO_REGISTER: the mapping is gone or another one, or of a kind that cannot be tracked.
    pub fn register_tracked(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut r = Register {
            range: Range { start, len },
            mode: MODE_WP,
            ioctls: 0,
        };
        // SAFETY: `r` is a live uffdio_register.
        unsafe { uffdio_register(self.0.as_raw_fd(), &mut r) }.map(drop)
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
            // SAFETY: `c` is a live uffdio_copy whose source is `rest`; the kernel gives pages only where none are, in
            // memory that was registered by its numbers.
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

nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, ZeroPage);

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// UFFD_FEATURE_EVENT_FORK | _REMAP | _REMOVE | _UNMAP: what the program does to its mappings while they
/// are being filled is told, and waits for us to take note.
pub const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// UFFD_FEATURE_PAGEFAULT_FLAG_WP | _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC (Linux 6.7): writes to
/// protected pages go on by themselves, and are noted.
pub const TRACKING: u64 = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15;
/// Flags of userfaultfd(2) for one that needs no privilege: O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY. Where
/// no fault is ever handed out, it makes no difference.
pub const UNPRIVILEGED: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

/// struct uffd_msg, read.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// A child has a copy of the address space, with missing pages of its own.
    Fork(Uffd),
    Remap {
        from: u64,
        to: u64,
        len: u64,
    },
    /// Given back (madvise) or unmapped: nothing is to be filled there any more.
    Gone {
        start: u64,
        end: u64,
    },
}

/// Bytes of a message: sizeof(struct uffd_msg).
pub const MESSAGE: usize = 32;

impl Event {
    /// What a message says. That of a child's userfaultfd owns it: to be called once.
    ///
    /// # Errors
    /// For a kind that was never asked for.
    pub fn parse(b: &[u8; MESSAGE]) -> Result<Self> {
        let word = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().unwrap_or_default());
        Ok(match b[0] {
            0x12 => Event::Fault(word(16)),
            0x13 => {
                let fd = word(8) as i32;
                // SAFETY: the kernel has installed this descriptor in us for the event (fs/userfaultfd.c,
                // resolve_userfault_fork); nobody else knows it.
                Event::Fork(Uffd(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
            }
            0x14 => Event::Remap {
                from: word(8),
                to: word(16),
                len: word(24),
            },
            0x15 | 0x16 => Event::Gone {
                start: word(8),
                end: word(16),
            },
            other => bail!("an unknown userfaultfd event {other:#x}"),
        })
    }
}

impl Uffd {
    /// The next event, if there is one.
    pub fn event(&self) -> Result<Option<Event>> {
        let mut b = [0u8; MESSAGE];
        Ok(match self.read(&mut b)? {
            true => Some(Event::parse(&b)?),
            false => None,
        })
    }

    /// Reads the next message; false: there is none.
    pub(super) fn read(&self, message: &mut [u8; MESSAGE]) -> Result<bool> {
        match nix::unistd::read(&self.0, message) {
            Ok(MESSAGE) => Ok(true),
            Ok(n) => bail!("a userfaultfd event of {n} bytes"),
            Err(nix::errno::Errno::EAGAIN) => Ok(false),
            Err(e) => Err(io::Error::from(e)).context("reading userfaultfd events"),
        }
    }

    /// Gives zero pages, and wakes who waits for them.
    pub fn zero(&self, start: u64, len: u64) -> Result<Copied> {
        let mut z = ZeroPage {
            range: Range { start, len },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: `z` is a live uffdio_zeropage.
        match unsafe { uffdio_zeropage(self.0.as_raw_fd(), &mut z) } {
            Ok(_) => Ok(Copied::Done),
            Err(nix::errno::Errno::EEXIST) => Ok(Copied::Exists(0)),
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESRCH) => Ok(Copied::Gone(0)),
            Err(nix::errno::Errno::EAGAIN) => Ok(Copied::Again(0)),
            Err(e) => {
                Err(io::Error::from(e)).with_context(|| format!("UFFDIO_ZEROPAGE at {start:#x}"))
            }
        }
    }
}
