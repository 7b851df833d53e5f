//! What was on its way to the task: put into the new connection, in front of all that its pvmd will send.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::kernel::sockopt;
use crate::pvm::capture::Fragment;
use crate::pvm::connection::Daemons;

/// Most bytes that a socket's buffer is raised for.
pub const MOST: usize = 256 << 20;

/// What it is raised to while the task is parked.
const WIDE: i32 = 64 << 20;

/// What goes into a socket by one send(2) of so many bytes is in one piece, whoever else writes there: the kernel makes one
/// buffer of up to UNIX_SKB_FRAGS_SZ (unix_stream_sendmsg in net/unix/af_unix.c), and somewhat more.
const ONE_PIECE: usize = 32 << 10;

/// The pvmd's end of the connection.
pub struct FarEnd(OwnedFd);

impl FarEnd {
    /// That of this process's own connection.
    ///
    /// # Errors
    /// When no pvmd is found at the other end, or we may not look.
    pub fn find() -> Result<Self> {
        let pid = std::process::id() as i32;
        Daemons::look()?
            .connection(pid)?
            .map(|c| Self(c.into_pvmd_end()))
            .context("no process is found that has the pvmd's end of the connection")
    }

    /// Lets pvmd write as much as may come before the task reads, until [`FarEnd::narrow`] is given what this returns.
    /// Others go on printing for the task meanwhile, and what tells that it may run must not be behind a full buffer.
    ///
    /// # Errors
    /// When the buffer cannot be asked for, or be set.
    pub fn widen(&self) -> Result<i32> {
        const LEVEL: i32 = libc::SOL_SOCKET;
        // The kernel tells twice what it was given.
        let old = sockopt::get_int(&self.0, LEVEL, libc::SO_SNDBUF).context("SO_SNDBUF")? / 2;
        if sockopt::set_int(&self.0, LEVEL, libc::SO_SNDBUFFORCE, WIDE).is_err() {
            sockopt::set_int(&self.0, LEVEL, libc::SO_SNDBUF, WIDE).context("SO_SNDBUF")?;
        }
        Ok(old)
    }

    /// As it was; what is in it stays, and pvmd waits until there is room again.
    pub fn narrow(&self, old: i32) {
        let _ = sockopt::set_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUF, old);
    }

    /// Sends fragments through it. Its pvmd may write meanwhile: that stands before one of them, or behind all, if they are no
    /// longer than those of pvmd.
    ///
    /// # Errors
    /// When they do not fit into the socket's buffer, raised as far as can be.
    pub fn put(&self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > MOST {
            bail!("{} unread bytes are too many", bytes.len());
        }
        let before =
            sockopt::get_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUF).context("SO_SNDBUF")?;
        // Left so until somebody narrows it: as long as they stand there, pvmd needs room for what comes behind them.
        // select(2) shows it some only while no more than a quarter is used (unix_writable in net/unix/af_unix.c). The kernel doubles what it is
        // told, and counts what it needs for itself with the bytes.
        let wanted = bytes.len() as i32 * 3 + before;
        if bytes.len() as i32 > before / 8 {
            sockopt::set_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted)
                .context("SO_SNDBUFFORCE (needs CAP_NET_ADMIN)")?;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = one_piece(rest)?;
            self.send(piece).with_context(|| {
                let (left, all) = (rest.len(), bytes.len());
                format!("{left} of {all} unread bytes do not fit into the connection")
            })?;
            rest = rest.get(piece.len()..).unwrap_or_default();
        }
        Ok(())
    }

    fn send(&self, piece: &[u8]) -> nix::Result<()> {
        let mut rest = piece;
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.0.as_raw_fd(), rest, flags) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// As many fragments at the beginning of these as go at once; one at least.
fn one_piece(bytes: &[u8]) -> Result<&[u8]> {
    let mut rest = bytes;
    let mut len = 0;
    while let Some(fragment) = Fragment::take(&mut rest)? {
        if len > 0 && len + fragment.bytes.len() > ONE_PIECE {
            break;
        }
        len += fragment.bytes.len();
    }
    ensure!(len > 0, "the last fragment is not whole");
    Ok(bytes.get(..len).unwrap_or_default())
}
