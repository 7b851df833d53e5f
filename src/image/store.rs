//! Images as directories: written whole or not at all, and opened with suspicion.

pub(super) mod fs;
mod image;

use std::fs::{DirBuilder, File, FileType};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::FlockArg;

use crate::error::Failure;
use fs::{Lock, Locked, create_file, lock_dir, parent, rename_new, sync_dir};
pub use image::Image;
pub(super) use image::damaged;

use super::objects::ObjectsWriter;
use super::pages::{Finished, PagesWriter};
use super::{Compress, Manifest, verify};

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
        let allowed = verify::check(manifest).context(UNSOUND)?;
        let finished = self.pages.finish(&allowed)?;
        seal(
            &self.path,
            self.partial,
            self.objects,
            finished,
            manifest,
            true,
        )
    }
}

pub(super) const UNSOUND: &str = "the image would not be sound";

/// Writes what is left of an image, and gives it its name; `durable` makes it survive a crash of the machine.
pub(super) fn seal(
    path: &Path,
    mut partial: Partial,
    objects: ObjectsWriter,
    finished: Finished,
    manifest: &Manifest,
    durable: bool,
) -> Result<Written> {
    let dir = partial.path.clone();
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
        finished.map_hash
    );
    let sums_file = create_file(&dir.join("checksums"), 0o600)?;
    (&sums_file)
        .write_all(sums.as_bytes())
        .context("write: checksums")?;

    let files = [
        ("pages", &finished.file),
        ("pagemap", &finished.map),
        ("manifest.json", &manifest_file),
        ("checksums", &sums_file),
    ];
    for (name, file) in files.iter().filter(|_| durable) {
        file.sync_all()
            .with_context(|| format!("fsync: {}", dir.join(name).display()))?;
    }
    let objects = objects.finish()?;
    if durable {
        sync_dir(&dir)?;
    }
    partial.rename(path, durable)?;
    Ok(Written {
        path: path.to_owned(),
        bytes_written: finished.len + finished.map_len + json_len + sums.len() as u64 + objects,
        pages: finished.pages,
        pages_zero: finished.zero,
    })
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

/// What the name of an image ends with as long as it is written.
const PARTIAL: &str = "partial";

fn partial_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".");
    name.push(PARTIAL);
    PathBuf::from(name)
}

/// Removes what a writer of `image` left behind that was killed: true if it is gone. It stays where somebody has it
/// locked: another writer, or for a moment what the dead one has forked.
///
/// # Errors
/// When it cannot be removed, or is not what a writer leaves.
pub fn remove_partial(image: &Path) -> Result<bool> {
    let path = partial_of(image);
    match lock_dir(&path)? {
        Locked::Ours(_lock) => remove_unfinished(&path).map(|()| true),
        Locked::Busy => Ok(false),
        Locked::Gone => Ok(true),
    }
}

/// Removes an unfinished image, and nothing else that has such a name.
fn remove_unfinished(path: &Path) -> Result<()> {
    const OBJECTS: &str = "objects";
    let mut stranger = stranger_in(path, &|name, kind| match name {
        OBJECTS => kind.is_dir(),
        "pages" | "pagemap" | "manifest.json" | "checksums" => kind.is_file(),
        _ => false,
    })?;
    let objects = path.join(OBJECTS);
    if stranger.is_none() && objects.is_dir() {
        let is_object =
            |name: &str, kind: FileType| kind.is_file() && super::objects::is_written(name);
        stranger = stranger_in(&objects, &is_object)?.map(|name| format!("{OBJECTS}/{name}"));
    }
    ensure!(
        stranger.is_none(),
        "{} is where the image would be written, and holds something else ({}): move it away, or choose another name",
        path.display(),
        stranger.unwrap_or_default()
    );
    std::fs::remove_dir_all(path)
        .with_context(|| format!("removing what is left of a failed dump: {}", path.display()))
}

/// Something in a directory that a writer of images has not made.
fn stranger_in(dir: &Path, ours: &dyn Fn(&str, FileType) -> bool) -> Result<Option<String>> {
    let context = || format!("reading {}", dir.display());
    for entry in std::fs::read_dir(dir).with_context(context)? {
        let entry = entry.with_context(context)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !ours(&name, entry.file_type().with_context(context)?) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The directory NAME.partial: locked as long as its writer lives, removed unless renamed.
pub(super) struct Partial {
    pub path: PathBuf,
    lock: Lock,
    renamed: bool,
}

impl Partial {
    pub fn create(image: &Path) -> Result<Self> {
        ensure!(
            image.file_name().is_some(),
            "{} cannot be the name of an image; give one like DIR/NAME",
            image.display()
        );
        ensure!(
            image.symlink_metadata().is_err(),
            "{} exists; remove it or choose another name",
            image.display()
        );
        // The next dump to NAME would take NAME.partial for what a dead writer left.
        if image.extension().is_some_and(|e| e == PARTIAL) {
            return Err(Failure::Usage.because(format!(
                "{}: names that end in .{PARTIAL} are those of unfinished images; choose another",
                image.display()
            )));
        }
        let path = partial_of(image);
        // Another process can come between any two of these steps; it is then its turn, or we try again.
        for _ in 0..16 {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    match lock_dir(&path)? {
                        Locked::Busy => return Err(busy(&path)),
                        // Its writer is dead.
                        Locked::Ours(_lock) => remove_unfinished(&path)?,
                        Locked::Gone => {}
                    }
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
            match lock_dir(&path)? {
                Locked::Ours(lock) => {
                    return Ok(Self {
                        path,
                        lock,
                        renamed: false,
                    });
                }
                Locked::Busy => return Err(busy(&path)),
                Locked::Gone => {}
            }
        }
        bail!(
            "{} comes and goes: others are writing the same image",
            path.display()
        )
    }

    fn rename(&mut self, to: &Path, durable: bool) -> Result<()> {
        // Whoever finds it under its name may read it at once.
        self.lock
            .relock(FlockArg::LockSharedNonblock)
            .with_context(|| format!("flock: {}", self.path.display()))?;
        rename_new(&self.path, to)?;
        self.renamed = true;
        if !durable {
            return Ok(());
        }
        sync_dir(parent(to))
            .context("the image is complete, but its name may not survive a crash of the machine")
    }
}

fn busy(path: &Path) -> anyhow::Error {
    Failure::Busy.because(format!("another process is writing {}", path.display()))
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed
            && let Err(e) = std::fs::remove_dir_all(&self.path)
            // Whoever called it off has taken it away.
            && e.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("mistctl: cannot remove {}: {e}", self.path.display());
        }
    }
}
