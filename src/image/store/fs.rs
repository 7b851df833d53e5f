//! Files and directories of images: made with care, opened with suspicion.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, RenameFlags};
use nix::sys::stat::Mode;

/// A directory's lock (flock(2)): whoever writes or removes an image has it alone, readers share it.
pub(in crate::image) type Lock = Flock<OwnedFd>;

/// What came of trying to lock.
pub(in crate::image) enum Locked {
    Ours(Lock),
    /// Somebody else has it.
    Busy,
    /// The directory is not there, or another one is by now.
    Gone,
}

/// Locks the directory at `path` for us alone, without waiting.
pub(in crate::image) fn lock_dir(path: &Path) -> Result<Locked> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = match nix::fcntl::open(path, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::ENOENT) => return Ok(Locked::Gone),
        Err(e) => return Err(e).with_context(|| format!("open: {}", path.display())),
    };
    let lock = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(Locked::Busy),
        Err((_, e)) => return Err(e).with_context(|| format!("flock: {}", path.display())),
    };
    let ours = nix::sys::stat::fstat(lock.as_fd()).context("fstat")?;
    let same = path
        .symlink_metadata()
        .is_ok_and(|there| ours.st_dev == there.dev() && ours.st_ino == there.ino());
    Ok(if same {
        Locked::Ours(lock)
    } else {
        Locked::Gone
    })
}

/// Directory a path is in.
pub(in crate::image) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Renames to a name that must not exist.
pub(in crate::image) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let cwd = nix::fcntl::AT_FDCWD;
    let done = match nix::fcntl::renameat2(cwd, from, cwd, to, RenameFlags::RENAME_NOREPLACE) {
        // Not every file system knows the flag; a directory never replaces one that has something in it.
        Err(Errno::EINVAL) if to.symlink_metadata().is_err() => {
            nix::fcntl::renameat(cwd, from, cwd, to)
        }
        other => other,
    };
    done.with_context(|| format!("rename: {} to {}", from.display(), to.display()))
}

/// Makes names in a directory durable.
pub(in crate::image) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|d| d.sync_all())
        .with_context(|| format!("fsync: {}", path.display()))
}

/// Makes a directory for us alone.
pub(in crate::image) fn create_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("mkdir: {}", path.display()))
}

/// Creates a file that is not there yet, to be read and written.
pub(in crate::image) fn create_file(path: &Path, mode: u32) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("create: {}", path.display()))
}

/// Opens a directory inside of an image; not through a symlink.
pub(in crate::image) fn open_subdir(dir: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::openat(dir, name, flags, Mode::empty()).map_err(|e| match e {
        Errno::ENOTDIR | Errno::ELOOP => anyhow::anyhow!("{name} is not a directory"),
        e => anyhow::Error::from(e).context(format!("open: {name}")),
    })
}

/// Opens a regular file to be read; not through a symlink, and without waiting for a FIFO's writer.
pub(in crate::image) fn open_regular(dir: impl AsFd, path: &Path) -> Result<File> {
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_CLOEXEC
        | OFlag::O_NOCTTY;
    let fd = nix::fcntl::openat(dir, path, flags, Mode::empty()).map_err(|e| match e {
        Errno::ELOOP => anyhow::anyhow!("{} is a symbolic link", path.display()),
        e => anyhow::Error::from(e).context(format!("open: {}", path.display())),
    })?;
    let file = File::from(fd);
    let meta = file
        .metadata()
        .with_context(|| format!("stat: {}", path.display()))?;
    ensure!(meta.is_file(), "{} is not a regular file", path.display());
    Ok(file)
}
