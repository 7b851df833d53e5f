//! What was on its way to the task: put into the new connection, in front of all that its pvmd will send.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::kernel::sock_diag::SockDiag;
use crate::kernel::{pidfd, sockopt};

/// Most bytes that a socket's buffer is raised for.
const MOST: usize = 256 << 20;

/// The pvmd's end of the connection.
pub struct FarEnd(OwnedFd);

impl FarEnd {
    /// Finds the other end of `socket`: in the process `first`, if it is there, else in any.
    ///
    /// # Errors
    /// When nobody has it, or we may not look.
    pub fn of(socket: BorrowedFd<'_>, first: i32) -> Result<Self> {
        let own = nix::sys::stat::fstat(socket).context("fstat")?.st_ino;
        let all = SockDiag::open()
            .and_then(|diag| diag.unix())
            .context("sock_diag: list of unix sockets")?;
        let peer = all
            .iter()
            .find(|s| u64::from(s.ino) == own)
            .and_then(|s| s.peer)
            .context("the connection to the pvmd is no Unix socket, or has ended")?;
        let others = std::fs::read_dir("/proc")
            .context("/proc")?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid != first);
        for pid in std::iter::once(first).chain(others) {
            if let Some(fd) = holder(pid, u64::from(peer)) {
                let process = pidfd::open(pid)?;
                let end = pidfd::get_fd(process.as_fd(), fd)
                    .with_context(|| format!("taking descriptor {fd} of the pvmd (pid {pid})"))?;
                return Ok(Self(end));
            }
        }
        bail!("no process is found that has the pvmd's end of the connection")
    }

    /// Sends bytes through it.
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
        // The kernel counts what it needs for itself: at most as much again, and doubles what it is told.
        let wanted = bytes.len() as i32 + (64 << 10);
        if wanted > before / 4 {
            sockopt::set_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted)
                .context("SO_SNDBUFFORCE (needs CAP_NET_ADMIN)")?;
        }
        let mut rest = bytes;
        let result = loop {
            if rest.is_empty() {
                break Ok(());
            }
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.0.as_raw_fd(), rest, flags) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(e) => {
                    break Err(e).with_context(|| {
                        format!(
                            "{} of {} unread bytes do not fit into the connection",
                            rest.len(),
                            bytes.len()
                        )
                    });
                }
            }
        };
        if wanted > before / 4 {
            // It was raised for these bytes only; what is in there stays.
            sockopt::set_int(&self.0, libc::SOL_SOCKET, libc::SO_SNDBUF, before / 2)
                .context("SO_SNDBUF")?;
        }
        result
    }
}

/// The descriptor of process `pid` that is the socket with this inode.
fn holder(pid: i32, inode: u64) -> Option<i32> {
    let wanted = format!("socket:[{inode}]");
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    fds.flatten().find_map(|entry| {
        let link = std::fs::read_link(entry.path()).ok()?;
        (link == Path::new(&wanted))
            .then(|| entry.file_name().to_str()?.parse().ok())
            .flatten()
    })
}
