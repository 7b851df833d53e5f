//! The socket calls, on addresses as raw bytes: what an image stores is what the kernel gave.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Largest struct sockaddr.
const ADDR_MAX: usize = size_of::<libc::sockaddr_storage>();
/// SCM_MAX_FD (include/net/scm.h): most descriptors a message carries.
pub const SCM_MAX_FD: usize = 253;

fn check(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// socket(2), close-on-exec.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// socketpair(2), close-on-exec.
pub fn pair(family: i32, kind: i32, protocol: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` takes the two descriptors.
    check(unsafe {
        libc::socketpair(
            family,
            kind | libc::SOCK_CLOEXEC,
            protocol,
            fds.as_mut_ptr(),
        )
    })?;
    // SAFETY: both are fresh and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

fn name_of(
    fd: BorrowedFd<'_>,
    call: unsafe extern "C" fn(RawFd, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int,
) -> io::Result<Vec<u8>> {
    let mut addr = vec![0u8; ADDR_MAX];
    let mut len = ADDR_MAX as libc::socklen_t;
    // SAFETY: `addr` is writable for `len` bytes.
    check(unsafe { call(fd.as_raw_fd(), addr.as_mut_ptr().cast(), &mut len) })?;
    addr.truncate(len as usize);
    Ok(addr)
}

/// getsockname(2): struct sockaddr, as long as it is.
pub fn local_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_of(fd.as_fd(), libc::getsockname)
}

/// getpeername(2).
pub fn peer_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_of(fd.as_fd(), libc::getpeername)
}

/// bind(2).
pub fn bind(fd: impl AsFd, addr: &[u8]) -> io::Result<()> {
    // SAFETY: `addr` is readable for its length.
    check(unsafe {
        libc::bind(
            fd.as_fd().as_raw_fd(),
            addr.as_ptr().cast(),
            addr.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// connect(2).
pub fn connect(fd: impl AsFd, addr: &[u8]) -> io::Result<()> {
    // SAFETY: `addr` is readable for its length.
    check(unsafe {
        libc::connect(
            fd.as_fd().as_raw_fd(),
            addr.as_ptr().cast(),
            addr.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// connect(2) to AF_UNSPEC: takes the peer of a datagram socket away.
pub fn disconnect(fd: impl AsFd) -> io::Result<()> {
    connect(fd, &[0u8; 16])
}

/// listen(2).
pub fn listen(fd: impl AsFd, backlog: u32) -> io::Result<()> {
    let backlog = backlog.min(i32::MAX as u32) as i32;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }).map(drop)
}

/// accept4(2), close-on-exec.
pub fn accept(fd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: null for an address that is not wanted.
    let new = check(unsafe {
        libc::accept4(
            fd.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// shutdown(2); `how` is the kernel's own mask, 1 receive, 2 send, 3 both (RCV_SHUTDOWN, SEND_SHUTDOWN).
pub fn shutdown(fd: impl AsFd, how: u8) -> io::Result<()> {
    let how = match how & 3 {
        0 => return Ok(()),
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    // SAFETY: no pointers.
    check(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }).map(drop)
}

/// Sets or clears O_NONBLOCK of the description; returns what it was.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<bool> {
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(raw, libc::F_GETFL) })?;
    let wanted = if on {
        flags | libc::O_NONBLOCK
    } else {
        flags & !libc::O_NONBLOCK
    };
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(raw, libc::F_SETFL, wanted) })?;
    Ok(flags & libc::O_NONBLOCK != 0)
}

/// What poll(2) says at once, of POLLIN, POLLOUT, POLLRDHUP and the conditions that are always told.
pub fn poll_now(fd: impl AsFd) -> io::Result<i16> {
    let mut p = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP | libc::POLLPRI,
        revents: 0,
    };
    // SAFETY: one pollfd.
    check(unsafe { libc::poll(&mut p, 1, 0) })?;
    Ok(p.revents)
}

/// The file a bound unix socket made, opened O_PATH (SIOCUNIXFILE, net/unix/af_unix.c).
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, ENOENT for a socket without a file.
pub fn unix_file(fd: impl AsFd) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89E0;
    // SAFETY: the request takes no argument.
    let new = check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE, 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// One message as recvmsg(2) gave it.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes put into the buffer.
    pub len: usize,
    /// Sender's struct sockaddr; empty is none.
    pub from: Vec<u8>,
    /// SCM_RIGHTS, ours to close.
    pub fds: Vec<OwnedFd>,
    /// SCM_CREDENTIALS: pid, uid, gid.
    pub credentials: Option<(i32, u32, u32)>,
    /// MSG_TRUNC, MSG_CTRUNC ...
    pub flags: i32,
}

/// recvmsg(2) without waiting; `flags` is added to MSG_DONTWAIT and MSG_CMSG_CLOEXEC.
pub fn receive(fd: impl AsFd, buffer: &mut [u8], flags: i32) -> io::Result<Received> {
    // Room for the most descriptors, credentials, and what other options may add. u64 for alignment.
    let mut control = [0u64; 256];
    let mut from = [0u8; ADDR_MAX];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_name = from.as_mut_ptr().cast();
    msg.msg_namelen = ADDR_MAX as libc::socklen_t;
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `msg` points at live buffers of the lengths it says.
    let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut msg, flags) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut received = Received {
        len: (n as usize).min(buffer.len()),
        from: from
            .get(..msg.msg_namelen as usize)
            .unwrap_or_default()
            .to_vec(),
        flags: msg.msg_flags,
        ..Received::default()
    };
    // SAFETY: the kernel filled `control` up to msg_controllen; the CMSG macros stay inside of it, and
    // cmsg_len covers the data that is read.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(&msg);
        while !c.is_null() {
            let data = libc::CMSG_DATA(c);
            let len = ((*c).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*c).cmsg_level, (*c).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for i in 0..len / 4 {
                        let fd = data.cast::<RawFd>().add(i).read_unaligned();
                        received.fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= size_of::<libc::ucred>() => {
                    let u = data.cast::<libc::ucred>().read_unaligned();
                    received.credentials = Some((u.pid, u.uid, u.gid));
                }
                _ => {}
            }
            c = libc::CMSG_NXTHDR(&msg, c);
        }
    }
    Ok(received)
}

/// Peeks at a stream with room for `buffer` and one byte more at an address nobody can write to: the
/// kernel then copies whole pieces of the queue (what one send put there) as far as they fit, so that the
/// number returned is where a piece ends. 0: the first piece is longer than the buffer.
///
/// # Errors
/// errno of recvmsg(2), EFAULT excepted.
pub fn peek_whole_pieces(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let mut iov = [
        libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        },
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(1),
            iov_len: 1,
        },
    ];
    // SAFETY: all zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = 2;
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: `buffer` is writable; address 1 is in the page that is never mapped
    // (vm.mmap_min_addr), so the kernel's copy to it fails and writes nothing.
    let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut msg, flags) };
    if n >= 0 {
        return Ok(n as usize);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        e => Err(e),
    }
}

/// What [`send`] sends besides bytes.
#[derive(Debug, Default)]
pub struct Extra<'a> {
    /// Address to send to; None for the peer.
    pub to: Option<&'a [u8]>,
    pub fds: &'a [BorrowedFd<'a>],
    pub credentials: Option<(i32, u32, u32)>,
}

/// sendmsg(2) without waiting and without SIGPIPE. Returns the bytes sent.
pub fn send(fd: impl AsFd, data: &[u8], extra: &Extra<'_>) -> io::Result<usize> {
    let mut control = [0u64; 256];
    let mut iov = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: all zero is a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(to) = extra.to {
        msg.msg_name = to.as_ptr().cast_mut().cast();
        msg.msg_namelen = to.len() as libc::socklen_t;
    }
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    if extra.fds.len() > SCM_MAX_FD {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut used = 0;
    // SAFETY: room for SCM_MAX_FD descriptors and a ucred is in `control` (2048 bytes), so that every
    // header and its data stay inside; msg_controllen is set to what was written.
    unsafe {
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = size_of_val(&control);
        let mut c = libc::CMSG_FIRSTHDR(&msg);
        if !extra.fds.is_empty() {
            let len = size_of_val(extra.fds) as u32;
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(len) as usize;
            for (i, f) in extra.fds.iter().enumerate() {
                let at = libc::CMSG_DATA(c).cast::<RawFd>().add(i);
                at.write_unaligned(f.as_raw_fd());
            }
            used += libc::CMSG_SPACE(len) as usize;
            c = control.as_mut_ptr().cast::<u8>().add(used).cast();
        }
        if let Some((pid, uid, gid)) = extra.credentials {
            let len = size_of::<libc::ucred>() as u32;
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_CREDENTIALS;
            (*c).cmsg_len = libc::CMSG_LEN(len) as usize;
            libc::CMSG_DATA(c)
                .cast::<libc::ucred>()
                .write_unaligned(libc::ucred { pid, uid, gid });
            used += libc::CMSG_SPACE(len) as usize;
        }
    }
    msg.msg_controllen = used;
    if used == 0 {
        msg.msg_control = std::ptr::null_mut();
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `msg` points at live buffers of the lengths it says.
    let n = unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &msg, flags) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(n as usize)
}

/// Gives the calling thread a working directory of its own, `directory`, so that relative names can be
/// bound without moving the whole process (unshare(2), CLONE_FS).
pub fn private_directory(directory: &std::path::Path) -> io::Result<()> {
    // SAFETY: no pointers; only the calling thread is affected.
    check(unsafe { libc::unshare(libc::CLONE_FS) })?;
    std::env::set_current_dir(directory)
}

/// Gives the calling thread a mount namespace of its own with an empty tmpfs over `directory`: names can
/// be bound there that are taken, or not to be seen, outside.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, ENOENT when there is no such directory.
pub fn private_mount(directory: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let target = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: strings end in zero and outlive the calls; unshare moves only the calling thread.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(
            std::ptr::null(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        ))?;
        check(libc::mount(
            c"mist".as_ptr(),
            target.as_ptr(),
            c"tmpfs".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            std::ptr::null(),
        ))?;
    }
    Ok(())
}

/// SO_PEERCRED: pid (0: none that we see), uid, gid.
pub fn peer_credentials(fd: impl AsFd) -> io::Result<(i32, u32, u32)> {
    let len = size_of::<libc::ucred>();
    let bytes = super::sockopt::get(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, len)?;
    let word = |i: usize| {
        let b = bytes.get(4 * i..4 * i + 4).and_then(|b| b.try_into().ok());
        b.map_or(0, i32::from_ne_bytes)
    };
    Ok((word(0), word(1) as u32, word(2) as u32))
}
