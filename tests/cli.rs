//! The command line, as its users meet it: what is printed where, and with which code it ends.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{both, mistctl, wait_child, wait_for};
use mistctl::image::{Compress, ImageWriter, Manifest};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// No step takes longer, unless something hangs.
const LIMIT: Duration = Duration::from_secs(30);
/// A user who is nobody in particular.
const NOBODY: u32 = 65534;

/// Runs mistctl with these arguments.
fn run(args: &[&str]) -> Ran {
    Ran(mistctl().args(args).output().expect("mistctl starts"))
}

/// What a run of mistctl came to.
struct Ran(Output);

impl Ran {
    #[track_caller]
    fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.0.status.code(), Some(code), "{}", both(&self.0));
        self
    }

    /// Standard output.
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    /// Standard error.
    fn err(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// The one JSON object on standard output.
    #[track_caller]
    fn object(&self) -> Value {
        let v: Value =
            serde_json::from_str(&self.out()).unwrap_or_else(|e| panic!("{e}: {}", both(&self.0)));
        assert!(v.is_object(), "{v}");
        v
    }

    #[track_caller]
    fn says(self, words: &[&str]) -> Self {
        let text = both(&self.0);
        for w in words {
            assert!(text.contains(w), "no {w:?} in: {text}");
        }
        self
    }

    #[track_caller]
    fn silent(self) -> Self {
        assert_eq!(both(&self.0), "");
        self
    }
}

/// A process of ours that sleeps; dies with this value.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Sleeper {
        Sleeper::of(Command::new("sleep").arg("1000"))
    }

    fn of(command: &mut Command) -> Sleeper {
        let null = Stdio::null;
        Sleeper(
            command
                .stdin(null())
                .stdout(null())
                .stderr(null())
                .spawn()
                .expect("sleep starts"),
        )
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says loudly that a test cannot run here; `scripts/test` counts these lines.
fn skipped(why: &str) {
    // Past the capture of test output.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skipped("needs root, to be an ordinary user in its turn");
    }
    root
}

/// Whether dump and restore do anything yet.
fn engine() -> bool {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("i");
    let target = Sleeper::new();
    let dump = run(&["dump", &target.pid(), "-o", image.to_str().unwrap()]);
    let restore = run(&["restore", dir.path().to_str().unwrap()]);
    let text = both(&dump.0) + &both(&restore.0);
    let there = !text.contains("not built yet");
    if !there {
        skipped("dump and restore are not built yet");
    }
    there
}

fn temp() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn manifest() -> Manifest {
    serde_json::from_str(include_str!("data/manifest.json")).unwrap()
}

/// Writes a sound image with some pages of memory.
fn image(path: &Path) {
    let writer = ImageWriter::create(path, None, Compress::None).unwrap();
    writer.pages().put(0, 0x40_0000, &[7; 3 * 4096]).unwrap();
    writer.finish(&manifest()).unwrap();
}

/// Changes one byte of a file.
fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

// ---- usage ------------------------------------------------------------------------------------------------

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2() {
    for args in [
        &[][..],
        &["dumb"],
        &["dump"],
        &["dump", "x"],
        &["dump", "0"],
        &["dump", "-1"],
        &["dump", "99999999999"],
        &["dump", "1", "--kill", "--stop"],
        &["dump", "1", "--keep", "3"],
        &["dump", "1", "-o", "d", "--keep", "0"],
        &["dump", "1", "--compress", "rar"],
        &["restore"],
        &["show"],
        &["verify", "a", "b"],
        &["completions", "tcsh"],
    ] {
        let ran = run(args).ends_with(2);
        assert_eq!(ran.out(), "", "{args:?}: errors go to standard error");
        assert!(
            ran.err().contains("Usage:") || ran.err().contains("For more information"),
            "{args:?}"
        );
    }
}

#[test]
fn with_json_even_that_is_one_object() {
    let ran = run(&["dump", "x", "--json"]).ends_with(2);
    let v = ran.object();
    assert_eq!(v["exit"], 2);
    assert_eq!(v["failure"], "usage");
    assert!(v["error"].as_str().unwrap().contains("'x'"), "{v}");
    assert_eq!(ran.err(), "");
}

#[test]
fn help_goes_to_standard_output_and_explains_every_exit_code() {
    let ran = run(&["--help"]).ends_with(0);
    assert_eq!(ran.err(), "");
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "6 ", "125"] {
        assert!(
            ran.out().lines().any(|l| l.trim_start().starts_with(code)),
            "{code}: {}",
            ran.out()
        );
    }
    for command in [
        "dump",
        "restore",
        "show",
        "verify",
        "check",
        "completions",
        "man",
    ] {
        run(&[command, "--help"])
            .ends_with(0)
            .says(&["Usage: mistctl"]);
    }
    run(&["--version"]).ends_with(0).says(&["mistctl 0."]);
}

#[test]
fn a_reader_who_has_seen_enough_is_no_error() {
    for args in [
        &["--help"][..],
        &["check"],
        &["completions", "bash"],
        &["man"],
        &["check", "--json"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = mistctl()
            .args(args)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", both(&output));
        assert_eq!(output.stderr, b"", "{args:?}");
    }
}

#[test]
fn a_standard_output_that_takes_nothing_is_an_error() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = mistctl().arg("check").stdout(full).output().unwrap();
    Ran(output)
        .ends_with(1)
        .says(&["standard output", "No space left"]);
}

#[test]
fn completions_and_manual_pages_come_out_of_the_same_definition() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        run(&["completions", shell])
            .ends_with(0)
            .says(&["mistctl", "tcp-established"]);
    }
    let dir = temp();
    run(&["man", path(dir.path())]).ends_with(0).silent();
    let mut pages: Vec<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    let commands = [
        "agent",
        "check",
        "completions",
        "dump",
        "exec",
        "man",
        "migrate",
        "ps",
        "pvm",
        "pvm-start",
        "pvm-stop",
        "restore",
        "shim",
        "show",
        "verify",
    ];
    let mut expected: Vec<String> = commands.iter().map(|c| format!("mistctl-{c}.1")).collect();
    expected.push("mistctl.1".to_owned());
    expected.sort();
    assert_eq!(pages, expected);
    let text = run(&["man"]).ends_with(0).out();
    assert!(
        text.contains(".TH mistctl 1") && text.contains("EXIT STATUS"),
        "{text}"
    );
}

// ---- whom it serves ---------------------------------------------------------------------------------------

#[test]
fn no_such_process_ends_with_3() {
    run(&["dump", "2147483647"])
        .ends_with(3)
        .says(&["no process has pid 2147483647"]);
    let v = run(&["dump", "2147483647", "--json"]).ends_with(3).object();
    assert_eq!(
        (&v["exit"], &v["failure"]),
        (&Value::from(3), &Value::from("no_such_process"))
    );
}

#[test]
fn nothing_is_left_behind_when_there_is_no_such_process() {
    let dir = temp();
    let store = dir.path().join("store");
    run(&["dump", "2147483647", "-o", path(&store), "--keep", "2"]).ends_with(3);
    assert!(!store.exists());
}

/// mistctl as an ordinary user runs it, with or without file capabilities.
fn as_nobody(dir: &Path, capabilities: Option<&str>) -> Option<Command> {
    let program = dir.join("mistctl");
    // By another process: a descriptor of ours, open for writing, could go into a child that another test starts
    // just now, and the program would be busy (execve(2), ETXTBSY).
    let copy = Command::new("install")
        .args(["-m", "755", env!("CARGO_BIN_EXE_mistctl")])
        .arg(&program)
        .status();
    assert!(copy.unwrap().success());
    if let Some(capabilities) = capabilities {
        let set = Command::new("setcap")
            .arg(capabilities)
            .arg(&program)
            .status();
        if !set.is_ok_and(|s| s.success()) {
            skipped("setcap does not work here");
            return None;
        }
    }
    let mut command = Command::new(program);
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir(dir)
        .stdin(Stdio::null());
    Some(command)
}

const FILE_CAPABILITIES: &str =
    "cap_sys_ptrace,cap_checkpoint_restore,cap_sys_admin,cap_sys_time,cap_net_admin=ep";

#[test]
fn another_users_process_is_refused_with_5_whatever_the_file_capabilities() {
    if !root() {
        return;
    }
    let target = Sleeper::new();
    for capabilities in [None, Some(FILE_CAPABILITIES)] {
        let dir = temp();
        let Some(mut command) = as_nobody(dir.path(), capabilities) else {
            return;
        };
        let output = command
            .args(["dump", &target.pid(), "-o", "/tmp/never"])
            .output()
            .unwrap();
        Ran(output)
            .ends_with(5)
            .says(&[&target.pid(), "another user (uid 0)"]);
    }
}

#[test]
fn a_process_of_ones_own_that_runs_as_another_is_refused_with_5() {
    if !root() {
        return;
    }
    // Like a set-user-ID program: the real user is the caller, the effective one is root.
    let target = Sleeper::of(Command::new("setpriv").args(["--ruid", "65534", "sleep", "1000"]));
    let uid = format!("Uid:\t{NOBODY}\t0\t");
    wait_for("setpriv has set the uid", LIMIT, || {
        let status = fs::read_to_string(format!("/proc/{}/status", target.pid()))?;
        Ok(status.contains(&uid).then_some(()))
    })
    .unwrap();
    let dir = temp();
    let Some(mut command) = as_nobody(dir.path(), Some(FILE_CAPABILITIES)) else {
        return;
    };
    let output = command
        .args(["dump", &target.pid(), "-o", "/tmp/never"])
        .output()
        .unwrap();
    Ran(output).ends_with(5);
}

#[test]
fn set_user_id_root_is_refused_with_5() {
    if !root() {
        return;
    }
    let dir = temp();
    let Some(mut command) = as_nobody(dir.path(), None) else {
        return;
    };
    let program = dir.path().join("mistctl");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let output = command.arg("check").output().unwrap();
    Ran(output)
        .ends_with(5)
        .says(&["set-user-ID", "file capabilities"]);
}

// ---- check ------------------------------------------------------------------------------------------------

#[test]
fn check_names_features_and_what_each_lack_costs() {
    run(&["check"]).ends_with(0).says(&[
        "ptrace",
        "PAGEMAP_SCAN",
        "TCP_REPAIR",
        "can be dumped and restored here",
    ]);
    let v = run(&["check", "--json"]).ends_with(0).object();
    assert_eq!(v["works"], true);
    for f in v["features"].as_array().unwrap() {
        let lacks = f["state"] != "yes";
        assert_eq!(f.get("cost").is_some(), lacks, "{f}");
        assert!(
            f["name"].is_string() && f["group"].is_string() && f["found"].is_string(),
            "{f}"
        );
    }
}

#[test]
fn check_tells_an_ordinary_user_the_setcap_line_and_that_line_works() {
    if !root() {
        return;
    }
    let dir = temp();
    let Some(mut command) = as_nobody(dir.path(), None) else {
        return;
    };
    let before = Ran(command.args(["check", "--json"]).output().unwrap()).object();
    let line = before["setcap"].as_str().expect("a setcap line").to_owned();
    assert!(!line.contains("dac_"), "{line}");
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[..2], ["sudo", "setcap"]);
    assert_eq!(
        Path::new(words[3]),
        dir.path().canonicalize().unwrap().join("mistctl")
    );

    let Some(mut command) = as_nobody(dir.path(), Some(words[2])) else {
        return;
    };
    let after = Ran(command.args(["check", "--json"]).output().unwrap()).object();
    assert_eq!(after.get("setcap"), None);
    let yes = |v: &Value, name: &str| {
        v["features"]
            .as_array()
            .unwrap()
            .iter()
            .any(|f| f["name"] == name && f["state"] == "yes")
    };
    for feature in [
        "clone3 with set_tid",
        "TCP_REPAIR",
        "time namespaces",
        "write tracking (WP_ASYNC)",
    ] {
        if yes(&run(&["check", "--json"]).object(), feature) {
            assert!(!yes(&before, feature) && yes(&after, feature), "{feature}");
        }
    }
}

// ---- images -----------------------------------------------------------------------------------------------

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

// ---- dump and restore -------------------------------------------------------------------------------------

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
