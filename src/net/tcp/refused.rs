//! A connect that failed. Such a socket is no connection that has ended: it may connect again, and says what went wrong.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::image::sockets::Socket;
use crate::kernel::{socket, sockopt};
use crate::net::inet;

/// A reset over loopback comes at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many segments have come for a socket in state CLOSE that is shut down (tcpi_segs_in of struct tcp_info): one, the
/// reset, where its connect was refused; none where nobody answered; two at least where it was a connection.
pub(super) fn segments(fd: impl AsFd) -> Option<u32> {
    const AT: usize = 140;
    let info = sockopt::get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, AT + 4).ok()?;
    let word = info.get(AT..AT + 4)?;
    word.try_into().ok().map(u32::from_ne_bytes)
}

/// A socket whose connect was refused. `told`: the program knows.
pub(super) fn again(s: &Socket, told: bool) -> Result<OwnedFd> {
    let nobody = socket::socket(s.family, s.kind, s.protocol).context("socket")?;
    let host = inet::loopback(if s.family == libc::AF_INET6 { 16 } else { 4 });
    socket::bind(&nobody, &inet::make_address(&host, 0)).context("bind to loopback")?;
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket")?;
    // Who does not wait for the answer is told by the next call.
    socket::set_nonblocking(&fd, true)?;
    match socket::connect(&fd, &socket::local_name(&nobody)?) {
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => bail!("a connect to nobody over loopback: {other:?}"),
    }
    let begun = Instant::now();
    while socket::poll_now(&fd)? & libc::POLLHUP == 0 {
        if begun.elapsed() > PATIENCE {
            bail!("a connect to nobody over loopback is not refused");
        }
        std::thread::yield_now();
    }
    socket::set_nonblocking(&fd, false)?;
    if told {
        sockopt::get_int(&fd, libc::SOL_SOCKET, libc::SO_ERROR)?;
    }
    Ok(fd)
}
