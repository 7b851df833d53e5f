//! Images as directories: there whole or not at all, shared where they can be, removed with care.

mod image_fixture;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use image_fixture::{START, check, child, child_role, error, manifest, noise, write};
use mistctl::image::dated::{self, Look};
use mistctl::image::{Compress, Image, ImageWriter};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

#[test]
fn an_image_has_its_name_only_when_it_is_finished() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let partial = dir.path().join("image.partial");
    let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
    assert!(partial.exists() && !path.exists());
    let e = ImageWriter::create(&path, None, Compress::None)
        .err()
        .expect("busy");
    assert!(
        format!("{e:#}").contains("another process is writing"),
        "{e:#}"
    );
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).expect("readdir").count(), 0);

    // What a dead writer left is replaced.
    fs::create_dir(&partial).expect("mkdir");
    fs::write(partial.join("pages"), "old").expect("write");
    write(&path, None, Compress::None);
    check(&path).expect("sound");
    assert!(!partial.exists());
    let mode = |p: &Path| p.metadata().expect("stat").permissions().mode() & 0o7777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("objects")), 0o700);
    for name in ["pages", "pagemap", "manifest.json", "checksums"] {
        assert_eq!(mode(&path.join(name)), 0o600, "{name}");
    }

    let e = ImageWriter::create(&path, None, Compress::None)
        .err()
        .expect("exists");
    assert!(format!("{e:#}").contains("exists"), "{e:#}");
    let e = ImageWriter::create(&dir.path().join("no/image"), None, Compress::None)
        .err()
        .expect("no directory");
    assert!(format!("{e:#}").contains("mkdir"), "{e:#}");
}

#[test]
fn nothing_that_is_not_of_a_dead_writer_is_removed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let partial = dir.path().join("image.partial");
    let refused = |path: &Path| {
        let e = ImageWriter::create(path, None, Compress::None)
            .err()
            .expect("refused");
        format!("{e:#}")
    };
    // Files of a user, wherever they are.
    for precious in ["mine", "objects/mine", "objects/sub/mine", "pages/mine"] {
        let precious = partial.join(precious);
        fs::create_dir_all(precious.parent().expect("parent")).expect("mkdir");
        fs::write(&precious, "precious").expect("write");
        let e = refused(&path);
        assert!(
            e.contains("image.partial") && e.contains("holds something else"),
            "{e}"
        );
        assert_eq!(fs::read(&precious).expect("read"), b"precious");
        fs::remove_dir_all(&partial).expect("remove");
    }
    // An image of that name would be taken for an unfinished one.
    let e = refused(&partial);
    assert!(e.contains("choose another"), "{e}");
    // All that a writer leaves.
    fs::create_dir_all(partial.join("objects")).expect("mkdir");
    let object = "0123456789abcdef".repeat(4);
    for name in [
        "pages",
        "pagemap",
        "manifest.json",
        "checksums",
        "objects/7.new",
        &format!("objects/{object}"),
    ] {
        fs::write(partial.join(name), "old").expect("write");
    }
    write(&path, None, Compress::None);
    check(&path).expect("sound");
    assert!(!partial.exists());
}

#[test]
fn an_unsound_manifest_is_not_written() {
    let dir = tempfile::tempdir().expect("tempdir");
    let writer =
        ImageWriter::create(&dir.path().join("image"), None, Compress::None).expect("create");
    let mut manifest = manifest();
    manifest.processes[0].exe = 99;
    let e = writer.finish(&manifest).expect_err("unsound");
    assert!(
        format!("{e:#}").contains("process 100: exe 99 does not exist"),
        "{e:#}"
    );
    assert_eq!(fs::read_dir(dir.path()).expect("readdir").count(), 0);
}

#[test]
fn images_of_a_store_share_carried_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = dir.path();
    let (a, b, c) = (store.join("a"), store.join("b"), store.join("c"));
    let name = |path: &Path| {
        write(path, Some(store), Compress::None).files[0]
            .object
            .clone()
            .expect("name")
    };
    let object = name(&a);
    assert_eq!(object, name(&b));
    let inode = |image: &Path| {
        let meta = image
            .join("objects")
            .join(&object)
            .metadata()
            .expect("stat");
        assert_eq!(meta.permissions().mode() & 0o7777, 0o500);
        meta.ino()
    };
    assert_eq!(inode(&a), inode(&b));

    // A damaged copy is not shared.
    let bad = b.join("objects").join(&object);
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o600)).expect("chmod");
    File::options()
        .write(true)
        .open(&bad)
        .and_then(|mut f| f.write_all(b"X"))
        .expect("damage");
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o500)).expect("chmod");
    name(&c);
    assert_ne!(inode(&b), inode(&c));
    check(&c).expect("sound");
    assert!(error(&b).contains("BLAKE3"));
    let image = Image::open(&b).expect("opens");
    assert!(image.object(&object).is_ok() && image.object_verified(&object).is_err());
    for wrong in [
        "",
        "x",
        "../pages",
        &"g".repeat(64),
        &"0".repeat(64),
        &"A".repeat(64),
    ] {
        assert!(image.object(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_content_is_carried_once() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("image");
    let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
    let names: Vec<String> = ["one", "two", "one"]
        .iter()
        .map(|n| {
            let file = dir.path().join(n);
            fs::write(&file, "the same").expect("write");
            writer
                .add_object(&File::open(&file).expect("open"))
                .expect("object")
        })
        .collect();
    assert_eq!(names[0], blake3::hash(b"the same").to_hex().as_str());
    assert!(names.iter().all(|n| *n == names[0]));
    assert!(
        writer
            .add_object(&File::open(dir.path()).expect("open"))
            .is_err()
    );
    let written = writer.finish(&manifest()).expect("finish");
    assert_eq!(
        fs::read_dir(path.join("objects")).expect("readdir").count(),
        1
    );
    let files: u64 = ["pages", "pagemap", "manifest.json", "checksums"]
        .iter()
        .map(|f| path.join(f).metadata().expect("stat").len())
        .sum();
    assert_eq!(written.bytes_written, files + 8);
}

#[test]
fn a_killed_writer_leaves_no_half_image() {
    // The writer makes one image after the other until it is killed.
    if let Some(path) = child_role() {
        for i in 0..1000 {
            let name = format!("{}-{i}", path.display());
            write(Path::new(&name), None, Compress::Zstd);
        }
        return;
    }
    let (mut partials, mut images) = (0, 0);
    for round in 0..100u64 {
        // In memory, where the steps follow each other fast and all are met.
        let dir = tempfile::tempdir_in("/dev/shm").expect("tempdir");
        let mut child = child(
            "a_killed_writer_leaves_no_half_image",
            &dir.path().join("image"),
        )
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("spawn");
        // No event is waited for: the moment is to be a random one.
        let delay = noise(round, 2);
        std::thread::sleep(Duration::from_micros(
            5000 + u64::from(u16::from_le_bytes([delay[0], delay[1]])) / 2,
        ));
        child.kill().expect("kill");
        child.wait().expect("wait");
        let entries: Vec<PathBuf> = fs::read_dir(dir.path())
            .expect("readdir")
            .map(|e| e.expect("entry").path())
            .collect();
        for path in entries {
            match path.extension().and_then(|e| e.to_str()) {
                None => {
                    images += 1;
                    check(&path).expect("what has an image's name is sound");
                }
                Some("partial") => {
                    partials += 1;
                    let again = path.with_extension("");
                    write(&again, None, Compress::None);
                    check(&again).expect("the next image is sound");
                    assert!(!path.exists());
                }
                // The fixture's own file.
                Some(other) => assert_eq!(other, "carried"),
            }
        }
    }
    println!("100 writers were killed: {images} images, {partials} partial ones");
    assert!(partials > 0, "no writer was killed while it wrote");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let disk = dir.path().to_owned();
    let mut carried = tempfile::tempfile().expect("tempfile");
    carried.write_all(&noise(2, 20_000)).expect("write");
    // A mount namespace is a thread's own.
    std::thread::spawn(move || {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        let none: Option<&str> = None;
        let mounted = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, private, none))
            .and_then(|()| {
                mount(
                    Some("disk"),
                    &disk,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    Some("size=1m"),
                )
            });
        if let Err(e) = mounted {
            println!("SKIPPED: a full disk needs a file system of its own (unshare, mount: {e})");
            return;
        }
        let path = disk.join("image");
        // With each page more that is left on the disk, it gets full at a later step.
        let mut filler = File::create(disk.join("filler")).expect("create");
        while filler.write_all(&[1; 4096]).is_ok() {}
        let full = filler.metadata().expect("stat").len();
        let mut failed = 0;
        for free in 0.. {
            filler.set_len(full - free * 4096).expect("truncate");
            let result = (|| -> anyhow::Result<()> {
                let writer = ImageWriter::create(&path, None, Compress::None)?;
                writer.pages().put(0, START, &noise(1, 12288))?;
                writer.add_object(&carried)?;
                writer.finish(&manifest())?;
                Ok(())
            })();
            match result {
                Ok(()) => break,
                Err(e) => assert!(
                    format!("{e:#}").contains("No space left on device"),
                    "{e:#}"
                ),
            }
            failed += 1;
            let there: Vec<_> = fs::read_dir(&disk)
                .expect("readdir")
                .map(|e| e.expect("entry").file_name())
                .collect();
            assert_eq!(there, ["filler"]);
        }
        assert!(failed > 8, "only {failed} attempts met a full disk");
        check(&path).expect("the one that had room is sound");
        fs::remove_dir_all(&path).expect("remove");
        // A writer that goes on after an error is not believed.
        fs::remove_file(disk.join("filler")).expect("unlink");
        let writer = ImageWriter::create(&path, None, Compress::None).expect("create");
        assert!(writer.pages().put(0, START, &noise(1, 2 << 20)).is_err());
        let e = writer.finish(&manifest()).expect_err("pages are missing");
        assert!(format!("{e:#}").contains("could not be stored"), "{e:#}");
        umount2(&disk, MntFlags::MNT_DETACH).expect("umount");
    })
    .join()
    .expect("thread");
}

#[test]
fn dates_are_right() {
    let at = |s: u64| dated::name(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
    for (seconds, name) in [
        (0, "19700101T000000Z"),
        (951_782_399, "20000228T235959Z"),
        (951_782_400, "20000229T000000Z"),
        (951_868_800, "20000301T000000Z"),
        (1_704_067_199, "20231231T235959Z"),
        (1_709_251_199, "20240229T235959Z"),
        (4_107_542_400, "21000301T000000Z"),
    ] {
        assert_eq!(at(seconds), name);
        assert!(dated::is_dated(name));
    }
    for wrong in [
        "",
        "20240229T235959",
        "20240229 235959Z",
        "20240229T235959Z.partial",
    ] {
        assert!(!dated::is_dated(wrong), "{wrong}");
    }
}

/// Makes sound images with these names.
fn store(names: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("tempdir");
    for name in names {
        write(&dir.path().join(name), Some(dir.path()), Compress::None);
    }
    dir
}

fn names(paths: &[PathBuf]) -> Vec<&str> {
    paths
        .iter()
        .filter_map(|p| p.file_name().and_then(|n| n.to_str()))
        .collect()
}

const DATES: [&str; 4] = [
    "20260101T000000Z",
    "20260102T000000Z",
    "20260103T000000Z",
    "20260104T000000Z",
];

/// Flips a byte in the middle of a file.
fn damage(path: &Path) {
    let mut content = fs::read(path).expect("read");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(path, content).expect("write");
}

#[test]
fn the_newest_sound_image_is_found() {
    let dir = store(&DATES);
    let dir = dir.path();
    let newest = |look| dated::newest_sound(dir, look).map(|n| names(&[n.path])[0].to_owned());
    assert_eq!(newest(Look::Full).expect("newest"), DATES[3]);
    // Damaged pages show only in a full look, a damaged manifest at once.
    damage(&dir.join(DATES[3]).join("pages"));
    assert_eq!(newest(Look::Quick).expect("newest"), DATES[3]);
    assert_eq!(newest(Look::Full).expect("newest"), DATES[2]);
    damage(&dir.join(DATES[2]).join("manifest.json"));
    damage(&dir.join(DATES[3]).join("pagemap"));
    let found = dated::newest_sound(dir, Look::Quick).expect("newest");
    assert_eq!(names(&[found.path]), [DATES[1]]);
    assert_eq!(found.skipped.len(), 2);
    // Other names, and links, are no images of the store.
    write(&dir.join("zzz"), None, Compress::None);
    std::os::unix::fs::symlink(dir.join("zzz"), dir.join("20270101T000000Z")).expect("symlink");
    assert_eq!(newest(Look::Quick).expect("newest"), DATES[1]);

    for name in &DATES[..2] {
        damage(&dir.join(name).join("checksums"));
    }
    let e = format!("{:#}", newest(Look::Quick).expect_err("none"));
    assert!(e.contains("none of the 4 images"), "{e}");
    let empty = tempfile::tempdir().expect("tempdir");
    let e = dated::newest_sound(empty.path(), Look::Quick).expect_err("none");
    assert!(format!("{e:#}").contains("no image"), "{e:#}");
}

#[test]
fn the_newest_images_are_kept() {
    let dir = store(&DATES);
    let dir = dir.path();
    damage(&dir.join(DATES[2]).join("manifest.json"));
    // What a crash left.
    fs::create_dir(dir.join("20250101T000000Z.removing")).expect("mkdir");
    fs::write(dir.join("20250101T000000Z.removing/pages"), "old").expect("write");
    fs::create_dir(dir.join("mine.removing")).expect("mkdir");

    dated::remove_leftovers(dir).expect("leftovers");
    assert!(dated::keep_newest(dir, 0, Look::Quick).is_err());
    let done = dated::keep_newest(dir, 2, Look::Full).expect("keep");
    assert_eq!(names(&done.kept), [DATES[3], DATES[1]]);
    assert_eq!(names(&done.removed), [DATES[0]]);
    assert_eq!(done.broken.len(), 1);
    assert!(!dir.join("20250101T000000Z.removing").exists());
    assert!(dir.join("mine.removing").exists() && dir.join(DATES[2]).exists());

    // An image in use stays.
    let open = Image::open(&dir.join(DATES[1])).expect("open");
    let done = dated::keep_newest(dir, 1, Look::Quick).expect("keep");
    assert_eq!(
        (names(&done.kept), names(&done.busy)),
        (vec![DATES[3]], vec![DATES[1]])
    );
    drop(open);
    let done = dated::keep_newest(dir, 1, Look::Quick).expect("keep");
    assert_eq!(names(&done.removed), [DATES[1]]);
    check(&dir.join(DATES[3])).expect("shared objects are there still");
}

#[test]
fn a_new_image_gets_a_name_of_its_own() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut last = PathBuf::new();
    for _ in 0..3 {
        let next = dated::next_path(dir.path()).expect("next_path");
        assert!(
            next > last
                && names(std::slice::from_ref(&next))
                    .iter()
                    .all(|n| dated::is_dated(n))
        );
        fs::create_dir(&next).expect("mkdir");
        last = next;
    }
}
