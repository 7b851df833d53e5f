//! Stores: directories of images that `dump --keep` fills and `restore` takes the newest from.
//!
//! ```text
//! DIR/.lock                   held by whoever adds or removes images
//! DIR/20261121T223000Z/       an image, named by the moment it was begun; names sort as time goes
//! DIR/20261121T224000Z.partial  one that is being written, or whose writer died
//! DIR/.20261121T221000Z.gone  one that is being removed
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use mistctl::error::Failure;
use mistctl::image::Image;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::timestamp;

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

    /// Path for an image made now, unused so far. It sorts behind every image that is there, also when the
    /// clock was set back.
    pub fn new_name(&self, now: SystemTime) -> anyhow::Result<PathBuf> {
        let name = timestamp::name(now);
        let newest = images(&self.dir)?.into_iter().next();
        let newest = newest
            .as_deref()
            .and_then(Path::file_name)
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        if name.as_str() > newest {
            return Ok(self.dir.join(name));
        }
        let (stem, number) = newest.split_once('-').unwrap_or((newest, "1"));
        let number: u32 = number.parse().unwrap_or(1);
        if number >= 999 {
            anyhow::bail!(
                "{}: the newest image, {newest}, is from the future; set the clock, or remove it",
                self.dir.display()
            );
        }
        Ok(self.dir.join(format!("{stem}-{:03}", number + 1)))
    }

    /// Removes what is older than the newest `keep` sound images, and what dead writers left. Images that are
    /// not sound do not count, and nothing that does not look like an image of a store is touched.
    pub fn keep_newest(&self, keep: usize) -> anyhow::Result<()> {
        let mut sound = 0;
        for image in images(&self.dir)? {
            if sound >= keep {
                let gone = self.hidden(&image)?;
                fs::rename(&image, &gone)
                    .with_context(|| format!("{}: cannot rename", image.display()))?;
            } else if Image::open(&image).is_ok() {
                sound += 1;
            }
        }
        for entry in fs::read_dir(&self.dir)
            .with_context(|| format!("{}: cannot list", self.dir.display()))?
        {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let left = name.strip_suffix(".partial").is_some_and(is_image_name)
                || name
                    .strip_prefix('.')
                    .and_then(|n| n.strip_suffix(".gone"))
                    .is_some_and(is_image_name);
            // Nobody else writes here: we hold the lock, and our own image is complete.
            if left {
                let path = entry.path();
                fs::remove_dir_all(&path)
                    .with_context(|| format!("{}: cannot remove", path.display()))?;
            }
        }
        Ok(())
    }

    /// Name under which an image waits for its removal.
    fn hidden(&self, image: &Path) -> anyhow::Result<PathBuf> {
        let name = image
            .file_name()
            .and_then(|n| n.to_str())
            .context("an image without a name")?;
        Ok(self.dir.join(format!(".{name}.gone")))
    }
}

fn is_image(dir: &Path) -> bool {
    dir.join("manifest.json").symlink_metadata().is_ok()
}

/// 20261121T223000Z, or 20261121T223000Z-002.
fn is_image_name(name: &str) -> bool {
    let pattern = "ddddddddTddddddZ-ddd";
    (name.len() == 16 || name.len() == 20)
        && name.bytes().zip(pattern.bytes()).all(|(c, p)| {
            if p == b'd' {
                c.is_ascii_digit()
            } else {
                c == p
            }
        })
}

/// Images of a store, newest first.
fn images(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("{}: cannot list", dir.display()))? {
        if let Some(name) = entry?.file_name().to_str().filter(|n| is_image_name(n)) {
            names.push(name.to_owned());
        }
    }
    names.sort_by(|a, b| b.cmp(a));
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// What a command that is given `path` may mean: the image itself; of a store, its images, newest first.
pub fn candidates(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if is_image(path) || !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let images = images(path)?;
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
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn only_names_that_a_store_gives_are_images() {
        for name in ["20261121T223000Z", "20261121T223000Z-002"] {
            assert!(is_image_name(name), "{name}");
        }
        for name in [
            "20261121T223000Z.partial",
            "20261121T223000",
            "20261121T223000Z-02",
            "2026112xT223000Z",
            "",
            ".lock",
        ] {
            assert!(!is_image_name(name), "{name}");
        }
    }

    #[test]
    fn new_images_sort_behind_old_ones_even_when_the_clock_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = Locked::open(dir.path()).unwrap();
        let at = |secs| UNIX_EPOCH + Duration::from_secs(secs);
        let mut last = PathBuf::new();
        for now in [1000, 1000, 1000, 900, 1001, 1001] {
            let name = store.new_name(at(now)).unwrap();
            assert!(name > last, "{name:?} after {last:?}");
            std::fs::create_dir(&name).unwrap();
            last = name;
        }
        assert!(last.ends_with("19700101T001641Z-002"));
    }

    #[test]
    fn a_store_that_is_locked_is_busy() {
        let dir = tempfile::tempdir().unwrap();
        let _store = Locked::open(dir.path()).unwrap();
        let e = Locked::open(dir.path()).err().unwrap();
        assert_eq!(Failure::of(&e), Failure::Busy);
    }
}
