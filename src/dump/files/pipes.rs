//! Pipes and FIFOs, with what stands in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{FileDumper, Seen};
use crate::dump::tables::Tables;
use crate::image::Bytes;
use crate::image::files::{External, Kind, Pipe};
use crate::kernel::fds;

/// A pipe, or a FIFO by its name. Content is added in [`FileDumper::pipes`].
pub(super) fn kind(seen: &Seen<'_>, tables: &mut Tables) -> Result<Kind> {
    let mode = seen.info.flags & libc::O_ACCMODE;
    let capacity = fds::pipe_size(seen.own.as_fd())
        .with_context(|| format!("{}: F_GETPIPE_SZ", seen.place))?;
    let pipe = Pipe {
        pipe: seen.meta.ino(),
        write_end: mode == libc::O_WRONLY,
        capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
        content: Vec::new(),
    };
    let link = &seen.place.link;
    let named = link.starts_with('/')
        && std::fs::symlink_metadata(link)
            .is_ok_and(|m| (m.dev(), m.ino()) == (seen.meta.dev(), seen.meta.ino()));
    if named {
        let file = tables.file(link, seen.meta, false);
        return Ok(Kind::Fifo { file, pipe });
    }
    // A FIFO whose name is gone is as good as a pipe.
    Ok(Kind::Pipe(pipe))
}

/// The descriptions of one pipe.
#[derive(Default)]
struct Ends {
    /// All of them, and whether it is a named one.
    all: Vec<usize>,
    named: bool,
    reader: Option<usize>,
    writer: Option<usize>,
}

impl FileDumper {
    /// Stores what is in each pipe; marks those whose other end is outside.
    pub(super) fn pipes(&mut self) -> Result<()> {
        let mut pipes: BTreeMap<u64, Ends> = BTreeMap::new();
        for (id, open) in self.open.iter().enumerate() {
            let (pipe, named) = match &open.description.kind {
                Kind::Pipe(pipe) => (pipe, false),
                Kind::Fifo { pipe, .. } => (pipe, true),
                _ => continue,
            };
            let ends = pipes.entry(pipe.pipe).or_default();
            ends.all.push(id);
            ends.named |= named;
            let mode = open.description.flags & libc::O_ACCMODE;
            if mode != libc::O_WRONLY {
                ends.reader = Some(id);
            }
            if mode != libc::O_RDONLY {
                ends.writer = Some(id);
            }
        }
        for ends in pipes.into_values() {
            let outside = match (ends.reader, ends.writer) {
                (Some(_), Some(_)) => None,
                (Some(r), None) => (!hung_up(self.open[r].own.as_fd())?)
                    .then_some("pipe from a process outside the dump"),
                (None, Some(w)) => (!hung_up(self.open[w].own.as_fd())?)
                    .then_some("pipe to a process outside the dump"),
                (None, None) => None,
            };
            // The partner of a FIFO is found again by the name.
            if let (Some(what), false) = (outside, ends.named) {
                for id in ends.all {
                    self.open[id].description.kind = Kind::External(External {
                        what: what.to_owned(),
                        ..External::default()
                    });
                }
                continue;
            }
            let (Some(reader), Some(&first)) = (ends.reader, ends.all.first()) else {
                continue;
            };
            let open = &self.open[reader];
            let content = peek(&open.own).with_context(|| open.place.to_string())?;
            match &mut self.open[first].description.kind {
                Kind::Pipe(pipe) | Kind::Fifo { pipe, .. } => pipe.content = content,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Nobody has the other end open any more (our duplicate is of this end).
fn hung_up(fd: BorrowedFd<'_>) -> Result<bool> {
    let mut polled = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).context("poll of a pipe")?;
    let got = polled[0].revents().unwrap_or(PollFlags::empty());
    Ok(got.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// What stands in a pipe, without taking it: tee(2) makes a second pipe refer to the same pages. One piece, or
/// one for each packet.
fn peek(reader: &File) -> Result<Vec<Bytes>> {
    let mut left = fds::readable(reader.as_fd()).context("FIONREAD")?;
    if left == 0 {
        return Ok(Vec::new());
    }
    let (copy_reader, copy_writer) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
    // As many slots as the original, or not all of it fits.
    let size = fds::pipe_size(reader.as_fd()).context("F_GETPIPE_SZ")?;
    if fds::pipe_size(copy_writer.as_fd())? < size {
        fds::set_pipe_size(copy_writer.as_fd(), size).with_context(|| {
            format!(
                "a second pipe of {size} bytes (F_SETPIPE_SZ; see /proc/sys/fs/pipe-max-size and pipe-user-pages-soft)"
            )
        })?;
    }
    let copied = tee(reader, &copy_writer, left, SpliceFFlags::SPLICE_F_NONBLOCK).context("tee")?;
    if copied < left {
        bail!("tee copied {copied} of {left} bytes");
    }
    let mut copy = File::from(copy_reader);
    let mut content = Vec::new();
    while left > 0 {
        // A read ends where a packet does, so a short one is a packet.
        let mut piece = vec![0; left];
        let n = match copy.read(&mut piece) {
            Ok(n) => n,
            Err(e) if e.raw_os_error() == Some(Errno::EAGAIN as i32) => 0,
            Err(e) => return Err(e).context("read of the copy"),
        };
        if n == 0 {
            bail!("{left} bytes of its content are missing");
        }
        piece.truncate(n);
        left -= n;
        content.push(Bytes(piece));
    }
    Ok(content)
}
