//! A real image of which fuzz targets replace one file, with checksums that fit: an attacker's would.

use std::fs;
use std::path::PathBuf;

use mistctl::image::{Compress, Image, ImageWriter, Manifest};

const START: u64 = 0x50_0000;

pub struct Fixture {
    _dir: tempfile::TempDir,
    image: PathBuf,
}

impl Default for Fixture {
    fn default() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("tempdir");
        let image = dir.path().join("image");
        let manifest: Manifest =
            serde_json::from_str(include_str!("../tests/data/manifest.json")).expect("manifest");
        let writer = ImageWriter::create(&image, None, Compress::Zstd).expect("create");
        let mut data = vec![1; 40 * 4096];
        data[4096..3 * 4096].fill(0);
        data[70_000..].iter_mut().enumerate().for_each(|(i, b)| *b = (i * i / 7) as u8);
        writer.pages().put(0, START, &data).expect("put");
        writer.pages().put_over(2, 0, &[0; 8192]).expect("put_over");
        writer.finish(&manifest).expect("finish");
        Self { _dir: dir, image }
    }
}

impl Fixture {
    /// Replaces a file and uses the image as a restore would.
    pub fn try_with(&self, name: &str, content: &[u8]) {
        fs::write(self.image.join(name), content).expect("write");
        let hash = |n: &str| blake3::hash(&fs::read(self.image.join(n)).expect("read"));
        let sums = format!("{}  manifest.json\n{}  pagemap\n", hash("manifest.json"), hash("pagemap"));
        fs::write(self.image.join("checksums"), sums).expect("write");
        let Ok(image) = Image::open(&self.image) else { return };
        let _ = image.verify(&mut |_, _| {});
        let (mut out, mut scratch) = (vec![0; 1 << 18], Vec::new());
        for space in image.pages().spaces().collect::<Vec<_>>() {
            for block in image.pages().blocks(space) {
                let block = block.expect("was checked");
                let found = image.pages().find(space, block.end() - 1).expect("was checked");
                assert_eq!(found, Some(block));
            }
            for run in image.pages().runs(space, START + 4096, u64::MAX, 1 << 18) {
                let _ = image.pages().read_run(&run.expect("was checked"), &mut out, &mut scratch);
            }
        }
    }
}
