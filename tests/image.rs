//! Pages of memory: what is put in an image comes out of it.

mod image_fixture;

use std::collections::BTreeMap;
use std::fs;

use image_fixture::{
    END, START, check, child_role, manifest, noise, peak_of_child, print_peak, same,
};
use mistctl::image::pages::{BLOCK, Codec, PAGE};
use mistctl::image::{Compress, Image, ImageWriter};
use proptest::prelude::*;

const COMPRESS: [Compress; 3] = [Compress::None, Compress::Lz4, Compress::Zstd];

/// Puts runs of pages and reads them back in every way there is.
fn roundtrip(compress: Compress, puts: &[(u64, u8, bool)]) {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = ImageWriter::create(&path, None, compress).expect("create");
    // What each page must be: none is not stored.
    let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let (mut zero, mut stored) = (0, 0);
    for (i, &(addr, len, over)) in puts.iter().enumerate() {
        let mut data = noise(i as u64, usize::from(len) * PAGE);
        for (n, page) in data.chunks_mut(PAGE).enumerate() {
            match (i + n * 7 + usize::from(len)) % 5 {
                0 | 1 => page.fill(0),
                2 => page[100..].fill(9),
                // All zero but the last byte.
                3 => page[..PAGE - 1].fill(0),
                _ => {}
            }
            *page.last_mut().expect("byte") |= u8::from((i + n * 7 + usize::from(len)) % 5 == 3);
        }
        let base = START + addr * PAGE as u64;
        if over {
            writer.pages().put_over(0, base, &data).expect("put_over");
        } else {
            writer.pages().put(0, base, &data).expect("put");
        }
        for (n, page) in data.chunks(PAGE).enumerate() {
            let is_zero = page.iter().all(|b| *b == 0);
            zero += u64::from(is_zero);
            if !is_zero || over {
                stored += 1;
                pages.insert(base + (n * PAGE) as u64, page.to_owned());
            }
        }
    }
    let written = writer.finish(&manifest()).expect("finish");
    assert_eq!((written.pages, written.pages_zero), (stored, zero));
    let size: u64 = ["pages", "pagemap", "manifest.json", "checksums"]
        .iter()
        .map(|f| path.join(f).metadata().expect("stat").len())
        .sum();
    assert_eq!(written.bytes_written, size);

    let image = check(&path).expect("open and verify");
    assert!(same(&image.manifest, &manifest()));
    let reader = image.pages();
    assert_eq!(reader.pages(), stored);
    // Block by block.
    let mut got = BTreeMap::new();
    for block in reader.blocks(0) {
        let block = block.expect("block");
        let mut out = vec![1; block.bytes()];
        reader.read(&block, &mut out).expect("read");
        assert_eq!(block.addr / BLOCK as u64, (block.end() - 1) / BLOCK as u64);
        assert!(compress != Compress::None || block.offset % PAGE as u64 == 0);
        assert_eq!(reader.find(0, block.end() - 1).expect("find"), Some(block));
        for (n, page) in out.chunks(PAGE).enumerate() {
            got.insert(block.addr + (n * PAGE) as u64, page.to_owned());
        }
    }
    assert!(got == pages, "blocks differ");
    // Run by run, in windows.
    let mut got = BTreeMap::new();
    let (mut out, mut scratch) = (vec![1; 1 << 20], Vec::new());
    for window in (START..START + (1 << 26)).step_by(1 << 21) {
        for run in reader.runs(0, window, window + (1 << 21), 1 << 20) {
            let run = run.expect("run");
            reader
                .read_run(&run, &mut out, &mut scratch)
                .expect("read_run");
            assert!(!run.is_zero() || out[..run.bytes()].iter().all(|b| *b == 0));
            for (n, page) in out[..run.bytes()].chunks(PAGE).enumerate() {
                got.insert(run.addr() + (n * PAGE) as u64, page.to_owned());
            }
        }
    }
    assert!(got == pages, "runs differ");
    for page in (START..START + (1 << 25)).step_by(PAGE) {
        let found = reader.find(0, page).expect("find").is_some();
        assert_eq!(found, pages.contains_key(&page), "{page:#x}");
    }
    assert!(reader.find(0, 0).expect("find").is_none());
    assert!(reader.find(7, START).expect("find").is_none());
    assert_eq!(reader.blocks(1).count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn what_was_put_comes_back(
        compress in 0..3usize,
        gaps in prop::collection::vec((0..60u64, 1..50u8, any::<bool>(), any::<u16>()), 1..10),
    ) {
        let mut at = 0;
        let mut puts: Vec<_> = gaps
            .iter()
            .map(|&(gap, len, over, order)| {
                at += gap;
                let put = (at, len, over);
                at += u64::from(len);
                (order, put)
            })
            .collect();
        // They come in any order.
        puts.sort_by_key(|p| p.0);
        let puts: Vec<_> = puts.into_iter().map(|p| p.1).collect();
        roundtrip(COMPRESS[compress], &puts);
    }
}

#[test]
fn a_page_given_twice_is_an_error() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
    writer
        .pages()
        .put(0, START, &noise(1, 16 * PAGE))
        .expect("put");
    writer
        .pages()
        .put(0, START + 8 * PAGE as u64, &noise(1, PAGE))
        .expect("put");
    let e = writer.finish(&manifest()).expect_err("twice");
    assert!(format!("{e:#}").contains("is there twice"), "{e:#}");
    assert_eq!(fs::read_dir(dir.path()).expect("readdir").count(), 0);
}

#[test]
fn memory_that_is_not_whole_pages_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let writer =
        ImageWriter::create(&dir.path().join("image"), None, Compress::None).expect("create");
    for (addr, len) in [
        (START + 1, PAGE),
        (START, PAGE - 1),
        (u64::MAX - 4095, 2 * PAGE),
    ] {
        assert!(writer.pages().put(0, addr, &vec![1; len]).is_err());
    }
}

#[test]
fn pages_outside_of_mappings_are_not_written() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    for (space, addr) in [(0, END), (1, START), (9, 0), (2, 1 << 20)] {
        let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
        writer
            .pages()
            .put(space, addr, &noise(1, PAGE))
            .expect("put");
        let e = format!("{:#}", writer.finish(&manifest()).expect_err("outside"));
        assert!(
            e.contains("belongs to no mapping") || e.contains("which nothing uses"),
            "{e}"
        );
    }
}

/// 200,000 blocks are more than are sorted in memory.
#[test]
fn memory_stays_small() {
    let Some(path) = child_role() else {
        let peak = peak_of_child("memory_stays_small");
        assert!(peak < 32 << 10, "{peak} kB");
        return;
    };
    let blocks = 200_000u64;
    let mut manifest = manifest();
    manifest.processes[0].vmas.truncate(2);
    manifest.processes[0].vmas[1].end = START + blocks * 2 * PAGE as u64;
    let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
    let page = vec![0; PAGE];
    for i in 0..blocks {
        // Each block comes once, out of order.
        let i = i * 7919 % blocks;
        let addr = START + i * 2 * PAGE as u64;
        writer.pages().put_over(0, addr, &page).expect("put");
    }
    writer.finish(&manifest).expect("finish");
    let image = Image::open(&path).expect("open");
    image.verify(&mut |_, _| {}).expect("verify");
    let mut next = START;
    for block in image.pages().blocks(0) {
        let block = block.expect("block");
        assert_eq!((block.addr, block.codec), (next, Codec::Zero));
        next += 2 * PAGE as u64;
    }
    assert_eq!(next, manifest.processes[0].vmas[1].end);
    for i in (0..blocks).step_by(997) {
        let addr = START + i * 2 * PAGE as u64;
        assert!(image.pages().find(0, addr).expect("find").is_some());
        assert!(
            image
                .pages()
                .find(0, addr + PAGE as u64)
                .expect("find")
                .is_none()
        );
    }
    print_peak();
}
