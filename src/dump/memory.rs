//! Memory into the image: which pages, read from where, by two threads.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;

use super::Sink;
use super::tables::Content;
use crate::image::memory::{Backing, SharedMemory, SpaceId, Vma};
use crate::kernel::arch::PAGE;
use crate::kernel::buffer::Buffer;
use crate::kernel::maps;
use crate::kernel::mem::Mem;
use crate::kernel::pagemap::{Behind, Pagemap};

/// Bytes that a thread takes at a time, beginning at a multiple of it: what one page of page tables maps, and so
/// what one lock covers.
const PIECE: u64 = 2 << 20;
/// Bytes read and written at once.
const STEP: u64 = 1 << 20;
const WORKERS: usize = 2;

/// A run of pages to copy.
///
/// They are read through /proc/PID/mem. process_vm_readv(2) pins what it reads, and pages that are shared with
/// another process by fork are first copied for that (mm/gup.c, gup_must_unshare): it would give the snapshot
/// all of the memory that copy-on-write has saved.
struct Piece {
    space: SpaceId,
    start: u64,
    end: u64,
    /// Behind it is a file, not nothing.
    over: bool,
    mem: Arc<Mem>,
}

impl Piece {
    fn copy(&self, sink: &dyn Sink, buffer: &mut [u8], done: &mut dyn FnMut(u64)) -> Result<()> {
        for at in (self.start..self.end).step_by(STEP as usize) {
            let out = &mut buffer[..STEP.min(self.end - at) as usize];
            self.mem.read(at, out)?;
            if self.over {
                sink.put_over(self.space, at, out)?;
            } else {
                sink.put(self.space, at, out)?;
            }
            done(out.len() as u64);
        }
        Ok(())
    }
}

/// A process to read from, and what of it.
pub struct Source {
    /// The process, or its copy.
    pid: i32,
    space: SpaceId,
    ranges: Vec<Range>,
}

/// A mapping to read.
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    end: u64,
    behind: Behind,
}

impl Source {
    /// Of these mappings those that have pages in the process's own part of the image.
    pub fn new<'a>(pid: i32, space: SpaceId, vmas: impl Iterator<Item = &'a Vma>) -> Self {
        let range = |v: &Vma| Range {
            start: v.start,
            end: v.end,
            behind: match v.backing {
                Backing::Anonymous => Behind::Nothing,
                _ => Behind::File,
            },
        };
        let ranges = vmas.filter(|v| is_private(v)).map(range).collect();
        Self { pid, space, ranges }
    }
}

/// True when a mapping's pages are in the process's own part of the image.
pub fn is_private(v: &Vma) -> bool {
    !v.shared && !v.is_kernel()
}

/// Copies the private pages of all sources, and calls `meanwhile` in this thread. Returns the bytes looked at.
pub fn copy(
    sources: Vec<Source>,
    sink: &dyn Sink,
    bar: &ProgressBar,
    meanwhile: &mut dyn FnMut() -> Result<()>,
) -> Result<u64> {
    if sources.iter().all(|s| s.ranges.is_empty()) {
        // Mostly so while a process stands: no threads for nothing.
        meanwhile()?;
        return Ok(0);
    }
    let pieces = Mutex::new(Pieces::new(sources));
    let (total, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let panicked = || anyhow!("a copying thread panicked");
    thread::scope(|scope| {
        let work = || -> Result<()> {
            let mut buffer = Buffer::new(STEP as usize);
            while !failed.load(Ordering::Relaxed) {
                let next = pieces.lock().map_err(|_| panicked())?.next();
                let copied = next.and_then(|piece| {
                    let Some(piece) = piece else { return Ok(false) };
                    piece.copy(sink, &mut buffer, &mut |n| {
                        total.fetch_add(n, Ordering::Relaxed);
                        bar.inc(n);
                    })?;
                    Ok(true)
                });
                match copied {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(e) => {
                        failed.store(true, Ordering::Relaxed);
                        return Err(e);
                    }
                }
            }
            Ok(())
        };
        // As many as there may be.
        let worker = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let workers: Vec<_> = (0..WORKERS).filter_map(worker).collect();
        let mut result = meanwhile();
        if workers.is_empty() {
            result = result.and_then(|()| work());
        }
        if result.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        for w in workers {
            result = result.and(w.join().unwrap_or_else(|_| Err(panicked())));
        }
        result
    })?;
    Ok(total.into_inner())
}

/// What is to be copied, found as it is asked for.
struct Pieces {
    sources: std::vec::IntoIter<Source>,
    open: Option<Opened>,
    found: VecDeque<Piece>,
}

/// A source, and how far it has been looked at.
struct Opened {
    space: SpaceId,
    pagemap: Pagemap,
    mem: Arc<Mem>,
    ranges: std::vec::IntoIter<Range>,
    now: Option<Range>,
}

impl Pieces {
    fn new(sources: Vec<Source>) -> Self {
        Self {
            sources: sources.into_iter(),
            open: None,
            found: VecDeque::new(),
        }
    }

    fn next(&mut self) -> Result<Option<Piece>> {
        while self.found.is_empty() {
            let Some(open) = &mut self.open else {
                let Some(s) = self.sources.next() else {
                    return Ok(None);
                };
                self.open = Some(Opened {
                    space: s.space,
                    pagemap: Pagemap::open(s.pid)?,
                    mem: Arc::new(Mem::open(s.pid)?),
                    ranges: s.ranges.into_iter(),
                    now: None,
                });
                continue;
            };
            let Some(range) = open.now.take().or_else(|| open.ranges.next()) else {
                self.open = None;
                continue;
            };
            let Range { start, end, behind } = range;
            let (found, space, mem) = (&mut self.found, open.space, &open.mem);
            let seen = open
                .pagemap
                .some_private(start, end, behind, &mut |from, to| {
                    for at in (from - from % PIECE..to).step_by(PIECE as usize) {
                        found.push_back(Piece {
                            space,
                            start: at.max(from),
                            end: (at + PIECE).min(to),
                            over: behind == Behind::File,
                            mem: Arc::clone(mem),
                        });
                    }
                })?;
            if seen < end {
                open.now = Some(Range {
                    start: seen,
                    ..range
                });
            }
        }
        Ok(self.found.pop_front())
    }
}

/// Copies mappings whose content a clone does not have. The process stands still meanwhile.
pub fn copy_stopped(pid: i32, space: SpaceId, vmas: &[&Vma], sink: &dyn Sink) -> Result<u64> {
    let source = Source::new(pid, space, vmas.iter().copied());
    copy(vec![source], sink, &ProgressBar::hidden(), &mut || Ok(()))
}

/// Anonymous mappings that hold something in `pid` and nothing in its copy (MADV_WIPEONFORK), that the
/// copy has not at all (MADV_DONTFORK), or that a fork shares pages of at a price (huge TLB pages).
pub fn not_copied(pid: i32, copy: i32, vmas: &[Vma]) -> Result<Vec<&Vma>> {
    let there = maps::read(copy)
        .with_context(|| format!("reading mappings of the copy of process {pid}"))?;
    let starts: std::collections::HashSet<u64> = there.iter().map(|m| m.start).collect();
    let (ours, theirs) = (Pagemap::open(pid)?, Pagemap::open(copy)?);
    let mut all = Vec::new();
    for v in vmas.iter().filter(|v| is_private(v)) {
        let lacks_pages = || {
            // In this order: nearly always the copy has some, which is the answer.
            Ok::<_, anyhow::Error>(
                v.backing == Backing::Anonymous
                    && theirs.first_private(v.start, v.end)?.is_none()
                    && ours.first_private(v.start, v.end)?.is_some(),
            )
        };
        if !starts.contains(&v.start) || v.has("ht") || lacks_pages()? {
            all.push(v);
        }
    }
    Ok(all)
}

/// Copies objects of shared memory, holes left out. The processes stand still meanwhile.
pub fn copy_contents(
    contents: &[Content],
    shared: &[SharedMemory],
    sink: &dyn Sink,
) -> Result<u64> {
    let mut buffer = Buffer::default();
    let mut total = 0;
    for c in contents {
        buffer.resize(PIECE as usize);
        let Some(object) = shared.get(c.memory as usize) else {
            continue;
        };
        let mut at = 0;
        while at < object.size {
            let Some((start, end)) = next_data(&c.file, at, object.size)? else {
                break;
            };
            let mut from = start - start % PAGE;
            while from < end {
                let len = (end - from).min(PIECE) as usize;
                let padded = len.next_multiple_of(PAGE as usize);
                let out = &mut buffer[..padded];
                out[len..].fill(0);
                c.file
                    .read_exact_at(&mut out[..len], from)
                    .with_context(|| format!("reading shared memory object {}", c.memory))?;
                sink.put(object.space, from, out)?;
                total += len as u64;
                from += len as u64;
            }
            at = end;
        }
    }
    Ok(total)
}

/// Guard pages of every anonymous mapping.
pub fn add_guards(of: i32, vmas: &mut [Vma]) -> Result<()> {
    let pagemap = Pagemap::open(of)?;
    for v in vmas.iter_mut().filter(|v| !v.is_kernel() && !v.has("ht")) {
        let mut guards = Vec::new();
        pagemap.guards(v.start, v.end, &mut |start, end| {
            guards.push((start, end));
            Ok(())
        })?;
        v.guards = guards;
    }
    Ok(())
}

/// The next run of bytes at or after `from` that is not a hole; None when there is none before `size`.
fn next_data(file: &File, from: u64, size: u64) -> Result<Option<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    let start = match lseek(file, from as i64, Whence::SeekData) {
        Ok(at) => at as u64,
        Err(nix::errno::Errno::ENXIO) => return Ok(None),
        // A file system that knows no holes.
        Err(_) => return Ok((from < size).then_some((from, size))),
    };
    let end = lseek(file, start as i64, Whence::SeekHole).map_or(size, |at| at as u64);
    Ok((start < size).then_some((start, end.min(size))))
}
