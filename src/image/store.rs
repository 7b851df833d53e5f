//! Images as directories: written whole or not at all, and opened with suspicion.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, RenameFlags};
use nix::sys::stat::Mode;

use crate::error::Failure;

use super::objects::{self, ObjectsWriter};
use super::pagemap::Pagemap;
use super::pages::{Finished, PagesReader, PagesWriter};
use super::{Compress, FORMAT_NAME, FORMAT_VERSION, Manifest, verify};

/// Most bytes of a manifest. serde makes of a byte at most some 16 bytes in memory.
const MANIFEST_MAX: u64 = 64 << 20;
/// Most bytes of `checksums`.
const CHECKSUMS_MAX: u64 = 4096;

/// Writes an image. Dropped without `finish`, it removes what it wrote.
pub struct ImageWriter {
    path: PathBuf,
    partial: Partial,
    pages: PagesWriter,
    objects: ObjectsWriter,
}

/// What `finish` wrote.
#[derive(Debug, Clone)]
pub struct Written {
    pub path: PathBuf,
    /// Bytes of all files, without those shared with other images.
    pub bytes_written: u64,
    /// Pages stored, and pages found to be zero.
    pub pages: u64,
    pub pages_zero: u64,
}

impl ImageWriter {
    /// Begins the image `path`, as `path`.partial. `store` is a directory whose images share their carried
    /// files. What a dead writer left under `path`.partial is removed.
    ///
    /// # Errors
    /// When `path` exists, when its directory cannot be written, when another process is writing it.
    pub fn create(path: &Path, store: Option<&Path>, compress: Compress) -> Result<Self> {
        ensure!(
            path.file_name().is_some(),
            "{} cannot be the name of an image; give one like DIR/NAME",
            path.display()
        );
        ensure!(
            path.symlink_metadata().is_err(),
            "{} exists; remove it or choose another name",
            path.display()
        );
        let partial = Partial::create(path)?;
        let pages = PagesWriter::create(&partial.path, compress)?;
        let objects = ObjectsWriter::create(&partial.path, store)?;
        Ok(Self {
            path: path.to_owned(),
            partial,
            pages,
            objects,
        })
    }

    /// Where pages go. Threads share it.
    pub fn pages(&self) -> &PagesWriter {
        &self.pages
    }

    /// Carries a regular file's content, from its beginning whatever the file's position is, and returns the
    /// object's name, its BLAKE3 hash. A content is stored once, and shared with other images of the store.
    ///
    /// # Errors
    /// When the file cannot be read or the object not be written.
    pub fn add_object(&self, file: &File) -> Result<String> {
        self.objects
            .add(file)
            .context("carrying a file in the image")
    }

    /// Makes the image real: it is complete and durable when this returns.
    ///
    /// # Errors
    /// When something could not be written (nothing is left then), or the manifest is not sound.
    pub fn finish(self, manifest: &Manifest) -> Result<Written> {
        let Self {
            path,
            mut partial,
            pages,
            objects,
        } = self;
        verify::check(manifest).context("the image would not be sound")?;
        let dir = partial.path.clone();
        let Finished {
            file,
            len,
            map,
            map_len,
            map_hash,
            pages,
            zero,
        } = pages.finish()?;

        let mut json = Counting {
            out: Vec::new(),
            hash: blake3::Hasher::new(),
        };
        serde_json::to_writer(&mut json, manifest).context("writing manifest.json")?;
        json.write_all(b"\n")?;
        let json_len = json.out.len() as u64;
        ensure!(
            json_len <= MANIFEST_MAX,
            "the manifest would have {json_len} bytes, more than {MANIFEST_MAX}: there is too much data in pipes and sockets"
        );
        let manifest_file = create_file(&dir.join("manifest.json"), 0o600)?;
        (&manifest_file)
            .write_all(&json.out)
            .context("write: manifest.json")?;
        let sums = format!(
            "{}  manifest.json\n{}  pagemap\n",
            json.hash.finalize(),
            map_hash
        );
        let sums_file = create_file(&dir.join("checksums"), 0o600)?;
        (&sums_file)
            .write_all(sums.as_bytes())
            .context("write: checksums")?;

        for (name, file) in [
            ("pages", &file),
            ("pagemap", &map),
            ("manifest.json", &manifest_file),
            ("checksums", &sums_file),
        ] {
            file.sync_all()
                .with_context(|| format!("fsync: {}", dir.join(name).display()))?;
        }
        let objects = objects.finish()?;
        sync_dir(&dir)?;
        partial.rename(&path)?;
        Ok(Written {
            path,
            bytes_written: len + map_len + json_len + sums.len() as u64 + objects,
            pages,
            pages_zero: zero,
        })
    }
}

struct Counting {
    out: Vec<u8>,
    hash: blake3::Hasher,
}

impl Write for Counting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hash.update(bytes);
        self.out.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The directory NAME.partial: locked as long as its writer lives, removed unless renamed.
struct Partial {
    path: PathBuf,
    _lock: Flock<OwnedFd>,
    renamed: bool,
}

impl Partial {
    fn create(image: &Path) -> Result<Self> {
        let mut name = image.as_os_str().to_owned();
        name.push(".partial");
        let path = PathBuf::from(name);
        // Another process can come between any two of these steps; it is then its turn, or we try again.
        for _ in 0..16 {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    let Some(lock) = lock_dir(&path)? else {
                        continue;
                    };
                    // Its writer is dead.
                    std::fs::remove_dir_all(&path).with_context(|| {
                        format!("removing what is left of a failed dump: {}", path.display())
                    })?;
                    drop(lock);
                    continue;
                }
                Err(e) => {
                    return Err(e).with_context(|| {
                        format!(
                            "mkdir: {} (is its directory there and writable?)",
                            path.display()
                        )
                    });
                }
            }
            if let Some(lock) = lock_dir(&path)? {
                return Ok(Self {
                    path,
                    _lock: lock,
                    renamed: false,
                });
            }
        }
        bail!(
            "{} comes and goes: others are writing the same image",
            path.display()
        )
    }

    fn rename(&mut self, to: &Path) -> Result<()> {
        rename_new(&self.path, to)?;
        self.renamed = true;
        sync_dir(parent(to))
            .context("the image is complete, but its name may not survive a crash of the machine")
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed
            && let Err(e) = std::fs::remove_dir_all(&self.path)
        {
            eprintln!("mistctl: cannot remove {}: {e}", self.path.display());
        }
    }
}

/// Locks a directory that is being written; none when it went away meanwhile.
fn lock_dir(path: &Path) -> Result<Option<Flock<OwnedFd>>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = match nix::fcntl::open(path, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::ENOENT) => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("open: {}", path.display())),
    };
    let lock = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => {
            bail!("another process is writing {}", path.display())
        }
        Err((_, e)) => return Err(e).with_context(|| format!("flock: {}", path.display())),
    };
    let ours = nix::sys::stat::fstat(lock.as_fd()).context("fstat")?;
    let there = match path.symlink_metadata() {
        Ok(meta) => meta,
        Err(_) => return Ok(None),
    };
    Ok((ours.st_dev == there.dev() && ours.st_ino == there.ino()).then_some(lock))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Renames to a name that must not exist.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let cwd = nix::fcntl::AT_FDCWD;
    let done = match nix::fcntl::renameat2(cwd, from, cwd, to, RenameFlags::RENAME_NOREPLACE) {
        // Not every file system knows the flag; a directory never replaces one that has something in it.
        Err(Errno::EINVAL) if to.symlink_metadata().is_err() => {
            nix::fcntl::renameat(cwd, from, cwd, to)
        }
        other => other,
    };
    done.with_context(|| format!("rename: {} to {}", from.display(), to.display()))
}

pub(super) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|d| d.sync_all())
        .with_context(|| format!("fsync: {}", path.display()))
}

pub(super) fn create_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("mkdir: {}", path.display()))
}

/// Creates a file that is not there yet, to be read and written.
pub(super) fn create_file(path: &Path, mode: u32) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("create: {}", path.display()))
}

/// Opens a regular file to be read; not through a symlink, and without waiting for a FIFO's writer.
pub(super) fn open_regular(dir: impl AsFd, path: &Path) -> Result<File> {
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_CLOEXEC
        | OFlag::O_NOCTTY;
    let fd = nix::fcntl::openat(dir, path, flags, Mode::empty()).map_err(|e| match e {
        Errno::ELOOP => anyhow::anyhow!("{} is a symbolic link", path.display()),
        e => anyhow::Error::from(e).context(format!("open: {}", path.display())),
    })?;
    let file = File::from(fd);
    let meta = file
        .metadata()
        .with_context(|| format!("stat: {}", path.display()))?;
    ensure!(meta.is_file(), "{} is not a regular file", path.display());
    Ok(file)
}

/// An image, opened and checked but for the content of pages and objects.
pub struct Image {
    pub manifest: Manifest,
    path: PathBuf,
    dir: OwnedFd,
    pages: PagesReader,
}

impl Image {
    /// Opens an image and checks everything that can be checked without reading all pages: versions, sizes,
    /// checksums of the manifest and of the pagemap, every reference in them.
    ///
    /// # Errors
    /// One that says what is wrong with the image, whatever it is.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_inner(path)
            .map_err(damaged)
            .with_context(|| format!("image {}", path.display()))
    }

    fn open_inner(path: &Path) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::ENOTDIR => anyhow::anyhow!("it is not a directory"),
            e => anyhow::Error::from(e).context("open"),
        })?;
        let json = read_small(&dir, "manifest.json", MANIFEST_MAX)?;
        let sums = Checksums::read(&dir);
        let sound = sums
            .as_ref()
            .is_ok_and(|sums| sums.manifest == blake3::hash(&json));
        // A newer version may check itself in other ways: say so before anything is called damage.
        check_version(&json, sound)?;
        let sums = sums?;
        ensure!(
            sound,
            "it is damaged: manifest.json does not have the checksum that `checksums` says"
        );
        let manifest: Manifest = serde_json::from_slice(&json).context("manifest.json")?;
        drop(json);
        let allowed = verify::check(&manifest).context("manifest.json")?;
        let pages = open_regular(&dir, Path::new("pages"))?;
        let pages_len = pages.metadata().context("stat: pages")?.len();
        let map = open_regular(&dir, Path::new("pagemap"))?;
        let (map, hash) = Pagemap::open(map, pages_len, &allowed).context("pagemap")?;
        ensure!(
            hash == sums.pagemap,
            "it is damaged: pagemap does not have the checksum that `checksums` says"
        );
        for object in manifest.files.iter().filter_map(|f| f.object.as_ref()) {
            objects::open(&dir, object)?;
        }
        Ok(Self {
            manifest,
            path: path.to_owned(),
            dir,
            pages: PagesReader::new(pages, map),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// User that the image's directory belongs to, as it was opened.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn owner(&self) -> Result<u32> {
        let stat = nix::sys::stat::fstat(&self.dir)
            .with_context(|| format!("fstat: image {}", self.path.display()))?;
        Ok(stat.st_uid)
    }

    /// Reads every page and every object and checks them. `progress` is told bytes done and in all.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.verify_inner(progress)
            .map_err(damaged)
            .with_context(|| format!("image {}", self.path.display()))
    }

    fn verify_inner(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        const PIECE: usize = 1 << 20;
        let total = self.pages.pages() * 4096;
        let mut done = 0;
        progress(done, total);
        let (mut out, mut scratch) = (vec![0; PIECE], Vec::new());
        for space in self.pages.spaces() {
            for run in self.pages.runs(space, 0, u64::MAX, PIECE) {
                let run = run?;
                self.pages.read_run(&run, &mut out, &mut scratch)?;
                done += run.bytes() as u64;
                progress(done, total);
            }
        }
        for object in self.manifest.files.iter().filter_map(|f| f.object.as_ref()) {
            objects::open_verified(&self.dir, object)?;
        }
        Ok(())
    }

    /// Where pages come from. Threads share it.
    pub fn pages(&self) -> &PagesReader {
        &self.pages
    }

    /// Opens a carried file by its name. Its content is not checked.
    ///
    /// # Errors
    /// When there is no such object, or it is not a regular file.
    pub fn object(&self, name: &str) -> Result<File> {
        objects::open(&self.dir, name).with_context(|| format!("image {}", self.path.display()))
    }

    /// Opens a carried file and checks that its content is what it is named for.
    ///
    /// # Errors
    /// As `object`, and when the content is another.
    pub fn object_verified(&self, name: &str) -> Result<File> {
        objects::open_verified(&self.dir, name)
            .with_context(|| format!("image {}", self.path.display()))
    }
}

/// What is wrong with an image is damage, unless it could not even be looked at.
fn damaged(e: anyhow::Error) -> anyhow::Error {
    let denied = |c: &(dyn std::error::Error + 'static)| {
        matches!(
            c.downcast_ref(),
            Some(Errno::EACCES | Errno::EPERM | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
        )
    };
    if e.chain().any(denied) {
        return e;
    }
    Failure::Damaged.with(e)
}

/// The file `checksums`.
struct Checksums {
    manifest: blake3::Hash,
    pagemap: blake3::Hash,
}

impl Checksums {
    fn read(dir: &OwnedFd) -> Result<Self> {
        let text = read_small(dir, "checksums", CHECKSUMS_MAX)?;
        let text = std::str::from_utf8(&text).context("checksums")?;
        let of = |name: &str| -> Result<blake3::Hash> {
            let mut lines = text
                .lines()
                .filter_map(|l| l.split_once("  "))
                .filter(|(_, n)| *n == name);
            let (hex, _) = lines
                .next()
                .with_context(|| format!("it is damaged: `checksums` has no line for {name}"))?;
            ensure!(
                lines.next().is_none(),
                "it is damaged: `checksums` has two lines for {name}"
            );
            blake3::Hash::from_hex(hex).with_context(|| format!("checksums: {name}"))
        };
        Ok(Self {
            manifest: of("manifest.json")?,
            pagemap: of("pagemap")?,
        })
    }
}

fn check_version(json: &[u8], sound: bool) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Head {
        format: String,
        version: u64,
    }
    let head: Head = match serde_json::from_slice(json) {
        Ok(head) => head,
        // The checksum says it better.
        Err(_) if !sound => return Ok(()),
        Err(e) => return Err(e).context("manifest.json"),
    };
    ensure!(
        head.format == FORMAT_NAME,
        "it is not a checkpoint: its format is {:?} instead of {FORMAT_NAME:?}",
        head.format
    );
    ensure!(
        head.version == u64::from(FORMAT_VERSION),
        "its format version is {}, and this mistctl reads version {FORMAT_VERSION}; use the mistctl that made it",
        head.version
    );
    Ok(())
}

/// Reads a whole small file of the image.
fn read_small(dir: &OwnedFd, name: &str, max: u64) -> Result<Vec<u8>> {
    let file = open_regular(dir, Path::new(name))?;
    let len = file
        .metadata()
        .with_context(|| format!("stat: {name}"))?
        .len();
    ensure!(len <= max, "{name} has {len} bytes, more than {max}");
    let mut bytes = Vec::with_capacity(len as usize + 1);
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("read: {name}"))?;
    ensure!(
        bytes.len() as u64 <= max,
        "{name} has more than {max} bytes"
    );
    Ok(bytes)
}
