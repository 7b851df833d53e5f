//! What several parts of a dump name by index: files, and memory that is shared.

use std::collections::HashMap;
use std::fs::{DirEntry, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};

use crate::image::memory::{FileRef, SharedKind, SharedMemory, SpaceId};

/// Tables of a manifest that are filled from several sides; whoever meets a file first adds it.
#[derive(Debug)]
pub struct Tables {
    pub files: Vec<FileRef>,
    pub shared_memory: Vec<SharedMemory>,
    /// Objects whose bytes have to be copied while the processes stand still.
    pub contents: Vec<Content>,
    /// What was left out and does not matter much, for people.
    pub warnings: Vec<String>,
    by_name: HashMap<(u64, u64, String), u32>,
    by_inode: HashMap<(u64, u64), u32>,
    next_space: SpaceId,
}

/// An object that is open as a file and whose bytes go into the image.
#[derive(Debug)]
pub struct Content {
    /// Index in `Manifest::shared_memory`.
    pub memory: u32,
    /// Open for reading, with a position of its own.
    pub file: File,
}

impl Tables {
    /// Shared memory gets the space numbers from `first_space` on (processes have those below).
    pub fn new(first_space: SpaceId) -> Self {
        Self {
            files: Vec::new(),
            shared_memory: Vec::new(),
            contents: Vec::new(),
            warnings: Vec::new(),
            by_name: HashMap::new(),
            by_inode: HashMap::new(),
            next_space: first_space,
        }
    }

    /// Index of the file that has this path and metadata.
    pub fn file(&mut self, path: &str, meta: &std::fs::Metadata, deleted: bool) -> u32 {
        let key = (meta.dev(), meta.ino(), path.to_owned());
        *self.by_name.entry(key).or_insert_with(|| {
            self.files.push(FileRef {
                path: path.to_owned(),
                size: meta.size(),
                mode: meta.mode(),
                dev: meta.dev(),
                ino: meta.ino(),
                mtime_ns: nanos(meta.mtime(), meta.mtime_nsec()),
                ctime_ns: nanos(meta.ctime(), meta.ctime_nsec()),
                object: None,
                deleted,
            });
            (self.files.len() - 1) as u32
        })
    }

    /// Index of the memory object with this device and inode number, as fstat tells them; `kind` and size are
    /// asked for when it is new. True: it is new, and its content is still to be carried.
    pub fn shared(
        &mut self,
        dev: u64,
        ino: u64,
        new: impl FnOnce() -> Result<(u64, SharedKind)>,
    ) -> Result<(u32, bool)> {
        if let Some(&index) = self.by_inode.get(&(dev, ino)) {
            return Ok((index, false));
        }
        let (size, kind) = new()?;
        let index = self.shared_memory.len() as u32;
        self.shared_memory.push(SharedMemory {
            space: self.next_space,
            size,
            huge_page: None,
            kind,
        });
        self.next_space += 1;
        self.by_inode.insert((dev, ino), index);
        Ok((index, true))
    }

    /// Like [`Tables::shared`] for a memfd or deleted file that is at hand as a descriptor (of /proc/PID/fd or
    /// of /proc/PID/map_files); its content is noted in [`Tables::contents`]. `link` is what its /proc link says.
    pub fn shared_file(&mut self, fd: BorrowedFd<'_>, link: &str) -> Result<u32> {
        let meta = metadata(fd).with_context(|| format!("{link}: fstat"))?;
        let (memory, new) = self.shared(meta.dev(), meta.ino(), || {
            Ok((meta.size(), shared_kind(fd, &meta, link)?))
        })?;
        if new && meta.size() > 0 {
            let file = reopen_readable(fd).with_context(|| format!("{link}: open for reading"))?;
            self.content(memory, file);
        }
        Ok(memory)
    }

    /// Notes the content of a new object of shared memory.
    pub fn content(&mut self, memory: u32, file: File) {
        if let Some(object) = self.shared_memory.get_mut(memory as usize) {
            object.huge_page = huge_page(&file);
        }
        self.contents.push(Content { memory, file });
    }

    pub fn warn(&mut self, text: String) {
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }
}

fn nanos(seconds: i64, nanos: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanos)
}

/// A name that a file has still, of which `shown` is gone: files are often made under a name for the moment, linked to
/// their own and unlinked, as sem_open(3) does. Only the directory of `shown` is searched; nothing tells of others.
pub fn other_name(shown: &str, meta: &std::fs::Metadata) -> Option<String> {
    if meta.nlink() == 0 || !meta.is_file() {
        return None;
    }
    let bare = shown.strip_suffix(" (deleted)").unwrap_or(shown);
    let entries = std::fs::read_dir(Path::new(bare).parent()?).ok()?;
    let same = |e: &DirEntry| {
        let found = || e.metadata().ok();
        e.ino() == meta.ino() && found().is_some_and(|m| m.dev() == meta.dev())
    };
    let entry = entries.flatten().find(same)?;
    entry.path().into_os_string().into_string().ok()
}

/// fstat(2).
pub fn metadata(fd: BorrowedFd<'_>) -> Result<std::fs::Metadata> {
    Ok(File::from(fd.try_clone_to_owned()?).metadata()?)
}

/// A description of our own of the same inode: reading it moves no position of the program's.
fn reopen_readable(fd: BorrowedFd<'_>) -> Result<File> {
    Ok(File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?)
}

const HUGETLBFS_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x958458f6);

/// Bytes of a page of a file of hugetlbfs.
pub fn huge_page(file: &File) -> Option<u64> {
    let fs = nix::sys::statfs::fstatfs(file).ok()?;
    (fs.filesystem_type() == HUGETLBFS_MAGIC).then(|| fs.block_size() as u64)
}

fn shared_kind(fd: BorrowedFd<'_>, meta: &std::fs::Metadata, link: &str) -> Result<SharedKind> {
    let bare = link.strip_suffix(" (deleted)").unwrap_or(link);
    if meta.nlink() == 0
        && let Some(name) = bare.strip_prefix("/memfd:")
    {
        // An O_PATH descriptor cannot be asked; reopened it can.
        let owned: OwnedFd = reopen_readable(fd)?.into();
        let seals = crate::kernel::fds::seals(owned.as_fd()).context("F_GET_SEALS")?;
        return Ok(SharedKind::Memfd {
            name: name.to_owned(),
            seals,
            hugetlb: huge_page(&File::from(owned)).is_some(),
        });
    }
    // MAP_SHARED|MAP_ANONYMOUS|MAP_HUGETLB; who opened a file of this name would have it elsewhere.
    if bare == "/anon_hugepage" {
        return Ok(SharedKind::Anonymous);
    }
    Ok(SharedKind::DeletedFile {
        path: bare.to_owned(),
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
    })
}
