//! Memory of a process that is restored into this very one, put in its place as it arrives.
//!
//! The other side says where large mappings are. Memory is mapped there, and their pages are given to it when they come:
//! once, with no file between and nothing left to fill when the program runs. When all have come it is made what the
//! program has mapped by then. What cannot be placed, because something of ours is there or because it has become
//! another kind of memory, goes into the image like all else.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::memory::{joins, put, was_writable};
use crate::image::RoundsWriter;
use crate::image::memory::{SpaceId, Vma};
use crate::image::process::Process;
use crate::image::rounds::Populated;
use crate::kernel::arch;
use crate::kernel::buffer::Buffer;
use crate::kernel::mem::{self, Mem, map_fixed, unmap_fixed};
use crate::kernel::uffd::Uffd;

/// Memory smaller than this is not worth the trouble.
const LARGE: u64 = 1 << 20;
/// Nor is more than this placed, all in all: a byte is noted for each page.
const LARGEST: u64 = 64 << 30;
/// Most parts of it that are placed.
const MOST: usize = 1024;
const PAGE: u64 = arch::PAGE;
/// Bytes that go from memory to an image at once.
const PIECE: u64 = 1 << 20;
const NOT_OPEN: &str = "our own memory was not opened";
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Mappings that join ([`joins`]), whose pages are to come: mapped as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    pub start: u64,
    pub end: u64,
    /// MAP_NORESERVE.
    pub no_reserve: bool,
}

impl Announced {
    /// Those of these mappings that are worth it.
    pub fn of(vmas: &[Vma]) -> Vec<Self> {
        let all = vmas.chunk_by(joins).filter_map(Self::one);
        let worth = all.filter(|one| (LARGE..=LARGEST).contains(&(one.end - one.start)));
        worth.take(MOST).collect()
    }

    /// Of mappings that join.
    fn one(vmas: &[Vma]) -> Option<Self> {
        let (first, last) = (vmas.first()?, vmas.last()?);
        was_writable(first).then(|| Self {
            start: first.start,
            end: last.end,
            no_reserve: first.has("nr"),
        })
    }

    fn is_sound(&self) -> bool {
        let aligned = self.start.is_multiple_of(PAGE) && self.end.is_multiple_of(PAGE);
        let len = self.end.checked_sub(self.start);
        let fits = len.is_some_and(|len| (1..=LARGEST).contains(&len));
        aligned && fits && self.end <= arch::TASK_SIZE
    }
}

/// What has come of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    Not,
    /// As zeros, which missing pages are.
    Zero,
    There,
}

/// A mapping of ours, readable and writable.
struct Range {
    end: u64,
    no_reserve: bool,
    pages: Vec<Came>,
}

impl Range {
    fn map(
        &Announced {
            start,
            end,
            no_reserve,
        }: &Announced,
    ) -> std::io::Result<Self> {
        let flags = if no_reserve { libc::MAP_NORESERVE } else { 0 };
        map_fixed(start, end - start, RW, flags)?;
        // The tracer is forked from us, and needs none of it.
        let apart = mem::advise_fixed(start, end - start, libc::MADV_DONTFORK);
        apart.inspect_err(|_| unmap_fixed(start, end - start))?;
        Ok(Self {
            end,
            no_reserve,
            pages: vec![Came::Not; ((end - start) / PAGE) as usize],
        })
    }
}

/// What comes for pages.
enum Content<'a> {
    Bytes(&'a [u8]),
    Zeros,
}

/// Our own memory.
struct Own {
    uffd: Uffd,
    mem: Mem,
}

impl Own {
    fn open() -> Result<Self> {
        let uffd = Uffd::ours().context("userfaultfd")?;
        uffd.api(0)?;
        let mem = Mem::open(std::process::id() as i32)?;
        // Until it is the task's alone, this process needs memory of its own beside it.
        for limit in [Resource::RLIMIT_AS, Resource::RLIMIT_DATA] {
            let (soft, _) = getrlimit(limit).context("getrlimit")?;
            ensure!(soft == RLIM_INFINITY, "memory is limited");
        }
        Ok(Self { uffd, mem })
    }
}

/// Memory that is arriving.
pub struct Placing {
    space: SpaceId,
    /// None: all goes into the image.
    own: Option<Own>,
    /// By where they begin.
    ranges: BTreeMap<u64, Range>,
}

impl Placing {
    /// Of one address space; nothing is announced yet.
    #[must_use]
    pub fn new(space: SpaceId) -> Self {
        Self {
            space,
            own: Own::open().ok(),
            ranges: BTreeMap::new(),
        }
    }

    /// Maps it, if it can be.
    ///
    /// # Errors
    /// For what is no mapping.
    pub fn announce(&mut self, announced: &Announced) -> Result<()> {
        let Announced { start, end, .. } = *announced;
        ensure!(
            announced.is_sound(),
            "a mapping {start:#x}-{end:#x} was announced, which is none"
        );
        let room = self.ranges.len() < MOST && self.len() + (end - start) <= LARGEST;
        let Some(own) = self.own.as_ref().filter(|_| room) else {
            return Ok(());
        };
        if let Ok(range) = Range::map(announced) {
            match own.uffd.register_missing(start, end - start) {
                Ok(()) => drop(self.ranges.insert(start, range)),
                Err(_) => unmap_fixed(start, end - start),
            }
        }
        Ok(())
    }

    /// Bytes of all ranges.
    fn len(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(start, range)| range.end - start)
            .sum()
    }

    /// Takes whole pages; those that were there are replaced.
    ///
    /// # Errors
    /// When they cannot be put in place, and those of [`RoundsWriter::put`].
    pub fn put(
        &mut self,
        writer: &RoundsWriter,
        space: SpaceId,
        addr: u64,
        data: &[u8],
    ) -> Result<()> {
        for (start, from, to) in self.parts(space, addr, data.len() as u64) {
            let part = data.get((from - addr) as usize..(to - addr) as usize);
            let part = part.unwrap_or_default();
            match start {
                Some(start) => self.place(start, from, to, &Content::Bytes(part))?,
                None => writer.put(space, from, part)?,
            }
        }
        Ok(())
    }

    /// The same, of pages of zeros.
    ///
    /// # Errors
    /// As for [`Placing::put`].
    pub fn put_zeros(
        &mut self,
        writer: &RoundsWriter,
        space: SpaceId,
        addr: u64,
        len: u64,
    ) -> Result<()> {
        for (start, from, to) in self.parts(space, addr, len) {
            match start {
                Some(start) => self.place(start, from, to, &Content::Zeros)?,
                None => writer.put(space, from, &vec![0; (to - from) as usize])?,
            }
        }
        Ok(())
    }

    /// Cuts memory into parts that lie in one of our ranges (where that begins), and those between.
    fn parts(&self, space: SpaceId, addr: u64, len: u64) -> Vec<(Option<u64>, u64, u64)> {
        let end = addr.saturating_add(len);
        if space != self.space || end > arch::TASK_SIZE {
            return vec![(None, addr, end)];
        }
        let mut parts = Vec::new();
        let mut at = addr;
        while at < end {
            let inside = self.ranges.range(..=at).next_back();
            let inside = inside.filter(|(_, range)| at < range.end);
            let next = || self.ranges.range(at..).next().map_or(end, |(s, _)| *s);
            let (start, to) = match inside {
                Some((start, range)) => (Some(*start), range.end),
                None => (None, next()),
            };
            parts.push((start, at, to.min(end)));
            at = to.min(end);
        }
        parts
    }

    /// Puts pages into the range that begins at `start`.
    fn place(&mut self, start: u64, from: u64, to: u64, content: &Content) -> Result<()> {
        ensure!(
            from.is_multiple_of(PAGE) && to.is_multiple_of(PAGE),
            "memory at {from:#x} ({} bytes) is not whole pages",
            to - from
        );
        let range = self
            .ranges
            .get_mut(&start)
            .context("a range that is none")?;
        let own = self.own.as_ref().context(NOT_OPEN)?;
        let first = ((from - start) / PAGE) as usize;
        let count = ((to - from) / PAGE) as usize;
        let pages = range.pages.get_mut(first..first + count);
        let pages = pages.context("pages beyond their range")?;
        let mut at = from;
        for run in pages.chunk_by(|a, b| (*a == Came::There) == (*b == Came::There)) {
            let there = run.first() == Some(&Came::There);
            let len = run.len() as u64 * PAGE;
            match content {
                Content::Bytes(bytes) => {
                    let part = bytes.get((at - from) as usize..(at - from + len) as usize);
                    let part = part.unwrap_or_default();
                    match there {
                        true => own.mem.write(at, part)?,
                        false => put(&own.uffd, at, part)?,
                    }
                }
                Content::Zeros if there => empty(at, len)?,
                Content::Zeros => {}
            }
            at += len;
        }
        pages.fill(match content {
            Content::Bytes(_) => Came::There,
            Content::Zeros => Came::Zero,
        });
        Ok(())
    }

    /// All has come: makes the ranges what the program `p` has mapped, and takes them out of `populated`, whose other
    /// pages are in the image. Which mappings of the program are there, with what is in them.
    ///
    /// # Errors
    /// When a page has not come.
    pub fn settle(
        mut self,
        p: &Process,
        populated: &mut Populated,
        writer: &RoundsWriter,
    ) -> Result<Placed> {
        let mut placed = Placed::default();
        if self.ranges.is_empty() {
            return Ok(placed);
        }
        if p.space != self.space {
            bail!("memory came for another address space than the task's");
        }
        let own = self.own.take().context(NOT_OPEN)?;
        for (start, range) in &self.ranges {
            own.uffd.unregister(*start, range.end - start)?;
        }
        let runs = populated
            .remove(&self.space)
            .context("it is not known which pages there are")?;
        for vmas in p.vmas.chunk_by(joins) {
            let Some(one) = Announced::one(vmas) else {
                continue;
            };
            if self.complete(&one, &own.mem, writer)? {
                for v in vmas {
                    self.check(v, &within(&runs, v.start, v.end), &mut placed)?;
                }
            }
        }
        // What has become of the rest of them is no mapping of this kind.
        let mut rest = Vec::new();
        let mut at = 0;
        for (start, end) in placed
            .mappings
            .iter()
            .copied()
            .chain([(u64::MAX, u64::MAX)])
        {
            let between = within(&runs, at, start);
            self.give_back(&between, &own.mem, writer)?;
            rest.extend(between);
            self.unmap(at, start);
            at = end;
        }
        placed.left = rest.iter().map(|(start, end)| end - start).sum();
        populated.insert(self.space, rest);
        Ok(placed)
    }

    /// Maps what of these mappings is not in a range yet, with the pages that have come for it. False: it cannot be done, or
    /// they are not of one range: two would never be one mapping.
    fn complete(&mut self, all: &Announced, mem: &Mem, writer: &RoundsWriter) -> Result<bool> {
        let ours = self.overlapping(all.start, all.end);
        let [of] = &ours[..] else {
            return Ok(false);
        };
        let more = (all.end - all.start) - (of.end - of.start);
        if of.no_reserve != all.no_reserve || self.len() + more > LARGEST {
            return Ok(false);
        }
        let gaps = [(all.start, of.start), (of.end, all.end)];
        for (start, end) in gaps.into_iter().filter(|(start, end)| start < end) {
            let gap = Announced {
                start,
                end,
                no_reserve: all.no_reserve,
            };
            let Ok(range) = Range::map(&gap) else {
                return Ok(false);
            };
            let range = self.ranges.entry(start).or_insert(range);
            writer.take_out(self.space, start, end, &mut |addr, bytes, zero| {
                if !zero {
                    mem.write(addr, bytes)?;
                }
                let first = ((addr - start) / PAGE) as usize;
                let pages = range
                    .pages
                    .get_mut(first..first + bytes.len() / PAGE as usize);
                let pages = pages.context("pages beyond their range")?;
                pages.fill(if zero { Came::Zero } else { Came::There });
                Ok(())
            })?;
        }
        Ok(true)
    }

    /// Parts of ranges that lie there.
    fn overlapping(&self, start: u64, end: u64) -> Vec<Announced> {
        let before = self.ranges.range(..start).next_back();
        let all = before.into_iter().chain(self.ranges.range(start..end));
        let cut = all.map(|(from, range)| Announced {
            start: start.max(*from),
            end: end.min(range.end),
            no_reserve: range.no_reserve,
        });
        cut.filter(|r| r.start < r.end).collect()
    }

    /// Of a mapping that is in ranges: all `runs` have come, and nothing else stays.
    fn check(&mut self, v: &Vma, runs: &[(u64, u64)], placed: &mut Placed) -> Result<()> {
        let mut runs = runs.iter().copied().peekable();
        for part in self.overlapping(v.start, v.end) {
            for (from, to, came) in self.alike(part.start, part.end) {
                let mut at = from;
                while at < to {
                    while runs.next_if(|(_, end)| *end <= at).is_some() {}
                    let (begin, end) = runs.peek().copied().unwrap_or((to, to));
                    let wanted = begin <= at;
                    let until = to.min(if wanted { end } else { begin });
                    match (wanted, came) {
                        (true, Came::Not) => {
                            bail!("of {} pages at {at:#x} none have come", (until - at) / PAGE)
                        }
                        (true, Came::There) => placed.bytes += until - at,
                        (false, Came::There) => empty(at, until - at)?,
                        (true, Came::Zero) | (false, Came::Not | Came::Zero) => {}
                    }
                    at = until;
                }
            }
        }
        placed.mappings.push((v.start, v.end));
        Ok(())
    }

    /// Runs of pages, within one range, of which the same has come.
    fn alike(&self, start: u64, end: u64) -> Vec<(u64, u64, Came)> {
        let Some((first, range)) = self.ranges.range(..=start).next_back() else {
            return Vec::new();
        };
        let index = |addr: u64| ((addr - first) / PAGE) as usize;
        let pages = range.pages.get(index(start)..index(end.min(range.end)));
        let mut at = start;
        let runs = pages.unwrap_or_default().chunk_by(|a, b| a == b);
        runs.map(|run| {
            let from = at;
            at += run.len() as u64 * PAGE;
            (from, at, run.first().copied().unwrap_or(Came::Not))
        })
        .collect()
    }

    /// Puts pages that are wanted into the image after all.
    fn give_back(&self, runs: &[(u64, u64)], mem: &Mem, writer: &RoundsWriter) -> Result<()> {
        let mut buffer = Buffer::default();
        for (start, end) in runs {
            for part in self.overlapping(*start, *end) {
                for (from, to, came) in self.alike(part.start, part.end) {
                    for at in (from..to).step_by(PIECE as usize) {
                        let len = PIECE.min(to - at) as usize;
                        match came {
                            Came::Not => continue, // it is missed when the image is finished
                            Came::Zero => writer.put(self.space, at, &vec![0; len])?,
                            Came::There => {
                                buffer.resize(len);
                                mem.read(at, &mut buffer)?;
                                writer.put(self.space, at, &buffer)?;
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn unmap(&self, start: u64, end: u64) {
        for part in self.overlapping(start, end) {
            unmap_fixed(part.start, part.end - part.start);
        }
    }
}

/// Memory that is in its place: of the first process of an image that is restored into this very process.
#[derive(Debug, Default)]
pub struct Placed {
    /// From, to; sorted. Each is one of the program's, but readable and writable.
    pub mappings: Vec<(u64, u64)>,
    /// Of pages in them that hold something.
    pub bytes: u64,
    /// Bytes of pages that are in the image.
    pub left: u64,
}

impl Placed {
    /// In the body, when the tracer has been forked: children of the program have this memory, too.
    ///
    /// # Errors
    /// Those of madvise(2).
    pub fn share(&self) -> std::io::Result<()> {
        let mut all = self.mappings.iter();
        all.try_for_each(|(start, end)| mem::advise_fixed(*start, end - start, libc::MADV_DOFORK))
    }
}

fn empty(start: u64, len: u64) -> Result<()> {
    mem::advise_fixed(start, len, libc::MADV_DONTNEED)
        .with_context(|| format!("emptying {len} bytes at {start:#x}"))
}

/// The parts of runs, which are sorted, that lie there.
fn within(runs: &[(u64, u64)], start: u64, end: u64) -> Vec<(u64, u64)> {
    let first = runs.partition_point(|(_, to)| *to <= start);
    let runs = runs.get(first..).unwrap_or_default().iter();
    runs.take_while(|(from, _)| *from < end)
        .map(|(from, to)| (start.max(*from), end.min(*to)))
        .collect()
}
