//! How fast images are written and read, next to plain write() and pread() of the same bytes in the same run.
//!
//! `cargo bench --bench pages [-- DIR [MIB]]`; DIR is /dev/shm unless given, and each figure the best of five.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use mistctl::image::{Compress, Image, ImageWriter, Manifest};

const PIECE: usize = 1 << 20;
const ROUNDS: usize = 5;
const BASE: u64 = 0x50_0000;

fn manifest(size: u64) -> Manifest {
    let mut manifest: Manifest =
        serde_json::from_str(include_str!("../tests/data/manifest.json")).expect("manifest");
    manifest.processes[0].vmas.truncate(2);
    manifest.processes[0].vmas[1].end = BASE + size;
    manifest
}

/// Incompressible bytes (xorshift).
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out
}

fn best(mut f: impl FnMut()) -> f64 {
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64() * 1e3
        })
        .fold(f64::MAX, f64::min)
}

/// Two threads take pieces in turn.
fn two(pieces: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= pieces {
                        break;
                    }
                    work(i);
                }
            });
        }
    });
}

fn plain(path: &Path, data: &[u8], sync: bool) {
    let mut file = File::create(path).expect("create");
    for piece in data.chunks(PIECE) {
        file.write_all(piece).expect("write");
    }
    if sync {
        file.sync_all().expect("fsync");
    }
}

fn image(path: &Path, data: &[u8], compress: Compress) {
    let writer = ImageWriter::create(path, None, compress).expect("create");
    two(data.len() / PIECE, |i| {
        let piece = &data[i * PIECE..(i + 1) * PIECE];
        writer
            .pages()
            .put(0, BASE + (i * PIECE) as u64, piece)
            .expect("put");
    });
    writer.finish(&manifest(data.len() as u64)).expect("finish");
}

fn main() {
    // Cargo says so; `cargo test --all-targets` does not, and has other things to do than this.
    if !std::env::args().any(|a| a == "--bench") {
        println!("only with --bench, as `cargo bench --bench pages` has it");
        return;
    }
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let dir = PathBuf::from(args.first().map_or("/dev/shm", String::as_str));
    let mib: usize = args.get(1).map_or(1024, |s| s.parse().expect("MIB"));
    let dir = tempfile::tempdir_in(dir).expect("tempdir");
    let (file, img) = (dir.path().join("plain"), dir.path().join("image"));
    let mut data = noise(mib << 20);

    let remove = |p: &Path| {
        let _ = std::fs::remove_file(p);
        let _ = std::fs::remove_dir_all(p);
    };
    let line = |what: &str, ms: f64, base: f64| {
        println!(
            "{what:44} {ms:9.1} ms  {:6.2} GiB/s  ratio {:.2}",
            mib as f64 / 1.024 / ms,
            ms / base
        );
    };
    println!("{mib} MiB of noise in {}", dir.path().display());
    let write = best(|| {
        remove(&file);
        plain(&file, &data, false);
    });
    line("plain write, one thread", write, write);
    let synced = best(|| {
        remove(&file);
        plain(&file, &data, true);
    });
    line("plain write and fsync, one thread", synced, synced);
    let ms = best(|| {
        remove(&img);
        image(&img, &data, Compress::None);
    });
    line("image, two threads, to the end of finish", ms, synced);

    let plain_file = File::open(&file).expect("open");
    let pread = best(|| {
        let buffers: Vec<_> = (0..2)
            .map(|_| std::sync::Mutex::new(vec![0u8; PIECE]))
            .collect();
        two(data.len() / PIECE, |i| {
            let mut buffer = buffers
                .iter()
                .find_map(|b| b.try_lock().ok())
                .expect("buffer");
            plain_file
                .read_exact_at(&mut buffer, (i * PIECE) as u64)
                .expect("pread");
        });
    });
    line("plain pread, two threads", pread, pread);
    let open = best(|| drop(Image::open(&img).expect("open")));
    println!("{:44} {open:9.1} ms", "open");
    let image_file = Image::open(&img).expect("open");
    let ms = best(|| {
        let buffers: Vec<_> = (0..2)
            .map(|_| std::sync::Mutex::new((vec![0u8; PIECE], Vec::new())))
            .collect();
        two(data.len() / PIECE, |i| {
            let mut buffer = buffers
                .iter()
                .find_map(|b| b.try_lock().ok())
                .expect("buffer");
            let (out, scratch) = &mut *buffer;
            let start = BASE + (i * PIECE) as u64;
            for run in image_file
                .pages()
                .runs(0, start, start + PIECE as u64, PIECE)
            {
                image_file
                    .pages()
                    .read_run(&run.expect("run"), out, scratch)
                    .expect("read");
            }
        });
    });
    line("read_run, two threads, checked", ms, pread);
    let ms = best(|| {
        for i in 0..10_000u64 {
            let addr = BASE + (i * 7919 * 4096) % data.len() as u64;
            image_file
                .pages()
                .find(0, addr)
                .expect("find")
                .expect("block");
        }
    });
    println!("{:44} {:9.3} us", "find at random", ms / 10.0);

    // Half the pages zero, each other page.
    for page in data.chunks_mut(8192) {
        page[..4096].fill(0);
    }
    let ms = best(|| {
        remove(&img);
        image(&img, &data, Compress::None);
    });
    println!("{:44} {ms:9.1} ms", "image, each other page zero");
    data.fill(0);
    let ms = best(|| {
        remove(&img);
        image(&img, &data, Compress::None);
    });
    println!("{:44} {ms:9.1} ms", "image, all zero");

    let mut data = noise(data.len().min(256 << 20));
    for page in data.chunks_mut(4096) {
        page[1024..].fill(7);
    }
    for (name, compress) in [("lz4", Compress::Lz4), ("zstd", Compress::Zstd)] {
        let ms = best(|| {
            remove(&img);
            image(&img, &data, compress);
        });
        let (mib, len) = (
            data.len() >> 20,
            img.join("pages").metadata().expect("stat").len(),
        );
        println!(
            "{name:5} {mib} MiB, a quarter noise: {ms:22.1} ms, to {} MiB",
            len >> 20
        );
    }
}
