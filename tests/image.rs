//! Images: what is put in comes out, whole or not at all.

use mistctl::image::{Compress, Image, ImageWriter, Manifest};

fn manifest() -> Manifest {
    let text = include_str!("data/manifest.json");
    serde_json::from_str(text).expect("tests/data/manifest.json")
}

#[test]
fn what_was_put_comes_back() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
    let data: Vec<u8> = (0..5 * 4096u32).map(|i| (i / 4096 + i) as u8).collect();
    writer.pages().put(0, 0x40_0000, &data).expect("put");
    let written = writer.finish(&manifest()).expect("finish");
    assert_eq!((written.pages, written.pages_zero), (5, 0));

    let image = Image::open(&path).expect("open");
    image.verify(&mut |_, _| {}).expect("verify");
    let block = image
        .pages()
        .find(0, 0x40_1000)
        .expect("find")
        .expect("block");
    let mut out = vec![0; block.bytes()];
    image.pages().read(&block, &mut out).expect("read");
    assert_eq!(out, data);
}
