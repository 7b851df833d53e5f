//! What looks at images.

use super::*;

#[test]
fn what_is_no_image_ends_with_6() {
    let dir = temp();
    let (missing, empty, file) = (
        dir.path().join("missing"),
        dir.path().join("empty"),
        dir.path().join("file"),
    );
    fs::create_dir(&empty).unwrap();
    fs::write(&file, "x").unwrap();
    for what in [&missing, &empty, &file] {
        for command in ["show", "verify"] {
            let ran = run(&[command, path(what)]).ends_with(6).says(&[path(what)]);
            assert_eq!(ran.out(), "");
        }
        let v = run(&["show", "--json", path(what)]).ends_with(6).object();
        assert_eq!(
            (&v["exit"], &v["failure"]),
            (&Value::from(6), &Value::from("damaged"))
        );
    }
}

#[test]
fn a_sound_image_verifies() {
    let dir = temp();
    let i = dir.path().join("i");
    image(&i);
    let ran = run(&["verify", path(&i)]).ends_with(0);
    assert_eq!(ran.out(), format!("{}: sound\n", i.display()));
}

#[test]
fn one_flipped_bit_or_a_missing_end_anywhere_ends_with_6() {
    let dir = temp();
    for (n, file) in ["manifest.json", "pagemap", "pages", "checksums"]
        .iter()
        .enumerate()
    {
        let flipped = dir.path().join(format!("flipped{n}"));
        image(&flipped);
        damage(&flipped.join(file));
        run(&["verify", path(&flipped)])
            .ends_with(6)
            .says(&[path(&flipped)]);
        let short = dir.path().join(format!("short{n}"));
        image(&short);
        let bytes = fs::read(short.join(file)).unwrap();
        fs::write(short.join(file), &bytes[..bytes.len() / 2]).unwrap();
        run(&["verify", path(&short)])
            .ends_with(6)
            .says(&[path(&short)]);
    }
}

#[test]
fn an_image_of_a_future_version_says_so_with_6() {
    let dir = temp();
    let i = dir.path().join("i");
    image(&i);
    let text = fs::read_to_string(i.join("manifest.json")).unwrap();
    let version = |n: u32| [format!("\"version\":{n}"), format!("\"version\": {n}")];
    let future = text
        .replace(&version(1)[0], &version(99)[0])
        .replace(&version(1)[1], &version(99)[1]);
    assert_ne!(future, text);
    fs::write(i.join("manifest.json"), future).unwrap();
    for command in ["show", "verify"] {
        run(&[command, path(&i)])
            .ends_with(6)
            .says(&["version", "99"]);
    }
}

#[test]
fn show_tells_people_and_scripts_the_same() {
    let dir = temp();
    let i = dir.path().join("i");
    image(&i);
    run(&["show", path(&i)]).ends_with(0).says(&[
        "2 processes",
        "demo",
        "12.0 KiB of memory stored",
        "On this host",
    ]);
    let v = run(&["show", "--json", path(&i)]).ends_with(0).object();
    assert_eq!(v["processes"][0]["comm"], "demo");
    assert_eq!(v["bytes_memory"], 12288);
}

#[test]
fn of_a_store_the_newest_sound_image_is_meant() {
    let dir = temp();
    let names = ["20260101T000000Z", "20260102T000000Z", "20260103T000000Z"];
    for name in names {
        image(&dir.path().join(name));
    }
    fs::create_dir(dir.path().join("20260104T000000Z.partial")).unwrap();
    run(&["verify", path(dir.path())])
        .ends_with(0)
        .says(&[names[2]]);
    damage(&dir.path().join(names[2]).join("manifest.json"));
    run(&["verify", path(dir.path())])
        .ends_with(0)
        .says(&[names[1]]);
    run(&["show", path(dir.path())])
        .ends_with(0)
        .says(&[names[1]]);
    for name in &names[..2] {
        damage(&dir.path().join(name).join("pagemap"));
    }
    run(&["verify", path(dir.path())])
        .ends_with(6)
        .says(&[names[2]]);
}

#[test]
fn an_image_is_never_overwritten() {
    let dir = temp();
    let i = dir.path().join("i");
    image(&i);
    let target = Sleeper::new();
    run(&["dump", &target.pid(), "-o", path(&i)])
        .ends_with(1)
        .says(&["exists"]);
    run(&["dump", &target.pid(), "-o", path(&i), "--keep", "1"])
        .ends_with(1)
        .says(&["is an image, not a store"]);
    run(&["verify", path(&i)]).ends_with(0);
}

#[test]
fn a_store_that_another_mistctl_works_on_ends_with_4_at_once_and_untouched() {
    let dir = temp();
    image(&dir.path().join("20260101T000000Z"));
    let file = fs::File::create(dir.path().join(".lock")).unwrap();
    let _lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| e)
        .unwrap();
    let target = Sleeper::new();
    let args = ["dump", &target.pid(), "-o", path(dir.path()), "--keep", "1"];
    run(&args).ends_with(4).says(&["another mistctl"]);
    let v = run(&[&args[..], &["--json"]].concat())
        .ends_with(4)
        .object();
    assert_eq!(v["failure"], "busy");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
