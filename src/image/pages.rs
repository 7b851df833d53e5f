//! The file `pages`: the bytes of memory, in blocks that are checked one by one.
//!
//! A block is at most 64 KiB of memory, and what `pagemap` says about it is enough to read it alone. Blocks
//! that were given in one call lie next to each other, so that a long run is one read. Without compression
//! every block begins at a multiple of the page size.

mod read;

use std::fs::File;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use twox_hash::XxHash3_64;

use super::Compress;
use super::memory::SpaceId;
use super::pagemap::{Sorter, lock};

pub use super::pagemap::{BLOCK, Block, Blocks, Codec, PAGE};
pub use read::{PagesReader, Run, Runs};

/// zstd's fastest of the levels that are worth their time: memory is written once and read seldom.
const ZSTD_LEVEL: i32 = 1;
/// Bytes of the file whose way to the disk begins at a time.
const WRITE_BACK: u64 = 16 << 20;
/// Most slices in one pwritev (UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// Writes pages. Threads share it.
pub struct PagesWriter {
    file: File,
    dir: PathBuf,
    compress: Compress,
    /// Bytes of the file that are spoken for.
    end: AtomicU64,
    pages: AtomicU64,
    zero: AtomicU64,
    failed: AtomicBool,
    sorter: Mutex<Sorter>,
    /// Working memory of threads that are not in `put` now.
    idle: Mutex<Vec<Scratch>>,
}

/// What one call of `put` works with.
#[derive(Default)]
struct Scratch {
    blocks: Vec<Block>,
    /// Ranges of the data, or of `compressed`, that go to the file, adjacent ones as one.
    slices: Vec<(usize, usize)>,
    compressed: Vec<u8>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

/// What to do with pages that are all zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeros {
    LeaveOut,
    Record,
}

impl PagesWriter {
    pub(super) fn create(dir: &Path, compress: Compress) -> Result<Self> {
        Ok(Self {
            file: super::store::fs::create_file(&dir.join("pages"), 0o600)?,
            dir: dir.to_owned(),
            compress,
            end: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            sorter: Mutex::default(),
            idle: Mutex::default(),
        })
    }

    /// Stores pages of memory whose background is zero (anonymous and shared memory): pages that are all
    /// zero are left out. `addr` and the length of `data` are multiples of the page size. No page may be
    /// given twice. Best called with about 1 MiB at a time, beginning at a multiple of [`BLOCK`].
    ///
    /// # Errors
    /// When the file cannot be written (disk full); `finish` will then refuse.
    pub fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.put_with(space, addr, data, Zeros::LeaveOut)
    }

    /// As `put`, for memory whose background is something else (private mappings of files): pages that are
    /// all zero are recorded, though no bytes are stored for them.
    ///
    /// # Errors
    /// As `put`.
    pub fn put_over(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.put_with(space, addr, data, Zeros::Record)
    }

    /// Pages stored or recorded so far, and pages found to be zero.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.pages.load(Ordering::Relaxed),
            self.zero.load(Ordering::Relaxed),
        )
    }

    fn put_with(&self, space: SpaceId, addr: u64, data: &[u8], zeros: Zeros) -> Result<()> {
        let end = addr.checked_add(data.len() as u64);
        ensure!(
            addr.is_multiple_of(PAGE as u64) && data.len().is_multiple_of(PAGE) && end.is_some(),
            "memory at {addr:#x} ({} bytes) of space {space} is not whole pages",
            data.len()
        );
        let mut scratch = lock(&self.idle).pop().unwrap_or_default();
        let result = self.put_scratch(space, addr, data, zeros, &mut scratch);
        lock(&self.idle).push(scratch);
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        result.with_context(|| format!("storing pages at {addr:#x} of space {space}"))
    }

    fn put_scratch(
        &self,
        space: SpaceId,
        addr: u64,
        data: &[u8],
        zeros: Zeros,
        s: &mut Scratch,
    ) -> Result<()> {
        s.blocks.clear();
        s.slices.clear();
        s.compressed.clear();
        let (mut pages, mut zero) = (0u64, 0u64);
        let mut rest = data;
        let mut at = addr;
        while !rest.is_empty() {
            // No block crosses a multiple of BLOCK.
            let room = BLOCK - (at % BLOCK as u64) as usize;
            let (window, after) = rest.split_at(room.min(rest.len()));
            let mut begin = 0;
            while begin < window.len() {
                let tail = window.get(begin..).unwrap_or_default();
                let (is_zero, n) = run(tail);
                let bytes = tail.get(..n).unwrap_or_default();
                let from = data.len() - rest.len() + begin;
                let block_addr = at + begin as u64;
                begin += n;
                if is_zero {
                    zero += (n / PAGE) as u64;
                    if zeros == Zeros::LeaveOut {
                        continue;
                    }
                }
                pages += (n / PAGE) as u64;
                s.add(self.compress, block_addr, bytes, from, is_zero)?;
            }
            at += window.len() as u64;
            rest = after;
        }
        if s.blocks.is_empty() {
            self.zero.fetch_add(zero, Ordering::Relaxed);
            return Ok(());
        }
        let total: u64 = s.blocks.iter().map(|b| u64::from(b.stored)).sum();
        let mut offset = self.end.fetch_add(total, Ordering::Relaxed);
        let source: &[u8] = if self.compress == Compress::None {
            data
        } else {
            &s.compressed
        };
        self.write(source, &s.slices, offset)?;
        // Two puts are not done in the order of their offsets: stay behind by one window.
        let window = offset / WRITE_BACK;
        if (offset + total) / WRITE_BACK > window && window > 0 {
            crate::kernel::writeback::start(&self.file, (window - 1) * WRITE_BACK, WRITE_BACK);
        }
        for block in s.blocks.iter_mut().filter(|b| b.codec != Codec::Zero) {
            block.offset = offset;
            offset += u64::from(block.stored);
        }
        lock(&self.sorter).push(space, &s.blocks, || nameless(&self.dir))?;
        self.zero.fetch_add(zero, Ordering::Relaxed);
        self.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Writes ranges of `source` one behind the other from `offset` on.
    fn write(&self, source: &[u8], slices: &[(usize, usize)], mut offset: u64) -> Result<()> {
        for group in slices.chunks(IOV_MAX) {
            let mut io: Vec<IoSlice> = group
                .iter()
                .map(|(from, to)| IoSlice::new(source.get(*from..*to).unwrap_or_default()))
                .collect();
            let mut io = io.as_mut_slice();
            while !io.is_empty() {
                let n = match nix::sys::uio::pwritev(&self.file, io, offset.try_into()?) {
                    Ok(0) => bail!(
                        "write: {} takes no more bytes",
                        self.dir.join("pages").display()
                    ),
                    Ok(n) => n,
                    Err(nix::errno::Errno::EINTR) => continue,
                    Err(e) => {
                        return Err(std::io::Error::from(e)).with_context(|| {
                            format!("write: {}", self.dir.join("pages").display())
                        });
                    }
                };
                offset += n as u64;
                IoSlice::advance_slices(&mut io, n);
            }
        }
        Ok(())
    }

    /// Writes the pagemap. Returns the file `pages`, the file `pagemap`, their lengths and the hash of the latter.
    pub(super) fn finish(self, allowed: &super::verify::Allowed) -> Result<Finished> {
        ensure!(
            !self.failed.load(Ordering::Acquire),
            "memory could not be stored completely"
        );
        let len = self.end.load(Ordering::Acquire);
        let map = super::store::fs::create_file(&self.dir.join("pagemap"), 0o600)?;
        let sorter = std::mem::take(&mut *lock(&self.sorter));
        let (map_len, map_hash) = sorter.write(&map, len, 0, allowed)?;
        Ok(Finished {
            pages: self.pages.load(Ordering::Acquire),
            zero: self.zero.load(Ordering::Acquire),
            file: self.file,
            len,
            map,
            map_len,
            map_hash,
        })
    }
}

pub(super) struct Finished {
    pub file: File,
    pub len: u64,
    pub map: File,
    pub map_len: u64,
    pub map_hash: blake3::Hash,
    pub pages: u64,
    pub zero: u64,
}

impl Scratch {
    /// Plans one block: `bytes`, which stand at `from` in the caller's data.
    fn add(
        &mut self,
        compress: Compress,
        addr: u64,
        bytes: &[u8],
        from: usize,
        zero: bool,
    ) -> Result<()> {
        let mut block = Block {
            addr,
            pages: (bytes.len() / PAGE) as u32,
            offset: 0,
            stored: bytes.len() as u32,
            codec: Codec::Raw,
            hash: 0,
        };
        if zero {
            (block.stored, block.codec) = (0, Codec::Zero);
            self.blocks.push(block);
            return Ok(());
        }
        let (from, to) = if compress == Compress::None {
            block.hash = XxHash3_64::oneshot(bytes);
            (from, from + bytes.len())
        } else {
            let start = self.compressed.len();
            // A block that does not shrink is stored as it is.
            block.codec = self.compress(compress, bytes, start)?;
            let stored = self.compressed.get(start..).unwrap_or_default();
            block.stored = stored.len() as u32;
            block.hash = XxHash3_64::oneshot(stored);
            (start, self.compressed.len())
        };
        match self.slices.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => self.slices.push((from, to)),
        }
        self.blocks.push(block);
        Ok(())
    }

    /// Appends `bytes` to `compressed`, which has `start` bytes, and says how they stand there.
    fn compress(&mut self, compress: Compress, bytes: &[u8], start: usize) -> Result<Codec> {
        let bound = match compress {
            Compress::Lz4 => lz4_flex::block::get_maximum_output_size(bytes.len()),
            _ => zstd::zstd_safe::compress_bound(bytes.len()),
        };
        self.compressed.resize(start + bound, 0);
        let space = self.compressed.get_mut(start..).unwrap_or_default();
        let (codec, n) = match compress {
            Compress::Lz4 => (
                Codec::Lz4,
                lz4_flex::block::compress_into(bytes, space).context("lz4")?,
            ),
            _ => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    empty => empty.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).context("zstd")?),
                };
                (
                    Codec::Zstd,
                    zstd.compress_to_buffer(bytes, space).context("zstd")?,
                )
            }
        };
        if n < bytes.len() {
            self.compressed.truncate(start + n);
            return Ok(codec);
        }
        self.compressed.truncate(start);
        self.compressed.extend_from_slice(bytes);
        Ok(Codec::Raw)
    }
}

/// Whether the data begins with zero pages or with others, and for how many bytes.
fn run(data: &[u8]) -> (bool, usize) {
    let mut pages = data.chunks_exact(PAGE);
    let first = pages.next().is_some_and(is_zero);
    let more = pages.take_while(|p| is_zero(p) == first).count();
    (first, (1 + more) * PAGE)
}

/// Whether a page is all zero. Most pages that are not show it in their first bytes.
pub(super) fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|part| part.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// A file in `dir` that has no name and goes away by itself.
pub(super) fn nameless(dir: &Path) -> Result<File> {
    let path = dir.join("pagemap.sort");
    let file = super::store::fs::create_file(&path, 0o600)?;
    std::fs::remove_file(&path).with_context(|| format!("unlink: {}", path.display()))?;
    Ok(file)
}
