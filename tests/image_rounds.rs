//! Images whose memory comes in rounds: whatever came, the last state counts.

mod image_fixture;

use std::collections::BTreeMap;
use std::path::Path;

use image_fixture::{START, check, child_role, manifest, peak_of_child, print_peak};
use mistctl::image::rounds::Populated;
use mistctl::image::{Manifest, RoundsWriter};
use proptest::prelude::*;

const PAGE: u64 = 4096;
/// Pages that the tests use of the fixture's anonymous mapping, and of its mapping of a file.
const PAGES: u64 = 96;

/// What a page holds: nothing but zeros, or its number in every word.
fn page(value: u32) -> Vec<u8> {
    value
        .to_le_bytes()
        .iter()
        .copied()
        .cycle()
        .take(PAGE as usize)
        .collect()
}

#[derive(Debug, Clone)]
enum Op {
    /// Pages from this one on, each with its value.
    Put(u64, Vec<u32>),
    Settle,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let value = prop_oneof![1 => Just(0u32), 3 => 1..u32::MAX];
    let put = (0..PAGES, prop::collection::vec(value, 1..40)).prop_map(|(at, mut values)| {
        values.truncate((PAGES - at) as usize);
        Op::Put(at, values)
    });
    prop::collection::vec(prop_oneof![8 => put, 1 => Just(Op::Settle)], 0..30)
}

/// Runs of the pages that are in the set.
fn runs(kept: &BTreeMap<u64, u32>, base: u64) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for at in kept.keys().map(|i| base + i * PAGE) {
        match all.last_mut() {
            Some(last) if last.1 == at => last.1 += PAGE,
            _ => all.push((at, at + PAGE)),
        }
    }
    all
}

/// All pages of the image in this range, by number; pages of zeros left out.
fn read(path: &Path, base: u64) -> BTreeMap<u64, Vec<u8>> {
    let image = check(path).expect("open");
    let mut all = BTreeMap::new();
    for block in image.pages().blocks_in(0, base, base + PAGES * PAGE) {
        let block = block.expect("block");
        let mut bytes = vec![0; block.bytes()];
        image.pages().read(&block, &mut bytes).expect("read");
        for (i, page) in bytes.chunks_exact(PAGE as usize).enumerate() {
            all.insert((block.addr - base) / PAGE + i as u64, page.to_vec());
        }
    }
    all
}

fn without_others(mut manifest: Manifest) -> Manifest {
    for f in &mut manifest.files {
        f.object = None;
    }
    manifest
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_last_state_counts(ops in ops(), dropped in prop::collection::vec(0..PAGES, 0..20)) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("image");
        let writer = RoundsWriter::create(&path).expect("create");
        let mut model = BTreeMap::new();
        for op in ops {
            match op {
                Op::Settle => writer.settle().expect("settle"),
                Op::Put(at, values) => {
                    let data: Vec<u8> = values.iter().flat_map(|v| page(*v)).collect();
                    writer.put(0, START + at * PAGE, &data).expect("put");
                    model.extend((at..).zip(values));
                }
            }
        }
        for i in dropped {
            model.remove(&i);
        }
        let populated: Populated = [(0, runs(&model, START))].into();
        writer.finish(&without_others(manifest()), &populated, false).expect("finish");
        let wanted: BTreeMap<u64, Vec<u8>> = model
            .iter()
            .filter(|(_, value)| **value != 0)
            .map(|(i, value)| (*i, page(*value)))
            .collect();
        prop_assert!(read(&path, START) == wanted);
    }
}

#[test]
fn a_page_that_never_came_is_missed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = RoundsWriter::create(&path).expect("create");
    writer.put(0, START, &page(7)).expect("put");
    let populated: Populated = [(0, vec![(START, START + 2 * PAGE)])].into();
    let error = writer.finish(&without_others(manifest()), &populated, false);
    let error = error.expect_err("a page is missing").to_string();
    assert!(error.contains("of 2 pages of space 0 only 1"), "{error}");
    assert!(!path.exists() && !path.with_extension("partial").exists());
    assert_eq!(std::fs::read_dir(dir.path()).expect("readdir").count(), 0);
}

/// Zeros over a mapping of a file are recorded, for the file's content would show; over nothing they are not.
#[test]
fn zeros_over_a_file_count() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = RoundsWriter::create(&path).expect("create");
    let file = 0x40_0000;
    for at in [file, START] {
        writer.put(0, at, &page(7)).expect("put");
        writer.put(0, at, &page(0)).expect("put");
    }
    let populated: Populated = [(0, vec![(file, file + PAGE), (START, START + PAGE)])].into();
    writer
        .finish(&without_others(manifest()), &populated, false)
        .expect("finish");
    assert_eq!(read(&path, file), [(0, page(0))].into());
    assert!(read(&path, START).is_empty());
}

/// 4 GiB, some of it twice.
#[test]
fn memory_stays_small() {
    let Some(path) = child_role() else {
        let peak = peak_of_child("memory_stays_small");
        assert!(peak < 32 << 10, "{peak} kB");
        return;
    };
    let writer = RoundsWriter::create(&path).expect("create");
    let mut manifest = without_others(manifest());
    manifest.processes[0].vmas.truncate(2);
    let blocks = 65536u64;
    manifest.processes[0].vmas[1].end = START + (blocks << 16);
    // One page of each block: the file has holes and takes little of the disk.
    for (round, step) in [(1, 1), (2, 8)] {
        for i in (0..blocks).step_by(step) {
            let at = START + (i << 16) + round * PAGE;
            writer.put(0, at, &page(i as u32 + 1)).expect("put");
        }
        writer.settle().expect("settle");
    }
    let run = |i: u64| {
        let at = START + (i << 16) + PAGE;
        (at, at + if i.is_multiple_of(8) { 2 } else { 1 } * PAGE)
    };
    let populated: Populated = [(0, (0..blocks).map(run).collect())].into();
    writer.finish(&manifest, &populated, false).expect("finish");
    print_peak();
}
