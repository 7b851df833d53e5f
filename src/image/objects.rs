//! The directory `objects/`: files the image carries, each named by the BLAKE3 hash of its content.
//!
//! Images of one store share them by hard links. They are executable (mode 0500), because a restored
//! process may run from them where the original program is missing.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use nix::fcntl::AtFlags;

use super::pagemap::lock;
use super::store::fs;

const MODE: u32 = 0o500;
/// Bytes read at a time.
const PIECE: usize = 256 * 1024;

/// Whether `name` can be the name of an object: 64 lower-case hexadecimal digits.
pub fn is_object_name(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a writer gives files such a name in `objects`.
pub(super) fn is_written(name: &str) -> bool {
    is_object_name(name)
        || name
            .strip_suffix(".new")
            .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

/// Adds files to objects/. Threads share it.
pub(super) struct ObjectsWriter {
    dir: PathBuf,
    /// objects/ of other images in the store, newest first.
    siblings: Vec<PathBuf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Names of objects by what identifies a file's content.
    known: HashMap<Identity, String>,
    /// Objects that have to be made durable.
    new: HashSet<String>,
    /// Objects linked from siblings, durable already.
    linked: HashSet<String>,
    bytes: u64,
    temporary: u64,
}

/// A file is the same as before when all of these are.
#[derive(PartialEq, Eq, Hash)]
struct Identity {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl ObjectsWriter {
    /// `image` is the directory being written; `store` one whose images may have objects to share.
    pub fn create(image: &Path, store: Option<&Path>) -> Result<Self> {
        let dir = image.join("objects");
        fs::create_dir(&dir)?;
        let mut siblings = Vec::new();
        // A store that cannot be listed only costs space.
        for entry in store
            .and_then(|s| std::fs::read_dir(s).ok())
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path != image && entry.file_type().is_ok_and(|t| t.is_dir()) {
                siblings.push(path.join("objects"));
            }
        }
        siblings.sort_unstable();
        siblings.reverse();
        Ok(Self {
            dir,
            siblings,
            state: Mutex::default(),
        })
    }

    pub fn add(&self, file: &File) -> Result<String> {
        let meta = file.metadata().context("stat: file to carry")?;
        ensure!(meta.is_file(), "only regular files can be carried");
        let identity = Identity {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        };
        if let Some(name) = lock(&self.state).known.get(&identity) {
            return Ok(name.clone());
        }
        let name = match self.link(file)? {
            Some(name) => name,
            None => self.copy(file)?,
        };
        lock(&self.state).known.insert(identity, name.clone());
        Ok(name)
    }

    /// Shares a sibling's copy of the file.
    fn link(&self, file: &File) -> Result<Option<String>> {
        if self.siblings.is_empty() {
            return Ok(None);
        }
        let name = hash_of(file)?.to_hex().to_string();
        if self.has(&name) {
            return Ok(Some(name));
        }
        let to = self.dir.join(&name);
        for sibling in &self.siblings {
            // Not a symlink's target; and what the link leads to is looked at before it is trusted.
            if nix::unistd::linkat(
                nix::fcntl::AT_FDCWD,
                &sibling.join(&name),
                nix::fcntl::AT_FDCWD,
                &to,
                AtFlags::empty(),
            )
            .is_err()
            {
                continue;
            }
            if self.link_is_sound(&to, &name) {
                lock(&self.state).linked.insert(name.clone());
                return Ok(Some(name));
            }
            std::fs::remove_file(&to).with_context(|| format!("unlink: {}", to.display()))?;
        }
        Ok(None)
    }

    fn link_is_sound(&self, path: &Path, name: &str) -> bool {
        let Ok(file) = fs::open_regular(nix::fcntl::AT_FDCWD, path) else {
            return false;
        };
        let own = file
            .metadata()
            .is_ok_and(|m| m.uid() == nix::unistd::geteuid().as_raw() && m.mode() & 0o7777 == MODE);
        own && hash_of(&file).is_ok_and(|h| h.to_hex().as_str() == name)
    }

    fn has(&self, name: &str) -> bool {
        let state = lock(&self.state);
        state.new.contains(name) || state.linked.contains(name)
    }

    fn copy(&self, file: &File) -> Result<String> {
        let number = {
            let mut state = lock(&self.state);
            state.temporary += 1;
            state.temporary
        };
        let temporary = self.dir.join(format!("{number}.new"));
        let copy = fs::create_file(&temporary, MODE)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let n = read_some(file, &mut buffer, at)?;
            let piece = buffer.get(..n).unwrap_or_default();
            if piece.is_empty() {
                break;
            }
            hasher.update(piece);
            copy.write_all_at(piece, at)
                .with_context(|| format!("write: {}", temporary.display()))?;
            at += n as u64;
        }
        let name = hasher.finalize().to_hex().to_string();
        let mut state = lock(&self.state);
        if state.new.contains(&name) || state.linked.contains(&name) {
            std::fs::remove_file(&temporary)
                .with_context(|| format!("unlink: {}", temporary.display()))?;
        } else {
            let to = self.dir.join(&name);
            std::fs::rename(&temporary, &to)
                .with_context(|| format!("rename: {}", to.display()))?;
            state.bytes += at;
            state.new.insert(name.clone());
        }
        Ok(name)
    }

    /// Makes everything durable; returns how many bytes were stored (not those shared).
    pub fn finish(self) -> Result<u64> {
        let state = self
            .state
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for name in &state.new {
            fs::open_regular(nix::fcntl::AT_FDCWD, &self.dir.join(name))?
                .sync_all()
                .with_context(|| format!("fsync: objects/{name}"))?;
        }
        fs::sync_dir(&self.dir)?;
        Ok(state.bytes)
    }
}

/// Opens an object of an image whose directory is `image`.
pub(super) fn open(image: BorrowedFd, name: &str) -> Result<File> {
    ensure!(
        is_object_name(name),
        "{name:?} is not the name of an object"
    );
    let objects = fs::open_subdir(image, "objects")?;
    fs::open_regular(objects, Path::new(name)).with_context(|| format!("object {name}"))
}

/// Opens an object and checks that it has the content it is named for.
pub(super) fn open_verified(image: BorrowedFd, name: &str) -> Result<File> {
    let file = open(image, name)?;
    let hash = hash_of(&file).with_context(|| format!("objects/{name}"))?;
    ensure!(
        hash.to_hex().as_str() == name,
        "it is damaged: objects/{name} has the BLAKE3 hash {hash}"
    );
    Ok(file)
}

/// Names of all that is in objects/, sorted.
pub(super) fn list(image: BorrowedFd) -> Result<Vec<String>> {
    let objects = fs::open_subdir(image, "objects")?;
    let mut dir = nix::dir::Dir::from_fd(objects).context("objects")?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry.context("reading objects")?;
        let name = entry.file_name().to_string_lossy();
        if name == "." || name == ".." {
            continue;
        }
        ensure!(
            is_object_name(&name),
            "objects/{name} is not the name of an object"
        );
        names.push(name.into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// BLAKE3 hash of a file's content; its position stays where it is.
pub fn hash_of(file: &File) -> Result<blake3::Hash> {
    hash_of_first(file, u64::MAX)
}

/// The same of its first `len` bytes, or of all when it has less.
pub fn hash_of_first(file: &File, len: u64) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        let room = (len - at).min(PIECE as u64) as usize;
        let n = read_some(file, buffer.get_mut(..room).unwrap_or_default(), at)?;
        let piece = buffer.get(..n).unwrap_or_default();
        if piece.is_empty() {
            return Ok(hasher.finalize());
        }
        hasher.update(piece);
        at += n as u64;
    }
}

fn read_some(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    loop {
        match file.read_at(buffer, at) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other.with_context(|| format!("read at {at}")),
        }
    }
}
