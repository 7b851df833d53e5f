//! Memfds and deleted files: objects that have content and no name.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::memfd::MFdFlags;

use crate::image::memory::{SharedKind, SharedMemory};
use crate::kernel::{fds, shm};

/// Makes the object, of the right size and empty; its content is written through the descriptor, which is open for
/// reading and writing, and then [`finish`] is called. For memfds and deleted files only.
pub fn create(memory: &SharedMemory, warnings: &mut Vec<String>) -> Result<OwnedFd> {
    let fd = match &memory.kind {
        SharedKind::Memfd { name, hugetlb, .. } => memfd(name, *hugetlb, memory.huge_page)?,
        SharedKind::DeletedFile { path, .. } => match unnamed(path) {
            Ok(fd) => fd,
            Err(e) => {
                warnings.push(format!(
                    "{path} (deleted): lives in memory now, for there can be no file in its directory: {e:#}"
                ));
                memfd(&last_name(path), false, None)?
            }
        },
        other => bail!("{other:?} is no file"),
    };
    nix::unistd::ftruncate(&fd, i64::try_from(memory.size)?)
        .with_context(|| format!("ftruncate to {} bytes", memory.size))?;
    Ok(fd)
}

/// Mode and seals, after the content.
pub fn finish(memory: &SharedMemory, fd: BorrowedFd<'_>) -> Result<()> {
    match &memory.kind {
        SharedKind::Memfd { seals, name, .. } if *seals != 0 => {
            fds::add_seals(fd, *seals).with_context(|| format!("memfd {name}: F_ADD_SEALS"))
        }
        SharedKind::DeletedFile { mode, .. } => {
            let mode = nix::sys::stat::Mode::from_bits_truncate(*mode & 0o777);
            nix::sys::stat::fchmod(fd, mode).context("fchmod")
        }
        _ => Ok(()),
    }
}

fn memfd(name: &str, hugetlb: bool, huge_page: Option<u64>) -> Result<OwnedFd> {
    // 249 bytes is the longest name (memfd_create(2)).
    let name = CString::new(name.get(..249).unwrap_or(name))?;
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if hugetlb {
        flags |= MFdFlags::MFD_HUGETLB;
        flags |= MFdFlags::from_bits_retain(shm::huge_flag(huge_page) as u32);
    }
    nix::sys::memfd::memfd_create(name.as_c_str(), flags).context("memfd_create")
}

fn last_name(path: &str) -> String {
    Path::new(path)
        .file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

/// A file without a name on the file system that `path` was on. O_TMPFILE first: whatever happens, nothing is left.
fn unnamed(path: &str) -> Result<OwnedFd> {
    let directory = Path::new(path).parent().context("no directory")?;
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.custom_flags(libc::O_TMPFILE).open(directory) {
        Ok(file) => return Ok(file.into()),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(e).with_context(|| directory.display().to_string()),
    }
    let name = directory.join(format!(".mist-{}", std::process::id()));
    let file = options
        .custom_flags(libc::O_NOFOLLOW)
        .create_new(true)
        .open(&name)
        .with_context(|| name.display().to_string())?;
    std::fs::remove_file(&name).with_context(|| name.display().to_string())?;
    Ok(file.as_fd().try_clone_to_owned()?)
}
