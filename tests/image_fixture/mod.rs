//! A small real image that tests take apart.
#![allow(dead_code)] // each test file uses its part

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mistctl::image::{Compress, Image, ImageWriter, Manifest};

/// Where the fixture's large anonymous mapping begins and ends.
pub const START: u64 = 0x50_0000;
pub const END: u64 = 0x1050_0000;

pub fn manifest() -> Manifest {
    let text = include_str!("../data/manifest.json");
    serde_json::from_str(text).expect("tests/data/manifest.json")
}

/// Bytes that neither compress nor repeat.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Writes an image with a few runs of pages, zero pages, shared memory and a carried file.
pub fn write(path: &Path, store: Option<&Path>, compress: Compress) -> Manifest {
    let writer = ImageWriter::create(path, store, compress).expect("create");
    let mut data = noise(1, 40 * 4096);
    data[4096..3 * 4096].fill(0);
    data[20 * 4096..30 * 4096].fill(7);
    writer.pages().put(0, START, &data).expect("put");
    writer
        .pages()
        .put_over(0, 0x40_0000, &[vec![0; 4096], noise(2, 8192)].concat())
        .expect("put_over");
    writer
        .pages()
        .put(2, 0, &noise(3, 3 * 4096))
        .expect("put shared");
    let mut manifest = manifest();
    let carried = path.with_extension("carried");
    fs::write(&carried, noise(4, 10_000)).expect("write");
    let file = fs::File::open(&carried).expect("open");
    manifest.files[0].object = Some(writer.add_object(&file).expect("object"));
    fs::remove_file(&carried).expect("unlink");
    writer.finish(&manifest).expect("finish");
    manifest
}

/// Opens and verifies.
pub fn check(path: &Path) -> anyhow::Result<Image> {
    let image = Image::open(path)?;
    image.verify(&mut |_, _| {})?;
    Ok(image)
}

/// The error of an image that must not open, in one line.
pub fn error(path: &Path) -> String {
    match check(path) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(e) => format!("{e:#}"),
    }
}

/// Gives the image new files that are consistent among themselves, as an attacker would.
pub fn forge(path: &Path, name: &str, content: &[u8]) {
    replace(&path.join(name), content);
    let of = |n: &str| blake3::hash(&fs::read(path.join(n)).expect("read"));
    let sums = format!(
        "{}  manifest.json\n{}  pagemap\n",
        of("manifest.json"),
        of("pagemap")
    );
    replace(&path.join("checksums"), sums.as_bytes());
}

pub fn replace(path: &Path, content: &[u8]) {
    fs::remove_file(path).expect("unlink");
    fs::write(path, content).expect("write");
}

/// Copies an image.
pub fn copy(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir(to).expect("mkdir");
    for entry in fs::read_dir(from).expect("readdir") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
    to.to_owned()
}

pub fn same(a: &Manifest, b: &Manifest) -> bool {
    serde_json::to_value(a).expect("json") == serde_json::to_value(b).expect("json")
}

/// A test that plays two roles calls this first: the image it is to work on, if this is the child's.
pub fn child_role() -> Option<PathBuf> {
    std::env::var_os("IMAGE").map(PathBuf::from)
}

/// The child's role of the test of that name, for a process of its own.
pub fn child(test: &str, image: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("exe"));
    command
        .args(["--exact", "--nocapture", "--test-threads=1", test])
        .env("IMAGE", image);
    command
}

/// Runs a test's child role, which must succeed and `print_peak`; the most memory that it used, in KiB.
pub fn peak_of_child(test: &str) -> u64 {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = child(test, &dir.path().join("image"))
        .output()
        .expect("child");
    let text = String::from_utf8_lossy(&out.stdout);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}{error}");
    let (_, peak) = text.split_once("PEAK VmHWM:").expect("peak");
    let peak = peak.split_whitespace().next().expect("peak");
    peak.parse().expect("peak")
}

/// Tells the parent how much memory this process used at most.
pub fn print_peak() {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let peak = status.lines().find(|l| l.starts_with("VmHWM"));
    println!("PEAK {}", peak.expect("VmHWM"));
}
