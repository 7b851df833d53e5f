//! Directories of images named for the moment they were made: DIR/YYYYmmddTHHMMSSZ.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::store::Image;
use super::store::fs::{Locked, lock_dir, parent, sync_dir};

/// Suffix of an image that is being removed. What has it is no image any more.
const REMOVING: &str = ".removing";

/// How much of an image is looked at before it is called sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// All but the content of pages and objects ([`Image::open`]).
    Quick,
    /// Everything ([`Image::verify`]).
    Full,
}

/// The newest sound image of a directory.
#[derive(Debug)]
pub struct Newest {
    pub path: PathBuf,
    pub image: Image,
    /// Newer ones that are not sound, and what is wrong with them.
    pub skipped: Vec<(PathBuf, anyhow::Error)>,
}

/// What `keep_newest` did.
#[derive(Debug, Default)]
pub struct Kept {
    /// Sound images that are there still, newest first.
    pub kept: Vec<PathBuf>,
    pub removed: Vec<PathBuf>,
    /// Images that are not sound (they stay where they are), and what is wrong with them.
    pub broken: Vec<(PathBuf, anyhow::Error)>,
    /// Images that should have been removed and are in use.
    pub busy: Vec<PathBuf>,
}

/// Path for an image made now: the first moment from now on that no image has, nor a newer one; so it is the
/// newest also where the clock was set back.
///
/// # Errors
/// When the directory cannot be read, and when the newest image is more than a day ahead of the clock.
pub fn next_path(dir: &Path) -> Result<PathBuf> {
    const DAY: u64 = 86400;
    let newest = images(dir)?.into_iter().next();
    let now = SystemTime::now();
    (0..DAY)
        .map(|s| dir.join(name(now + Duration::from_secs(s))))
        .find(|p| newest.as_ref().is_none_or(|n| p > n) && p.symlink_metadata().is_err())
        .with_context(|| match newest {
            Some(n) => format!(
                "{} is from the future: set the clock right, or remove it",
                n.display()
            ),
            None => format!("{}: no name is free", dir.display()),
        })
}

/// Name of an image made at a moment (UTC).
pub fn name(when: SystemTime) -> String {
    let seconds = when
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Days from the civil calendar, with years that begin in March so that the leap day is the last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Whether a file name is that of a dated image.
pub fn is_dated(name: &str) -> bool {
    name.len() == 16
        && name.bytes().enumerate().all(|(i, b)| match i {
            8 => b == b'T',
            15 => b == b'Z',
            _ => b.is_ascii_digit(),
        })
}

/// Finds the newest sound image in `dir`.
///
/// # Errors
/// When there is none; the error says what is wrong with the newest.
pub fn newest_sound(dir: &Path, look: Look) -> Result<Newest> {
    let mut skipped = Vec::new();
    for path in images(dir)? {
        match open(&path, look) {
            Ok(image) => {
                return Ok(Newest {
                    path,
                    image,
                    skipped,
                });
            }
            Err(e) => skipped.push((path, e)),
        }
    }
    let n = skipped.len();
    match skipped.into_iter().next() {
        Some((_, e)) => Err(e.context(format!(
            "none of the {n} images in {} is sound; the newest",
            dir.display()
        ))),
        None => bail!("there is no image in {}", dir.display()),
    }
}

/// Removes the oldest sound images of `dir` beyond the newest `n`. What is not sound neither counts nor is
/// touched. An image is renamed before it is removed, so that no half of one ever has an image's name.
///
/// # Errors
/// When `n` is 0, and when an image cannot be removed.
pub fn keep_newest(dir: &Path, n: usize, look: Look) -> Result<Kept> {
    ensure!(
        n > 0,
        "keeping no image at all is not possible; remove {} instead",
        dir.display()
    );
    let mut done = Kept::default();
    for path in images(dir)? {
        // Each has to be sound, also one that goes: what is broken is evidence, and takes no other's place.
        match open(&path, look) {
            Err(e) => done.broken.push((path, e)),
            Ok(_) if done.kept.len() < n => done.kept.push(path),
            Ok(image) => {
                drop(image);
                if remove(&path)? {
                    done.removed.push(path);
                } else {
                    done.busy.push(path);
                }
            }
        }
    }
    Ok(done)
}

/// Removes an image, unless somebody has it open: true if it is gone.
///
/// # Errors
/// When it cannot be renamed or removed.
pub fn remove(path: &Path) -> Result<bool> {
    let _lock = match lock_dir(path)? {
        Locked::Ours(lock) => lock,
        Locked::Busy | Locked::Gone => return Ok(false),
    };
    let mut gone = path.as_os_str().to_owned();
    gone.push(REMOVING);
    let gone = PathBuf::from(gone);
    std::fs::rename(path, &gone).with_context(|| format!("rename: {}", gone.display()))?;
    sync_dir(parent(path))?;
    std::fs::remove_dir_all(&gone).with_context(|| format!("remove: {}", gone.display()))?;
    Ok(true)
}

fn open(path: &Path, look: Look) -> Result<Image> {
    let image = Image::open(path)?;
    if look == Look::Full {
        image.verify(&mut |_, _| {})?;
    }
    Ok(image)
}

/// Dated directories in `dir`, sound or not, newest first.
///
/// # Errors
/// When the directory cannot be read.
pub fn images(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        if let Some(name) = entry.file_name().to_str()
            && is_dir
            && is_dated(name)
        {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names.into_iter().rev().map(|n| dir.join(n)).collect())
}

/// Removes what a crash in the middle of a removal, or of the making of an image, left behind. Do it before an image is
/// added: it may be what fills the disk.
///
/// # Errors
/// When something cannot be removed.
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)
        .with_context(|| format!("reading {}", dir.display()))?
        .flatten()
    {
        let name = entry.file_name();
        let leftover = name
            .to_str()
            .and_then(|n| n.strip_suffix(REMOVING).or(n.strip_suffix(".partial")))
            .is_some_and(is_dated);
        // Whoever is removing or writing it now holds its lock.
        if leftover && entry.file_type().is_ok_and(|t| t.is_dir()) {
            let Locked::Ours(_lock) = lock_dir(&entry.path())? else {
                continue;
            };
            match std::fs::remove_dir_all(entry.path()) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("remove: {}", entry.path().display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
