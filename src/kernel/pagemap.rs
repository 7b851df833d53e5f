//! Which pages of a process hold something: the PAGEMAP_SCAN ioctl of /proc/PID/pagemap (Linux 6.7;
//! Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c).

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

// PAGE_IS_* categories.
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const GUARD: u64 = 1 << 8;

// PM_SCAN_*: protect what matches again; fail where a mapping is not tracked.
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;

/// struct pm_scan_arg
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// Pages after which a scan tells what it has found, so that work on a large mapping begins at once.
const BATCH: u64 = 1 << 14;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArg);

/// Which pages a scan tells of.
#[derive(Debug, Clone, Copy, Default)]
struct Wanted {
    flags: u64,
    /// Categories that are meant the other way round.
    inverted: u64,
    /// All of these, and one of those.
    all: u64,
    any: u64,
}

impl Wanted {
    const POPULATED: Self = Self {
        flags: 0,
        inverted: 0,
        all: 0,
        any: PRESENT | SWAPPED,
    };
    const GUARDS: Self = Self {
        all: GUARD,
        any: 0,
        ..Self::POPULATED
    };
}

/// /proc/PID/pagemap of one process.
pub struct Pagemap {
    pid: i32,
    file: File,
    knows_guards: bool,
}

impl Pagemap {
    pub fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        let mut me = Self {
            pid,
            file,
            knows_guards: true,
        };
        // An empty range: nothing but the categories is looked at.
        me.knows_guards = me.scan_once(0, 0, Wanted::GUARDS, &mut [], 0).is_ok();
        Ok(me)
    }

    /// Pages in `start..end` that belong to the process alone (anonymous, or modified copies of file
    /// pages) and are not the zero page, as runs given to `each`. Some of them: returns how far it has looked.
    pub fn some_private(
        &self,
        start: u64,
        end: u64,
        behind: Behind,
        each: &mut dyn FnMut(u64, u64),
    ) -> Result<u64> {
        let mut regions = [Region::default(); 512];
        let (n, walk_end) = self
            .scan_once(start, end, self.own(behind), &mut regions, BATCH)
            .with_context(|| {
                format!("scanning pages {start:#x}-{end:#x} of process {}", self.pid)
            })?;
        for r in regions.iter().take(n) {
            each(r.start, r.end);
        }
        // A scan that comes no further has nothing to tell.
        Ok(if walk_end <= start { end } else { walk_end })
    }

    /// The pages that [`Pagemap::some_private`] would give, all or only those written to since the last call with
    /// `protect`, which begins to track them anew before it tells of them. False, and nothing is certain about the
    /// range any more, when a part of it is not tracked.
    ///
    /// # Errors
    /// Those of PAGEMAP_SCAN but EPERM, and those of `each`.
    pub fn tracked(
        &self,
        start: u64,
        end: u64,
        how: Tracked,
        each: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<bool> {
        let own = self.own(how.behind);
        let wanted = Wanted {
            flags: CHECK_WPASYNC | if how.protect { WP_MATCHING } else { 0 },
            all: own.all | if how.only_written { WRITTEN } else { 0 },
            ..own
        };
        let mut regions = [Region::default(); 512];
        let mut at = start;
        while at < end {
            let (n, walk_end) = match self.scan_once(at, end, wanted, &mut regions, BATCH) {
                Err(nix::errno::Errno::EPERM) => return Ok(false),
                found => found.with_context(|| {
                    format!("scanning pages {at:#x}-{end:#x} of process {}", self.pid)
                })?,
            };
            for r in regions.iter().take(n) {
                each(r.start, r.end)?;
            }
            if walk_end <= at {
                break;
            }
            at = walk_end;
        }
        Ok(true)
    }

    /// All that is to be known of a range, in one walk over its page tables. `tracked`: whether writes to it are
    /// followed; if they are not, everything counts as written.
    ///
    /// # Errors
    /// Those of PAGEMAP_SCAN but EPERM.
    pub fn look(&self, start: u64, end: u64, behind: Behind, tracked: bool) -> Result<Pages> {
        let guard = if self.knows_guards { GUARD } else { 0 };
        let file = behind.category();
        let mut pages = Pages::default();
        let mut regions = [Region::default(); 512];
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                flags: if tracked { CHECK_WPASYNC } else { 0 },
                start: at,
                end,
                category_anyof_mask: PRESENT | SWAPPED | guard,
                return_mask: WRITTEN | file | PRESENT | SWAPPED | PFNZERO | guard,
                ..ScanArg::default()
            };
            let n = match self.ioctl(&mut arg, &mut regions) {
                Err(nix::errno::Errno::EPERM) if tracked => {
                    return self.look(start, end, behind, false);
                }
                n => n.with_context(|| {
                    format!("scanning pages {at:#x}-{end:#x} of process {}", self.pid)
                })?,
            };
            for r in regions.iter().take(n) {
                let is = |category: u64| r.categories & category != 0;
                let run = (r.start, r.end);
                if is(guard) {
                    add(&mut pages.guards, run);
                } else if !is(FILE | PFNZERO) {
                    add(&mut pages.private, run);
                    if is(WRITTEN) || !tracked {
                        add(&mut pages.written, run);
                    }
                }
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(pages)
    }

    /// Address of the first page that [`Pagemap::some_private`] would give.
    pub fn first_private(&self, start: u64, end: u64) -> Result<Option<u64>> {
        // Told to stop at one page: the region of a large mapping is found by walking all of its tables.
        let mut first = [Region::default()];
        let (n, _) = self
            .scan_once(start, end, self.own(Behind::File), &mut first, 1)
            .with_context(|| {
                format!("scanning pages {start:#x}-{end:#x} of process {}", self.pid)
            })?;
        Ok((n > 0).then_some(first[0].start))
    }

    /// Pages that are a process's own and hold something.
    fn own(&self, behind: Behind) -> Wanted {
        // Guard pages look like swapped ones; kernels that have none do not know the category.
        let not = behind.category() | PFNZERO | if self.knows_guards { GUARD } else { 0 };
        Wanted {
            inverted: not,
            all: not,
            ..Wanted::POPULATED
        }
    }

    /// Whether pages in `start..end` were written to since they were protected (userfaultfd, WP_ASYNC). With
    /// `protect` they are protected again.
    ///
    /// # Errors
    /// EPERM where `protect` meets a mapping that is not tracked.
    pub fn written(&self, start: u64, end: u64, protect: bool) -> Result<bool> {
        let wanted = Wanted {
            flags: if protect {
                WP_MATCHING | CHECK_WPASYNC
            } else {
                0
            },
            any: WRITTEN,
            ..Wanted::default()
        };
        let mut any = false;
        self.scan(start, end, wanted, &mut |_, _| {
            any = true;
            Ok(())
        })?;
        Ok(any)
    }

    /// Pages in `start..end` that are there at all.
    pub fn populated(
        &self,
        start: u64,
        end: u64,
        each: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.scan(start, end, Wanted::POPULATED, each)
    }

    /// Guard pages (MADV_GUARD_INSTALL) in `start..end`.
    pub fn guards(
        &self,
        start: u64,
        end: u64,
        each: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        if !self.knows_guards {
            return Ok(());
        }
        self.scan(start, end, Wanted::GUARDS, each)
    }

    fn scan(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        each: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut regions = [Region::default(); 512];
        let mut at = start;
        while at < end {
            let (n, walk_end) = self
                .scan_once(at, end, wanted, &mut regions, BATCH)
                .with_context(|| {
                    format!("scanning pages {at:#x}-{end:#x} of process {}", self.pid)
                })?;
            for r in regions.iter().take(n) {
                each(r.start, r.end)?;
            }
            if walk_end <= at {
                break;
            }
            at = walk_end;
        }
        Ok(())
    }

    /// One ioctl, ended after `max` pages when that is not 0: regions found, and how far it came.
    fn scan_once(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        regions: &mut [Region],
        max: u64,
    ) -> nix::Result<(usize, u64)> {
        let mut arg = ScanArg {
            start,
            end,
            max_pages: max,
            flags: wanted.flags,
            category_inverted: wanted.inverted,
            category_mask: wanted.all,
            category_anyof_mask: wanted.any,
            return_mask: wanted.any | PRESENT | SWAPPED | wanted.all & GUARD,
            ..ScanArg::default()
        };
        let n = self.ioctl(&mut arg, regions)?;
        Ok((n, arg.walk_end))
    }

    fn ioctl(&self, arg: &mut ScanArg, regions: &mut [Region]) -> nix::Result<usize> {
        arg.size = size_of::<ScanArg>() as u64;
        arg.vec = regions.as_mut_ptr() as u64;
        arg.vec_len = regions.len() as u64;
        // SAFETY: `arg` is a live pm_scan_arg and `vec` points to `vec_len` writable regions.
        let n = unsafe { pagemap_scan(self.file.as_raw_fd(), arg) }?;
        Ok(n as usize)
    }
}

/// What [`Pagemap::look`] finds, as sorted runs of addresses.
#[derive(Debug, Default)]
pub struct Pages {
    /// As [`Pagemap::some_private`] gives them.
    pub private: Vec<(u64, u64)>,
    /// Those of them that were written to since they were protected.
    pub written: Vec<(u64, u64)>,
    pub guards: Vec<(u64, u64)>,
}

/// Appends a run that begins where the last one ends, or behind it.
fn add(runs: &mut Vec<(u64, u64)>, run: (u64, u64)) {
    match runs.last_mut() {
        Some(last) if last.1 >= run.0 => last.1 = last.1.max(run.1),
        _ => runs.push(run),
    }
}

/// What a private mapping shows where the process has nothing of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    /// Zeros: all that is there is the process's own.
    Nothing,
    /// Pages of a file. To tell them from the process's own the kernel looks at each page, not at the page tables
    /// alone, and that takes several times as long.
    File,
}

impl Behind {
    fn category(self) -> u64 {
        match self {
            Behind::Nothing => 0,
            Behind::File => FILE,
        }
    }
}

/// What [`Pagemap::tracked`] does.
#[derive(Debug, Clone, Copy)]
pub struct Tracked {
    pub behind: Behind,
    /// Only pages written to since they were protected last; else all.
    pub only_written: bool,
    /// Protect what is told of: its next write is noted.
    pub protect: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::arch::PAGE;

    const HUGE: u64 = 2 << 20;

    fn map(len: u64, flags: i32, fd: i32) -> u64 {
        // SAFETY: a new private mapping, which is left to the end of the process.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | flags,
                fd,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        at as u64
    }

    fn touch(at: u64, value: Option<u8>) {
        let at = at as *mut u8;
        // SAFETY: within a mapping of [`map`], which nobody else uses.
        unsafe {
            match value {
                Some(value) => at.write_volatile(value),
                None => drop(at.read_volatile()),
            }
        }
    }

    fn advise(at: u64, len: u64, advice: i32) {
        // SAFETY: within a mapping of [`map`]; the advice changes nothing that it shows.
        // What a kernel does not know of it is left out.
        unsafe { libc::madvise(at as *mut libc::c_void, len as usize, advice) };
    }

    #[test]
    fn without_a_file_behind_it_the_same_pages_are_found_without_looking_at_them() {
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let private = |start, end, behind| {
            let mut found = Vec::new();
            let how = pagemap.look(start, end, behind, false).unwrap();
            pagemap
                .scan(start, end, pagemap.own(behind), &mut |from, to| {
                    add(&mut found, (from, to));
                    Ok(())
                })
                .unwrap();
            assert_eq!(found, how.private);
            found
        };
        // Small pages: own, zero, none, forked, paged out where that is possible, one to be merged with another.
        let small = map(64 * PAGE, libc::MAP_ANONYMOUS, -1);
        advise(small, 64 * PAGE, libc::MADV_NOHUGEPAGE);
        for page in 0..64 {
            match page % 4 {
                0 => touch(small + page * PAGE, Some(page as u8 + 1)),
                1 => touch(small + page * PAGE, None),
                2 => touch(small + page * PAGE, Some(7)),
                _ => {}
            }
        }
        advise(small, 64 * PAGE, libc::MADV_MERGEABLE);
        advise(small, 16 * PAGE, libc::MADV_PAGEOUT);
        let want: Vec<_> = (0..64)
            .filter(|page| page % 2 == 0)
            .map(|page| (small + page * PAGE, small + (page + 1) * PAGE))
            .collect();
        assert_eq!(private(small, small + 64 * PAGE, Behind::Nothing), want);
        assert_eq!(private(small, small + 64 * PAGE, Behind::File), want);
        // Huge pages: own, zero, none, and one of which a part has been given back.
        let huge = map(6 * HUGE, libc::MAP_ANONYMOUS, -1).next_multiple_of(HUGE);
        advise(huge, 5 * HUGE, libc::MADV_HUGEPAGE);
        touch(huge, Some(1));
        touch(huge + HUGE, None);
        touch(huge + 3 * HUGE, Some(1));
        advise(huge + 3 * HUGE + PAGE, PAGE, libc::MADV_DONTNEED);
        let found = private(huge, huge + 5 * HUGE, Behind::Nothing);
        assert!(found.first().is_some_and(|run| run.0 == huge));
        assert_eq!(private(huge, huge + 5 * HUGE, Behind::File), found);
        // What a file shows is not the process's own, and to be told from it.
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let mapped = map(8 * PAGE, 0, file.as_raw_fd());
        (0..8).for_each(|page| touch(mapped + page * PAGE, None));
        touch(mapped + 3 * PAGE, Some(1));
        let own = [(mapped + 3 * PAGE, mapped + 4 * PAGE)];
        assert_eq!(private(mapped, mapped + 8 * PAGE, Behind::File), own);
        assert_ne!(private(mapped, mapped + 8 * PAGE, Behind::Nothing), own);
    }
}
