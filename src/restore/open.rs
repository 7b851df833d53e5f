//! Files that mappings need, opened before the body is forked so that it inherits them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, anyhow};

use crate::error::Failure;
use crate::image::memory::{Backing, FileRef};
use crate::image::store::Image;

/// Open files by what the image calls them. Numbers are those of the bodies, too.
#[derive(Default)]
pub struct Opened {
    files: BTreeMap<(u32, bool), OwnedFd>,
    executables: BTreeMap<u32, OwnedFd>,
    pub warnings: Vec<String>,
}

impl Opened {
    /// Opens what the mappings of all processes need.
    /// `instead` are files to be used instead of those of these indexes.
    pub fn new(image: &Image, mut instead: BTreeMap<u32, File>, floor: i32) -> Result<Self> {
        let mut me = Self::default();
        let manifest = &image.manifest;
        let mut wanted = BTreeSet::new();
        for v in manifest.processes.iter().flat_map(|p| &p.vmas) {
            if let Backing::File { file } = v.backing {
                wanted.insert((file, v.may_be_written(), v.shared));
            }
        }
        for (index, writable, live) in wanted {
            let open = match instead.remove(&index) {
                Some(file) => file,
                None => me.open(image, file_ref(image, index)?, writable, live)?,
            };
            me.files.insert((index, writable), high(open, floor)?);
        }
        for p in manifest.processes.iter().filter(|p| !p.threads.is_empty()) {
            if !me.executables.contains_key(&p.exe) {
                let open = me.open(image, file_ref(image, p.exe)?, false, false)?;
                me.executables.insert(p.exe, high(open, floor)?);
            }
        }
        Ok(me)
    }

    /// Descriptor of the file that index names.
    pub fn file(&self, index: u32, writable: bool) -> Result<i32> {
        self.files
            .get(&(index, writable))
            .map(AsRawFd::as_raw_fd)
            .with_context(|| format!("file {index} of the image was not opened"))
    }

    pub fn executable(&self, index: u32) -> Option<i32> {
        self.executables.get(&index).map(AsRawFd::as_raw_fd)
    }

    /// The file in place when it is what the program had, else the carried copy. `live`: a shared mapping,
    /// whose content is the file's own by definition.
    fn open(&mut self, image: &Image, f: &FileRef, writable: bool, live: bool) -> Result<File> {
        let in_place = OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(&f.path);
        if let Ok(file) = &in_place
            && !f.deleted
            && (live || same(file, f, image)?)
        {
            return in_place.with_context(|| f.path.clone());
        }
        let Some(object) = f.object.as_deref().filter(|_| !writable) else {
            let why = match in_place {
                Ok(_) => anyhow!("it is another file now"),
                Err(e) => anyhow!(e),
            };
            return Err(Failure::Restore.with(why.context(format!(
                "the program maps {} ({} bytes), which the image does not carry; put it back",
                f.path, f.size
            ))));
        };
        if !f.deleted {
            self.warnings.push(format!(
                "{} differs here; the image's own copy is used",
                f.path
            ));
        }
        image
            .object_verified(object)
            .with_context(|| format!("the carried copy of {}", f.path))
    }
}

fn file_ref(image: &Image, index: u32) -> Result<&FileRef> {
    image
        .manifest
        .files
        .get(index as usize)
        .with_context(|| format!("the image has no file {index}"))
}

/// The untouched inode needs no reading; another one is read and compared by hash.
fn same(file: &File, f: &FileRef, image: &Image) -> Result<bool> {
    let m = file.metadata().with_context(|| f.path.clone())?;
    if !m.file_type().is_file() || m.size() != f.size {
        return Ok(false);
    }
    let nanos = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
    if (m.dev(), m.ino()) == (f.dev, f.ino)
        && nanos(m.mtime(), m.mtime_nsec()) == f.mtime_ns
        && nanos(m.ctime(), m.ctime_nsec()) == f.ctime_ns
        && image.manifest.origin.hostname
            == nix::unistd::gethostname()
                .unwrap_or_default()
                .to_string_lossy()
    {
        return Ok(true);
    }
    let Some(object) = &f.object else {
        return Ok(true);
    };
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(file)
        .with_context(|| format!("reading {}", f.path))?;
    Ok(hasher.finalize().to_hex().as_str() == object)
}

/// A duplicate at `floor` or above.
fn high(file: File, floor: i32) -> Result<OwnedFd> {
    use std::os::fd::AsFd;
    crate::kernel::fds::dup_above(file.as_fd(), floor).context("no descriptors left")
}
