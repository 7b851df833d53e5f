//! Whether a file is the same on two hosts.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::control::FileLook;
use crate::image::objects::hash_of_first;

/// Files over this size are compared by size alone: to read them would take longer than to move the task.
const HASHED: u64 = 64 << 20;

/// What there is to compare of a file; `written`: somebody may be writing to it.
///
/// # Errors
/// When it cannot be looked at.
pub fn look(path: &Path, written: bool) -> Result<FileLook> {
    look_at(path, written, None)
}

/// The same, of at most its first `len` bytes.
fn look_at(path: &Path, written: bool, len: Option<u64>) -> Result<FileLook> {
    let meta = std::fs::metadata(path).with_context(|| format!("{}: stat", path.display()))?;
    let kind = meta.file_type();
    let device = kind.is_char_device() || kind.is_block_device();
    let size = meta.len().min(len.unwrap_or(u64::MAX));
    let hash = match kind.is_file() && size <= HASHED {
        true => {
            let file = File::open(path).with_context(|| format!("{}: open", path.display()))?;
            Some(hash_of_first(&file, size)?.to_hex().to_string())
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

/// Those that are missing here or different, and why.
pub fn different(files: &[FileLook]) -> Vec<(PathBuf, String)> {
    let differs = |wanted: &FileLook| {
        // What has been added since the other look does not count.
        let len = wanted.size.filter(|_| wanted.written);
        let found = match look_at(&wanted.path, wanted.written, len) {
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
    };
    files
        .iter()
        .filter_map(|file| Some((file.path.clone(), differs(file)?)))
        .collect()
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
            .map(|n| look(&path(n), false).unwrap())
            .collect();
        let null = look(Path::new("/dev/null"), true).unwrap();
        assert_eq!(different(&looks), []);
        assert_eq!(different(&[null]), []);
        std::fs::write(path("other"), "TEXT").unwrap();
        std::fs::write(path("longer"), "texts").unwrap();
        std::fs::remove_file(path("gone")).unwrap();
        let told = different(&looks);
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
        let [still, written] = [false, true].map(|written| look(&path, written).unwrap());
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(different(std::slice::from_ref(&written)), []);
        assert_eq!(different(&[still]).len(), 1);
        std::fs::write(&path, "two\none\n").unwrap();
        assert_eq!(different(std::slice::from_ref(&written)).len(), 1);
        std::fs::write(&path, "on").unwrap();
        assert_eq!(different(&[written]).len(), 1);
    }
}
