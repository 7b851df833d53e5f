//! The command line, as its users meet it: what is printed where, and with which code it ends.

mod common;
#[path = "cli/dump.rs"]
mod dump;
#[path = "cli/images.rs"]
mod images;
#[path = "cli/restore.rs"]
mod restore;

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

/// mistctl, in what a shell's command makes of its surroundings.
fn after(setup: &str) -> Command {
    let mut sh = Command::new("sh");
    sh.args(["-c", &format!("{setup}; exec \"$@\""), "sh"])
        .arg(mistctl().get_program());
    sh
}

/// A process of ours that sleeps; dies with this value.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Sleeper {
        Sleeper::of(Command::new("sleep").arg("1000"))
    }

    fn of(command: &mut Command) -> Sleeper {
        let null = Stdio::null;
        let sleeper = Sleeper(
            command
                .stdin(null())
                .stdout(null())
                .stderr(null())
                .spawn()
                .expect("sleep starts"),
        );
        // spawn() may return before the kernel has given it its name, which is that of our thread until then.
        let ours = std::fs::read("/proc/thread-self/comm").unwrap();
        let comm = format!("/proc/{}/comm", sleeper.pid());
        wait_for("the program to have its own name", LIMIT, || {
            Ok((std::fs::read(&comm)? != ours).then_some(()))
        })
        .unwrap();
        sleeper
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
fn a_child_that_proc_does_not_show_is_not_left_out_of_a_tree() {
    if !root() {
        return;
    }
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let hidden = "mount -t proc -o hidepid=invisible proc /proc";
    // The shell's child stays root's.
    let parent = format!("{hidden} && {{ sleep 1000 & exec {nobody} sleep 1000; }}");
    let target = Sleeper::of(Command::new("unshare").args(["-m", "sh", "-c", &parent]));
    let uid = format!("Uid:\t{NOBODY}\t{NOBODY}\t");
    wait_for("setpriv has set the uid", LIMIT, || {
        let of = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", target.pid()));
        Ok((of("status")?.contains(&uid) && of("comm")? == "sleep\n").then_some(()))
    })
    .unwrap();
    let children = format!("/proc/{0}/task/{0}/children", target.pid());
    let child = fs::read_to_string(children).unwrap().trim().to_owned();
    let dir = temp();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    as_nobody(dir.path(), None).unwrap();
    let output = Command::new("nsenter")
        .args(["-m", "-t", &target.pid()])
        .args(nobody.split_whitespace())
        .args([path(&dir.path().join("mistctl")), "dump", "--tree"])
        .args([&target.pid(), "-o", path(&dir.path().join("i"))])
        .output()
        .unwrap();
    kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL).unwrap();
    Ran(output).ends_with(5).says(&[&child, "hidepid"]);
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
