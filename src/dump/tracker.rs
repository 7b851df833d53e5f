//! What changes in a process's memory while it runs, so that little is left to copy once it stands.
//!
//! A userfaultfd in WP_ASYNC mode, made inside the process and held by us alone, lets the kernel note writes. A
//! round first protects the pages that were written, then reads them: what is written from then on is in the next
//! round. In between the process stands still for a moment: a call that had its pages before (O_DIRECT, some files of
//! FUSE, process_vm_writev) writes to them past the protection, and has ended then. A mapping that is not registered
//! (new, grown, moved) is registered and read whole. It is registered while the process stands still, with all that lies
//! beside it at once: half of a mapping registered is a mapping of its own, and mremap(2) of the whole would fail.
//! Dropped, it leaves nothing behind: the last copy of the userfaultfd unregisters everything.

use anyhow::{Context, Result};

use super::hold::HeldProcess;
use super::memory::is_private;
use crate::error::Failure;
use crate::image::Vma;
use crate::image::memory::Backing;
use crate::kernel::arch::{PAGE, TASK_SIZE};
use crate::kernel::buffer::Buffer;
use crate::kernel::maps::{self, Map, Name};
use crate::kernel::mem::Mem;
use crate::kernel::pagemap::{Behind, Pagemap, Tracked};
use crate::kernel::uffd::{self, Uffd};

/// Bytes read at once, beginning at a multiple of it: they stay in a cache until they are encrypted.
const STEP: u64 = 1 << 20;

/// A run of pages: from, to (addresses).
pub type Run = (u64, u64);

/// Follows the private memory of one process.
pub struct Tracker {
    pid: i32,
    /// A thread of it that lives, through which /proc shows its memory.
    via: i32,
    mem: Mem,
    /// None where changes cannot be followed: then all memory is read in the last round, and none before.
    uffd: Option<Uffd>,
    why_not: Option<String>,
    /// Where something may have been protected and not been read then.
    owed: Vec<Run>,
    /// Mappings that could not be registered.
    unfit: Vec<Run>,
    buffer: Buffer,
}

/// What a round has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Bytes that were new or had changed.
    pub bytes: u64,
    /// Bytes of mappings that were looked through, populated or not.
    pub looked_through: u64,
}

/// Takes whole pages: address, content, of which nothing needs to stay.
pub type Take<'a> = dyn FnMut(u64, &mut [u8]) -> Result<()> + 'a;

impl Tracker {
    /// Begins to follow process `pid`, which stands still for a moment. Where the kernel cannot do it
    /// ([`Tracker::why_not`] says so) the rounds are empty.
    ///
    /// # Errors
    /// Those of [`HeldProcess::stop`]; the process runs on.
    pub fn start(pid: i32) -> Result<Self> {
        let held = HeldProcess::stop(pid)?;
        let via = held.via();
        let made = crate::kernel::lend::descriptor(
            held.leader(),
            &held.mem,
            held.tail(),
            libc::SYS_userfaultfd,
            &[uffd::UNPRIVILEGED],
        );
        let uffd = made.and_then(|fd| {
            let uffd = Uffd(fd);
            uffd.api(uffd::TRACKING)?;
            register(&uffd, via)?;
            Ok(uffd)
        });
        held.release()?;
        let (uffd, why_not) = match uffd {
            Ok(uffd) => (Some(uffd), None),
            Err(e) => (
                None,
                Some(format!(
                    "writes to the memory of process {pid} cannot be followed ({e:#}; `mistctl check` says what \
                     this kernel lacks): all of it is copied while it stands still"
                )),
            ),
        };
        Ok(Self {
            pid,
            via,
            mem: Mem::open(via)?,
            uffd,
            why_not,
            owed: Vec::new(),
            unfit: Vec::new(),
            buffer: Buffer::default(),
        })
    }

    /// Why changes cannot be followed, for people.
    pub fn why_not(&self) -> Option<&str> {
        self.why_not.as_deref()
    }

    /// Gives `take` every page that is new or has changed since the last round, while the process runs; the first
    /// round gives all.
    ///
    /// # Errors
    /// When the process has ended or executed another program, those of [`HeldProcess::stop`], and those
    /// of `take`.
    pub fn round(&mut self, take: &mut Take) -> Result<Round> {
        let mut round = Round::default();
        if self.uffd.is_none() {
            return Ok(round);
        }
        let mut found = Vec::new();
        let mut unknown = self.protect_all(&mut found, &mut round)?;
        // Some cannot be registered at all (MAP_DROPPABLE).
        if unknown.iter().any(|run| !self.unfit.contains(run)) {
            // Owed should a thread stay in its call.
            self.owed.append(&mut found);
            self.owed.append(&mut unknown);
            let held = HeldProcess::stop(self.pid)?;
            if let Some(uffd) = &self.uffd {
                register(uffd, self.via)?;
            }
            held.release()?;
            unknown = self.protect_all(&mut found, &mut round)?;
            self.unfit.clone_from(&unknown);
        }
        self.owed.append(&mut unknown);
        let found = union(&found, &[]);
        if !found.is_empty() {
            // Owed should a thread stay in its call.
            let owed = self.owed.len();
            self.owed.extend(&found);
            HeldProcess::stop(self.pid)?.release()?;
            self.owed.truncate(owed);
        }
        for (start, end) in found {
            self.read(start, end, &mut round, take)?;
        }
        if self.mem.is_over() {
            return Err(self.gone());
        }
        Ok(round)
    }

    fn gone(&self) -> anyhow::Error {
        Failure::NoSuchProcess.because(format!(
            "process {} has ended or executes another program",
            self.pid
        ))
    }

    /// Protects what has changed, and what is owed, and adds it to `found`. Mappings that are not registered, all of which is
    /// owed: of a part of one it may not be known what was protected.
    fn protect_all(&mut self, found: &mut Vec<Run>, round: &mut Round) -> Result<Vec<Run>> {
        let pagemap = Pagemap::open(self.via)?;
        let maps = maps::read(self.via).map_err(|_| self.gone())?;
        let owed = union(&std::mem::take(&mut self.owed), &[]);
        let mut unknown = Vec::new();
        round.looked_through = 0;
        for m in maps.iter().filter(|m| is_followed(m)) {
            let (start, end) = (m.start, m.end);
            // Of a mapping that is gone nothing is owed.
            let owed = intersection(&[(start, end)], &owed);
            if m.prot & libc::PROT_READ == 0 {
                // Only who traces it may read it: in the last round.
                self.owed.extend(owed);
                continue;
            }
            round.looked_through += end - start;
            let behind = behind(m.inode != 0);
            if !protect(&pagemap, ((start, end), behind), &owed, found)? {
                unknown.push((start, end));
            }
        }
        Ok(unknown)
    }

    /// Reads pages that have been protected. What cannot be read now is owed.
    fn read(&mut self, start: u64, end: u64, round: &mut Round, take: &mut Take) -> Result<()> {
        let mut at = start;
        while at < end {
            let to = end.min(at - at % STEP + STEP);
            self.buffer.resize((to - at) as usize);
            match self.mem.read_pinned(at, &mut self.buffer) {
                Ok(()) => {
                    round.bytes += to - at;
                    take(at, &mut self.buffer)?;
                }
                Err(_) => self.read_pages(at, to, round, take)?,
            }
            at = to;
        }
        Ok(())
    }

    fn read_pages(
        &mut self,
        start: u64,
        end: u64,
        round: &mut Round,
        take: &mut Take,
    ) -> Result<()> {
        for at in (start..end).step_by(PAGE as usize) {
            self.buffer.resize(PAGE as usize);
            match self.mem.read(at, &mut self.buffer) {
                Ok(()) => {
                    round.bytes += PAGE;
                    take(at, &mut self.buffer)?;
                }
                // Unmapped, or not to be read any more; the last round finds out.
                Err(_) => self.owed.push((at, at + PAGE)),
            }
        }
        Ok(())
    }

    /// The last round, of a process that stands still: gives `take` what is new or has changed since the last one,
    /// and returns all runs of pages that hold something. Notes guard pages in `vmas`. To be called by the thread that
    /// traces it.
    ///
    /// # Errors
    /// When memory cannot be read, and those of `take`.
    pub fn last(&mut self, vmas: &mut [Vma], take: &mut Take) -> Result<(Vec<Run>, Round)> {
        if self.mem.is_over() {
            return Err(self.gone());
        }
        let pagemap = Pagemap::open(self.via)?;
        let owed = union(&std::mem::take(&mut self.owed), &[]);
        let (mut populated, mut changed) = (Vec::new(), Vec::new());
        for v in vmas.iter_mut().filter(|v| !v.is_kernel()) {
            if !is_private(v) {
                let mut guards = Vec::new();
                pagemap.guards(v.start, v.end, &mut |start, end| {
                    guards.push((start, end));
                    Ok(())
                })?;
                v.guards = guards;
                continue;
            }
            let behind = behind(v.backing != Backing::Anonymous);
            let pages = pagemap.look(v.start, v.end, behind, self.uffd.is_some())?;
            changed.extend(union(&pages.written, &intersection(&pages.private, &owed)));
            populated.extend(pages.private);
            v.guards = pages.guards;
        }
        let mut round = Round::default();
        for (start, end) in changed {
            let mut at = start;
            while at < end {
                let to = end.min(at - at % STEP + STEP);
                self.buffer.resize((to - at) as usize);
                self.mem
                    .read_pinned(at, &mut self.buffer)
                    .with_context(|| {
                        format!("reading memory {at:#x}-{to:#x} of process {}", self.pid)
                    })?;
                round.bytes += to - at;
                take(at, &mut self.buffer)?;
                at = to;
            }
        }
        Ok((populated, round))
    }
}

/// Whether what is written to a mapping can be followed: it is the process's own.
fn is_followed(m: &Map) -> bool {
    let special = matches!(m.name(), Name::Special(n) if n == "vdso" || n.starts_with("vvar"));
    !special && m.start < TASK_SIZE && !m.shared
}

/// Registers all mappings of a process that stands still; what cannot be is left out.
fn register(uffd: &Uffd, via: i32) -> Result<()> {
    let maps = maps::read(via).with_context(|| format!("reading mappings of thread {via}"))?;
    let beside = |a: &Map, b: &Map| a.end == b.start && is_followed(a) && is_followed(b);
    for maps in maps.chunk_by(beside) {
        let (Some(first), Some(last)) = (maps.first(), maps.last()) else {
            continue;
        };
        let len = last.end - first.start;
        if !is_followed(first) || uffd.register_tracked(first.start, len).is_ok() {
            continue;
        }
        for m in maps {
            // It is found unregistered, and read whole in the last round.
            let _ = uffd.register_tracked(m.start, m.end - m.start);
        }
    }
    Ok(())
}

/// Protects what has changed in one mapping, and all of it where that is owed; adds it to `found`. False: it is not
/// registered, or gone.
fn protect(
    pagemap: &Pagemap,
    ((start, end), behind): (Run, Behind),
    owed: &[Run],
    found: &mut Vec<Run>,
) -> Result<bool> {
    let mut note = |from, to| {
        match found.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => found.push((from, to)),
        }
        Ok(())
    };
    let all = Tracked {
        only_written: false,
        protect: true,
        behind,
    };
    let written = Tracked {
        only_written: true,
        ..all
    };
    let parts = owed.iter().map(|(from, to)| (*from, *to, all));
    let mut known = true;
    for (from, to, how) in parts.chain([(start, end, written)]) {
        known &= pagemap.tracked(from, to, how, &mut note)?;
    }
    Ok(known)
}

/// What a mapping shows where the process has nothing of its own.
fn behind(file: bool) -> Behind {
    match file {
        true => Behind::File,
        false => Behind::Nothing,
    }
}

/// Appends a run that begins where the last one ends, or behind it.
fn add(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.1 >= run.0 => last.1 = last.1.max(run.1),
        _ => runs.push(run),
    }
}

/// What is in one list of runs or the other; sorted both.
fn union(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = a.iter().chain(b).copied().collect();
    all.sort_unstable();
    let mut runs = Vec::new();
    all.into_iter().for_each(|run| add(&mut runs, run));
    runs
}

/// What is in both lists; both are sorted and without overlaps.
fn intersection(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut runs = Vec::new();
    let (mut a, mut b) = (a, b);
    while let ([(start, end), behind_a @ ..], [(from, to), behind_b @ ..]) = (a, b) {
        let (low, high) = (*start.max(from), *end.min(to));
        if low < high {
            runs.push((low, high));
        }
        if end < to {
            a = behind_a;
        } else {
            b = behind_b;
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_cut() {
        assert_eq!(
            union(&[(1, 3), (7, 9)], &[(2, 5), (9, 10)]),
            [(1, 5), (7, 10)]
        );
        assert_eq!(
            intersection(&[(1, 5), (7, 10)], &[(0, 2), (4, 8), (9, 20)]),
            [(1, 2), (4, 5), (7, 8), (9, 10)]
        );
    }
}
