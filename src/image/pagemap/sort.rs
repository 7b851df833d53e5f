//! Writing a pagemap: blocks come in any order and are sorted in bounded memory.

use std::collections::{BTreeMap, BinaryHeap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};

use super::{BLOCK, Block, HEADER, MAGIC, PAGE, RECORD, VERSION, Walk, u32_at};
use crate::image::memory::SpaceId;

/// Records the writer sorts in memory before it spills them (some 4 MiB).
const SORT_IN_MEMORY: usize = 96 * 1024;
/// Bytes of buffers for merging spilled runs, together.
const MERGE_BUFFERS: usize = 4 << 20;

const UNSOUND: &str = "the image would not be sound";

/// Collects blocks in any order and writes them sorted, in bounded memory.
#[derive(Default)]
pub struct Sorter {
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

    /// Writes the whole pagemap to `file`, and checks what a reader will check; returns its length and its BLAKE3
    /// hash. `unused`: bytes of `pages` that belong to no block.
    pub fn write(
        mut self,
        file: &File,
        pages_len: u64,
        unused: u64,
        allowed: &BTreeMap<SpaceId, Vec<(u64, u64)>>,
    ) -> Result<(u64, blake3::Hash)> {
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
        header[40..48].copy_from_slice(&unused.to_le_bytes());
        out.put(&header)?;
        let mut first = 0u64;
        for (space, count) in &self.count {
            out.put(&space.to_le_bytes())?;
            out.put(&[0; 4])?;
            out.put(&first.to_le_bytes())?;
            out.put(&count.to_le_bytes())?;
            first += count;
        }

        let mut walk = Walk::new(allowed);
        let mut current = None;
        let mut emit = |space: SpaceId, block: Block| -> Result<()> {
            if current != Some(space) {
                walk.enter(space).context(UNSOUND)?;
                current = Some(space);
            }
            walk.block(&block).context(UNSOUND)?;
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
