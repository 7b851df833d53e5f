//! getsockopt(2) and setsockopt(2) on raw bytes, and the socket ioctls that tell queue lengths.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Value of a socket option, at most `max` bytes.
///
/// # Errors
/// errno of getsockopt(2); ENOPROTOOPT where the socket or the kernel has no such option.
pub fn get(fd: impl AsFd, level: i32, name: i32, max: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    // SAFETY: `value` is writable for `len` bytes and both outlive the call.
    let r = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    value.truncate(len as usize);
    Ok(value)
}

/// Like [`get`], with what `value` holds passed in (options that name a queue, an index, an address).
pub fn get_with(fd: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is writable for `len` bytes and both outlive the call.
    let r = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(len as usize)
}

/// An option that is an int (or a byte, which some kernels return for small ones).
pub fn get_int(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let value = get(fd, level, name, 4)?;
    let mut bytes = [0u8; 4];
    for (to, from) in bytes.iter_mut().zip(&value) {
        *to = *from;
    }
    Ok(i32::from_ne_bytes(bytes))
}

/// Memory that what a socket has queued to send is charged with, bytes (SO_MEMINFO, SK_MEMINFO_WMEM_QUEUED).
pub fn queued_memory(fd: impl AsFd) -> io::Result<i32> {
    const SO_MEMINFO: i32 = 55;
    const WMEM_QUEUED: usize = 5;
    let all = get(fd, libc::SOL_SOCKET, SO_MEMINFO, 36)?;
    let word = all.get(4 * WMEM_QUEUED..).and_then(|w| w.first_chunk());
    Ok(word.copied().map_or(0, i32::from_ne_bytes))
}

/// Sets a socket option to raw bytes.
///
/// # Errors
/// errno of setsockopt(2).
pub fn set(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: `value` is readable for its length.
    let r = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets an option that is an int.
pub fn set_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(fd, level, name, &value.to_ne_bytes())
}

/// Which queue [`queued`] asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// SIOCINQ: bytes that can be read (of a datagram socket: of the first datagram).
    In,
    /// SIOCOUTQ: bytes sent or queued and not acknowledged (of a unix socket: memory in flight).
    Out,
    /// SIOCOUTQNSD: of these, bytes not sent yet (TCP only).
    OutUnsent,
}

/// Bytes in a queue of a socket (unix(7), tcp(7)).
pub fn queued(fd: impl AsFd, queue: Queue) -> io::Result<u32> {
    // linux/sockios.h: SIOCOUTQNSD; the other two are FIONREAD and TIOCOUTQ.
    const SIOCOUTQNSD: libc::c_ulong = 0x894B;
    let request = match queue {
        Queue::In => libc::FIONREAD,
        Queue::Out => libc::TIOCOUTQ,
        Queue::OutUnsent => SIOCOUTQNSD,
    };
    let mut bytes: libc::c_int = 0;
    // SAFETY: these requests write one int through the pointer.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &mut bytes) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.max(0) as u32)
}

/// One instruction of a classic socket filter, struct sock_filter.
pub type Instruction = [u8; 8];

/// The classic filter a socket has (SO_ATTACH_FILTER); empty without one.
///
/// # Errors
/// EACCES for an eBPF program (SO_ATTACH_BPF), which cannot be read.
pub fn filter(fd: impl AsFd) -> io::Result<Vec<Instruction>> {
    let fd = fd.as_fd();
    let mut count: libc::socklen_t = 0;
    // SO_GET_FILTER is SO_ATTACH_FILTER; its length counts instructions, and 0 only asks for the count
    // (net/core/filter.c, sk_get_filter).
    // SAFETY: with a length of zero nothing is written but the count.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::null_mut(),
            &mut count,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut program = vec![[0u8; 8]; count as usize];
    if program.is_empty() {
        return Ok(program);
    }
    // SAFETY: `program` has room for `count` instructions of 8 bytes, what the kernel writes.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            program.as_mut_ptr().cast(),
            &mut count,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    program.truncate(count as usize);
    Ok(program)
}

/// Attaches a classic filter, or takes away what there is when `program` is empty.
pub fn set_filter(fd: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let fd = fd.as_fd();
    if program.is_empty() {
        return match set_int(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        };
    }
    let fprog = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `fprog` points at `program`, which the kernel only reads; sock_filter has no
    // alignment the kernel relies on, for it copies from user memory.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const fprog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A filter that drops every packet: `ret #0`.
pub const DROP_ALL: [Instruction; 1] = [[0x06, 0, 0, 0, 0, 0, 0, 0]];
