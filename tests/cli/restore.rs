//! Restores.

use super::*;

/// A program that a dump has killed, and its image.
fn killed(dir: &TempDir) -> (Sleeper, PathBuf) {
    let image = dir.path().join("i");
    let target = Sleeper::new();
    run(&["dump", "--kill", &target.pid(), "-o", path(&image)]).ends_with(0);
    (target, image)
}

#[test]
fn a_damaged_or_missing_image_is_not_restored_and_ends_with_6() {
    if !engine() {
        return;
    }
    let dir = temp();
    run(&["restore", path(&dir.path().join("missing"))]).ends_with(6);
    let i = dir.path().join("i");
    let target = Sleeper::new();
    run(&["dump", &target.pid(), "-o", path(&i)]).ends_with(0);
    drop(target);
    damage(&i.join("pages"));
    run(&["restore", "--detach", path(&i)])
        .ends_with(6)
        .says(&["damaged"]);
    let v = run(&["restore", "--detach", "--json", path(&i)])
        .ends_with(6)
        .object();
    assert_eq!(v["failure"], "damaged");
}

#[test]
fn who_is_left_in_a_programs_session_is_named_where_its_id_is_wanted() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let mut program = Command::new("setsid")
        .args(["sh", "-c"])
        .arg("(sleep 1000 & echo $! >left.tmp; mv left.tmp left); exec sleep 1001")
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = program.id().to_string();
    let left = dir.path().join("left");
    wait_for("the program", LIMIT, || {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
        Ok((left.exists() && name == "sleep\n").then_some(()))
    })
    .unwrap();
    let left = fs::read_to_string(left).unwrap().trim().to_owned();
    run(&["dump", "--kill", &pid, "-o", path(&i)]).ends_with(0);
    program.wait().unwrap();
    let said = format!("{pid} (still the session of process {left}, sleep)");
    run(&["restore", "--detach", "--same-pid", path(&i)])
        .ends_with(125)
        .says(&[&said, "end those processes"]);
    let v = run(&["restore", "--detach", "--json", path(&i)])
        .ends_with(0)
        .object();
    let new = v["pid"].as_i64().unwrap();
    assert_ne!(new.to_string(), pid);
    for id in [new as i32, left.parse().unwrap()] {
        kill(Pid::from_raw(id), Signal::SIGKILL).unwrap();
    }
}

#[test]
fn in_a_user_namespace_without_its_own_pids_a_program_gets_another_pid() {
    if !engine() {
        return;
    }
    let dir = temp();
    let (mut target, i) = killed(&dir);
    target.0.wait().unwrap();
    let within = |options: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user"])
            .arg(mistctl().get_program());
        command.args(["restore", "--detach"]).args(options).arg(&i);
        Ran(command.output().unwrap())
    };
    within(&["--same-pid"])
        .ends_with(125)
        .says(&["unshare --pid"]);
    let ran = within(&["--json"]).ends_with(0);
    let pid = ran.object()["pid"].as_i64().unwrap();
    assert_ne!(pid.to_string(), target.pid());
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn what_cannot_be_printed_is_said_and_shows_in_the_exit_code() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let mut target = Sleeper::new();
    let full = |args: &[&str]| {
        let full = fs::OpenOptions::new().write(true).open("/dev/full");
        Ran(mistctl().args(args).stdout(full.unwrap()).output().unwrap()).ends_with(1)
    };
    let killed = format!("process {} was killed", target.pid());
    full(&["dump", "--kill", &target.pid(), "-o", path(&i)]).says(&[path(&i), &killed]);
    target.0.wait().unwrap();
    for json in [&[][..], &["--json"]] {
        let args = [&["restore", "--detach", "--same-pid", path(&i)], json].concat();
        full(&args).says(&["the program runs, as process", &target.pid(), "No space"]);
        let pid = Pid::from_raw(target.0.id() as i32);
        kill(pid, Signal::SIGKILL).unwrap();
    }
}

/// A shell that ends as told by signals and by a file, and its image; the shell itself is dead.
fn dumped(dir: &Path, script: &str) -> Option<PathBuf> {
    if !engine() {
        return None;
    }
    let ready = dir.join("ready");
    let script = format!(
        "{script}; : > {}; read x < {}",
        ready.display(),
        dir.join("fifo").display()
    );
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut shell = Sleeper::of(Command::new("sh").args(["-c", &script]).process_group(0));
    wait_for("the shell is ready", LIMIT, || {
        Ok(ready.exists().then_some(()))
    })
    .unwrap();
    let i = dir.join("i");
    run(&["dump", &shell.pid(), "-o", path(&i), "--kill"]).ends_with(0);
    wait_child(&mut shell.0, "its end", LIMIT).unwrap();
    Some(i)
}

/// A restore in the foreground, and the pid of what it restored.
fn foreground(image: &Path) -> (Child, i32) {
    let mut child = mistctl()
        .args(["restore", "--json", path(image)])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while out.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let v: Value = serde_json::from_slice(&line).expect("one JSON object");
    for number in ["pid", "resume_us", "total_us"] {
        assert!(v[number].is_i64(), "{number}: {v}");
    }
    assert_eq!(v["mode"], "eager");
    (child, v["pid"].as_i64().unwrap() as i32)
}

#[test]
fn a_restore_in_the_foreground_passes_signals_on_and_ends_as_the_program_does() {
    let dir = temp();
    let Some(i) = dumped(dir.path(), "trap 'exit 42' TERM; trap 'exit 43' USR1") else {
        return;
    };
    for (signal, code) in [(Signal::SIGTERM, 42), (Signal::SIGUSR1, 43)] {
        let (mut child, _) = foreground(&i);
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(
            wait_child(&mut child, "restore", LIMIT).unwrap().code(),
            Some(code)
        );
    }
}

#[test]
fn a_program_that_a_signal_ends_gives_128_and_its_number() {
    let dir = temp();
    let Some(i) = dumped(dir.path(), "true") else {
        return;
    };
    let (mut child, pid) = foreground(&i);
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert_eq!(
        wait_child(&mut child, "restore", LIMIT).unwrap().code(),
        Some(128 + 9)
    );
}

#[test]
fn a_detached_restore_prints_the_pid_and_leaves() {
    let dir = temp();
    let Some(i) = dumped(dir.path(), "true") else {
        return;
    };
    let ran = run(&["restore", "--detach", path(&i)]).ends_with(0);
    let pid: i32 = ran
        .out()
        .trim_end()
        .parse()
        .unwrap_or_else(|_| panic!("{}", both(&ran.0)));
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn of_a_store_the_image_before_a_damaged_one_is_restored() {
    let dir = temp();
    let Some(i) = dumped(dir.path(), "true") else {
        return;
    };
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    let newest = store.join("20260102T000000Z");
    Command::new("cp")
        .args(["-a", path(&i), path(&newest)])
        .status()
        .unwrap();
    fs::rename(&i, store.join("20260101T000000Z")).unwrap();
    damage(&newest.join("pages"));
    let ran = run(&["restore", "--detach", path(&store)]).ends_with(0);
    assert!(
        ran.err().contains("trying the image before it"),
        "{}",
        ran.err()
    );
    let pid: i32 = ran.out().trim_end().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn an_image_gives_an_ordinary_user_nothing_he_does_not_have() {
    if !root() || !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let target = Sleeper::new(); // root's
    run(&["dump", &target.pid(), "-o", path(&i)]).ends_with(0);
    drop(target);
    let Some(mut command) = as_nobody(dir.path(), Some(FILE_CAPABILITIES)) else {
        return;
    };
    // Root's image he cannot even read; given to him, it still holds a process of root's.
    Ran(command
        .args(["restore", "--detach", path(&i)])
        .output()
        .unwrap())
    .says(&["mistctl: "]);
    let owner = format!("{NOBODY}:{NOBODY}");
    assert!(
        Command::new("chown")
            .args(["-R", &owner, path(&i)])
            .status()
            .unwrap()
            .success()
    );
    Ran(command.output().unwrap()).ends_with(5).says(&["uid 0"]);
    // Nor does root restore it as root, now that its content is somebody else's.
    run(&["restore", "--detach", path(&i)])
        .ends_with(5)
        .says(&["uid 0"]);
}

#[test]
fn an_ordinary_user_saves_and_restores_what_is_his() {
    if !root() || !engine() {
        return;
    }
    let dir = temp();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let target = Sleeper::of(Command::new("sleep").arg("1000").uid(NOBODY).gid(NOBODY));
    let i = dir.path().join("i");
    let Some(mut command) = as_nobody(dir.path(), Some(FILE_CAPABILITIES)) else {
        return;
    };
    Ran(command
        .args(["dump", "--kill", &target.pid(), "-o", path(&i)])
        .output()
        .unwrap())
    .ends_with(0);
    drop(target);
    let Some(mut command) = as_nobody(dir.path(), Some(FILE_CAPABILITIES)) else {
        return;
    };
    let ran = Ran(command
        .args(["restore", "--detach", path(&i)])
        .output()
        .unwrap())
    .ends_with(0);
    let pid: u32 = ran.out().trim_end().parse().unwrap();
    let caps = common::status_field(pid, "CapPrm").unwrap();
    let uids = common::status_field(pid, "Uid").unwrap();
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    assert_eq!(
        u64::from_str_radix(&caps, 16),
        Ok(0),
        "it has no capability of mistctl's"
    );
    assert!(
        uids.split_whitespace().all(|u| u == NOBODY.to_string()),
        "{uids}"
    );
}

#[test]
fn a_restore_waits_for_the_ids_of_who_was_just_killed() {
    if !engine() {
        return;
    }
    let dir = temp();
    let (mut target, i) = killed(&dir);
    // It has the id until its parent asks how it ended.
    let mut restore = mistctl()
        .args(["restore", "--detach", "--same-pid", path(&i)])
        .spawn()
        .unwrap();
    let call = format!("/proc/{}/syscall", restore.id());
    let waits = [libc::SYS_poll, libc::SYS_clock_nanosleep].map(|nr| format!("{nr} "));
    wait_for("the restore to wait, or to end", LIMIT, || {
        let call = fs::read_to_string(&call).unwrap_or_default();
        let waits = waits.iter().any(|w| call.starts_with(w));
        Ok((waits || restore.try_wait()?.is_some()).then_some(()))
    })
    .unwrap();
    target.0.wait().unwrap();
    let status = wait_child(&mut restore, "the restore's end", LIMIT).unwrap();
    assert!(status.success(), "{status}");
    let pid = Pid::from_raw(target.0.id() as i32);
    kill(pid, Signal::SIGKILL).unwrap();
}

#[test]
fn a_small_stack_of_the_callers_is_enough() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let mut target = Sleeper::new();
    let run = |limit, args: &[&str]| Ran(after(limit).args(args).output().unwrap()).ends_with(0);
    let dump = ["dump", "--kill", &target.pid(), "-o", path(&i)];
    run("ulimit -s 64", &dump);
    target.0.wait().unwrap();
    // Which the program's may exceed.
    let restore = ["restore", "--detach", "--same-pid", path(&i)];
    run("ulimit -S -s 64", &restore);
    let limits = fs::read_to_string(format!("/proc/{}/limits", target.pid())).unwrap();
    let stack = |text: &str| {
        let line = text.lines().find(|l| l.starts_with("Max stack size"));
        line.unwrap_or_default().to_owned()
    };
    let ours = fs::read_to_string("/proc/self/limits").unwrap();
    assert_eq!(stack(&limits), stack(&ours));
    kill(Pid::from_raw(target.0.id() as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn a_restore_may_have_as_many_descriptors_as_the_hard_limit_allows() {
    if !engine() {
        return;
    }
    let dir = temp();
    let i = dir.path().join("i");
    let open = "for ((i = 10; i < 610; i++)); do eval \"exec $i</dev/null\"; done; exec sleep 1000";
    let mut target = Sleeper::of(Command::new("bash").args(["-c", open]));
    let comm = format!("/proc/{}/comm", target.pid());
    wait_for("the descriptors are open", LIMIT, || {
        Ok((fs::read_to_string(&comm)? == "sleep\n").then_some(()))
    })
    .unwrap();
    let run = |limit, args: &[&str]| Ran(after(limit).args(args).output().unwrap()).ends_with(0);
    let other = dir.path().join("other");
    let dump = ["dump", &target.pid(), "-o", path(&other)];
    run("ulimit -n 650", &dump).says(&["650 are allowed"]);
    let table = format!("/proc/{}/fd", target.pid());
    let open = || {
        let fds = fs::read_dir(&table).unwrap();
        let names = fds.map(|e| e.unwrap().file_name());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    let before = open();
    run("true", &["dump", "--kill", &target.pid(), "-o", path(&i)]);
    target.0.wait().unwrap();
    let restore = ["restore", "--detach", "--same-pid", path(&i)];
    run("ulimit -S -n 64; ulimit -H -n 700", &restore);
    assert_eq!(open(), before);
    kill(Pid::from_raw(target.0.id() as i32), Signal::SIGKILL).unwrap();
}

/// A control group of our own that limits processes, in either version. What is left in it is killed.
struct Few(PathBuf);

impl Few {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mounts = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
        let of_pids = |m: &Vec<&str>| match m.get(2..4) {
            Some(&["cgroup", options]) => options.split(',').any(|o| o == "pids"),
            Some(&["cgroup2", _]) => {
                fs::read_to_string(Path::new(m[1]).join("cgroup.subtree_control"))
                    .is_ok_and(|c| c.split_whitespace().any(|c| c == "pids"))
            }
            _ => false,
        };
        let root = mounts.into_iter().find(of_pids)?.get(1)?.to_string();
        let me = Self(Path::new(&root).join(format!("mist-test-few-{}", std::process::id())));
        fs::create_dir(&me.0).ok()?;
        Some(me)
    }

    fn allow(&self, most: &str) {
        fs::write(self.0.join("pids.max"), most).unwrap();
    }

    fn members(&self) -> Vec<i32> {
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        pids.lines().filter_map(|l| l.parse().ok()).collect()
    }

    fn is_left(&self) {
        wait_for("all that is in it to end", LIMIT, || {
            Ok(self.members().is_empty().then_some(()))
        })
        .unwrap();
    }

    fn kill(&self) {
        for pid in self.members() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        self.is_left();
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn where_too_few_processes_may_be_nothing_is_left_behind() {
    if !engine() {
        return;
    }
    let Some(few) = Few::new() else {
        return skipped("control groups that limit processes cannot be made here");
    };
    let dir = temp();
    let image = dir.path().join("i");
    let threads = "import threading, time
for i in range(5): threading.Thread(target=time.sleep, args=(1000,)).start()
open('ready', 'w').close()
time.sleep(1000)";
    let mut target = Sleeper::of(
        Command::new("python3")
            .args(["-c", threads])
            .current_dir(&dir),
    );
    wait_for("its threads", LIMIT, || {
        Ok(dir.path().join("ready").exists().then_some(()))
    })
    .unwrap();
    run(&["dump", "--kill", &target.pid(), "-o", path(&image)]).ends_with(0);
    target.0.wait().unwrap();
    let restore = || {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", path(&few.0));
        let mut command = Command::new("sh");
        command
            .args(["-c", &enter, "sh", env!("CARGO_BIN_EXE_mistctl")])
            .args(["restore", "--detach", path(&image)])
            .stdin(Stdio::null());
        Ran(command.output().unwrap())
    };
    // It has six threads.
    for most in [2, 4, 5] {
        few.allow(&most.to_string());
        restore().ends_with(125).says(&["limit", "pids.max"]);
        few.is_left();
    }
    few.allow("max");
    restore().ends_with(0);
    few.kill();
}

#[test]
fn nodes_that_are_missing_are_a_warning() {
    if !engine() {
        return;
    }
    let dir = temp();
    let (target, image) = killed(&dir);
    drop(target);
    const MPOL_BIND: u32 = 2;
    common::change_manifest(&image, |manifest| {
        manifest["processes"][0]["threads"][0]["mempolicy"] =
            serde_json::json!({"mode": MPOL_BIND, "nodes": [1u64 << 63]});
        Ok(())
    })
    .unwrap();
    let ran = run(&["restore", "--detach", path(&image)])
        .ends_with(0)
        .says(&["nodes", "set_mempolicy"]);
    kill(
        Pid::from_raw(ran.out().trim().parse().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
}

/// There a context for one request has a ring that is as long as one for many is here.
#[test]
fn a_ring_of_a_machine_with_more_processors_gets_as_long_as_it_was() {
    if !engine() || !root() {
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/aio.c");
    let program = common::build_c(&source, &["-pthread".to_owned()]).unwrap();
    let dir = temp();
    let image = dir.path().join("i");
    let mut target = Sleeper::of(Command::new(program).arg("many").current_dir(&dir));
    let has = |name: &str| dir.path().join(name).exists();
    wait_for("the program to be ready", LIMIT, || {
        Ok((has("ready") || has("result")).then_some(()))
    })
    .unwrap();
    if has("result") {
        return skipped("this kernel has no asynchronous I/O");
    }
    run(&["dump", "--kill", &target.pid(), "-o", path(&image)]).ends_with(0);
    target.0.wait().unwrap();
    common::change_manifest(&image, |manifest| {
        let mappings = manifest["processes"][0]["vmas"].as_array_mut();
        let rings = mappings.into_iter().flatten();
        for ring in rings.filter(|v| v["backing"]["kind"] == "aio") {
            ring["backing"]["ring"]["requests"] = 1.into();
        }
        Ok(())
    })
    .unwrap();
    run(&["restore", "--detach", path(&image)]).ends_with(0);
    fs::write(dir.path().join("go"), "").unwrap();
    let result = wait_for("its verdict", LIMIT, || {
        Ok(fs::read_to_string(dir.path().join("result")).ok())
    })
    .unwrap();
    assert!(result.starts_with("PASS\n"), "{result}");
}
