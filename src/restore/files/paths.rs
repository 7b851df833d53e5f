//! What is opened by a name again, or leads outside.

use std::ffi::CString;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

use super::Builder;
use crate::error::Failure;
use crate::image::Manifest;
use crate::image::files::{Description, External, Kind, MessageQueue};
use crate::image::memory::FileRef;
use crate::kernel::fds::{self, QueueAttributes};
use crate::kernel::tty;

/// Flags of open(2) that act at the moment of opening and must not act again. O_TMPFILE includes O_DIRECTORY, which
/// adds nothing to a path that names a directory.
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_TMPFILE;

impl Builder<'_> {
    pub(super) fn file_ref(&self, file: u32) -> Result<&FileRef> {
        self.manifest
            .files
            .get(file as usize)
            .ok_or_else(|| Failure::Damaged.because(format!("there is no file {file}")))
    }

    /// A file, directory, device, or anything opened with O_PATH.
    pub(super) fn path(
        &mut self,
        description: &Description,
        file: u32,
        file_type: u32,
        rdev: u64,
    ) -> Result<OwnedFd> {
        let file = self.file_ref(file)?;
        let path = file.path.clone();
        let size = file.size;
        let fd = open(&path, description.flags)?;
        let fd = File::from(fd);
        let meta = fd.metadata().with_context(|| format!("{path}: fstat"))?;
        if meta.mode() & libc::S_IFMT != file_type & libc::S_IFMT {
            bail!(
                "{path} is a {} now, it was a {}",
                name(meta.mode()),
                name(file_type)
            );
        }
        if matches!(file_type & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK) && meta.rdev() != rdev
        {
            bail!("{path} is another device now");
        }
        if file_type & libc::S_IFMT == libc::S_IFREG && description.flags & libc::O_PATH == 0 {
            if meta.size() < size {
                bail!(
                    "{path} has {} bytes now, it had {size}; put the file back as it was",
                    meta.size()
                );
            }
            // Files of /proc and the like have no size.
            if meta.size() > size && size > 0 {
                self.built.warnings.push(format!(
                    "{path} has grown from {size} to {} bytes since the checkpoint",
                    meta.size()
                ));
            }
        }
        place(fd.as_fd(), description).with_context(|| path)?;
        Ok(fd.into())
    }

    /// A POSIX message queue: the one that is there, else a new one if none of its content would be missing.
    pub(super) fn message_queue(
        &mut self,
        description: &Description,
        queue: &MessageQueue,
    ) -> Result<OwnedFd> {
        // The C library takes the slash off, the kernel wants none.
        let name = CString::new(queue.name.trim_start_matches('/'))?;
        let flags = description.flags & (libc::O_ACCMODE | libc::O_NONBLOCK);
        match fds::open_message_queue(&name, flags, None) {
            Err(Errno::ENOENT) if queue.messages == 0 => {
                let attributes = QueueAttributes {
                    max_messages: queue.max_messages,
                    message_size: queue.message_size,
                    messages: 0,
                };
                fds::open_message_queue(&name, flags, Some((queue.mode & 0o7777, attributes)))
                    .with_context(|| format!("message queue {}: mq_open", queue.name))
            }
            Err(Errno::ENOENT) => bail!(
                "message queue {} is gone, and the {} messages in it could not be saved",
                queue.name,
                queue.messages
            ),
            other => other.with_context(|| format!("message queue {}: mq_open", queue.name)),
        }
    }
}

/// Cuts regular files that the processes have open for writing back to the size they had at the checkpoint, so that
/// what was written after it is written again rather than twice. To be called before [`super::build`], which leaves
/// files that grew as they are.
///
/// # Errors
/// A file is gone, or is no regular file any more.
pub fn cut_back(manifest: &Manifest) -> Result<()> {
    for description in &manifest.descriptions {
        let Kind::Path {
            file, file_type, ..
        } = description.kind
        else {
            continue;
        };
        let written = description.flags & libc::O_ACCMODE != libc::O_RDONLY
            && description.flags & libc::O_PATH == 0
            && file_type & libc::S_IFMT == libc::S_IFREG;
        let Some(file) = manifest.files.get(file as usize).filter(|_| written) else {
            continue;
        };
        let path = &file.path;
        let now = File::from(open(path, libc::O_WRONLY)?);
        let meta = now.metadata().with_context(|| format!("{path}: fstat"))?;
        if !meta.is_file() {
            bail!(
                "{path} is a {} now, it was a regular file",
                name(meta.mode())
            );
        }
        if meta.size() > file.size {
            now.set_len(file.size)
                .with_context(|| format!("{path}: ftruncate to {} bytes", file.size))?;
        }
    }
    Ok(())
}

/// Opens `path` as it was opened, without waiting and without becoming anybody's controlling terminal.
pub(super) fn open(path: &str, flags: i32) -> Result<OwnedFd> {
    let name = CString::new(path).context("a path with a zero byte")?;
    let flags = (flags & !ONCE) | libc::O_NOCTTY | libc::O_NONBLOCK;
    let opened = match fds::open(&name, flags) {
        // Only the owner may ask not to touch the access time.
        Err(Errno::EPERM) if flags & libc::O_NOATIME != 0 => {
            fds::open(&name, flags & !libc::O_NOATIME)
        }
        other => other,
    };
    opened.with_context(|| format!("{path}: open"))
}

/// A description of its own of what `fd` has open.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
    open(
        &format!("/proc/self/fd/{}", fd.as_raw_fd()),
        flags & !libc::O_NOFOLLOW,
    )
}

/// Sets the position.
pub(super) fn place(fd: BorrowedFd<'_>, description: &Description) -> Result<()> {
    if description.pos == 0 || description.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    fds::seek(fd, description.pos).with_context(|| format!("lseek to {}", description.pos))
}

/// What the restoring shell has in place of what led outside.
pub(super) fn external(external: &External, detached: bool) -> Result<OwnedFd> {
    let streams: [OwnedFd; 3] = [
        std::io::stdin().as_fd().try_clone_to_owned()?,
        std::io::stdout().as_fd().try_clone_to_owned()?,
        std::io::stderr().as_fd().try_clone_to_owned()?,
    ];
    let found = if detached {
        None
    } else if let Some(stream) = external.stream {
        streams.into_iter().nth(stream.into())
    } else if external.terminal {
        streams.into_iter().find(|s| s.is_terminal())
    } else {
        None
    };
    match found {
        Some(fd) => {
            if let Some(termios) = &external.termios {
                take_over(fd.as_fd(), termios)?;
            }
            Ok(fd)
        }
        None => Ok(fds::open(c"/dev/null", libc::O_RDWR).context("/dev/null: open")?),
    }
}

/// Gives the terminal the modes that the program had set, if it is ours to set: the command line puts
/// back what was.
fn take_over(terminal: BorrowedFd<'_>, termios: &[u8]) -> Result<()> {
    let termios: tty::Termios2 = termios
        .try_into()
        .context("the modes of a terminal are no struct termios2")?;
    if nix::unistd::tcgetpgrp(terminal) == Ok(nix::unistd::getpgrp()) {
        tty::set_termios(terminal, &termios).context("TCSETS2")?;
    }
    Ok(())
}

fn name(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFREG => "regular file",
        libc::S_IFDIR => "directory",
        libc::S_IFCHR => "character device",
        libc::S_IFBLK => "block device",
        libc::S_IFIFO => "FIFO",
        libc::S_IFLNK => "symbolic link",
        libc::S_IFSOCK => "socket",
        _ => "file of another type",
    }
}
