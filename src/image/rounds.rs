//! An image whose memory comes in rounds: a page may come again, and the last one counts.
//!
//! Each aligned [`BLOCK`] of a space has one place in `pages`, whose bytes are overwritten. What is present, and the
//! checksums, are kept in memory (some 50 bytes for each 64 KiB). [`RoundsWriter::settle`] computes checksums that are
//! out of date; called between rounds, it leaves little for the end.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use twox_hash::XxHash3_64;

use super::memory::{Backing, SpaceId};
use super::objects::ObjectsWriter;
use super::pagemap::{BLOCK, Block, Codec, PAGE, Sorter, lock};
use super::pages::{Finished, is_zero, nameless};
use super::store::fs::create_file;
use super::store::{Partial, UNSOUND, Written, seal};
use super::{Manifest, verify};
use crate::kernel::buffer::Buffer;

/// Runs of pages by space: from, to (addresses), sorted and without overlaps.
pub type Populated = BTreeMap<SpaceId, Vec<(u64, u64)>>;

/// Takes pages: their address, their content, and whether that is zeros.
pub type TakeOut<'a> = dyn FnMut(u64, &[u8], bool) -> Result<()> + 'a;

/// Writes such an image. Dropped without [`RoundsWriter::finish`], it removes what it wrote. Threads share it.
pub struct RoundsWriter {
    path: PathBuf,
    partial: Partial,
    objects: ObjectsWriter,
    file: File,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// Index in `all`, by space and address / [`BLOCK`].
    index: HashMap<(SpaceId, u64), u32>,
    all: Vec<Place>,
    failed: bool,
}

/// One place in `pages`; bit n of a mask is its page n.
struct Place {
    space: SpaceId,
    block: u64,
    present: u16,
    /// Of the present ones: zero, and not in the file.
    zero: u16,
    /// Checksums of the runs of pages that are in the file: first page, pages, XXH3-64. None: out of date.
    sums: Option<Vec<(u8, u8, u64)>>,
}

impl RoundsWriter {
    /// Begins the image `path`, as `path`.partial.
    ///
    /// # Errors
    /// As for [`super::ImageWriter::create`].
    pub fn create(path: &Path) -> Result<Self> {
        let partial = Partial::create(path)?;
        Ok(Self {
            path: path.to_owned(),
            objects: ObjectsWriter::create(&partial.path, None)?,
            file: create_file(&partial.path.join("pages"), 0o600)?,
            partial,
            places: Mutex::default(),
        })
    }

    /// Takes whole pages; those that were there are replaced.
    ///
    /// # Errors
    /// When the file cannot be written; `finish` will then refuse.
    pub fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        ensure!(
            addr.is_multiple_of(PAGE as u64)
                && data.len().is_multiple_of(PAGE)
                && addr.checked_add(data.len() as u64).is_some(),
            "memory at {addr:#x} ({} bytes) of space {space} is not whole pages",
            data.len()
        );
        let mut places = lock(&self.places);
        let result = self.put_locked(&mut places, space, addr, data);
        places.failed |= result.is_err();
        result.with_context(|| format!("storing pages at {addr:#x} of space {space}"))
    }

    fn put_locked(
        &self,
        places: &mut Places,
        space: SpaceId,
        addr: u64,
        data: &[u8],
    ) -> Result<()> {
        // What goes to the file next: where, and which part of the data.
        let mut next: Option<(u64, usize, usize)> = None;
        let mut done = 0;
        while done < data.len() {
            let at = addr + done as u64;
            let first = (at % BLOCK as u64) as usize / PAGE;
            let len = (BLOCK - first * PAGE).min(data.len() - done);
            let window = data.get(done..done + len).unwrap_or_default();
            let (index, place) = places.at(space, at / BLOCK as u64)?;
            let offset = u64::from(index) * BLOCK as u64;
            for (from, to) in place.take(first, window) {
                let run = (
                    offset + (from * PAGE) as u64,
                    done + (from - first) * PAGE,
                    done + (to - first) * PAGE,
                );
                next = match next {
                    Some((o, a, b)) if o + (b - a) as u64 == run.0 && b == run.1 => {
                        Some((o, a, run.2))
                    }
                    Some(before) => {
                        self.write(before, data)?;
                        Some(run)
                    }
                    None => Some(run),
                };
            }
            done += len;
        }
        next.map_or(Ok(()), |last| self.write(last, data))
    }

    fn write(&self, (offset, from, to): (u64, usize, usize), data: &[u8]) -> Result<()> {
        let bytes = data.get(from..to).unwrap_or_default();
        self.file
            .write_all_at(bytes, offset)
            .with_context(|| format!("write: {}", self.partial.path.join("pages").display()))
    }

    /// Takes out again the pages of `start..end` that have come, and gives them to `take`.
    ///
    /// # Errors
    /// When the file cannot be read, and those of `take`.
    pub fn take_out(&self, space: SpaceId, start: u64, end: u64, take: &mut TakeOut) -> Result<()> {
        let mut places = lock(&self.places);
        let mut buffer = Buffer::new(BLOCK);
        for block in start / BLOCK as u64..end.div_ceil(BLOCK as u64) {
            let Some(index) = places.index.get(&(space, block)).copied() else {
                continue;
            };
            let Some(place) = places.all.get_mut(index as usize) else {
                continue;
            };
            let base = block * BLOCK as u64;
            let wanted =
                (0..BLOCK / PAGE).filter(|i| (start..end).contains(&(base + (i * PAGE) as u64)));
            let wanted = place.present & wanted.fold(0, |mask, i| mask | 1u16 << i);
            for (mask, zero) in [(wanted & place.zero, true), (wanted & !place.zero, false)] {
                for (from, to) in runs(mask) {
                    let bytes = buffer.get_mut(..(to - from) * PAGE).unwrap_or_default();
                    if zero {
                        bytes.fill(0);
                    } else {
                        let at = u64::from(index) * BLOCK as u64 + (from * PAGE) as u64;
                        self.file.read_exact_at(bytes, at).with_context(|| {
                            format!("read: {}", self.partial.path.join("pages").display())
                        })?;
                        place.sums = None;
                    }
                    take(base + (from * PAGE) as u64, bytes, zero)?;
                }
            }
            place.present &= !wanted;
            place.zero &= !wanted;
        }
        Ok(())
    }

    /// Takes an object's content, as [`super::ImageWriter::add_object`] does.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn add_object(&self, file: &File) -> Result<String> {
        self.objects
            .add(file)
            .context("carrying a file in the image")
    }

    /// Computes checksums that are out of date.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn settle(&self) -> Result<()> {
        let mut places = lock(&self.places);
        let mut buffer = vec![0; BLOCK];
        for (index, place) in places.all.iter_mut().enumerate() {
            if place.sums.is_none() {
                let mask = place.present & !place.zero;
                place.sums = Some(self.sums(index, &runs(mask), &mut buffer)?);
            }
        }
        Ok(())
    }

    /// Checksums of these runs of pages.
    fn sums(
        &self,
        index: usize,
        runs: &[(usize, usize)],
        buffer: &mut [u8],
    ) -> Result<Vec<(u8, u8, u64)>> {
        let mut sums = Vec::new();
        for &(from, to) in runs {
            let bytes = buffer
                .get_mut(..(to - from) * PAGE)
                .context("a run is longer than its place")?;
            self.file
                .read_exact_at(bytes, (index * BLOCK + from * PAGE) as u64)
                .with_context(|| format!("read: {}", self.partial.path.join("pages").display()))?;
            sums.push((from as u8, (to - from) as u8, XxHash3_64::oneshot(bytes)));
        }
        Ok(sums)
    }

    /// Whether [`RoundsWriter::finish`] would take this manifest.
    ///
    /// # Errors
    /// It is not sound.
    pub fn check(manifest: &Manifest) -> Result<()> {
        verify::check(manifest).map(drop).context(UNSOUND)
    }

    /// Makes it an image. Of the spaces in `populated` only the pages named there stay, and all of them must have
    /// come; other spaces stay as they are. `durable`: it is on disk when this returns.
    ///
    /// # Errors
    /// When a page is missing, something could not be written, or the manifest is not sound. Nothing is left then.
    pub fn finish(
        self,
        manifest: &Manifest,
        populated: &Populated,
        durable: bool,
    ) -> Result<Written> {
        let allowed = verify::check(manifest).context(UNSOUND)?;
        let mut places = std::mem::take(&mut *lock(&self.places));
        ensure!(!places.failed, "memory could not be stored completely");
        places.index = HashMap::new();
        let len = places.all.len() as u64 * BLOCK as u64;
        self.file.set_len(len).context("ftruncate: pages")?;
        let mappings = Mappings::of(manifest);
        let mut order: Vec<usize> = (0..places.all.len()).collect();
        order.sort_unstable_by_key(|i| places.all.get(*i).map(|p| (p.space, p.block)));

        let mut out = Emitter {
            writer: &self,
            sorter: Sorter::default(),
            buffer: vec![0; BLOCK],
            stored: 0,
            pages: 0,
            zero: 0,
        };
        let mut came: BTreeMap<SpaceId, u64> = BTreeMap::new();
        let mut walk: BTreeMap<SpaceId, &[(u64, u64)]> = populated
            .iter()
            .map(|(space, runs)| (*space, runs.as_slice()))
            .collect();
        for index in order {
            let Some(place) = places.all.get(index) else {
                continue;
            };
            let wanted = match walk.get_mut(&place.space) {
                Some(runs) => wanted(runs, place.block),
                None => u16::MAX,
            };
            let keep = place.present & wanted;
            *came.entry(place.space).or_default() += u64::from(keep.count_ones());
            out.place(index, place, keep, &mappings)?;
        }
        for (space, runs) in populated {
            let expected: u64 = runs.iter().map(|(a, b)| (b - a) / PAGE as u64).sum();
            let got = came.get(space).copied().unwrap_or(0);
            ensure!(
                got == expected,
                "of {expected} pages of space {space} only {got} have come"
            );
        }
        let (sorter, stored, pages, zero) = (out.sorter, out.stored, out.pages, out.zero);
        let map = create_file(&self.partial.path.join("pagemap"), 0o600)?;
        let (map_len, map_hash) = sorter.write(&map, len, len - stored, &allowed)?;
        let finished = Finished {
            file: self.file,
            len,
            map,
            map_len,
            map_hash,
            pages,
            zero,
        };
        seal(
            &self.path,
            self.partial,
            self.objects,
            finished,
            manifest,
            durable,
        )
    }
}

impl Places {
    fn at(&mut self, space: SpaceId, block: u64) -> Result<(u32, &mut Place)> {
        let next = u32::try_from(self.all.len()).context("too much memory")?;
        let index = *self.index.entry((space, block)).or_insert(next);
        if index == next {
            self.all.push(Place {
                space,
                block,
                present: 0,
                zero: 0,
                sums: Some(Vec::new()),
            });
        }
        match self.all.get_mut(index as usize) {
            Some(place) => Ok((index, place)),
            None => bail!("the list of places is damaged"),
        }
    }
}

impl Place {
    /// Notes pages from `first` on; returns the runs of them (first, behind the last) that go to the file.
    fn take(&mut self, first: usize, window: &[u8]) -> Vec<(usize, usize)> {
        let (mut mask, mut zero) = (0u16, 0u16);
        for (i, page) in window.chunks_exact(PAGE).enumerate() {
            let bit = 1u16 << (first + i);
            mask |= bit;
            if is_zero(page) {
                zero |= bit;
            }
        }
        self.present |= mask;
        self.zero = self.zero & !mask | zero;
        let (stored, new) = (self.present & !self.zero, mask & !zero);
        // The sums are at hand if nothing but these pages is there.
        self.sums = (stored == new).then(|| {
            runs(new)
                .into_iter()
                .map(|(from, to)| {
                    let bytes = window.get((from - first) * PAGE..(to - first) * PAGE);
                    let sum = XxHash3_64::oneshot(bytes.unwrap_or_default());
                    (from as u8, (to - from) as u8, sum)
                })
                .collect()
        });
        runs(new)
    }
}

/// Runs of set bits: first, behind the last.
fn runs(mask: u16) -> Vec<(usize, usize)> {
    runs_between(mask, 0)
}

/// The same, each ended where a bit of `cuts` is set.
fn runs_between(mask: u16, cuts: u16) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for i in (0..16).filter(|i| mask >> i & 1 != 0) {
        match all.last_mut() {
            Some(last) if last.1 == i && cuts >> i & 1 == 0 => last.1 = i + 1,
            _ => all.push((i, i + 1)),
        }
    }
    all
}

/// Which pages of a block are in the runs; those that lie before it are taken off.
fn wanted(runs: &mut &[(u64, u64)], block: u64) -> u16 {
    let (start, end) = (block * BLOCK as u64, (block + 1) * BLOCK as u64);
    while let [(_, to), behind @ ..] = runs
        && *to <= start
    {
        *runs = behind;
    }
    let mut mask = 0;
    for (from, to) in runs.iter().take_while(|(from, _)| *from < end) {
        let first = (from.max(&start) - start) / PAGE as u64;
        let last = (to.min(&end) - start) / PAGE as u64;
        for i in first..last {
            mask |= 1 << i;
        }
    }
    mask
}

/// Where the mappings of each space begin, and whether something else than nothing is behind them: there a page of
/// zeros counts.
struct Mappings(HashMap<SpaceId, Vec<(u64, bool)>>);

impl Mappings {
    fn of(manifest: &Manifest) -> Self {
        let mut all = HashMap::new();
        for p in &manifest.processes {
            let mapping = |v: &super::Vma| {
                let over = !v.shared && !matches!(v.backing, Backing::Anonymous);
                (v.start, over && !v.is_kernel())
            };
            all.insert(p.space, p.vmas.iter().map(mapping).collect());
        }
        Self(all)
    }

    fn is_over(&self, space: SpaceId, addr: u64) -> bool {
        let all = self.0.get(&space).map_or(&[][..], Vec::as_slice);
        let behind = all.partition_point(|(start, _)| *start <= addr);
        let at = behind.checked_sub(1).and_then(|i| all.get(i));
        at.is_some_and(|(_, over)| *over)
    }

    /// The pages of a block at which a mapping begins: no run of pages goes over that.
    fn cuts(&self, space: SpaceId, block: u64) -> u16 {
        let all = self.0.get(&space).map_or(&[][..], Vec::as_slice);
        let (start, end) = (block * BLOCK as u64, (block + 1) * BLOCK as u64);
        let from = all.partition_point(|(at, _)| *at < start);
        let inside = all.get(from..).unwrap_or_default().iter();
        inside
            .take_while(|(at, _)| *at < end)
            .fold(0, |mask, (at, _)| mask | 1 << ((at - start) / PAGE as u64))
    }
}

/// Turns places into blocks of the pagemap.
struct Emitter<'a> {
    writer: &'a RoundsWriter,
    sorter: Sorter,
    buffer: Vec<u8>,
    stored: u64,
    pages: u64,
    zero: u64,
}

impl Emitter<'_> {
    fn place(&mut self, index: usize, place: &Place, keep: u16, mappings: &Mappings) -> Result<()> {
        let start = place.block * BLOCK as u64;
        let mask = keep & !place.zero;
        let cuts = mappings.cuts(place.space, place.block);
        let wanted = runs_between(mask, cuts);
        let same = |sums: &&Vec<(u8, u8, u64)>| {
            let there = |(first, pages, _): &(u8, u8, u64)| {
                (usize::from(*first), usize::from(first + pages))
            };
            sums.iter().map(there).eq(wanted.iter().copied())
        };
        let sums = match place.sums.as_ref().filter(same) {
            Some(sums) => sums.clone(),
            None => self.writer.sums(index, &wanted, &mut self.buffer)?,
        };
        let mut blocks: Vec<Block> = sums
            .into_iter()
            .map(|(first, pages, hash)| {
                let from = u64::from(first) * PAGE as u64;
                Block {
                    addr: start + from,
                    pages: u32::from(pages),
                    offset: (index * BLOCK) as u64 + from,
                    stored: u32::from(pages) * PAGE as u32,
                    codec: Codec::Raw,
                    hash,
                }
            })
            .collect();
        self.stored += blocks.iter().map(|b| u64::from(b.stored)).sum::<u64>();
        self.zero += u64::from((keep & place.zero).count_ones());
        for i in (0..16u64).filter(|i| keep & place.zero & 1 << i != 0) {
            let addr = start + i * PAGE as u64;
            if mappings.is_over(place.space, addr) {
                blocks.push(Block {
                    addr,
                    pages: 1,
                    offset: 0,
                    stored: 0,
                    codec: Codec::Zero,
                    hash: 0,
                });
            }
        }
        self.pages += blocks.iter().map(|b| u64::from(b.pages)).sum::<u64>();
        let dir = &self.writer.partial.path;
        self.sorter.push(place.space, &blocks, || nameless(dir))
    }
}
