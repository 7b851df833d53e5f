//! Memory that is put in its place as it arrives: whatever came, and whatever the mappings have become meanwhile, the
//! last state counts, here or in the image.

mod image_fixture;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use image_fixture::{check, manifest};
use mistctl::image::memory::Backing;
use mistctl::image::rounds::Populated;
use mistctl::image::{Manifest, RoundsWriter, Vma};
use mistctl::restore::{Announced, Placed, Placing};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const PAGES: u64 = 600;
const RW: (i32, bool) = (libc::PROT_READ | libc::PROT_WRITE, true);

/// Where nothing else is, in this process and for this test alone.
fn base() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x2000_0000_0000);
    NEXT.fetch_add(16 << 20, Ordering::Relaxed)
}

fn page(value: u32) -> Vec<u8> {
    value.to_le_bytes().repeat(PAGE as usize / 4)
}

/// Private memory; what can be read only has never been writable, or it has.
fn mapping(base: u64, pages: (u64, u64), (prot, was_writable): (i32, bool)) -> Vma {
    Vma {
        start: base + pages.0 * PAGE,
        end: base + pages.1 * PAGE,
        prot,
        shared: false,
        offset: 0,
        backing: Backing::Anonymous,
        flags: Vec::from_iter(was_writable.then(|| "ac".to_owned())),
        name: None,
        guards: Vec::new(),
        policy: None,
    }
}

fn announced(base: u64, pages: (u64, u64)) -> Announced {
    let Vma { start, end, .. } = mapping(base, pages, RW);
    Announced {
        start,
        end,
        no_reserve: false,
    }
}

/// An image whose only process has mapped this.
fn of(vmas: Vec<Vma>) -> Manifest {
    let mut manifest = manifest();
    manifest.files.iter_mut().for_each(|f| f.object = None);
    let first = &mut manifest.processes[0];
    first.vmas.extend(vmas);
    first.vmas.sort_by_key(|v| v.start);
    manifest
}

/// What stands at a page of ours.
fn ours(addr: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    let memory = File::open("/proc/self/mem").expect("open");
    memory.read_exact_at(&mut bytes, addr).expect("read");
    bytes
}

fn is_mapped(addr: u64) -> bool {
    let maps = mistctl::kernel::maps::ours().expect("maps");
    maps.iter().any(|m| (m.start..m.end).contains(&addr))
}

/// The pages, by address, that are in the image or in their place; those of zeros left out.
fn all(path: &Path, base: u64, placed: &Placed) -> BTreeMap<u64, Vec<u8>> {
    let image = check(path).expect("open");
    let mut all = BTreeMap::new();
    for block in image.pages().blocks_in(0, base, base + PAGES * PAGE) {
        let block = block.expect("block");
        let mut bytes = vec![0; block.bytes()];
        image.pages().read(&block, &mut bytes).expect("read");
        for (i, page) in bytes.chunks_exact(PAGE as usize).enumerate() {
            all.insert(block.addr + i as u64 * PAGE, page.to_vec());
        }
    }
    for (start, end) in &placed.mappings {
        for addr in (*start..*end).step_by(PAGE as usize) {
            let page = ours(addr);
            assert!(!all.contains_key(&addr), "{addr:#x} is in both");
            if page.iter().any(|byte| *byte != 0) {
                all.insert(addr, page);
            }
        }
    }
    all
}

fn runs(pages: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for at in pages {
        match all.last_mut() {
            Some(last) if last.1 == at => last.1 += PAGE,
            _ => all.push((at, at + PAGE)),
        }
    }
    all
}

#[derive(Debug, Clone)]
enum Op {
    /// Pages from this one on, each with its value.
    Put(u64, Vec<u32>),
    Zeros(u64, u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let put =
        (0..PAGES, prop::collection::vec(1..u32::MAX, 1..300)).prop_map(|(at, mut values)| {
            values.truncate((PAGES - at) as usize);
            Op::Put(at, values)
        });
    let zeros = (0..PAGES, 1..200u64).prop_map(|(at, n)| Op::Zeros(at, n.min(PAGES - at)));
    prop::collection::vec(prop_oneof![3 => put, 1 => zeros], 0..20)
}

/// First page, behind the last, protection, whether it has ever been writable.
type Cut = ((u64, u64), (i32, bool));

/// Cuts into mappings that lie side by side, or not, of several kinds.
fn cuts() -> impl Strategy<Value = Vec<Cut>> {
    let ends = prop::collection::btree_set(0..PAGES, 2..8);
    let kinds = prop::collection::vec(
        prop_oneof![
            4 => Just(RW),
            2 => (Just(libc::PROT_READ), any::<bool>())
        ],
        8,
    );
    (ends, kinds).prop_map(|(ends, kinds)| {
        let ends: Vec<u64> = ends.into_iter().collect();
        let pairs = ends.windows(2).map(|w| (w[0], w[1])).zip(kinds);
        // Between some there is nothing.
        pairs
            .enumerate()
            .filter(|(i, _)| i % 3 != 2)
            .map(|(_, cut)| cut)
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_last_state_counts(
        first in (0..PAGES / 2, 1..PAGES / 2),
        second in (PAGES / 2..PAGES - 10, 1..10u64),
        ops in ops(),
        cuts in cuts(),
        dropped in prop::collection::vec(0..PAGES, 0..40),
    ) {
        let base = base();
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("image");
        let writer = RoundsWriter::create(&path).expect("create");
        let mut placing = Placing::new(0);
        for (start, len) in [first, second] {
            placing.announce(&announced(base, (start, start + len))).expect("announce");
        }
        let mut model = BTreeMap::new();
        for op in ops {
            match op {
                Op::Put(at, values) => {
                    let data: Vec<u8> = values.iter().flat_map(|v| page(*v)).collect();
                    placing.put(&writer, 0, base + at * PAGE, &data).expect("put");
                    model.extend((at..).zip(values));
                }
                Op::Zeros(at, n) => {
                    placing.put_zeros(&writer, 0, base + at * PAGE, n * PAGE).expect("put");
                    model.extend((at..at + n).map(|i| (i, 0)));
                }
            }
        }
        // Of another space, at the same addresses.
        placing.put(&writer, 7, base, &page(1)).expect("put");
        for i in &dropped {
            model.remove(i);
        }
        model.retain(|i, _| cuts.iter().any(|((from, to), _)| (from..to).contains(&i)));
        let vmas = cuts.iter().map(|(pages, prot)| mapping(base, *pages, *prot)).collect();
        let manifest = of(vmas);
        let mut populated: Populated =
            [(0, runs(model.keys().map(|i| base + i * PAGE))), (7, Vec::new())].into();
        let placed = placing
            .settle(&manifest.processes[0], &mut populated, &writer)
            .expect("settle");
        writer.finish(&manifest, &populated, false).expect("finish");
        let wanted: BTreeMap<u64, Vec<u8>> = model
            .iter()
            .filter(|(_, value)| **value != 0)
            .map(|(i, value)| (base + i * PAGE, page(*value)))
            .collect();
        prop_assert!(all(&path, base, &placed) == wanted);
        // Nothing is mapped but what is placed, and that is the program's.
        for i in 0..PAGES {
            let addr = base + i * PAGE;
            let in_place = placed.mappings.iter().any(|(a, b)| (*a..*b).contains(&addr));
            prop_assert_eq!(is_mapped(addr), in_place);
        }
        let mut announced = [first, second].map(|(start, len)| (start, start + len)).to_vec();
        if announced[0].1 > announced[1].0 {
            // It was in the way.
            announced.pop();
        }
        let overlaps = |(a, b): (u64, u64)| {
            announced.iter().filter(|(c, d)| a < *d && *c < b).count() == 1
        };
        // What has been one is placed as one.
        let were_one = |a: &Cut, b: &Cut| a.0.1 == b.0.0 && a.1.1 == b.1.1;
        let could_be = cuts.chunk_by(were_one).filter(|all| {
            let (first, last) = (all[0], all[all.len() - 1]);
            first.1.1 && overlaps((first.0.0, last.0.1))
        });
        let could_be = could_be.map(<[Cut]>::len);
        prop_assert_eq!(placed.mappings.len(), could_be.sum::<usize>());
        for (start, end) in &placed.mappings {
            let is_it = |((a, b), _): &Cut| {
                (base + a * PAGE, base + b * PAGE) == (*start, *end)
            };
            prop_assert!(cuts.iter().any(is_it));
        }
    }
}

#[test]
fn a_page_that_never_came_is_missed() {
    let base = base();
    let dir = tempfile::tempdir().expect("tempdir");
    let writer = RoundsWriter::create(&dir.path().join("image")).expect("create");
    let mut placing = Placing::new(0);
    placing
        .announce(&announced(base, (0, 300)))
        .expect("announce");
    placing.put(&writer, 0, base, &page(7)).expect("put");
    let manifest = of(vec![mapping(base, (0, 300), RW)]);
    let mut populated: Populated = [(0, vec![(base, base + 3 * PAGE)])].into();
    let error = placing.settle(&manifest.processes[0], &mut populated, &writer);
    let error = format!("{:#}", error.expect_err("two pages are missing"));
    assert!(error.contains("of 2 pages"), "{error}");
}

/// What stands in the way here goes into the image, and nothing of ours is touched.
#[test]
fn where_something_is_nothing_is_placed() {
    let base = base();
    mistctl::kernel::mem::map_fixed(base + PAGE, PAGE, RW.0, 0).expect("mmap");
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = RoundsWriter::create(&path).expect("create");
    let mut placing = Placing::new(0);
    placing
        .announce(&announced(base, (0, 300)))
        .expect("announce");
    placing
        .put(&writer, 0, base, &page(7).repeat(3))
        .expect("put");
    let manifest = of(vec![mapping(base, (0, 300), RW)]);
    let mut populated: Populated = [(0, vec![(base, base + 3 * PAGE)])].into();
    let placed = placing
        .settle(&manifest.processes[0], &mut populated, &writer)
        .expect("settle");
    writer.finish(&manifest, &populated, false).expect("finish");
    assert!(placed.mappings.is_empty());
    assert_eq!(all(&path, base, &placed).len(), 3);
    assert_eq!(ours(base + PAGE), page(0));
}

#[test]
fn what_is_no_mapping_is_refused() {
    let base = base();
    let mut placing = Placing::new(0);
    for (start, end) in [
        (base, base),
        (base + PAGE, base),
        (base + 1, base + PAGE),
        (0, u64::MAX),
    ] {
        let no_reserve = false;
        let announced = Announced {
            start,
            end,
            no_reserve,
        };
        placing.announce(&announced).expect_err("no mapping");
    }
    // The program's own memory, of all places.
    let own = std::ptr::from_ref(&PAGES) as u64;
    let own = own - own % PAGE;
    placing
        .announce(&announced(own, (0, 1)))
        .expect("not placed");
    assert!(is_mapped(own));
    // Of more than that would be noted what has come of it.
    let far = 0x1000_0000_0000;
    let most = (64 << 30) / PAGE;
    placing
        .announce(&announced(far, (0, most + 1)))
        .expect_err("too much");
    for i in 0..3 {
        let mut announced = announced(far, (i * most, (i + 1) * most));
        announced.no_reserve = true;
        placing.announce(&announced).expect("placed or not");
        assert_eq!(is_mapped(far + i * most * PAGE), i == 0);
    }
}
