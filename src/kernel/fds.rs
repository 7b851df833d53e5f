//! Calls on descriptors that neither std nor nix has.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// fcntl(2) commands of linux/fcntl.h that libc lacks.
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;
const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
/// linux/timerfd.h: _IOW('T', 0, __u64).
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// struct f_owner_ex (fcntl(2)).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnerEx {
    /// F_OWNER_TID 0, F_OWNER_PID 1, F_OWNER_PGRP 2.
    pub who: i32,
    pub pid: i32,
}

/// The process or group that gets SIGIO of `fd`; pid 0: nobody.
pub fn owner(fd: BorrowedFd<'_>) -> nix::Result<OwnerEx> {
    let mut owner = OwnerEx::default();
    // SAFETY: F_GETOWN_EX writes one f_owner_ex, which `owner` is.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

/// See [`owner`]. The kernel notes the caller's credentials with it: call it as whom the signals may come from.
pub fn set_owner(fd: BorrowedFd<'_>, owner: OwnerEx) -> nix::Result<()> {
    // SAFETY: F_SETOWN_EX reads one f_owner_ex.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
}

/// Signal sent instead of SIGIO; 0: SIGIO.
pub fn signal(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    // SAFETY: F_GETSIG takes no argument.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })
}

/// See [`signal`].
pub fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: F_SETSIG takes an integer.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) }).map(drop)
}

/// F_GETFL: access mode and status flags.
pub fn flags(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    // SAFETY: F_GETFL takes no argument.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// F_SETFL: O_APPEND, O_NONBLOCK, O_DIRECT, O_NOATIME, O_ASYNC; other bits are ignored by the kernel.
pub fn set_flags(fd: BorrowedFd<'_>, flags: i32) -> nix::Result<()> {
    // SAFETY: F_SETFL takes an integer.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Closes everything else that is open in this process; for a fork of ours that uses nothing else from here on.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    kept.sort_unstable();
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: this process is ours alone; of its descriptors only those in `keep` are used from here on.
            unsafe { libc::close_range(from, to, 0) };
        }
    };
    let mut from = 0;
    for fd in kept {
        if fd > from {
            close(from, fd - 1);
        }
        from = fd + 1;
    }
    close(from, u32::MAX);
}

/// Lets us have as many descriptors as we may; how many these are.
pub fn allow_all() -> rlim_t {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) => {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
            hard
        }
        Err(_) => rlim_t::MAX,
    }
}

/// A duplicate with a number of at least `floor`, close-on-exec.
pub fn dup_above(fd: BorrowedFd<'_>, floor: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC returns a new descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, floor))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Bytes that a read would find (FIONREAD).
pub fn readable(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    Ok(n.max(0) as usize)
}

/// F_GETPIPE_SZ, bytes.
pub fn pipe_size(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    // SAFETY: F_GETPIPE_SZ takes no argument.
    let n = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) })?;
    Ok(n as usize)
}

/// F_SETPIPE_SZ; EPERM above /proc/sys/fs/pipe-max-size without CAP_SYS_RESOURCE.
pub fn set_pipe_size(fd: BorrowedFd<'_>, bytes: usize) -> nix::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| Errno::EINVAL)?;
    // SAFETY: F_SETPIPE_SZ takes an integer.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) }).map(drop)
}

/// Expirations that the next read of a timerfd reports (CONFIG_CHECKPOINT_RESTORE). Not zero.
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> nix::Result<()> {
    // SAFETY: TFD_IOC_SET_TICKS reads one u64.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) })
        .map(drop)
}

/// flock(2) on the description behind `fd`, without waiting.
pub fn flock(fd: BorrowedFd<'_>, exclusive: bool) -> nix::Result<()> {
    let how = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: flock takes two integers.
    Errno::result(unsafe { libc::flock(fd.as_raw_fd(), how | libc::LOCK_NB) }).map(drop)
}

/// Opens an inode by its file handle on the file system that `mount` is on; O_PATH. CAP_DAC_READ_SEARCH.
pub fn open_by_handle(
    mount: BorrowedFd<'_>,
    handle_type: i32,
    handle: &[u8],
) -> nix::Result<OwnedFd> {
    // struct file_handle: u32 bytes, i32 type, then the handle, at most MAX_HANDLE_SZ (128) bytes.
    #[repr(C, align(8))]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; 128],
    }
    let mut h = Handle {
        bytes: handle.len() as u32,
        kind: handle_type,
        data: [0; 128],
    };
    h.data
        .get_mut(..handle.len())
        .ok_or(Errno::EOVERFLOW)?
        .copy_from_slice(handle);
    // SAFETY: `h` begins with a struct file_handle followed by `bytes` bytes; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut h).cast(),
            libc::O_PATH | libc::O_CLOEXEC,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// open(2) without O_CREAT: flags as they are, close-on-exec added.
pub fn open(path: &CStr, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: `path` is a C string; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::open(path.as_ptr(), flags | libc::O_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The number of `fd`'s position set to `pos` bytes from the start; positions of directories are opaque cookies.
pub fn seek(fd: BorrowedFd<'_>, pos: i64) -> nix::Result<()> {
    // SAFETY: lseek takes integers.
    Errno::result(unsafe { libc::lseek(fd.as_raw_fd(), pos, libc::SEEK_SET) }).map(drop)
}

/// F_GET_SEALS of a memfd.
pub fn seals(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    // SAFETY: F_GET_SEALS takes no argument.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })
}

/// F_ADD_SEALS.
pub fn add_seals(fd: BorrowedFd<'_>, seals: i32) -> nix::Result<()> {
    // SAFETY: F_ADD_SEALS takes an integer.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// struct mq_attr, the part that is set at creation, and mq_curmsgs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueAttributes {
    pub max_messages: i64,
    pub message_size: i64,
    pub messages: i64,
}

/// mq_getattr(3) of a descriptor of a message queue.
pub fn message_queue(fd: BorrowedFd<'_>) -> nix::Result<QueueAttributes> {
    // struct mq_attr: flags, maxmsg, msgsize, curmsgs, four reserved.
    let mut attr = [0 as libc::c_long; 8];
    // SAFETY: the kernel writes one mq_attr of eight longs; the new attributes are absent.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mq_getsetattr,
            fd.as_raw_fd(),
            std::ptr::null::<libc::c_long>(),
            attr.as_mut_ptr(),
        )
    })?;
    Ok(QueueAttributes {
        max_messages: attr[1],
        message_size: attr[2],
        messages: attr[3],
    })
}

/// mq_open(3); `create` makes it, with that mode and those attributes, if it is not there.
pub fn open_message_queue(
    name: &CStr,
    flags: i32,
    create: Option<(u32, QueueAttributes)>,
) -> nix::Result<OwnedFd> {
    let (mode, attributes) = match create {
        Some((mode, a)) => (mode, [0, a.max_messages, a.message_size, 0, 0, 0, 0, 0]),
        None => (0, [0 as libc::c_long; 8]),
    };
    let (extra, pointer) = match create {
        Some(_) => (libc::O_CREAT, attributes.as_ptr()),
        None => (0, std::ptr::null()),
    };
    // SAFETY: `name` is a C string, `pointer` null or a whole mq_attr; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_mq_open,
            name.as_ptr(),
            flags | libc::O_CLOEXEC | extra,
            mode,
            pointer,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// mq_unlink(3), without the slash.
pub fn unlink_message_queue(name: &CStr) -> nix::Result<()> {
    // SAFETY: `name` is a C string.
    Errno::result(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

/// A signalfd with this mask (bit n-1 is signal n), non-blocking.
pub fn signalfd(mask: u64) -> nix::Result<OwnedFd> {
    // SAFETY: signalfd4 reads a kernel sigset of eight bytes; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// A timerfd that is not armed, non-blocking.
pub fn timerfd(clock: i32) -> nix::Result<OwnedFd> {
    // SAFETY: timerfd_create takes integers; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::timerfd_create(
            clock,
            libc::TFD_CLOEXEC | libc::TFD_NONBLOCK,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// timerfd_gettime(2): nanoseconds to the next expiry, 0 if it is not armed.
pub fn timerfd_left(fd: BorrowedFd<'_>) -> nix::Result<i64> {
    // SAFETY: itimerspec is plain data, for which zeros are valid; timerfd_gettime writes one.
    let now = unsafe {
        let mut now: libc::itimerspec = std::mem::zeroed();
        Errno::result(libc::timerfd_gettime(fd.as_raw_fd(), &raw mut now))?;
        now
    };
    Ok(now.it_value.tv_sec.saturating_mul(1_000_000_000) + now.it_value.tv_nsec)
}

/// timerfd_settime(2), times in nanoseconds.
pub fn timerfd_settime(
    fd: BorrowedFd<'_>,
    flags: i32,
    value_ns: i64,
    interval_ns: i64,
) -> nix::Result<()> {
    let spec = |ns: i64| libc::timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    };
    let new = libc::itimerspec {
        it_interval: spec(interval_ns),
        it_value: spec(value_ns),
    };
    // SAFETY: timerfd_settime reads one itimerspec; the old value is not asked for.
    Errno::result(unsafe {
        libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const new, std::ptr::null_mut())
    })
    .map(drop)
}

/// An io_uring of two entries, so that tests can see it refused.
pub fn io_uring() -> nix::Result<OwnedFd> {
    // struct io_uring_params is 120 bytes, all zero for the defaults.
    let mut params = [0u64; 15];
    // SAFETY: the kernel reads and writes one io_uring_params; the result is ours alone.
    unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_io_uring_setup,
            2,
            params.as_mut_ptr(),
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}
