//! Whether a file is the same on two hosts.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use super::control::FileLook;
use crate::image::objects::hash_of_first;
use crate::pvm::version::Version;

/// Files over this size are compared by size alone: to read them would take longer than to move the task.
const HASHED: u64 = 64 << 20;
/// Files whose hashes are known.
const MOST: usize = 512;

/// Hashes of files that have been read, so that each move does not read the C library on two hosts: see [`lasts`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hashes(Vec<(Version, String)>);

impl Hashes {
    fn of(&self, version: &Version) -> Option<&String> {
        let mut all = self.0.iter();
        all.find(|(known, _)| known == version)
            .map(|(_, hash)| hash)
    }

    /// Takes over what somebody else has found out.
    pub fn learn(&mut self, others: Hashes) {
        for (version, hash) in others.0 {
            if self.of(&version).is_none() {
                self.0.push((version, hash));
            }
        }
        let too_many = self.0.len().saturating_sub(MOST);
        self.0.drain(..too_many);
    }

    /// What there is to compare of a file; `written`: somebody may be writing to it.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn look(&mut self, path: &Path, written: bool) -> Result<FileLook> {
        self.look_at(path, written, None)
    }

    /// The same, of at most its first `len` bytes.
    fn look_at(&mut self, path: &Path, written: bool, len: Option<u64>) -> Result<FileLook> {
        let meta = std::fs::metadata(path).with_context(|| format!("{}: stat", path.display()))?;
        let kind = meta.file_type();
        let device = kind.is_char_device() || kind.is_block_device();
        let size = meta.len().min(len.unwrap_or(u64::MAX));
        let hash = match kind.is_file() && size <= HASHED {
            true => {
                let file = File::open(path).with_context(|| format!("{}: open", path.display()))?;
                let remember = !written && lasts(&file);
                let hash = self.hash(&file, size, remember);
                Some(hash.with_context(|| path.display().to_string())?)
            }
            false => None,
        };
        Ok(FileLook {
            path: path.to_owned(),
            size: kind.is_file().then_some(size),
            hash,
            written,
            rdev: device.then(|| meta.rdev()),
        })
    }

    /// The hash of the first `len` bytes of a file; `remember`: it is one of those that [`lasts`].
    fn hash(&mut self, file: &File, len: u64, remember: bool) -> Result<String> {
        let meta = file.metadata().context("stat")?;
        let version = Version::of(&meta);
        let remember = remember && meta.len() == len && version.is_settled();
        if let Some(hash) = self.of(&version).filter(|_| remember) {
            return Ok(hash.clone());
        }
        let hash = hash_of_first(file, len)?.to_hex().to_string();
        let now = file.metadata().context("stat")?;
        if remember && Version::of(&now) == version {
            self.learn(Hashes(vec![(version, hash.clone())]));
        }
        Ok(hash)
    }

    /// Those that are missing here or different, and why.
    pub fn different(&mut self, files: &[FileLook]) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        for file in files {
            if let Some(why) = self.differs(file) {
                found.push((file.path.clone(), why));
            }
        }
        found
    }

    fn differs(&mut self, wanted: &FileLook) -> Option<String> {
        // What has been added since the other look does not count.
        let len = wanted.size.filter(|_| wanted.written);
        let found = match self.look_at(&wanted.path, wanted.written, len) {
            Ok(found) => found,
            Err(e) => return Some(format!("{:#}", e.root_cause())),
        };
        if found.size.is_some() != wanted.size.is_some() || found.rdev != wanted.rdev {
            return Some("it is something else there".to_owned());
        }
        if found.size != wanted.size {
            return Some(format!(
                "it has {} bytes there, and {} here",
                found.size.unwrap_or(0),
                wanted.size.unwrap_or(0)
            ));
        }
        (found.hash != wanted.hash).then(|| "its content is different there".to_owned())
    }
}

/// Whether a file is one of those that change by being replaced, or written to by an administrator: then its times change,
/// too, on these file systems. What somebody writes by way of a mapping may change none.
fn lasts(file: &File) -> bool {
    let (Ok(meta), Ok(system)) = (file.metadata(), fstatfs(file)) else {
        return false;
    };
    let keeps_times = [
        EXT4_SUPER_MAGIC,
        XFS_SUPER_MAGIC,
        BTRFS_SUPER_MAGIC,
        OVERLAYFS_SUPER_MAGIC,
    ];
    keeps_times.contains(&system.filesystem_type())
        && meta.uid() == 0
        && meta.mode() & 0o022 == 0
        && !geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_different_is_told_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("same"), "text").unwrap();
        std::fs::write(path("other"), "text").unwrap();
        std::fs::write(path("longer"), "text").unwrap();
        std::fs::write(path("gone"), "text").unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        let names = ["same", "other", "longer", "gone", "dir"];
        let looks: Vec<FileLook> = names
            .iter()
            .map(|n| Hashes::default().look(&path(n), false).unwrap())
            .collect();
        let null = Hashes::default()
            .look(Path::new("/dev/null"), true)
            .unwrap();
        assert_eq!(Hashes::default().different(&looks), []);
        assert_eq!(Hashes::default().different(&[null]), []);
        std::fs::write(path("other"), "TEXT").unwrap();
        std::fs::write(path("longer"), "texts").unwrap();
        std::fs::remove_file(path("gone")).unwrap();
        let told = Hashes::default().different(&looks);
        let told: Vec<_> = told
            .iter()
            .map(|(p, why)| (p.file_name().unwrap().to_str().unwrap(), why.as_str()))
            .collect();
        assert_eq!(told[0], ("other", "its content is different there"));
        assert_eq!(told[1], ("longer", "it has 5 bytes there, and 4 here"));
        assert_eq!(told[2].0, "gone");
        assert_eq!(told.len(), 3);
    }

    #[test]
    fn what_was_read_once_is_read_again_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("library");
        std::fs::write(&path, "text").unwrap();
        let file = File::open(&path).unwrap();
        let version = || Version::of(&file.metadata().unwrap());
        let mut hashes = Hashes::default();
        let text = hashes.hash(&file, 4, true).unwrap();
        assert_eq!(hashes, Hashes::default(), "it has just been written");
        while !version().is_settled() {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(hashes.hash(&file, 4, false).unwrap(), text);
        assert_eq!(hashes, Hashes::default());
        assert_eq!(hashes.hash(&file, 4, true).unwrap(), text);
        assert_eq!(hashes, Hashes(vec![(version(), text.clone())]));
        // What is known is believed, of the whole file and this version.
        let mut lies = Hashes(vec![(version(), "lie".to_owned())]);
        assert_eq!(lies.hash(&file, 4, true).unwrap(), "lie");
        assert_eq!(lies.hash(&file, 4, false).unwrap(), text);
        assert_ne!(lies.hash(&file, 3, true).unwrap(), "lie");
        std::fs::write(&path, "TEXT").unwrap();
        assert_ne!(lies.hash(&file, 4, true).unwrap(), "lie");
        assert_ne!(hashes.hash(&file, 4, true).unwrap(), text);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let version = |n: usize| {
            let path = dir.path().join(n.to_string());
            std::fs::write(&path, "").unwrap();
            (
                Version::of(&std::fs::metadata(path).unwrap()),
                n.to_string(),
            )
        };
        let all: Vec<_> = (0..MOST + 2).map(version).collect();
        let (first, more) = all.split_at(MOST);
        let mut hashes = Hashes(first.to_vec());
        hashes.learn(Hashes(more.to_vec()));
        hashes.learn(Hashes(more.to_vec()));
        assert_eq!(hashes.0, all[2..]);
    }

    #[test]
    fn a_file_that_is_written_to_may_have_grown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "one\n").unwrap();
        let [still, written] =
            [false, true].map(|written| Hashes::default().look(&path, written).unwrap());
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(
            Hashes::default().different(std::slice::from_ref(&written)),
            []
        );
        assert_eq!(Hashes::default().different(&[still]).len(), 1);
        std::fs::write(&path, "two\none\n").unwrap();
        assert_eq!(
            Hashes::default()
                .different(std::slice::from_ref(&written))
                .len(),
            1
        );
        std::fs::write(&path, "on").unwrap();
        assert_eq!(Hashes::default().different(&[written]).len(), 1);
    }
}
