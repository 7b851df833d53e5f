//! Reading `pages`: each block is checked against the pagemap's checksum before it is used.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use twox_hash::XxHash3_64;

use crate::image::memory::SpaceId;
use crate::image::pagemap::{Block, Blocks, Codec, Pagemap};
use crate::image::store::damaged;

/// Reads pages. Threads share it.
pub struct PagesReader {
    file: File,
    map: Pagemap,
}

/// Blocks that are adjacent in memory and in the file: one read gets them all.
#[derive(Debug, Clone, Default)]
pub struct Run {
    blocks: Vec<Block>,
}

impl Run {
    /// Address of the first page.
    pub fn addr(&self) -> u64 {
        self.blocks.first().map_or(0, |b| b.addr)
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(Block::bytes).sum()
    }

    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Whether all of it is zero and nothing needs to be read.
    pub fn is_zero(&self) -> bool {
        self.blocks.iter().all(|b| b.codec == Codec::Zero)
    }
}

impl PagesReader {
    pub(in crate::image) fn new(file: File, map: Pagemap) -> Self {
        Self { file, map }
    }

    /// What it has open: all it needs from here on.
    pub fn open_files(&self) -> [BorrowedFd<'_>; 2] {
        [self.file.as_fd(), self.map.file()]
    }

    /// Spaces that have stored pages.
    pub fn spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.map.spaces()
    }

    /// Pages that are stored or recorded as zero, in all spaces.
    pub fn pages(&self) -> u64 {
        self.map.pages()
    }

    /// Number of blocks in all spaces.
    pub fn block_count(&self) -> u64 {
        self.map.total()
    }

    /// All blocks of a space in order of their addresses, which do not overlap. A space without pages gives
    /// an empty iterator.
    pub fn blocks(&self, space: SpaceId) -> Blocks<'_> {
        self.map.blocks(space, 0, u64::MAX)
    }

    /// Blocks that have pages in start..end. A block at the borders may reach beyond them, unless they are
    /// multiples of [`BLOCK`], which no block crosses.
    pub fn blocks_in(&self, space: SpaceId, start: u64, end: u64) -> Blocks<'_> {
        self.map.blocks(space, start, end)
    }

    /// The blocks of `blocks_in`, gathered into runs of at most `max` bytes (at least one block) that
    /// `read_run` reads at once.
    pub fn runs(&self, space: SpaceId, start: u64, end: u64, max: usize) -> Runs<'_> {
        Runs {
            blocks: self.map.blocks(space, start, end),
            ahead: None,
            max,
        }
    }

    /// The block with the page at `addr`; none means that the page is what it was before: zero, or the file's.
    ///
    /// # Errors
    /// When the pagemap cannot be read or has changed.
    pub fn find(&self, space: SpaceId, addr: u64) -> Result<Option<Block>> {
        self.map.find(space, addr)
    }

    /// Reads one block into the beginning of `out`, which has room for its bytes, and checks it.
    ///
    /// # Errors
    /// When the bytes are not those that were stored.
    pub fn read(&self, block: &Block, out: &mut [u8]) -> Result<()> {
        self.read_blocks(std::slice::from_ref(block), out, &mut Vec::new())
            .map_err(damaged)
    }

    /// Reads a run into the beginning of `out` with one read, and checks each block of it. `scratch` holds
    /// compressed bytes on their way and may be used again.
    ///
    /// # Errors
    /// When the bytes are not those that were stored; `out` is then not to be used.
    pub fn read_run(&self, run: &Run, out: &mut [u8], scratch: &mut Vec<u8>) -> Result<()> {
        self.read_blocks(&run.blocks, out, scratch).map_err(damaged)
    }

    fn read_blocks(&self, blocks: &[Block], out: &mut [u8], scratch: &mut Vec<u8>) -> Result<()> {
        let Some(first) = blocks.first() else {
            return Ok(());
        };
        let bytes: usize = blocks.iter().map(Block::bytes).sum();
        let have = out.len();
        let out = out
            .get_mut(..bytes)
            .with_context(|| format!("{have} bytes of room for {bytes} bytes of pages"))?;
        let offset = blocks
            .iter()
            .find(|b| b.codec != Codec::Zero)
            .map_or(0, |b| b.offset);
        let read = |into: &mut [u8]| {
            self.file
                .read_exact_at(into, offset)
                .with_context(|| format!("read: `pages` at {offset} for address {:#x}", first.addr))
        };
        if blocks.iter().all(|b| b.codec == Codec::Raw) {
            read(out)?;
            let mut rest = &*out;
            for block in blocks {
                let (data, after) = rest
                    .split_at_checked(block.bytes())
                    .context("run too short")?;
                check(block, data)?;
                rest = after;
            }
            return Ok(());
        }
        let stored: usize = blocks.iter().map(|b| b.stored as usize).sum();
        if scratch.len() < stored {
            scratch.resize(stored, 0);
        }
        let stored = scratch.get_mut(..stored).context("scratch too short")?;
        read(stored)?;
        let (mut rest, mut out) = (&*stored, out);
        for block in blocks {
            let (data, after) = rest
                .split_at_checked(block.stored as usize)
                .context("run too short")?;
            let (to, out_after) = std::mem::take(&mut out)
                .split_at_mut_checked(block.bytes())
                .context("run too short")?;
            if block.codec != Codec::Zero {
                check(block, data)?;
            }
            decode(block, data, to)?;
            (rest, out) = (after, out_after);
        }
        Ok(())
    }
}

fn check(block: &Block, stored: &[u8]) -> Result<()> {
    let hash = XxHash3_64::oneshot(stored);
    ensure!(
        hash == block.hash,
        "the image is damaged: memory at {:#x} has checksum {hash:#018x} instead of {:#018x}",
        block.addr,
        block.hash
    );
    Ok(())
}

fn decode(block: &Block, stored: &[u8], out: &mut [u8]) -> Result<()> {
    let n = match block.codec {
        Codec::Raw => {
            out.copy_from_slice(stored);
            Ok(out.len())
        }
        Codec::Zero => {
            out.fill(0);
            Ok(out.len())
        }
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, out).map_err(anyhow::Error::from),
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, out).map_err(anyhow::Error::from),
    };
    let n = n.with_context(|| {
        format!(
            "the image is damaged: memory at {:#x} cannot be decompressed",
            block.addr
        )
    })?;
    ensure!(
        n == out.len(),
        "the image is damaged: memory at {:#x} has {n} bytes instead of {}",
        block.addr,
        out.len()
    );
    Ok(())
}

/// Iterator of [`PagesReader::runs`].
pub struct Runs<'a> {
    blocks: Blocks<'a>,
    ahead: Option<Block>,
    max: usize,
}

impl Iterator for Runs<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        let mut run = Run::default();
        let mut bytes = 0;
        loop {
            let block = match self.ahead.take() {
                Some(block) => block,
                None => match self.blocks.next() {
                    Some(Ok(block)) => block,
                    Some(Err(e)) => return Some(Err(e)),
                    None => break,
                },
            };
            if let Some(last) = run.blocks.last() {
                // Zero blocks make runs of their own: there is nothing to read.
                let adjacent = last.end() == block.addr
                    && (last.codec == Codec::Zero) == (block.codec == Codec::Zero)
                    && (block.codec == Codec::Zero
                        || last.offset.checked_add(u64::from(last.stored)) == Some(block.offset));
                if !adjacent || bytes + block.bytes() > self.max {
                    self.ahead = Some(block);
                    break;
                }
            }
            bytes += block.bytes();
            run.blocks.push(block);
        }
        (!run.blocks.is_empty()).then_some(Ok(run))
    }
}
