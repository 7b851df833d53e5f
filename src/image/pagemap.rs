//! The file `pagemap`: which pages of which space are where in `pages`, with checksums.
//!
//! ```text
//! header        64 bytes
//! spaces        24 bytes each, sorted by space: its number, its first record, how many it has
//! records       32 bytes each, sorted by space and address, without overlaps
//! ```
//! Neither side ever holds the records of a large image in memory: the writer spills sorted runs and
//! merges them, the reader keeps a checksum and the first address of each chunk and reads chunks when they
//! are asked for. The file is not memory-mapped: mapped pages count as memory in use, and somebody else's
//! truncation of a mapped file is a SIGBUS. docs/image-format.md has every field.

use std::collections::{BTreeMap, BinaryHeap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use xxhash_rust::xxh3::xxh3_64;

use super::memory::SpaceId;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most bytes of memory in a block; no block crosses an address that is a multiple of it.
pub const BLOCK: usize = 64 * 1024;
/// Version of this file and of `pages`.
const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"mistpgmp";
const HEADER: usize = 64;
const SPACE: usize = 24;
const RECORD: usize = 32;
/// Records in a chunk: what the reader reads, checks and caches at a time (32 KiB).
const CHUNK: u64 = 1024;
/// Chunks the reader keeps for `find`.
const CACHED: usize = 64;
/// Records the writer sorts in memory before it spills them (some 4 MiB).
const SORT_IN_MEMORY: usize = 96 * 1024;
/// Bytes of buffers for merging spilled runs, together.
const MERGE_BUFFERS: usize = 4 << 20;

/// How the bytes of a block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// As they were.
    Raw,
    Lz4,
    Zstd,
    /// Nothing is stored: all bytes are zero.
    Zero,
}

impl Codec {
    fn number(self) -> u8 {
        match self {
            Codec::Raw => 0,
            Codec::Lz4 => 1,
            Codec::Zstd => 2,
            Codec::Zero => 3,
        }
    }

    fn from_number(n: u8) -> Result<Self> {
        Ok(match n {
            0 => Codec::Raw,
            1 => Codec::Lz4,
            2 => Codec::Zstd,
            3 => Codec::Zero,
            _ => bail!("unknown codec {n}"),
        })
    }
}

/// A run of pages in one space: at most [`BLOCK`] bytes, within one aligned [`BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    /// Address of the first page (in shared memory: offset in the object).
    pub addr: u64,
    /// How many pages.
    pub pages: u32,
    /// Where the stored bytes begin in `pages`.
    pub offset: u64,
    /// How many bytes are stored there.
    pub stored: u32,
    pub codec: Codec,
    /// XXH3-64 of the stored bytes (of a zero block: 0).
    pub hash: u64,
}

impl Block {
    /// Bytes of memory the block holds.
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE
    }

    /// Address behind the last page.
    pub fn end(&self) -> u64 {
        self.addr.saturating_add(self.bytes() as u64)
    }

    fn encode(&self) -> [u8; RECORD] {
        let mut r = [0; RECORD];
        r[0..8].copy_from_slice(&self.addr.to_le_bytes());
        r[8..16].copy_from_slice(&self.offset.to_le_bytes());
        r[16..24].copy_from_slice(&self.hash.to_le_bytes());
        r[24..28].copy_from_slice(&self.stored.to_le_bytes());
        // At most BLOCK / PAGE pages.
        r[28..30].copy_from_slice(&(self.pages as u16).to_le_bytes());
        r[30] = self.codec.number();
        r
    }

    /// Decodes a record and checks everything that it can be checked for alone. `pages_len`: bytes of `pages`.
    fn decode(r: &[u8], pages_len: u64) -> Result<Self> {
        let block = Self {
            addr: u64_at(r, 0)?,
            offset: u64_at(r, 8)?,
            hash: u64_at(r, 16)?,
            stored: u32_at(r, 24)?,
            pages: u32::from(u16_at(r, 28)?),
            codec: Codec::from_number(r.get(30).copied().unwrap_or(u8::MAX))?,
        };
        let Block { addr, pages, .. } = block;
        let bytes = block.bytes();
        ensure!(
            r.get(31) == Some(&0)
                && pages > 0
                && bytes <= BLOCK
                && addr.is_multiple_of(PAGE as u64),
            "the record at address {addr:#x} is malformed"
        );
        ensure!(
            addr % BLOCK as u64 + bytes as u64 <= BLOCK as u64
                && addr.checked_add(bytes as u64).is_some(),
            "the block at {addr:#x} crosses a block border"
        );
        let stored = block.stored as usize;
        let fits = match block.codec {
            Codec::Raw => stored == bytes,
            Codec::Lz4 | Codec::Zstd => stored > 0 && stored < bytes,
            Codec::Zero => stored == 0 && block.offset == 0 && block.hash == 0,
        };
        ensure!(
            fits,
            "the block at {addr:#x} has an impossible size ({stored} bytes stored for {bytes})"
        );
        let end = block.offset.checked_add(u64::from(block.stored));
        ensure!(
            end.is_some_and(|end| end <= pages_len),
            "the block at {addr:#x} lies behind the end of `pages`"
        );
        Ok(block)
    }
}

fn bytes_at<const N: usize>(b: &[u8], at: usize) -> Result<[u8; N]> {
    b.get(at..at + N)
        .and_then(|s| s.try_into().ok())
        .context("pagemap is cut short")
}

fn u64_at(b: &[u8], at: usize) -> Result<u64> {
    bytes_at(b, at).map(u64::from_le_bytes)
}

fn u32_at(b: &[u8], at: usize) -> Result<u32> {
    bytes_at(b, at).map(u32::from_le_bytes)
}

fn u16_at(b: &[u8], at: usize) -> Result<u16> {
    bytes_at(b, at).map(u16::from_le_bytes)
}

/// Locks whatever happened to another thread: what these locks guard is whole at every moment.
pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---------------------------------------------------------------------------------------------------------

/// Collects blocks in any order and writes them sorted, in bounded memory.
#[derive(Default)]
pub(super) struct Sorter {
    blocks: Vec<(SpaceId, Block)>,
    /// Blocks of each space.
    count: BTreeMap<SpaceId, u64>,
    /// Sorted runs that were spilled: where they begin in `spill`, and how many records they have.
    runs: Vec<(u64, u64)>,
    spill: Option<File>,
    spilled: u64,
}

/// Of a spilled record: the space, padding, and the record.
const SPILLED: usize = 8 + RECORD;

impl Sorter {
    /// Takes blocks. `spill` gives a file (without a name, best) for when there are too many for memory.
    pub fn push(
        &mut self,
        space: SpaceId,
        blocks: &[Block],
        spill: impl FnOnce() -> Result<File>,
    ) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        if self.blocks.len() + blocks.len() > SORT_IN_MEMORY && !self.blocks.is_empty() {
            self.spill_run(spill)?;
        }
        *self.count.entry(space).or_default() += blocks.len() as u64;
        self.blocks.extend(blocks.iter().map(|b| (space, *b)));
        Ok(())
    }

    fn spill_run(&mut self, new: impl FnOnce() -> Result<File>) -> Result<()> {
        if self.spill.is_none() {
            self.spill = Some(new()?);
        }
        let Some(file) = &self.spill else {
            bail!("no file to sort page records in")
        };
        self.blocks.sort_unstable();
        let mut out = Vec::with_capacity(256 * 1024);
        self.runs.push((self.spilled, self.blocks.len() as u64));
        for part in self.blocks.chunks(256 * 1024 / SPILLED) {
            out.clear();
            for (space, block) in part {
                out.extend_from_slice(&space.to_le_bytes());
                out.extend_from_slice(&[0; 4]);
                out.extend_from_slice(&block.encode());
            }
            file.write_all_at(&out, self.spilled)
                .context("write: sorting page records")?;
            self.spilled += out.len() as u64;
        }
        self.blocks.clear();
        Ok(())
    }

    /// Writes the whole pagemap to `file`; returns its length and its BLAKE3 hash.
    pub fn write(mut self, file: &File, pages_len: u64) -> Result<(u64, blake3::Hash)> {
        self.blocks.sort_unstable();
        let total: u64 = self.count.values().sum();
        let mut out = Hashing {
            out: BufWriter::with_capacity(256 * 1024, file),
            hash: blake3::Hasher::new(),
            len: 0,
        };

        let mut header = [0; HEADER];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(PAGE as u32).to_le_bytes());
        header[16..20].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        header[20..24].copy_from_slice(&u32::try_from(self.count.len())?.to_le_bytes());
        header[24..32].copy_from_slice(&total.to_le_bytes());
        header[32..40].copy_from_slice(&pages_len.to_le_bytes());
        out.put(&header)?;
        let mut first = 0u64;
        for (space, count) in &self.count {
            out.put(&space.to_le_bytes())?;
            out.put(&[0; 4])?;
            out.put(&first.to_le_bytes())?;
            out.put(&count.to_le_bytes())?;
            first += count;
        }

        let mut last: Option<(SpaceId, Block)> = None;
        let mut emit = |space: SpaceId, block: Block| -> Result<()> {
            if let Some((s, b)) = last {
                ensure!(
                    s != space || b.end() <= block.addr,
                    "page {:#x} of space {space} was given twice",
                    block.addr
                );
            }
            last = Some((space, block));
            out.put(&block.encode())
        };
        if self.runs.is_empty() {
            for (space, block) in &self.blocks {
                emit(*space, *block)?;
            }
        } else {
            self.merge(pages_len, &mut emit)?;
        }
        out.finish()
    }

    fn merge(
        self,
        pages_len: u64,
        emit: &mut dyn FnMut(SpaceId, Block) -> Result<()>,
    ) -> Result<()> {
        let file = self.spill.as_ref().context("no file of spilled records")?;
        let per_run = (MERGE_BUFFERS / SPILLED / (self.runs.len() + 1)).max(8);
        let mut runs: Vec<Run> = self
            .runs
            .iter()
            .map(|&(at, left)| Run {
                file: Some(file),
                at,
                left,
                pages_len,
                buffer: Vec::new(),
            })
            .collect();
        // What is still in memory is the last run.
        let mut rest = self.blocks;
        rest.reverse();
        runs.push(Run {
            file: None,
            at: 0,
            left: 0,
            pages_len,
            buffer: rest,
        });
        let mut heap = BinaryHeap::new();
        for (i, run) in runs.iter_mut().enumerate() {
            if let Some(next) = run.next(per_run)? {
                heap.push(std::cmp::Reverse((next, i)));
            }
        }
        while let Some(std::cmp::Reverse(((space, block), i))) = heap.pop() {
            emit(space, block)?;
            if let Some(run) = runs.get_mut(i)
                && let Some(next) = run.next(per_run)?
            {
                heap.push(std::cmp::Reverse((next, i)));
            }
        }
        Ok(())
    }
}

/// A sorted run on its way back.
struct Run<'a> {
    file: Option<&'a File>,
    at: u64,
    left: u64,
    pages_len: u64,
    /// Read and not yet taken, last first.
    buffer: Vec<(SpaceId, Block)>,
}

impl Run<'_> {
    fn next(&mut self, per_run: usize) -> Result<Option<(SpaceId, Block)>> {
        if self.buffer.is_empty()
            && self.left > 0
            && let Some(file) = self.file
        {
            let n = self.left.min(per_run as u64);
            let mut bytes = vec![0; n as usize * SPILLED];
            file.read_exact_at(&mut bytes, self.at)
                .context("read: sorting page records")?;
            for r in bytes.chunks_exact(SPILLED).rev() {
                let block = Block::decode(r.get(8..).unwrap_or_default(), self.pages_len)?;
                self.buffer.push((u32_at(r, 0)?, block));
            }
            self.at += bytes.len() as u64;
            self.left -= n;
        }
        Ok(self.buffer.pop())
    }
}

struct Hashing<'a> {
    out: BufWriter<&'a File>,
    hash: blake3::Hasher,
    len: u64,
}

impl Hashing<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        self.out.write_all(bytes).context("write: pagemap")
    }

    fn finish(mut self) -> Result<(u64, blake3::Hash)> {
        self.out.flush().context("write: pagemap")?;
        Ok((self.len, self.hash.finalize()))
    }
}

// ---------------------------------------------------------------------------------------------------------

/// Records of one space.
#[derive(Debug, Clone, Copy)]
struct Space {
    space: SpaceId,
    first: u64,
    count: u64,
}

/// Chunk of records as it was when the file was checked.
struct ChunkInfo {
    hash: u64,
    /// Address of its first record.
    addr: u64,
}

/// Reads a pagemap. All of it was checked when it was opened, and each chunk is checked again when it is
/// read: a file that changes under way is an error.
pub(super) struct Pagemap {
    file: File,
    spaces: Vec<Space>,
    total: u64,
    pages_len: u64,
    chunks: Vec<ChunkInfo>,
    cache: Vec<Slot>,
    /// Pages of blocks, all together.
    pages: u64,
}

type Chunk = Vec<Block>;
/// A chunk that was read, with its number.
type Slot = Mutex<Option<(u64, Arc<Chunk>)>>;

impl Pagemap {
    /// Checks the file. `allowed` gives the ranges of addresses that each space may have pages in, sorted and
    /// without overlaps. Returns the map and the BLAKE3 hash of the file.
    pub fn open(
        file: File,
        pages_len: u64,
        allowed: &BTreeMap<SpaceId, Vec<(u64, u64)>>,
    ) -> Result<(Self, blake3::Hash)> {
        let len = file.metadata().context("stat: pagemap")?.len();
        let mut hash = blake3::Hasher::new();
        ensure!(len >= HEADER as u64, "it is cut short ({len} bytes)");
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).context("read")?;
        hash.update(&header);
        ensure!(
            header.starts_with(&MAGIC),
            "it does not begin as a pagemap does"
        );
        let version = u32_at(&header, 8)?;
        ensure!(
            version == VERSION,
            "its version is {version}, and this mistctl reads version {VERSION}; use the mistctl that made it"
        );
        ensure!(
            u32_at(&header, 12)? as usize == PAGE && u32_at(&header, 16)? as usize == BLOCK,
            "its pages or blocks have another size than {PAGE} and {BLOCK} bytes"
        );
        let spaces = u32_at(&header, 20)? as usize;
        let total = u64_at(&header, 24)?;
        ensure!(
            header
                .get(40..)
                .is_some_and(|rest| rest.iter().all(|b| *b == 0)),
            "its header has something in reserved bytes"
        );
        ensure!(
            u64_at(&header, 32)? == pages_len,
            "`pages` has {pages_len} bytes instead of {}",
            u64_at(&header, 32)?
        );
        ensure!(
            spaces <= allowed.len(),
            "it has {spaces} spaces, the manifest {}",
            allowed.len()
        );
        let expected = total
            .checked_mul(RECORD as u64)
            .and_then(|n| n.checked_add((HEADER + spaces * SPACE) as u64));
        ensure!(
            expected == Some(len),
            "it has {len} bytes, which is not what {total} blocks take"
        );

        let mut table = vec![0; spaces * SPACE];
        file.read_exact_at(&mut table, HEADER as u64)
            .context("read")?;
        hash.update(&table);
        let spaces = read_spaces(&table, total)?;
        let mut map = Self {
            file,
            spaces,
            total,
            pages_len,
            chunks: Vec::new(),
            cache: (0..CACHED).map(|_| Mutex::new(None)).collect(),
            pages: 0,
        };
        map.check_records(&mut hash, allowed)?;
        Ok((map, hash.finalize()))
    }

    fn check_records(
        &mut self,
        hash: &mut blake3::Hasher,
        allowed: &BTreeMap<SpaceId, Vec<(u64, u64)>>,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK as usize * RECORD];
        let mut spaces = self.spaces.iter();
        // Records left in the current space, the end of the last block in it, and the ranges still ahead.
        let (mut left, mut end, mut space) = (0, 0, 0);
        let mut ranges: &[(u64, u64)] = &[];
        let mut stored = 0u64;
        let mut index = 0;
        while index < self.total {
            let n = (self.total - index).min(CHUNK);
            let bytes = buffer
                .get_mut(..n as usize * RECORD)
                .context("chunk size")?;
            self.file
                .read_exact_at(bytes, self.offset_of(index))
                .context("read")?;
            hash.update(bytes);
            self.chunks.push(ChunkInfo {
                hash: xxh3_64(bytes),
                addr: u64_at(bytes, 0)?,
            });
            for r in bytes.chunks_exact(RECORD) {
                if left == 0 {
                    let next = spaces.next().context("it has blocks of no space")?;
                    (left, end, space) = (next.count, 0, next.space);
                    ranges = allowed.get(&space).with_context(|| {
                        format!("it has pages of space {space}, which nothing uses")
                    })?;
                }
                left -= 1;
                let block = Block::decode(r, self.pages_len)?;
                ensure!(
                    block.addr >= end,
                    "the blocks of space {space} overlap or are not sorted at {:#x}",
                    block.addr
                );
                end = block.end();
                while let [(_, range_end), rest @ ..] = ranges
                    && *range_end <= block.addr
                {
                    ranges = rest;
                }
                ensure!(
                    ranges
                        .first()
                        .is_some_and(|(a, b)| *a <= block.addr && block.end() <= *b),
                    "page {:#x} of space {space} belongs to no mapping",
                    block.addr
                );
                stored = stored.saturating_add(u64::from(block.stored));
                self.pages += u64::from(block.pages);
            }
            index += n;
        }
        ensure!(
            stored == self.pages_len,
            "its blocks have {stored} bytes together, `pages` has {}",
            self.pages_len
        );
        Ok(())
    }

    fn offset_of(&self, index: u64) -> u64 {
        (HEADER + self.spaces.len() * SPACE) as u64 + index * RECORD as u64
    }

    /// Blocks of all spaces.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Pages of all blocks.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub fn spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.spaces.iter().map(|s| s.space)
    }

    fn chunk(&self, number: u64) -> Result<Arc<Chunk>> {
        let slot = self
            .cache
            .get(number as usize % CACHED)
            .context("cache slot")?;
        if let Some((n, chunk)) = &*lock(slot)
            && *n == number
        {
            return Ok(chunk.clone());
        }
        let info = self
            .chunks
            .get(number as usize)
            .context("chunk of records out of range")?;
        let first = number * CHUNK;
        let n = (self.total - first).min(CHUNK) as usize;
        let mut bytes = vec![0; n * RECORD];
        self.file
            .read_exact_at(&mut bytes, self.offset_of(first))
            .context("read: pagemap")?;
        ensure!(
            xxh3_64(&bytes) == info.hash,
            "pagemap changed while it was in use"
        );
        let chunk: Chunk = bytes
            .chunks_exact(RECORD)
            .map(|r| Block::decode(r, self.pages_len))
            .collect::<Result<_>>()?;
        let chunk = Arc::new(chunk);
        *lock(slot) = Some((number, chunk.clone()));
        Ok(chunk)
    }

    fn block(&self, index: u64) -> Result<Block> {
        let chunk = self.chunk(index / CHUNK)?;
        chunk
            .get((index % CHUNK) as usize)
            .copied()
            .context("record out of range")
    }

    /// Number of the first record in `space` whose block ends behind `addr`, and the number behind the
    /// space's last; equal if there is none.
    fn seek(&self, space: SpaceId, addr: u64) -> Result<(u64, u64)> {
        let Ok(i) = self.spaces.binary_search_by_key(&space, |s| s.space) else {
            return Ok((0, 0));
        };
        let Some(s) = self.spaces.get(i) else {
            return Ok((0, 0));
        };
        let end = s.first + s.count;
        // Chunks whose first record belongs to this space, and of these the last that begins at or before addr.
        let from = s.first.div_ceil(CHUNK);
        let to = end.div_ceil(CHUNK).max(from);
        let inside = self
            .chunks
            .get(from as usize..to as usize)
            .unwrap_or_default();
        let below = inside.partition_point(|c| c.addr <= addr) as u64;
        let low = if below == 0 {
            s.first
        } else {
            (from + below - 1) * CHUNK
        };
        let high = ((from + below) * CHUNK).clamp(low, end);
        if low >= end {
            return Ok((end, end));
        }
        let chunk = self.chunk(low / CHUNK)?;
        let at = (low % CHUNK) as usize;
        let records = chunk
            .get(at..at + (high - low) as usize)
            .context("records out of range")?;
        Ok((
            low + records.partition_point(|b| b.end() <= addr) as u64,
            end,
        ))
    }

    /// The block with the page at `addr`, if it is stored.
    pub fn find(&self, space: SpaceId, addr: u64) -> Result<Option<Block>> {
        let (index, end) = self.seek(space, addr)?;
        if index >= end {
            return Ok(None);
        }
        let block = self.block(index)?;
        Ok((block.addr <= addr && addr < block.end()).then_some(block))
    }

    /// Blocks with pages in start..end, in order of their addresses.
    pub fn blocks(&self, space: SpaceId, start: u64, end: u64) -> Blocks<'_> {
        match self.seek(space, start) {
            Ok((next, last)) => Blocks {
                map: self,
                chunk: None,
                next,
                last,
                below: end,
                error: None,
            },
            Err(e) => Blocks {
                map: self,
                chunk: None,
                next: 0,
                last: 0,
                below: 0,
                error: Some(e),
            },
        }
    }
}

/// Iterator over blocks of a space, in order of their addresses.
pub struct Blocks<'a> {
    map: &'a Pagemap,
    chunk: Option<(u64, Arc<Chunk>)>,
    next: u64,
    last: u64,
    below: u64,
    error: Option<anyhow::Error>,
}

impl Blocks<'_> {
    fn get(&mut self, index: u64) -> Result<Block> {
        let number = index / CHUNK;
        if self.chunk.as_ref().is_none_or(|(n, _)| *n != number) {
            self.chunk = Some((number, self.map.chunk(number)?));
        }
        self.chunk
            .as_ref()
            .and_then(|(_, c)| c.get((index % CHUNK) as usize).copied())
            .context("record out of range")
    }
}

impl Iterator for Blocks<'_> {
    type Item = Result<Block>;

    fn next(&mut self) -> Option<Result<Block>> {
        if let Some(e) = self.error.take() {
            return Some(Err(e));
        }
        if self.next >= self.last {
            return None;
        }
        match self.get(self.next) {
            Ok(block) if block.addr < self.below => {
                self.next += 1;
                Some(Ok(block))
            }
            Ok(_) => {
                self.next = self.last;
                None
            }
            Err(e) => {
                self.next = self.last;
                Some(Err(e))
            }
        }
    }
}

fn read_spaces(table: &[u8], total: u64) -> Result<Vec<Space>> {
    let mut spaces: Vec<Space> = Vec::with_capacity(table.len() / SPACE);
    let mut first = 0u64;
    for s in table.chunks_exact(SPACE) {
        let space = Space {
            space: u32_at(s, 0)?,
            first: u64_at(s, 8)?,
            count: u64_at(s, 16)?,
        };
        ensure!(
            u32_at(s, 4)? == 0
                && space.first == first
                && space.count > 0
                && spaces.last().is_none_or(|last| last.space < space.space),
            "its table of spaces is malformed at space {}",
            space.space
        );
        first = first
            .checked_add(space.count)
            .filter(|n| *n <= total)
            .with_context(|| format!("space {} has more blocks than there are", space.space))?;
        spaces.push(space);
    }
    ensure!(
        first == total,
        "its spaces have {first} blocks together instead of {total}"
    );
    Ok(spaces)
}
