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

mod map;
mod sort;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};

pub use map::Blocks;
pub(super) use map::Pagemap;
pub(super) use sort::Sorter;

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

/// Follows the blocks of a pagemap in their order, and checks that each is where it may be.
struct Walk<'a> {
    /// Ranges of addresses that each space may have pages in, sorted and without overlaps.
    allowed: &'a BTreeMap<SpaceId, Vec<(u64, u64)>>,
    space: SpaceId,
    /// End of the last block.
    end: u64,
    /// Ranges of the space that do not lie behind.
    ranges: &'a [(u64, u64)],
}

impl<'a> Walk<'a> {
    fn new(allowed: &'a BTreeMap<SpaceId, Vec<(u64, u64)>>) -> Self {
        Self {
            allowed,
            space: 0,
            end: 0,
            ranges: &[],
        }
    }

    /// Goes on with another space.
    fn enter(&mut self, space: SpaceId) -> Result<()> {
        let ranges = self.allowed.get(&space);
        self.ranges =
            ranges.with_context(|| format!("it has pages of space {space}, which nothing uses"))?;
        (self.space, self.end) = (space, 0);
        Ok(())
    }

    fn block(&mut self, block: &Block) -> Result<()> {
        let (addr, space) = (block.addr, self.space);
        ensure!(
            addr >= self.end,
            "page {addr:#x} of space {space} is there twice, or blocks are not sorted"
        );
        self.end = block.end();
        while let [(_, end), rest @ ..] = self.ranges
            && *end <= addr
        {
            self.ranges = rest;
        }
        ensure!(
            self.ranges
                .first()
                .is_some_and(|(start, end)| *start <= addr && block.end() <= *end),
            "page {addr:#x} of space {space} belongs to no mapping"
        );
        Ok(())
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
