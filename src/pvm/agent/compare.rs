//! Whether a file is the same on two hosts.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};
use serde::{Deserialize, Serialize};

use super::control::FileLook;
use crate::image::objects::hash_of_first;
use crate::pvm::version::Version;

/// Files over this size are compared by size alone: to read them would take longer than to move the task.
const HASHED: u64 = 64 << 20;
/// Files whose hashes are known: when there are more, all are read again.
const MOST: usize = 256;

/// Hashes of files that have been read, so that each move does not read the C library on two hosts. Only of those that this
/// user cannot write to: what is written by way of a mapping may change no time.
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
        if self.0.len() > MOST {
            self.0.clear();
        }
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
            true => Some(self.hash(path, size)?),
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

    /// The hash of the first `len` bytes of a file.
    fn hash(&mut self, path: &Path, len: u64) -> Result<String> {
        let file = File::open(path).with_context(|| format!("{}: open", path.display()))?;
        let stat = || {
            let meta = file.metadata();
            meta.with_context(|| format!("{}: stat", path.display()))
        };
        let meta = stat()?;
        let version = Version::of(&meta);
        let whole = meta.len() == len && is_others(&meta, path);
        if let Some(hash) = self.of(&version).filter(|_| whole) {
            return Ok(hash.clone());
        }
        let hash = hash_of_first(&file, len)?.to_hex().to_string();
        if whole && version.is_settled() && Version::of(&stat()?) == version {
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

/// Whether it is somebody else's, and not to be written to by us.
fn is_others(meta: &Metadata, path: &Path) -> bool {
    let access = faccessat(AT_FDCWD, path, AccessFlags::W_OK, AtFlags::AT_EACCESS);
    meta.uid() != geteuid().as_raw() && matches!(access, Err(Errno::EACCES | Errno::EROFS))
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
