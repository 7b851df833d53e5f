//! Where trampolines stand: in the dead end of a process's vDSO, and in what was added to it.

use std::ops::Range;

use anyhow::Result;

use crate::kernel::annex;
use crate::kernel::arch::trampoline;
use crate::kernel::arch::{self, Regs};
use crate::kernel::batch::{self, Held};
use crate::kernel::mem::Mem;
use crate::kernel::proc_file;
use crate::kernel::vdso;

/// The dead end of a process's vDSO, what was added to it, and what of both trampolines occupy.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    /// But for the last bytes, which say what was added.
    all: Range<u64>,
    annexes: Vec<Range<u64>>,
    /// Where trampolines stand.
    used: Vec<Range<u64>>,
    /// Those that signal frames lead to.
    frames: Vec<Range<u64>>,
}

impl Tail {
    /// Empty when the process has no vDSO.
    pub fn find(tid: i32, mem: &Mem) -> Self {
        let mut all = vdso_tail(tid, mem).unwrap_or_default();
        if all.end - all.start < annex::NOTE {
            return Self::default();
        }
        all.end -= annex::NOTE;
        let mut tail = Self {
            annexes: annex::find(mem, all.end),
            all,
            ..Self::default()
        };
        // What an earlier dump has left may be in use; once the threads stand [`super::settle`] knows.
        let from = tail.all.start + batch::ROOM;
        let len = tail.all.end.saturating_sub(from) as usize;
        if let Ok(old) = mem.read_vec(from, len)
            && let Some(i) = old.iter().position(|b| *b != 0)
        {
            tail.used.push((from + i as u64) & !7..tail.all.end);
        }
        tail.used.extend_from_slice(&tail.annexes);
        tail
    }

    /// Where it begins; None where there is none.
    pub fn begins(&self) -> Option<u64> {
        (!self.all.is_empty()).then_some(self.all.start)
    }

    /// What a batch may use.
    pub fn free(&self) -> Range<u64> {
        let used = self.used.iter().map(|r| r.start);
        let lowest = used.filter(|at| self.all.contains(at)).min();
        self.all.start..lowest.unwrap_or(self.all.end)
    }

    /// What an image carries, from low to high: signal handlers of the program return there.
    pub fn returned_to(&self) -> Vec<Range<u64>> {
        let frames = self.frames.iter().filter(|r| self.all.contains(&r.start));
        let mut all: Vec<_> = frames.cloned().collect();
        all.sort_unstable_by_key(|r| r.start);
        all
    }

    /// Mappings that are ours, and that no image carries: signal handlers of the program do not return there.
    pub fn ours(&self) -> Vec<Range<u64>> {
        let ours = self.annexes.iter().filter(|a| !holds_any(a, &self.frames));
        ours.cloned().collect()
    }

    pub(super) fn holds(&self, rip: u64) -> bool {
        self.part(rip).is_some()
    }

    fn part(&self, rip: u64) -> Option<&Range<u64>> {
        let mut parts = std::iter::once(&self.all).chain(&self.annexes);
        parts.find(|r| r.contains(&rip))
    }

    /// The code of a trampoline, from `rip` on.
    pub(super) fn code(&self, rip: u64, mem: &Mem) -> Result<Vec<u8>> {
        let end = self.part(rip).map_or(rip, |r| r.end);
        mem.read_vec(rip, (end - rip).min(trampoline::MOST as u64) as usize)
    }

    /// Nobody is known to use any of it.
    pub(super) fn forget(&mut self) {
        self.used.clear();
        self.frames.clear();
    }

    /// The trampoline that somebody with these registers stands in, from there on.
    pub(super) fn keep(&mut self, regs: &Regs, mem: &Mem) -> Range<u64> {
        let part_end = self.part(regs.rip).map_or(regs.rip, |r| r.end);
        let code = self.code(regs.rip, mem).unwrap_or_default();
        let end = match trampoline::extent(&code, regs) {
            Some(len) => (regs.rip + len as u64).min(part_end),
            None => part_end,
        };
        let kept = regs.rip.saturating_sub(2) & !7..end;
        self.used.push(kept.clone());
        kept
    }

    /// The same for one that a signal frame leads to.
    pub(super) fn keep_frame(&mut self, regs: &Regs, mem: &Mem) {
        let kept = self.keep(regs, mem);
        self.frames.push(kept);
    }

    /// Whether an earlier dump has left anything.
    pub(super) fn in_use(&self, mem: &Mem) -> bool {
        let len = (self.all.end - self.all.start) as usize;
        !self.annexes.is_empty()
            || mem
                .read_vec(self.all.start, len)
                .is_ok_and(|b| b.iter().any(|x| *x != 0))
    }

    /// The address for `len` bytes: the highest there is. What the next batch needs stays free, and `room`.
    pub(super) fn take(&mut self, len: usize, room: u64) -> Option<u64> {
        let above = self.all.start.checked_add(batch::ROOM + room)?;
        self.take_from(above, len)
    }

    /// The same, where no batch comes before the release.
    pub(super) fn take_last(&mut self, len: usize) -> Option<u64> {
        self.take_from(self.all.start, len)
    }

    fn take_from(&mut self, floor: u64, len: usize) -> Option<u64> {
        let parts = std::iter::once(floor..self.all.end);
        let mut parts = parts.chain(self.annexes.iter().map(annex::room));
        let at = parts.find_map(|part| gap(&part, &mut self.used, len))?;
        self.used.push(at..at + len as u64);
        Some(at)
    }

    /// Unmaps what was added and is not used any more; threads are known.
    pub(super) fn tidy(&mut self, leader: &Held, mem: &Mem) -> Result<()> {
        let (free, note) = (self.free(), self.all.end);
        let used = |a: &Range<u64>| holds_any(a, &self.used);
        annex::remove(leader, mem, &free, note, &mut self.annexes, used)
    }

    /// Adds room for so many `bytes`.
    pub(super) fn extend(&mut self, leader: &Held, mem: &Mem, bytes: u64) -> Result<()> {
        let (free, note) = (self.free(), self.all.end);
        annex::add(leader, mem, &free, note, &mut self.annexes, bytes)
    }
}

fn holds_any(part: &Range<u64>, places: &[Range<u64>]) -> bool {
    places.iter().any(|r| part.contains(&r.start))
}

/// The highest gap of `len` bytes in a part.
fn gap(part: &Range<u64>, used: &mut [Range<u64>], len: usize) -> Option<u64> {
    used.sort_unstable_by_key(|r| std::cmp::Reverse(r.start));
    let mut end = part.end;
    let fits = |end: u64, below: u64| {
        let at = end.checked_sub(len as u64)? & !7;
        (at >= below.max(part.start)).then_some(at)
    };
    for r in used
        .iter()
        .filter(|r| r.start < part.end && r.end > part.start)
    {
        if let found @ Some(_) = fits(end, r.end) {
            return found;
        }
        end = end.min(r.start);
    }
    fits(end, part.start)
}

fn vdso_tail(tid: i32, mem: &Mem) -> Option<Range<u64>> {
    const AT_SYSINFO_EHDR: u64 = 33;
    let auxv = proc_file::read(format!("/proc/{tid}/auxv")).ok()?;
    let word = |b: &[u8]| b.try_into().map_or(0, u64::from_le_bytes);
    let base = auxv
        .chunks_exact(16)
        .find(|c| word(&c[..8]) == AT_SYSINFO_EHDR)
        .map(|c| word(&c[8..]))?;
    let mut bytes = mem.read_vec(base, arch::PAGE as usize).ok()?;
    // As long as there is more of it.
    for i in 1..8 {
        match mem.read_vec(base + i * arch::PAGE, arch::PAGE as usize) {
            Ok(b) if vdso::elf_len(&bytes).is_err() => bytes.extend(b),
            _ => break,
        }
    }
    let len = vdso::elf_len(&bytes).ok()?;
    Some(base + len..base + len.next_multiple_of(arch::PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trampoline_goes_into_the_highest_gap_and_leaves_room_for_a_batch() {
        let end = 4096 + batch::ROOM + 200;
        let mut tail = Tail {
            all: 4096..end,
            ..Tail::default()
        };
        assert_eq!(tail.take(40, 0), Some((end - 40) & !7));
        let first = tail.take(64, 0).unwrap();
        assert_eq!(tail.take(40, 60), None);
        let second = tail.take(40, 0).unwrap();
        assert!(second + 40 <= first);
        assert_eq!(tail.take(64, 0), None);
        assert_eq!(tail.free(), 4096..second);
        // The one in the middle has ended.
        tail.used.retain(|r| r.start != first);
        assert_eq!(tail.take(64, 0), Some(first));
        assert!(Tail::default().take(8, 0).is_none());
    }

    #[test]
    fn what_was_added_comes_after_the_vdso_and_may_lie_on_either_side_of_it() {
        for at in [0x1_0000, 0x10_0000] {
            let all = 0x8_0000..0x8_0000 + batch::ROOM + 48;
            let mut tail = Tail {
                all: all.clone(),
                annexes: vec![at..at + 4096, at + 8192..at + 12288],
                ..Tail::default()
            };
            let places: Vec<u64> = (0..100).map_while(|_| tail.take(96, 0)).collect();
            assert_eq!(places.len(), 84);
            assert!(places.iter().all(|p| (at..at + 12288).contains(p)));
            assert!(tail.take(40, 0).is_some_and(|p| all.contains(&p)));
            assert_eq!(tail.free().start, all.start);
            assert!(all.contains(&tail.free().end));
            assert_eq!(tail.ours().len(), 2);
        }
    }
}
