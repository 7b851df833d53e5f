//! Sockets: TCP_REPAIR, sock_diag.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{checked, one, sys};

/// Puts a TCP socket into repair mode.
pub fn tcp_repair() -> io::Result<()> {
    let tcp_repair = 19;
    one(|| {
        let fd = sys(
            libc::SYS_socket,
            [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        );
        let on = 1i32;
        let value = &raw const on as u64;
        if fd < 0 {
            fd
        } else {
            sys(
                libc::SYS_setsockopt,
                [fd as u64, libc::IPPROTO_TCP as u64, tcp_repair, value, 4, 0],
            )
        }
    })
    .map(drop)
}

/// Asks the kernel for its sockets of a family (and protocol) by netlink.
pub fn sock_diag(family: i32, protocol: i32) -> io::Result<()> {
    let len = match family {
        libc::AF_UNIX => 24usize,
        libc::AF_NETLINK => 20,
        _ => 56,
    };
    let mut request = [0u8; 72];
    let total = 16 + len;
    let sock_diag_by_family = 20u16;
    let dump_request = 0x301u16; // NLM_F_REQUEST | NLM_F_DUMP
    request[0..4].copy_from_slice(&(total as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&sock_diag_by_family.to_ne_bytes());
    request[6..8].copy_from_slice(&dump_request.to_ne_bytes());
    request[16] = family as u8;
    request[17] = protocol as u8;
    if family != libc::AF_NETLINK {
        request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes()); // all states
    }
    let netlink_sock_diag = 4;
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
    let fd = checked(sys(
        libc::SYS_socket,
        [libc::AF_NETLINK as u64, kind, netlink_sock_diag, 0, 0, 0],
    ))?;
    // SAFETY: a descriptor that the kernel has just given us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let number = fd.as_raw_fd() as u64;
    checked(sys(
        libc::SYS_sendto,
        [number, request.as_ptr() as u64, total as u64, 0, 0, 0],
    ))?;
    let mut answer = [0u8; 32768];
    let n = checked(sys(
        libc::SYS_recvfrom,
        [
            number,
            answer.as_mut_ptr() as u64,
            answer.len() as u64,
            0,
            0,
            0,
        ],
    ))?;
    if n >= 20 && answer[4..6] == [2, 0] {
        // NLMSG_ERROR
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        checked(i64::from(code))?;
    }
    Ok(())
}
