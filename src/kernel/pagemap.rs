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
    /// pages) and are not the zero page, as runs given to `each`.
    pub fn private(
        &self,
        start: u64,
        end: u64,
        each: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.scan(start, end, self.own(), each)
    }

    /// The pages that [`Pagemap::private`] would give, all or only those written to since the last call with
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
        let own = self.own();
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
    pub fn look(&self, start: u64, end: u64, tracked: bool) -> Result<Pages> {
        let guard = if self.knows_guards { GUARD } else { 0 };
        let mut pages = Pages::default();
        let mut regions = [Region::default(); 512];
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                flags: if tracked { CHECK_WPASYNC } else { 0 },
                start: at,
                end,
                category_anyof_mask: PRESENT | SWAPPED | guard,
                return_mask: WRITTEN | FILE | PRESENT | SWAPPED | PFNZERO | guard,
                ..ScanArg::default()
            };
            let n = match self.ioctl(&mut arg, &mut regions) {
                Err(nix::errno::Errno::EPERM) if tracked => return self.look(start, end, false),
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

    /// Address of the first page that [`Pagemap::private`] would give.
    pub fn first_private(&self, start: u64, end: u64) -> Result<Option<u64>> {
        // Told to stop at one page: the region of a large mapping is found by walking all of its tables.
        let mut first = [Region::default()];
        let (n, _) = self
            .scan_once(start, end, self.own(), &mut first, 1)
            .with_context(|| {
                format!("scanning pages {start:#x}-{end:#x} of process {}", self.pid)
            })?;
        Ok((n > 0).then_some(first[0].start))
    }

    /// Pages that are a process's own and hold something.
    fn own(&self) -> Wanted {
        // Guard pages look like swapped ones; kernels that have none do not know the category.
        let not = FILE | PFNZERO | if self.knows_guards { GUARD } else { 0 };
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
    /// As [`Pagemap::private`] gives them.
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

/// What [`Pagemap::tracked`] does.
#[derive(Debug, Clone, Copy)]
pub struct Tracked {
    /// Only pages written to since they were protected last; else all.
    pub only_written: bool,
    /// Protect what is told of: its next write is noted.
    pub protect: bool,
}
