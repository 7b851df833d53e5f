//! Opening and checking images.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;

use super::fs::{Lock, open_regular};
use super::{CHECKSUMS_MAX, MANIFEST_MAX};
use crate::error::Failure;
use crate::image::objects;
use crate::image::pagemap::Pagemap;
use crate::image::pages::PagesReader;
use crate::image::{FORMAT_NAME, FORMAT_VERSION, Manifest, verify};

/// An image, opened and checked but for the content of pages and objects. While it is open it is not removed
/// ([`crate::image::dated::remove`]).
pub struct Image {
    pub manifest: Manifest,
    /// What is odd about it and no error, for people.
    pub warnings: Vec<String>,
    path: PathBuf,
    dir: Dir,
    pages: PagesReader,
}

/// The image's directory, locked where the file system has locks.
enum Dir {
    Locked(Lock),
    Plain(OwnedFd),
}

impl Dir {
    fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(path, flags, Mode::empty()).map_err(|e| match e {
            Errno::ENOTDIR => anyhow::anyhow!("it is not a directory"),
            e => anyhow::Error::from(e).context("open"),
        })?;
        match Flock::lock(dir, FlockArg::LockSharedNonblock) {
            Ok(lock) => Ok(Dir::Locked(lock)),
            Err((_, Errno::EWOULDBLOCK)) => {
                Err(Failure::Busy.because("it is being written or removed"))
            }
            Err((dir, _)) => Ok(Dir::Plain(dir)),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Dir::Locked(lock) => lock.as_fd(),
            Dir::Plain(fd) => fd.as_fd(),
        }
    }

    /// Who else could change the image.
    fn warnings(&self) -> Result<Vec<String>> {
        let stat = nix::sys::stat::fstat(self.fd()).context("stat")?;
        let mut warnings = Vec::new();
        if stat.st_mode & 0o077 != 0 {
            warnings.push(format!(
                "the image's directory has mode {:04o}: others than its owner may read or change it; chmod 0700",
                stat.st_mode & 0o7777
            ));
        }
        let euid = nix::unistd::geteuid().as_raw();
        if stat.st_uid != euid && stat.st_uid != 0 {
            warnings.push(format!(
                "the image belongs to uid {}, not to you (uid {euid})",
                stat.st_uid
            ));
        }
        Ok(warnings)
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Image").field(&self.path).finish()
    }
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
        let dir_lock = Dir::open(path)?;
        let warnings = dir_lock.warnings()?;
        let dir = dir_lock.fd();
        let json = read_small(dir, "manifest.json", MANIFEST_MAX)?;
        let sums = Checksums::read(dir);
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
        let pages = open_regular(dir, Path::new("pages"))?;
        let pages_len = pages.metadata().context("stat: pages")?.len();
        let map = open_regular(dir, Path::new("pagemap"))?;
        let (map, hash) = Pagemap::open(map, pages_len, &allowed).context("pagemap")?;
        ensure!(
            hash == sums.pagemap,
            "it is damaged: pagemap does not have the checksum that `checksums` says"
        );
        for object in manifest.files.iter().filter_map(|f| f.object.as_ref()) {
            objects::open(dir, object)?;
        }
        Ok(Self {
            manifest,
            warnings,
            path: path.to_owned(),
            dir: dir_lock,
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
        let stat = nix::sys::stat::fstat(self.dir.fd())
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
        // Those that the manifest names are there: opening looked.
        for object in objects::list(self.dir.fd())? {
            objects::open_verified(self.dir.fd(), &object)?;
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
        objects::open(self.dir.fd(), name).with_context(|| format!("image {}", self.path.display()))
    }

    /// Opens a carried file and checks that its content is what it is named for.
    ///
    /// # Errors
    /// As `object`, and when the content is another.
    pub fn object_verified(&self, name: &str) -> Result<File> {
        objects::open_verified(self.dir.fd(), name)
            .map_err(damaged)
            .with_context(|| format!("image {}", self.path.display()))
    }
}

/// What is wrong with an image is damage, unless it could not even be looked at.
pub(in crate::image) fn damaged(e: anyhow::Error) -> anyhow::Error {
    let denied = |c: &(dyn std::error::Error + 'static)| {
        matches!(
            c.downcast_ref(),
            Some(Errno::EACCES | Errno::EPERM | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
        )
    };
    if e.chain().any(denied) || Failure::of(&e) == Failure::Busy {
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
    fn read(dir: BorrowedFd) -> Result<Self> {
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
fn read_small(dir: BorrowedFd, name: &str, max: u64) -> Result<Vec<u8>> {
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
