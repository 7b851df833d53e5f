//! Reading a pagemap: all of it is checked once, then chunks are read when they are asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use twox_hash::XxHash3_64;

use super::{
    BLOCK, Block, HEADER, MAGIC, PAGE, RECORD, SPACE, VERSION, Walk, lock, u32_at, u64_at,
};
use crate::image::memory::SpaceId;

/// Records in a chunk: what the reader reads, checks and caches at a time (32 KiB).
const CHUNK: u64 = 1024;
/// Chunks the reader keeps for `find`.
const CACHED: usize = 64;
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
pub struct Pagemap {
    file: File,
    spaces: Vec<Space>,
    total: u64,
    pages_len: u64,
    unused: u64,
    chunks: Vec<ChunkInfo>,
    cache: Vec<Slot>,
    /// Pages of blocks, all together.
    pages: u64,
}

type Chunk = Vec<Block>;
/// A chunk that was read, with its number.
type Slot = Mutex<Option<(u64, Arc<Chunk>)>>;

impl Pagemap {
    /// What it reads.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

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
                .get(48..)
                .is_some_and(|rest| rest.iter().all(|b| *b == 0)),
            "its header has something in reserved bytes"
        );
        ensure!(
            u64_at(&header, 32)? == pages_len,
            "`pages` has {pages_len} bytes instead of {}",
            u64_at(&header, 32)?
        );
        let unused = u64_at(&header, 40)?;
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
            unused,
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
        let mut walk = Walk::new(allowed);
        // Records left in the current space.
        let mut left = 0;
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
                hash: XxHash3_64::oneshot(bytes),
                addr: u64_at(bytes, 0)?,
            });
            for r in bytes.chunks_exact(RECORD) {
                if left == 0 {
                    let next = spaces.next().context("it has blocks of no space")?;
                    left = next.count;
                    walk.enter(next.space)?;
                }
                left -= 1;
                let block = Block::decode(r, self.pages_len)?;
                walk.block(&block)?;
                stored = stored.saturating_add(u64::from(block.stored));
                self.pages += u64::from(block.pages);
            }
            index += n;
        }
        ensure!(
            stored.checked_add(self.unused) == Some(self.pages_len),
            "its blocks have {stored} bytes together and {} are unused, `pages` has {}",
            self.unused,
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
            XxHash3_64::oneshot(&bytes) == info.hash,
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
