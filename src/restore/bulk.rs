//! Large memory, filled by the first body itself before we take it in hand.
//!
//! Giving pages to another process costs one copy more, and gives it small pages only. So the body, as long as
//! it still is a fork of us, maps what it will need at its place and fills it: each huge page is read and checked
//! in a stage and moved to its place (UFFDIO_MOVE), which leaves no mark on the mapping as MADV_HUGEPAGE would.
//! What cannot be done this way is left to the usual one ([`super::memory::fill`]), errors too. What has been placed
//! before there was a tracer ([`Placed`]) is there already.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};

use super::memory::{by_uffd, joins, put, share, windows};
use super::placed::Placed;
use crate::image::memory::Vma;
use crate::image::process::Process;
use crate::image::store::Image;
use crate::kernel::mem::{HUGE, Stage, map_fixed, unmap_fixed};
use crate::kernel::uffd::Uffd;

/// Mappings smaller than this are not worth the trouble.
const LARGE: u64 = 16 << 20;
/// Most mappings that are told of: what is written stays within a pipe's size.
const MOST: usize = 1024;
/// Bytes read and checked at once: they stay in a second-level cache meanwhile.
const PIECE: usize = 256 << 10;

/// What the first body fills, and what it has filled.
pub struct Bulk {
    image: Arc<Image>,
    wanted: bool,
    placed: Placed,
    filled: Vec<(u64, u64)>,
    bytes: u64,
}

/// From the body to us.
pub struct Pipe {
    read: Option<File>,
    write: Option<File>,
}

impl Bulk {
    /// `placed`: this is in the first body already, and no more is wanted.
    pub fn new(image: Arc<Image>, wanted: bool, placed: Placed) -> Self {
        Self {
            image,
            wanted: wanted && placed.mappings.is_empty(),
            placed,
            filled: Vec::new(),
            bytes: 0,
        }
    }

    /// Bytes filled.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Ranges of `p` that its body has mapped, readable and writable, and filled.
    pub fn filled(&self, p: &Process) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.is_first(p);
        self.filled.iter().copied().filter(move |_| first)
    }

    /// Whether the body of `p` has mapped and filled this mapping.
    pub fn has(&self, p: &Process, v: &Vma) -> bool {
        self.is_first(p) && self.filled.binary_search(&(v.start, v.end)).is_ok()
    }

    fn is_first(&self, p: &Process) -> bool {
        let first = self.image.manifest.processes.first();
        first.is_some_and(|f| f.pid == p.pid)
    }

    /// None when there is nothing to fill.
    pub fn pipe(&self) -> Result<Pipe> {
        if self.candidates().next().is_none() && self.placed.mappings.is_empty() {
            return Ok(Pipe {
                read: None,
                write: None,
            });
        }
        let (read, write) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("making a pipe")?;
        Ok(Pipe {
            read: Some(read.into()),
            write: Some(write.into()),
        })
    }

    /// Mappings to fill, those together that join: children of the first body would begin as copies of it, so it has to be
    /// the only one.
    fn candidates(&self) -> impl Iterator<Item = &[Vma]> {
        let processes = &self.image.manifest.processes;
        let only = processes
            .first()
            .filter(|p| self.wanted && processes.len() == 1 && !p.thp_disable);
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        let fits = |v: &Vma| by_uffd(v) && !["gd", "nh", "wf"].iter().any(|code| v.has(code));
        let mut left = MOST;
        only.into_iter()
            .flat_map(move |p| {
                p.vmas
                    .chunk_by(move |a, b| joins(a, b) && fits(a) == fits(b))
            })
            .filter(move |vmas| vmas.iter().all(fits))
            .filter(|vmas| vmas.len() > 1 || vmas.iter().all(|v| v.prot == RW))
            .filter(|vmas| vmas.iter().map(Vma::len).sum::<u64>() >= LARGE)
            .take_while(move |vmas| {
                let fit = vmas.len() <= left;
                left = left.saturating_sub(vmas.len());
                fit
            })
    }

    /// In the body: fills, and tells what.
    pub fn fill(&mut self, pipe: &mut Pipe) {
        pipe.read = None;
        let Some(mut write) = pipe.write.take() else {
            return;
        };
        if !self.placed.mappings.is_empty() {
            // Who hears nothing gives up.
            if self.placed.share().is_ok() {
                tell(&mut write, self.placed.bytes, &self.placed.mappings);
            }
            return;
        }
        let space = self.image.manifest.processes.first().map_or(0, |p| p.space);
        let mut mapped = Vec::new();
        let mut filled = Vec::new();
        for vmas in self.candidates() {
            let Some((first, last)) = vmas.first().zip(vmas.last()) else {
                continue;
            };
            let (start, end) = (first.start, last.end);
            let flags = if first.has("nr") {
                libc::MAP_NORESERVE
            } else {
                0
            };
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            // Where we are ourselves it cannot be.
            if map_fixed(start, end - start, rw, flags).is_ok() {
                mapped.push((start, end));
                filled.extend(vmas.iter().map(|v| (v.start, v.end)));
            }
        }
        match fill(&self.image, space, &mapped) {
            Ok(bytes) => tell(&mut write, bytes, &filled),
            Err(_) => {
                // Done again the usual way, which finds the error and tells it.
                mapped.iter().for_each(|(s, e)| unmap_fixed(*s, e - s));
                tell(&mut write, 0, &[]);
            }
        }
    }

    /// In us: waits until the body has filled.
    pub fn await_filled(&mut self, mut pipe: Pipe) -> Result<()> {
        pipe.write = None;
        let Some(mut read) = pipe.read.take() else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        read.read_to_end(&mut bytes)
            .context("waiting for the new process to fill its memory")?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
            .collect();
        let (first, rest) = words
            .split_first()
            .context("the new process ended while it filled its memory")?;
        self.bytes = *first;
        self.filled = rest
            .chunks_exact(2)
            .filter_map(|c| Some((*c.first()?, *c.last()?)))
            .collect();
        self.filled.sort_unstable();
        Ok(())
    }
}

/// To us, from the body.
fn tell(write: &mut File, bytes: u64, filled: &[(u64, u64)]) {
    let ranges = filled.iter().flat_map(|(start, end)| [*start, *end]);
    let words = std::iter::once(bytes).chain(ranges);
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    // Whoever is gone needs no answer.
    let _ = write.write_all(&bytes);
}

/// Fills ranges of our own memory. Bytes filled.
fn fill(image: &Image, space: u32, ranges: &[(u64, u64)]) -> Result<u64> {
    if ranges.is_empty() {
        return Ok(0);
    }
    let uffd = Uffd::ours().context("userfaultfd")?;
    uffd.api(0)?;
    for (start, end) in ranges {
        uffd.register_missing(*start, end - start)?;
    }
    let bytes = AtomicU64::new(0);
    let windows = ranges.iter().flat_map(|(start, end)| windows(*start, *end));
    share(windows, &|next| {
        let mut worker = Worker::new(image, space, &uffd)?;
        while let Some((start, end)) = next()? {
            bytes.fetch_add(worker.window(start, end)?, Ordering::Relaxed);
        }
        Ok(())
    })?;
    for (start, end) in ranges {
        uffd.unregister(*start, end - start)?;
    }
    Ok(bytes.into_inner())
}

struct Worker<'a> {
    image: &'a Image,
    space: u32,
    uffd: &'a Uffd,
    stage: Stage,
    /// Huge pages can be moved: false after the first refusal.
    moves: bool,
    scratch: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(image: &'a Image, space: u32, uffd: &'a Uffd) -> Result<Self> {
        Ok(Self {
            image,
            space,
            uffd,
            stage: Stage::new().context("mmap")?,
            moves: true,
            scratch: Vec::new(),
        })
    }

    /// Fills what lies within one huge page. Bytes filled.
    fn window(&mut self, start: u64, end: u64) -> Result<u64> {
        let pages = self.image.pages();
        let runs = pages
            .runs(self.space, start, end, PIECE)
            .collect::<Result<Vec<_>>>()?;
        let bytes: u64 = runs.iter().map(|r| r.bytes() as u64).sum();
        let inside = runs
            .iter()
            .all(|r| r.addr() >= start && r.addr() + r.bytes() as u64 <= end);
        ensure!(inside, "pages beyond a mapping");
        let whole = bytes == HUGE && self.moves;
        for run in &runs {
            // A stage that is moved away as a whole, or one piece at its beginning.
            let at = if whole { run.addr() - start } else { 0 } as usize;
            let out = self
                .stage
                .bytes()
                .get_mut(at..at + run.bytes())
                .context("a run is too long")?;
            pages.read_run(run, out, &mut self.scratch)?;
            if !whole {
                put(self.uffd, run.addr(), out)?;
            }
        }
        if whole && self.uffd.take(start, &mut self.stage).is_err() {
            // Should some of it have been moved, this fails, and all is done the usual way.
            self.moves = false;
            for run in &runs {
                let out = self
                    .stage
                    .bytes()
                    .get_mut(..run.bytes())
                    .context("a run is too long")?;
                pages.read_run(run, out, &mut self.scratch)?;
                put(self.uffd, run.addr(), out)?;
            }
        }
        Ok(bytes)
    }
}
