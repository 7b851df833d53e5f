//! Dumps.

use super::*;

#[test]
fn a_process_that_a_debugger_holds_is_busy_with_4() {
    if !engine() {
        return;
    }
    let target = Sleeper::new();
    let pid = Pid::from_raw(target.0.id() as i32);
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).unwrap();
    let dir = temp();
    run(&["dump", &target.pid(), "-o", path(&dir.path().join("i"))])
        .ends_with(4)
        .says(&[&target.pid()]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// What it traces would be lost, and is no child that `--tree` takes along.
#[test]
fn a_debugger_is_refused_with_5() {
    if !engine() {
        return;
    }
    const PTRACE_SEIZE: i32 = 0x4206;
    let target = Sleeper::new();
    let seize = format!(
        "import ctypes, time
at = ctypes.c_void_p
ctypes.CDLL(None).ptrace({PTRACE_SEIZE}, {}, at(0), at(0))
time.sleep(1000)",
        target.pid()
    );
    let debugger = Sleeper::of(Command::new("python3").args(["-c", &seize]));
    wait_for("the debugger", LIMIT, || {
        let status = fs::read_to_string(format!("/proc/{}/status", target.pid()))?;
        let traced = format!("TracerPid:\t{}\n", debugger.pid());
        Ok(status.contains(&traced).then_some(()))
    })
    .unwrap();
    let dir = temp();
    for tree in [None, Some("--tree")] {
        let image = dir.path().join("i");
        let pid = debugger.pid();
        let mut args = vec!["dump", &pid, "-o", path(&image)];
        args.extend(tree);
        run(&args)
            .ends_with(5)
            .says(&[&pid, &format!("traces process {}", target.pid())]);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A control group of our own, where version 2 is mounted; what is in it is frozen.
struct Frozen(PathBuf);

impl Frozen {
    fn new(pid: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mut mounts = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
        let root = mounts
            .find(|m| m.get(2) == Some(&"cgroup2"))?
            .get(1)?
            .to_string();
        let me = Self(Path::new(&root).join(format!("mist-test-{pid}")));
        fs::create_dir(&me.0).ok()?;
        fs::write(me.0.join("cgroup.procs"), pid).ok()?;
        fs::write(me.0.join("cgroup.freeze"), "1").ok()?;
        wait_for("the freezer", LIMIT, || {
            let events = fs::read_to_string(me.0.join("cgroup.events"))?;
            Ok(events.contains("frozen 1").then_some(()))
        })
        .unwrap();
        Some(me)
    }

    fn thaw(&self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
        // Its processes are elsewhere first.
        if let (Ok(pids), Some(root)) = (
            fs::read_to_string(self.0.join("cgroup.procs")),
            self.0.parent(),
        ) {
            for pid in pids.lines() {
                let _ = fs::write(root.join("cgroup.procs"), pid);
            }
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_process_whose_control_group_is_frozen_is_busy_with_4() {
    if !engine() {
        return;
    }
    let target = Sleeper::new();
    let Some(frozen) = Frozen::new(&target.pid()) else {
        println!("SKIPPED: control groups (version 2) cannot be made here");
        return;
    };
    let dir = temp();
    let image = dir.path().join("i");
    run(&["dump", &target.pid(), "-o", path(&image)])
        .ends_with(4)
        .says(&[&target.pid(), "thaw it"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    frozen.thaw();
    run(&["dump", &target.pid(), "-o", path(&image)]).ends_with(0);
}

#[test]
fn without_proc_it_says_that_it_is_missing() {
    if !engine() {
        return;
    }
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        "umount -l /proc && exec \"$@\"",
        "sh",
    ]);
    command
        .arg(mistctl().get_program())
        .args(["show", "/nowhere"]);
    Ran(command.output().unwrap())
        .ends_with(1)
        .says(&["no /proc is mounted here"]);
}

/// Memory that is no part of a clone is written while the program stands: the disk gets full in the middle.
#[test]
fn a_dump_to_a_full_disk_leaves_nothing_in_the_program() {
    if !engine() {
        return;
    }
    const PROGRAM: &str = "import mmap, os, sys, time
m = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_DONTFORK)
m.write(os.urandom(16 << 20))
open(sys.argv[1], 'w').close()
time.sleep(1000)";
    const SCRIPT: &str = r#"
mount -t tmpfs -o size=4m small small && mkfifo ready || exit 77
python3 -c "$1" ready & pid=$!
trap 'kill $pid' EXIT
cat ready
cat /proc/$pid/maps >before
"$2" dump $pid -o small/i; status=$?
cat /proc/$pid/maps >after
exit $status"#;
    let dir = temp();
    fs::create_dir(dir.path().join("small")).unwrap();
    let mistctl = env!("CARGO_BIN_EXE_mistctl");
    let dumped = Command::new("unshare")
        .args(["--mount", "sh", "-c", SCRIPT, "sh", PROGRAM, mistctl])
        .current_dir(&dir)
        .output()
        .unwrap();
    Ran(dumped).ends_with(1).says(&["No space left"]);
    let maps = |name| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(maps("before"), maps("after"));
}

#[test]
fn without_a_name_dump_picks_one_and_prints_it() {
    if !engine() {
        return;
    }
    let dir = temp();
    let target = Sleeper::new();
    let ran = Ran(mistctl()
        .current_dir(&dir)
        .args(["dump", &target.pid()])
        .output()
        .unwrap())
    .ends_with(0);
    let name = ran.out().trim_end().to_owned();
    assert!(
        name.starts_with(&format!("sleep-{}-2", target.pid())) && name.ends_with('Z'),
        "{name}"
    );
    run(&["verify", path(&dir.path().join(name))]).ends_with(0);
}

/// Waits until a dump writes to this image.
fn begun(image: &Path) {
    let partial = image.with_extension("partial");
    wait_for("the image is begun", LIMIT, || {
        Ok(partial.exists().then_some(()))
    })
    .unwrap();
}

#[test]
fn a_dump_that_is_called_off_leaves_nothing() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    // It takes longer to save than we take to see that it is begun.
    let large = "import os, time; kept = os.urandom(1 << 20) * 96; time.sleep(1000)";
    let target = Sleeper::of(Command::new("python3").args(["-c", large]));
    wait_for("the program has its memory", LIMIT, || {
        let statm = fs::read_to_string(format!("/proc/{}/statm", target.pid()))?;
        let resident = statm.split(' ').nth(1).and_then(|n| n.parse().ok());
        Ok(resident.filter(|pages: &usize| *pages > 96 << 8))
    })
    .unwrap();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        let mut dump = mistctl()
            .args(["dump", &target.pid(), "-o", path(&i)])
            .spawn()
            .unwrap();
        begun(&i);
        kill(Pid::from_raw(dump.id() as i32), signal).unwrap();
        let status = wait_child(&mut dump, "the dump's end", LIMIT).unwrap();
        assert_eq!(status.signal(), Some(signal as i32));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{signal}");
    }
    // Who ignores a signal goes on doing so.
    let mut dump = after("trap '' HUP")
        .args(["dump", &target.pid(), "-o", path(&i)])
        .spawn()
        .unwrap();
    begun(&i);
    kill(Pid::from_raw(dump.id() as i32), Signal::SIGHUP).unwrap();
    let status = wait_child(&mut dump, "the dump's end", LIMIT).unwrap();
    assert!(status.success(), "{status}");
    run(&["verify", path(&i)]).ends_with(0);
}

#[test]
fn a_store_is_rid_of_what_a_killed_dump_left_before_there_is_a_new_image() {
    if !engine() {
        return;
    }
    let dir = temp();
    let left = dir.path().join("20250101T000000Z.partial");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("pages"), "what fills the disk").unwrap();
    run(&["dump", "999999999", "-o", path(dir.path()), "--keep", "2"]).ends_with(3);
    // A process that cannot be saved: the kernel's own.
    run(&["dump", "2", "-o", path(dir.path()), "--keep", "2"]).ends_with(5);
    assert!(!left.exists());
}

#[test]
fn an_image_may_be_named_as_a_directory() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let target = Sleeper::new();
    let slash = format!("{}/", path(&i));
    let ran = run(&["dump", &target.pid(), "-o", &slash]).ends_with(0);
    assert_eq!(ran.out().trim_end(), path(&i));
    run(&["verify", &slash]).ends_with(0);
}

#[test]
fn a_dump_without_descriptors_says_so_and_leaves_nothing() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let target = Sleeper::new();
    for limit in 8..40 {
        let ran = Ran(after(&format!("ulimit -n {limit}"))
            .args(["dump", &target.pid(), "-o", path(&i)])
            .output()
            .unwrap());
        if ran.0.status.success() {
            assert!(limit > 8);
            return;
        }
        // Not that there is no such process, with the code that makes cron silent.
        assert_ne!(ran.0.status.code(), Some(3), "{limit}: {}", both(&ran.0));
        if ran.0.status.code() != Some(127) {
            ran.says(&["Too many open files"]);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{limit}");
    }
    panic!("no limit was enough");
}

#[test]
fn a_umask_takes_nothing_from_an_image() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let target = Sleeper::new();
    let mut dump = after("umask 777");
    dump.args(["dump", &target.pid(), "-o", path(&i)]);
    Ran(dump.output().unwrap()).ends_with(0);
    for (name, mode) in [("", 0o700), ("objects", 0o700), ("pages", 0o600)] {
        let there = fs::metadata(i.join(name)).unwrap().permissions().mode();
        assert_eq!(there & 0o777, mode, "{name}");
    }
}

#[test]
fn dump_with_json_says_what_it_did_in_one_object() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let target = Sleeper::new();
    let ran = run(&["dump", &target.pid(), "-o", path(&i), "--json"]).ends_with(0);
    let v = ran.object();
    assert_eq!(v["pid"], target.0.id());
    assert_eq!(v["image"], path(&i));
    for number in [
        "bytes_memory",
        "bytes_written",
        "pages",
        "pages_zero",
        "blackout_us",
        "total_us",
    ] {
        assert!(v[number].is_u64(), "{number}: {v}");
    }
}

#[test]
fn dump_leaves_the_program_running_or_stopped_or_ended_as_told() {
    if !engine() {
        return;
    }
    let dir = temp();
    let state = |t: &Sleeper| common::status_field(t.0.id(), "State").unwrap_or_default();
    let target = Sleeper::new();
    run(&["dump", &target.pid(), "-o", path(&dir.path().join("run"))]).ends_with(0);
    assert!(state(&target).starts_with('S'), "{}", state(&target));
    run(&[
        "dump",
        &target.pid(),
        "-o",
        path(&dir.path().join("stop")),
        "--stop",
    ])
    .ends_with(0);
    wait_for("it stops", LIMIT, || {
        Ok(state(&target).starts_with('T').then_some(()))
    })
    .unwrap();
    kill(Pid::from_raw(target.0.id() as i32), Signal::SIGCONT).unwrap();
    let mut target = target;
    run(&[
        "dump",
        &target.pid(),
        "-o",
        path(&dir.path().join("kill")),
        "--kill",
    ])
    .ends_with(0);
    let status = wait_child(&mut target.0, "its end", LIMIT).unwrap();
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn keep_is_silent_and_keeps_the_newest_sound_images() {
    if !engine() {
        return;
    }
    let dir = temp();
    let store = dir.path().join("new/store");
    let target = Sleeper::new();
    let dump = || {
        run(&["dump", &target.pid(), "-o", path(&store), "--keep", "2"])
            .ends_with(0)
            .silent()
    };
    let names = || {
        let mut names: Vec<String> = fs::read_dir(&store)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.starts_with("20"))
            .collect();
        names.sort();
        names
    };
    dump();
    fs::create_dir(store.join("20200101T000000Z.partial")).unwrap(); // a writer that died
    fs::create_dir(store.join("mine")).unwrap(); // none of ours
    dump();
    dump();
    let kept = names();
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert!(store.join("mine").exists());
    // A damaged one does not count: two sound ones stay beside it.
    damage(&store.join(&kept[1]).join("manifest.json"));
    dump();
    assert_eq!(names()[..2], kept[..]);
    run(&["verify", path(&store)]).ends_with(0);
    let mode = fs::metadata(&store).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn bytes_of_an_outsiders_pipe_that_were_not_read_are_told_of() {
    if !engine() {
        return;
    }
    let dir = temp();
    let mut target = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = target.id().to_string();
    let pipe = target.stdin.as_mut().unwrap();
    let dump = |name: &str| run(&["dump", &pid, "-o", path(&dir.path().join(name))]).ends_with(0);
    let told = "5 bytes stand in it that were not read";
    assert!(!both(&dump("before").0).contains(told));
    pipe.write_all(b"hello").unwrap();
    dump("after").says(&[told, "fd 0"]);
    target.kill().unwrap();
    target.wait().unwrap();
}

/// Nothing shows such rules; who may not read kernel memory sees what they forbid.
#[test]
fn who_has_restricted_himself_is_refused_with_5_by_an_ordinary_user() {
    if !root() {
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/refused_landlock.c");
    let built = common::build_c(&source, &["-pthread".to_owned()]).unwrap();
    for (variant, capabilities) in [
        (Some("main"), None),
        (Some("thread"), Some(FILE_CAPABILITIES)),
        (None, Some(FILE_CAPABILITIES)),
    ] {
        let dir = temp();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let Some(mut command) = as_nobody(dir.path(), capabilities) else {
            return;
        };
        let mut program = Command::new("sleep");
        if let Some(variant) = variant {
            let copy = dir.path().join("program");
            let done = Command::new("install").arg(&built).arg(&copy).status();
            assert!(done.unwrap().success());
            program = Command::new(copy);
            program.arg(variant).current_dir(dir.path());
        } else {
            program.arg("1000");
        }
        let target = Sleeper::of(program.uid(NOBODY).gid(NOBODY));
        if variant.is_some() {
            let has = |name: &str| dir.path().join(name).exists();
            wait_for("the program to be ready", LIMIT, || {
                Ok((has("ready") || has("result")).then_some(()))
            })
            .unwrap();
            if has("result") {
                return skipped("this kernel has no Landlock, or none for us");
            }
        }
        let output = command
            .args(["dump", &target.pid(), "-o", "image"])
            .output()
            .unwrap();
        match variant {
            Some(_) => {
                Ran(output)
                    .ends_with(5)
                    .says(&[&target.pid(), "landlock_restrict_self"]);
                assert!(!dir.path().join("image").exists());
            }
            None => {
                Ran(output).ends_with(0);
            }
        }
    }
}
