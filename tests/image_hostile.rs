//! Images that are damaged, of the future, or made by an attacker: one clear error, never a panic.

mod image_fixture;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use image_fixture::{START, check, copy, error, forge, manifest, replace, same, write};
use mistctl::image::process::Creds;
use mistctl::image::{Compress, Image, Manifest};
use proptest::prelude::*;
use serde_json::{Value, json};

const FILES: [&str; 4] = ["manifest.json", "checksums", "pagemap", "pages"];

/// An image to take apart, and what is in it.
fn fixture(compress: Compress) -> (tempfile::TempDir, Manifest) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("tempdir");
    let manifest = write(&dir.path().join("image"), None, compress);
    (dir, manifest)
}

/// What may be done to a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, u8),
    Truncate(usize),
    Append(Vec<u8>),
    Remove(usize, usize),
    Overwrite(usize, Vec<u8>),
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            4 => (any::<usize>(), 0..8u8).prop_map(|(at, bit)| Damage::Flip(at, 1 << bit)),
            1 => any::<usize>().prop_map(Damage::Truncate),
            1 => prop::collection::vec(any::<u8>(), 1..100).prop_map(Damage::Append),
            1 => (any::<usize>(), 1..100usize).prop_map(|(at, n)| Damage::Remove(at, n)),
            2 => (any::<usize>(), prop::collection::vec(any::<u8>(), 1..16))
                .prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        ]
    }

    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        match self {
            Damage::Flip(at, bit) => bytes[at % len] ^= bit,
            Damage::Truncate(at) => bytes.truncate(at % len),
            Damage::Append(more) => bytes.extend_from_slice(more),
            Damage::Remove(at, n) => {
                let at = at % len;
                bytes.drain(at..(at + n).min(len));
            }
            Damage::Overwrite(at, new) => {
                for (i, byte) in new.iter().enumerate() {
                    bytes[(at + i) % len] = *byte;
                }
            }
        }
    }
}

/// Uses everything an image offers, as a restore would.
fn read_all(image: &Image) {
    let _ = image.verify(&mut |_, _| {});
    let (mut out, mut scratch) = (vec![0; 1 << 20], Vec::new());
    for space in image.pages().spaces().collect::<Vec<_>>() {
        for block in image.pages().blocks(space).flatten() {
            let _ = image.pages().find(space, block.addr);
        }
        for run in image
            .pages()
            .runs(space, START, u64::MAX, 1 << 20)
            .flatten()
        {
            let _ = image.pages().read_run(&run, &mut out, &mut scratch);
        }
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn damage_is_found(which in 0..5usize, compressed in any::<bool>(), damage in Damage::any()) {
        let (dir, manifest) = fixture(if compressed { Compress::Zstd } else { Compress::None });
        let path = dir.path().join("image");
        let object = format!("objects/{}", manifest.files[0].object.as_deref().expect("object"));
        let file = path.join(FILES.get(which).copied().unwrap_or(&object));
        let before = fs::read(&file).expect("read");
        let mut after = before.clone();
        damage.apply(&mut after);
        replace(&file, &after);
        match check(&path) {
            Ok(image) => prop_assert!(same(&image.manifest, &manifest)),
            Err(e) => prop_assert!(after != before, "{e:#}"),
        }
        // Only lines that are nobody's may be added to `checksums`; all else must be found.
        if after != before && which != 1 {
            prop_assert!(check(&path).is_err());
        }
    }

    #[test]
    fn a_forged_pagemap_does_no_harm(damage in prop::collection::vec(Damage::any(), 1..4)) {
        let (dir, _) = fixture(Compress::Lz4);
        let path = dir.path().join("image");
        let mut bytes = fs::read(path.join("pagemap")).expect("read");
        for d in &damage {
            if !bytes.is_empty() {
                d.apply(&mut bytes);
            }
        }
        forge(&path, "pagemap", &bytes);
        if let Ok(image) = Image::open(&path) {
            read_all(&image);
        }
    }

    #[test]
    fn a_forged_manifest_does_no_harm(
        changes in prop::collection::vec((any::<usize>(), 0..ODD), 1..4),
        text in prop::option::of(Damage::any()),
    ) {
        let (dir, manifest) = fixture(Compress::None);
        let path = dir.path().join("image");
        let mut value = serde_json::to_value(&manifest).expect("json");
        for (leaf, odd) in changes {
            let n = count(&value);
            set(&mut value, &mut (leaf % n), &odd_value(odd));
        }
        let mut bytes = value.to_string().into_bytes();
        if let Some(damage) = text {
            damage.apply(&mut bytes);
        }
        forge(&path, "manifest.json", &bytes);
        if let Ok(image) = Image::open(&path) {
            read_all(&image);
        }
    }
}

const ODD: usize = 16;

fn odd_value(n: usize) -> Value {
    match n {
        0 => json!(0),
        1 => json!(-1),
        2 => json!(1),
        3 => json!(u64::MAX),
        4 => json!(i64::MIN),
        5 => json!(u32::MAX),
        6 => json!(i32::MAX),
        7 => json!(1u64 << 47),
        8 => json!(""),
        9 => json!("\0"),
        10 => json!("../../etc/passwd"),
        11 => json!([]),
        12 => json!({}),
        13 => Value::Null,
        14 => json!(4096),
        _ => json!(1.5),
    }
}

/// Nodes of a JSON tree.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(a) => a.iter().map(count).sum(),
        Value::Object(o) => o.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces node number `n`.
fn set(value: &mut Value, n: &mut usize, new: &Value) -> bool {
    if *n == 0 {
        *value = new.clone();
        return true;
    }
    *n -= 1;
    match value {
        Value::Array(a) => a.iter_mut().any(|v| set(v, n, new)),
        Value::Object(o) => o.values_mut().any(|v| set(v, n, new)),
        _ => false,
    }
}

/// Opens an image whose manifest was changed and whose checksums are right.
fn forged(change: impl FnOnce(&mut Value)) -> String {
    let (dir, manifest) = fixture(Compress::None);
    let path = dir.path().join("image");
    let mut value = serde_json::to_value(&manifest).expect("json");
    change(&mut value);
    forge(&path, "manifest.json", value.to_string().as_bytes());
    error(&path)
}

#[test]
fn impossible_manifests_are_refused_by_name() {
    let cases: Vec<(&str, Value, &str)> = vec![
        ("/processes", json!([]), "it has 0 processes"),
        (
            "/processes/0/pid",
            json!(0),
            "process 0: pid 0 is impossible",
        ),
        ("/processes/0/pid", json!(-5), "pid -5 is impossible"),
        ("/processes/1/pid", json!(100), "its pid is there twice"),
        (
            "/processes/1/ppid",
            json!(7),
            "process 102: its parent 7 is not among",
        ),
        ("/processes/0/threads", json!([]), "it has 0 threads"),
        (
            "/processes/0/threads/0/tid",
            json!(101),
            "its first thread is not the leader",
        ),
        (
            "/processes/0/ended_leader",
            json!({"status": 0, "creds": Creds::default()}),
            "thread id 100 is there twice",
        ),
        (
            "/processes/0/threads/1/tid",
            json!(100),
            "thread id 100 is there twice",
        ),
        (
            "/processes/0/threads/1/regs",
            json!("AAAA"),
            "thread 101: 3 bytes of registers",
        ),
        (
            "/processes/0/threads/1/xstate",
            json!(""),
            "0 bytes of extended state",
        ),
        (
            "/processes/0/threads/0/pending/0/info",
            json!("AAAA"),
            "siginfo_t",
        ),
        ("/processes/0/exe", json!(2), "exe 2 does not exist"),
        ("/processes/0/cwd", json!(u32::MAX), "does not exist"),
        ("/processes/0/comm", json!("a\u{0}b"), "zero byte"),
        ("/processes/0/umask", json!(0o1000), "umask"),
        (
            "/processes/0/fds/1/fd",
            json!(0),
            "descriptor 0 is there twice",
        ),
        (
            "/processes/0/fds/1/fd",
            json!(-1),
            "descriptor -1 is impossible",
        ),
        (
            "/processes/0/fds/1/description",
            json!(4),
            "descriptor 1: open file description 4 does not exist",
        ),
        ("/processes/0/sigactions/0/signal", json!(65), "signal 65"),
        ("/processes/0/limits/0/resource", json!(16), "limit 16"),
        (
            "/processes/0/vmas/0/start",
            json!(0x40_0001),
            "mapping at 0x400001",
        ),
        (
            "/processes/0/vmas/0/start",
            json!(0x50_0000),
            "mapping at 0x500000: it ends at 0x500000",
        ),
        (
            "/processes/0/vmas/2/end",
            json!((1u64 << 47) + 4096),
            "it ends at",
        ),
        ("/processes/0/vmas/1/start", json!(0x4f_f000), "overlaps"),
        ("/processes/0/vmas/1/prot", json!(8), "protection 0x8"),
        (
            "/processes/0/vmas/1/flags",
            json!(["x; rm"]),
            "pairs of letters",
        ),
        (
            "/processes/0/vmas/0/backing/file",
            json!(9),
            "file 9 does not exist",
        ),
        (
            "/processes/0/vmas/2/backing/memory",
            json!(9),
            "shared memory 9 does not exist",
        ),
        (
            "/processes/0/vmas/2/offset",
            json!(u64::MAX - 4095),
            "offset",
        ),
        (
            "/processes/1/fds",
            json!([{"fd": 0, "description": 0}]),
            "it is dead and has",
        ),
        (
            "/descriptions/1/kind/file",
            json!(5),
            "open file description 1: file 5 does not exist",
        ),
        (
            "/descriptions/2/kind/capacity",
            json!(3),
            "a pipe of 3 bytes has 10",
        ),
        (
            "/descriptions/3/kind/socket",
            json!(1),
            "socket 1 does not exist",
        ),
        ("/sockets/0/family", json!(2), "not one of family 2"),
        (
            "/sockets/0/state/peer",
            json!(5),
            "its peer 5 is not in the image",
        ),
        (
            "/sockets/0/state/queue/0/descriptions",
            json!([8]),
            "in flight 8 does not exist",
        ),
        (
            "/files/0/object",
            json!("../pages"),
            "not the name of an object",
        ),
        ("/files/0/object", json!("0".repeat(64)), "ENOENT"),
        ("/files/1/path", json!("/\u{0}"), "zero byte"),
        (
            "/shared_memory/0/size",
            json!(u64::MAX),
            "its size is impossible",
        ),
        ("/shared_memory/0/space", json!(0), "space 0 is used twice"),
        (
            "/shared_memory/0/size",
            json!(4096),
            "belongs to no mapping",
        ),
        ("/processes/0/space", json!(3), "which nothing uses"),
        ("/format", json!("elf"), "it is not a checkpoint"),
        (
            "/version",
            json!(2),
            "its format version is 2, and this mistctl reads version 1",
        ),
        (
            "/version",
            json!(u64::MAX),
            "its format version is 18446744073709551615",
        ),
    ];
    for (at, new, expected) in cases {
        let e = forged(|m| {
            // A field that has its default is absent.
            let (parent, field) = at.rsplit_once('/').expect("pointer");
            match m.pointer_mut(parent) {
                Some(Value::Object(fields)) => drop(fields.insert(field.to_owned(), new.clone())),
                _ => *m.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = new.clone(),
            }
        });
        assert!(e.contains(expected), "{at} = {new}: {e}");
        assert!(!e.contains('\n') && e.len() < 1000, "{e}");
    }
}

#[test]
fn processes_share_memory_only_if_they_map_the_same() {
    let (dir, manifest) = fixture(Compress::None);
    let path = dir.path().join("image");
    let mut both = manifest;
    let mut other = both.processes[0].clone();
    (other.pid, other.ppid) = (200, 100);
    other.threads.truncate(1);
    other.threads[0].tid = 200;
    both.processes.push(other);
    forge(
        &path,
        "manifest.json",
        &serde_json::to_vec(&both).expect("json"),
    );
    check(&path).expect("a child of vfork");
    both.processes[2].vmas.pop();
    forge(
        &path,
        "manifest.json",
        &serde_json::to_vec(&both).expect("json"),
    );
    assert!(error(&path).contains("maps something else"));
}

#[test]
fn the_future_is_named_even_when_it_has_other_checksums() {
    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    replace(
        &path.join("manifest.json"),
        br#"{"format":"mist-checkpoint","version":7,"new":[]}"#,
    );
    assert!(
        error(&path).contains("its format version is 7"),
        "{}",
        error(&path)
    );
    fs::remove_file(path.join("checksums")).expect("unlink");
    assert!(
        error(&path).contains("its format version is 7"),
        "{}",
        error(&path)
    );

    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    let mut map = fs::read(path.join("pagemap")).expect("read");
    map[8] = 9;
    forge(&path, "pagemap", &map);
    assert!(
        error(&path).contains("its version is 9"),
        "{}",
        error(&path)
    );
}

#[test]
fn json_without_bottom_or_end_is_refused() {
    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    let deep = "[".repeat(1 << 20);
    forge(&path, "manifest.json", deep.as_bytes());
    assert!(error(&path).contains("manifest.json"));
    let deep = format!(
        "{{\"format\":\"mist-checkpoint\",\"version\":1,\"pvm\":{}{}}}",
        "{\"a\":".repeat(10_000),
        "1".to_owned() + &"}".repeat(10_000)
    );
    forge(&path, "manifest.json", deep.as_bytes());
    assert!(error(&path).contains("manifest.json: "), "{}", error(&path));
    // Larger than any manifest may be; it takes no room on the disk.
    let file = fs::File::create(path.join("manifest.json")).expect("create");
    file.set_len(1 << 40).expect("truncate");
    assert!(error(&path).contains("manifest.json has 1099511627776 bytes, more than"));
}

#[test]
fn absurd_numbers_of_blocks_are_refused_before_memory_is_taken() {
    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    let map = fs::read(path.join("pagemap")).expect("read");
    for (at, bytes) in [
        (20, u32::MAX.to_le_bytes().to_vec()),
        (24, u64::MAX.to_le_bytes().to_vec()),
        (24, (1u64 << 59).to_le_bytes().to_vec()),
        (64 + 16, u64::MAX.to_le_bytes().to_vec()),
        (64 + 8, 1u64.to_le_bytes().to_vec()),
    ] {
        let mut map = map.clone();
        map[at..at + bytes.len()].copy_from_slice(&bytes);
        forge(&path, "pagemap", &map);
        assert!(error(&path).contains("pagemap"), "{}", error(&path));
    }
}

#[test]
fn files_that_are_no_files_are_refused() {
    for name in FILES {
        for (what, expected) in [
            ("link", "symbolic link"),
            ("fifo", "not a regular file"),
            ("dir", "not a regular"),
        ] {
            let (dir, _) = fixture(Compress::None);
            let path = dir.path().join("image");
            let file = path.join(name);
            let moved = dir.path().join("moved");
            fs::rename(&file, &moved).expect("rename");
            match what {
                "link" => symlink(&moved, &file).expect("symlink"),
                "dir" => fs::create_dir(&file).expect("mkdir"),
                _ => nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo"),
            }
            let e = error(&path);
            assert!(
                e.contains(expected) && e.contains(name),
                "{name} {what}: {e}"
            );
        }
    }
    let (dir, manifest) = fixture(Compress::None);
    let path = dir.path().join("image");
    let moved = dir.path().join("moved");
    fs::rename(path.join("objects"), &moved).expect("rename");
    symlink(&moved, path.join("objects")).expect("symlink");
    assert!(
        error(&path).contains("objects is not a directory"),
        "{}",
        error(&path)
    );
    fs::remove_file(path.join("objects")).expect("unlink");
    fs::rename(&moved, path.join("objects")).expect("rename");
    check(&path).expect("sound again");
    fs::write(path.join("objects/README"), "").expect("write");
    assert!(error(&path).contains("objects/README is not the name of an object"));
    fs::remove_file(path.join("objects/README")).expect("unlink");
    let object = path
        .join("objects")
        .join(manifest.files[0].object.as_deref().expect("object"));
    fs::rename(&object, dir.path().join("object")).expect("rename");
    symlink(dir.path().join("object"), &object).expect("symlink");
    assert!(error(&path).contains("symbolic link"));
}

#[test]
fn what_is_no_image_says_so() {
    let dir = tempfile::tempdir().expect("tempdir");
    assert!(error(&dir.path().join("none")).contains("ENOENT"));
    assert!(error(dir.path()).contains("manifest.json"));
    fs::write(dir.path().join("file"), "").expect("write");
    assert!(error(&dir.path().join("file")).contains("not a directory"));
}

#[test]
fn an_image_others_can_change_is_warned_of() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    assert!(check(&path).expect("sound").warnings.is_empty());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("chmod");
    let image = check(&path).expect("sound");
    assert!(
        image.warnings[0].contains("mode 0777"),
        "{:?}",
        image.warnings
    );
}

#[test]
fn an_image_that_changes_under_way_is_noticed() {
    let (dir, _) = fixture(Compress::None);
    let path = dir.path().join("image");
    let image = Image::open(&path).expect("open");
    // In place, as nobody should.
    let map = fs::read(path.join("pagemap")).expect("read");
    fs::write(path.join("pagemap"), vec![0; map.len()]).expect("write");
    let e = image.pages().find(0, START).expect_err("changed");
    assert!(format!("{e:#}").contains("pagemap changed"), "{e:#}");
    fs::write(path.join("pagemap"), &map[..100]).expect("write");
    assert!(image.pages().blocks(0).next().is_some_and(|b| b.is_err()));
    fs::write(path.join("pagemap"), &map).expect("write");
    let block = image.pages().find(0, START).expect("find").expect("block");
    fs::write(path.join("pages"), "short").expect("write");
    assert!(image.pages().read(&block, &mut [0; 65536]).is_err());
    assert!(image.pages().read(&block, &mut [0; 100]).is_err());
}

#[test]
fn unknown_fields_do_not_matter() {
    let (dir, original) = fixture(Compress::None);
    let path = dir.path().join("image");
    let mut value = serde_json::to_value(&original).expect("json");
    value["comment"] = json!("made by hand");
    forge(&path, "manifest.json", value.to_string().as_bytes());
    assert!(same(&check(&path).expect("sound").manifest, &original));
    // A copy is as good as the original.
    let other = copy(&path, &dir.path().join("copy"));
    check(&other).expect("sound");
    assert_eq!(manifest().version, original.version);
    assert!(Path::new(&other).exists());
}
