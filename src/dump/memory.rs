//! Memory into the image: which pages, read from where, by two threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;

use super::Sink;
use super::tables::Content;
use crate::image::memory::{Backing, SharedMemory, SpaceId, Vma};
use crate::kernel::arch::PAGE;
use crate::kernel::maps;
use crate::kernel::mem::Mem;
use crate::kernel::pagemap::Pagemap;

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

/// A process to read from, and the mappings to read.
pub struct Source<'a> {
    /// The process, or its copy.
    pub pid: i32,
    pub space: SpaceId,
    pub vmas: Vec<&'a Vma>,
}

/// True when a mapping's pages are in the process's own part of the image.
pub fn is_private(v: &Vma) -> bool {
    !v.shared && !v.is_kernel()
}

/// Copies the private pages of all sources. Returns the bytes looked at.
pub fn copy(sources: &[Source], sink: &dyn Sink, bar: &ProgressBar) -> Result<u64> {
    if sources.iter().all(|s| s.vmas.is_empty()) {
        // Mostly so while a process stands: no threads for nothing.
        return Ok(0);
    }
    let (send, receive) = mpsc::sync_channel::<Piece>(64);
    let receive = Mutex::new(receive);
    let (total, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            let mut buffer = vec![0u8; STEP as usize];
            let mut result = Ok(());
            loop {
                let next = receive
                    .lock()
                    .map_err(|_| anyhow!("a copying thread panicked"))?
                    .recv();
                let Ok(piece) = next else { return result };
                // After an error pieces are only taken, so that nobody waits for ever to give one.
                if failed.load(Ordering::Relaxed) {
                    continue;
                }
                result = piece.copy(sink, &mut buffer, &mut |n| {
                    total.fetch_add(n, Ordering::Relaxed);
                    bar.inc(n);
                });
                if result.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        let sent = scan(sources, &send);
        drop(send);
        let mut result = Ok(());
        for w in workers {
            let r = w
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a copying thread panicked")));
            result = result.and(r);
        }
        result.and(sent)
    })?;
    Ok(total.into_inner())
}

/// Gives pages to the workers.
fn scan(sources: &[Source], send: &mpsc::SyncSender<Piece>) -> Result<()> {
    for s in sources {
        let pagemap = Pagemap::open(s.pid)?;
        let mem = Arc::new(Mem::open(s.pid)?);
        for v in s.vmas.iter().filter(|v| is_private(v)) {
            pagemap.private(v.start, v.end, &mut |start, end| {
                for at in (start - start % PIECE..end).step_by(PIECE as usize) {
                    let piece = Piece {
                        space: s.space,
                        start: at.max(start),
                        end: (at + PIECE).min(end),
                        over: v.backing != Backing::Anonymous,
                        mem: Arc::clone(&mem),
                    };
                    send.send(piece)
                        .map_err(|_| anyhow!("the copying threads have ended"))?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Copies mappings whose content a clone does not have. The process stands still meanwhile.
pub fn copy_stopped(pid: i32, space: SpaceId, vmas: &[&Vma], sink: &dyn Sink) -> Result<u64> {
    let source = Source {
        pid,
        space,
        vmas: vmas.to_vec(),
    };
    copy(&[source], sink, &ProgressBar::hidden())
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
        if !starts.contains(&v.start) || v.has("ht") {
            all.push(v);
        } else if v.backing == Backing::Anonymous
            && let Some(first) = ours.first_private(v.start, v.end)?
            && theirs.first_private(first, first + PAGE)?.is_none()
        {
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
    let mut buffer = vec![0u8; PIECE as usize];
    let mut total = 0;
    for c in contents {
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
