//! Stores: directories of images that `dump --keep` fills and `restore` takes the newest from.
//!
//! ```text
//! DIR/.lock              held by whoever adds or removes images
//! DIR/20261121T223000Z/  an image, named for the moment it was made (see `mistctl::image::dated`)
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use mistctl::error::Failure;
use mistctl::image::Image;
use mistctl::image::dated::{self, Look};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

const LOCK: &str = ".lock";

/// A store that no other mistctl adds to, or removes from, as long as this lives.
pub struct Locked {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Locked {
    /// Makes the store if need be, and locks it. Fails at once, as busy, when another process holds the lock.
    pub fn open(dir: &Path) -> anyhow::Result<Locked> {
        if is_image(dir) {
            anyhow::bail!(
                "{}: is an image, not a store of images: give --keep another directory",
                dir.display()
            );
        }
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
            Ok(lock) => {
                dated::remove_leftovers(dir)?;
                Ok(Locked {
                    dir: dir.to_owned(),
                    _lock: lock,
                })
            }
            Err((_, Errno::EWOULDBLOCK)) => Err(Failure::Busy.because(format!(
                "{}: another mistctl is at work on this store; nothing was done",
                dir.display()
            ))),
            Err((_, e)) => Err(e).with_context(|| format!("{}: cannot lock", path.display())),
        }
    }

    /// Path for an image made now.
    pub fn next_path(&self) -> anyhow::Result<PathBuf> {
        dated::next_path(&self.dir)
    }

    /// Removes the oldest images beyond the newest `keep` sound ones.
    pub fn keep_newest(&self, keep: usize) -> anyhow::Result<()> {
        dated::keep_newest(&self.dir, keep, Look::Quick).map(drop)
    }
}

fn is_image(dir: &Path) -> bool {
    dir.join("manifest.json").symlink_metadata().is_ok()
}

/// What a command that is given `path` may mean: the image itself; of a store, its images, newest first.
pub fn candidates(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if is_image(path) || !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let images = dated::images(path)?;
    if images.is_empty() {
        return Err(Failure::Damaged.because(format!(
            "{}: is no image, and no store with images in it",
            path.display()
        )));
    }
    Ok(images)
}

/// Opens the image that is meant: of a store, the newest that is sound as far as opening it can tell.
pub fn open(path: &Path) -> anyhow::Result<Image> {
    let mut first = None;
    for image in candidates(path)? {
        match Image::open(&image) {
            Ok(image) => return Ok(image),
            Err(e) => first = first.or(Some(e)),
        }
    }
    Err(first
        .unwrap_or_else(|| Failure::Damaged.because(format!("{}: holds no image", path.display()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_locked_is_busy() {
        let dir = tempfile::tempdir().unwrap();
        let _store = Locked::open(dir.path()).unwrap();
        let e = Locked::open(dir.path()).err().unwrap();
        assert_eq!(Failure::of(&e), Failure::Busy);
    }
}
