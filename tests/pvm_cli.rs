//! The task-pvmd protocol and the PVM commands, in virtual machines of one host with real pvmds and tasks.

mod common;
#[path = "pvm_cli/protocol.rs"]
mod protocol;
#[path = "shim/mod.rs"]
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::tid::Tid;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use stage::Vm;

/// A pvmd that ends sends SIGTERM to all its tasks, and here these are tests. They have it blocked, but while
/// something is started, which would inherit that.
fn sigterm() -> SigSet {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term
}

fn started<T>(start: impl FnOnce() -> T) -> T {
    let pending = SignalFd::with_flags(&sigterm(), SfdFlags::SFD_NONBLOCK).unwrap();
    while pending.read_signal().unwrap().is_some() {}
    sigterm().thread_unblock().unwrap();
    let started = start();
    sigterm().thread_block().unwrap();
    started
}

fn main() -> ExitCode {
    sigterm().thread_block().unwrap();
    stage::main(&[
        ("enrols, and leaves", protocol::enrols),
        ("takes over the task a pvmd started", protocol::takes_over),
        ("lists hosts and tasks", protocol::lists),
        ("a message goes to a C task and back", protocol::messages),
        ("large messages go both ways", protocol::large_messages),
        (
            "a marker comes behind what was sent before",
            protocol::marker,
        ),
        ("is told when a task ends", protocol::notices),
        (
            "starts a task where, and with what, it was asked",
            protocol::spawns,
        ),
        ("output goes where it is sent", protocol::output_goes),
        (
            "mailbox entries move from owner to owner",
            protocol::mailbox,
        ),
        (
            "who looks for one meanwhile finds it",
            protocol::mailbox_read,
        ),
        (
            "a wish for a direct route is refused",
            protocol::refuses_route,
        ),
        ("hosts that cannot be added are named", protocol::bad_hosts),
        (
            "the end of the pvmd is an error that names it",
            protocol::pvmd_ends,
        ),
        ("mistctl shim and exec", shim_and_exec),
        ("mistctl pvm start and stop", start_and_stop),
        (
            "file capabilities of mistctl cost its children no variable",
            strong,
        ),
        (
            "mistctl pvm start after a pvmd that died",
            start_after_death,
        ),
        ("mistctl ps tells every task by its two tids", ps),
        ("mistctl ps tells tasks without the shim", ps_without_shim),
    ])
}

/// Runs mistctl in the environment of a virtual machine.
fn pvmd_of(vm: &Vm) -> Pvmd {
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    Pvmd::find_at(None, &file).unwrap().unwrap()
}

fn client_of(vm: &Vm) -> Client {
    Client::enrol(&pvmd_of(vm), 0).unwrap()
}

fn mistctl(vm: &Vm, arguments: &[&str]) -> Output {
    vm.command("mistctl", false)
        .args(arguments)
        .output()
        .unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text} {}", String::from_utf8_lossy(&output.stderr)))
}

fn shim_and_exec(kit: &Path) {
    let vm = started(|| Vm::start_bare(kit));
    let library = kit.join("libmistshim.so").canonicalize().unwrap();
    let output = mistctl(&vm, &["shim", "--json"]);
    assert_eq!(json(&output)["path"], library.to_str().unwrap());
    let output = mistctl(&vm, &["shim"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        library.to_str().unwrap()
    );
    // The exit status, the arguments and the library.
    let script = "grep -q libmistshim /proc/$$/maps && test \"$1\" = 'a b' && exit 42";
    let output = mistctl(&vm, &["exec", "--", "sh", "-c", script, "sh", "a b"]);
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    let output = mistctl(&vm, &["exec", "sh", "-c", "kill -9 $$"]);
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&output.status),
        Some(9)
    );
    // A folder in PATH that may not be searched would count as "cannot be run", as with execvp(3) everywhere.
    let mut command = vm.command("mistctl", false);
    command.args(["exec", "--json", "--", "no-such-program"]);
    let output = command.env("PATH", "/usr/bin:/bin").output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(json(&output)["exit"], 127);
    assert_eq!(mistctl(&vm, &["exec", "/etc"]).status.code(), Some(126));
    // Alone, mistctl has no shim and says so.
    let alone = vm.dir.join("mistctl");
    fs::copy(kit.join("mistctl"), &alone).unwrap();
    let output = Command::new(&alone).arg("shim").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the PVM shim is missing"), "{said}");
}

/// A folder for a virtual machine that mistctl starts, ended when dropped.
struct Started {
    vm: Vm,
    tmp: PathBuf,
}

impl Started {
    /// Another virtual machine beside `vm`, of which only the environment is used.
    fn new(kit: &Path) -> Started {
        let vm = started(|| Vm::start_bare(kit));
        let tmp = vm.dir.join("tmp");
        fs::create_dir(&tmp).unwrap();
        Started { vm, tmp }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.vm.command("mistctl", false);
        command.env("PVM_TMP", &self.tmp).args(arguments);
        match arguments.contains(&"start") {
            true => started(|| command.output().unwrap()),
            false => command.output().unwrap(),
        }
    }

    fn left(&self) -> Vec<String> {
        fs::read_dir(&self.tmp)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("pvml."))
            .collect()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.run(&["pvm", "stop"]);
    }
}

fn start_and_stop(kit: &Path) {
    let it = Started::new(kit);
    let output = it.run(&["pvm", "stop", "--json"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(json(&output)["failure"], "no_such_process");
    let output = it.run(&["ps"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");

    // The hostfile gives this host its path, and may name it or not.
    let hostfile = it.tmp.join("hosts");
    fs::write(
        &hostfile,
        format!("# one\n* ep={}\n127.0.0.1\n", kit.display()),
    )
    .unwrap();
    let hostfile = hostfile.to_str().unwrap().to_owned();
    let output = it.run(&["pvm", "start", "--json", "--name", "127.0.0.1", &hostfile]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let started = json(&output);
    assert_eq!(started["hosts"][0]["name"], "127.0.0.1", "{started}");
    assert_eq!(started["failed"], serde_json::json!([]));
    let pid = started["pid"].as_i64().unwrap() as i32;
    assert!(Path::new(started["table"].as_str().unwrap()).exists());
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps.contains("libmistshim.so"));

    // A second one is refused and does not harm the first.
    let output = it.run(&["pvm", "start", "--json"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert_eq!(json(&output)["failure"], "busy");

    // What it starts has the shim.
    let file = it.tmp.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    let mut client = Client::enrol(&pvmd, 0).unwrap();
    let mut console = it.vm.command("pvm", false);
    console.env("PVM_TMP", &it.tmp);
    console.stdin(std::process::Stdio::piped());
    console.stdout(std::process::Stdio::piped());
    let mut console = console.spawn().unwrap();
    use std::io::Write;
    let mut lines = console.stdin.take().unwrap();
    writeln!(lines, "spawn /bin/sleep 1000\nquit").unwrap();
    drop(lines);
    assert!(console.wait().unwrap().success());
    let tasks = client.tasks(Tid::NONE).unwrap();
    let task = tasks.iter().find(|t| t.program.contains("sleep")).unwrap();
    // The pvmd has forked it, but exec may be still to come.
    stage::until("the shim to be loaded", || {
        fs::read_to_string(format!("/proc/{}/maps", task.pid))
            .is_ok_and(|maps| maps.contains("libmistshim.so"))
    });
    client.exit().unwrap();

    let output = it.run(&["pvm", "stop", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(json(&output)["pid"], pid);
    assert_eq!(it.left(), ["hosts"], "only the test's own file is left");
}

/// ld.so(8) takes these away from a program with file capabilities.
const TAKEN: [(&str, &str); 3] = [
    ("LD_LIBRARY_PATH", "/opt/own/lib"),
    ("TMPDIR", "/var/tmp"),
    ("LD_PRELOAD", "libpvm3.so.3"),
];

fn strong(kit: &Path) {
    let mistctl = kit.join(stage::STRONG);
    if !mistctl.exists() {
        eprintln!("SKIPPED: file capabilities: setcap does not work here");
        return;
    }
    let it = Started::new(kit);
    let run = |arguments: &[&str]| {
        let mut command = it.vm.command(stage::STRONG, false);
        command.env("PVM_TMP", &it.tmp).envs(TAKEN).args(arguments);
        let output = started(|| command.output().unwrap());
        assert!(output.status.success(), "{output:?}");
        output
    };
    let given = |variables: &str| {
        for (name, value) in TAKEN {
            let line = match name {
                "LD_PRELOAD" => format!("{name}={}/libmistshim.so:{value}", kit.display()),
                _ => format!("{name}={value}"),
            };
            assert!(variables.lines().any(|l| l == line), "{line}: {variables}");
        }
    };
    given(&String::from_utf8_lossy(&run(&["exec", "env"]).stdout));
    // The pvmd, which passes on what it has to its tasks.
    let begun = json(&run(&["pvm", "start", "--json", "--name", "127.0.0.1"]));
    let variables = fs::read_to_string(format!("/proc/{}/environ", begun["pid"])).unwrap();
    given(&variables.replace('\0', "\n"));
}

fn start_after_death(kit: &Path) {
    let it = Started::new(kit);
    let start = ["pvm", "start", "--json", "--name", "127.0.0.1"];
    let first = json(&it.run(&start));
    let pid = nix::unistd::Pid::from_raw(first["pid"].as_i64().unwrap() as i32);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    let file = it.tmp.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    stage::until("the pvmd to be dead", || pvmd.is_dead().unwrap());
    let output = it.run(&start);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let second = json(&output);
    assert_ne!(first["table"], second["table"]);
    assert!(!Path::new(first["table"].as_str().unwrap()).exists());
    // And one that fails says why, and leaves nothing.
    let output = it.run(&["pvm", "stop"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = it.run(&["pvm", "start", "--name", "no-such-name.invalid"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("pvmd does not start"), "{said}");
    assert_eq!(it.left(), [""; 0], "{said}");
}

fn row(listing: &serde_json::Value, tid: u32) -> serde_json::Value {
    let tid = format!("t{tid:x}");
    let tasks = listing["tasks"].as_array().unwrap();
    let found = tasks.iter().find(|task| task["tid"] == *tid);
    found.unwrap_or_else(|| panic!("{tid}: {listing}")).clone()
}

fn ps(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut old = vm.actor();
    let v = old.enrol();
    let r2 = v + 1;
    let mut table = vm.table();
    table.add_incarnation(r2, v).unwrap();
    let mut new = vm.actor();
    assert_eq!(new.enrol(), v);
    let r3 = r2 + 1;
    let mut agent = vm.actor();
    assert_eq!(agent.enrol(), r3);
    table.hide(r3).unwrap();
    table.close_gate(v, r2, 0).unwrap();
    let listing = json(&mistctl(&vm, &["ps", "--json"]));
    assert_eq!(row(&listing, v)["state"], "moving", "{listing}");
    table.open_gate(v, r2).unwrap();
    drop(table);
    old.ask("exit");
    new.tell("recv -1 5");
    stage::until_waits(&new.block(), mistctl::pvm::shimabi::block::wait::RECEIVE);
    let listing = json(&mistctl(&vm, &["ps", "--json"]));
    assert_eq!(listing["tasks"].as_array().unwrap().len(), 1, "{listing}");
    let task = row(&listing, r2);
    assert_eq!(task["virtual_tid"], format!("t{v:x}"));
    assert_eq!(task["pid"], new.pid());
    assert_eq!(task["host"], "127.0.0.1");
    assert_eq!(task["shim"], "yes");
    assert_eq!(task["state"], "receiving");
    assert_eq!(
        task["program"],
        kit.join("actor").canonicalize().unwrap().to_str().unwrap()
    );
    assert!(task["memory"].as_u64().unwrap() > 4096);
    assert!(task["since"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(task["direct_route"], false);
    let output = mistctl(&vm, &["ps"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains(&format!("t{v:x}  t{r2:x}  127.0.0.1")),
        "{said}"
    );
}

fn ps_without_shim(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut bare = vm.bare_actor();
    let tid = bare.enrol();
    let mut direct = vm.actor();
    let asks = direct.enrol();
    direct.ask("setopt 1 3");
    let mut allowed = vm.direct_actor();
    let has = allowed.enrol();
    // The client of this test has no libpvm at all, as a program that holds it inside. It says which process it is.
    let client = Client::enrol(&pvmd_of(&vm), std::process::id() as i32).unwrap();
    let unseen = client_of(&vm);
    let listing = json(&mistctl(&vm, &["ps", "--json"]));
    assert_eq!(row(&listing, tid)["shim"], "no", "{listing}");
    assert_eq!(row(&listing, client.tid().0)["shim"], "static", "{listing}");
    let unseen = format!("{}", unseen.tid());
    assert!(!listing.to_string().contains(&unseen), "{listing}");
    assert_eq!(row(&listing, asks)["direct_route"], true, "{listing}");
    let output = mistctl(&vm, &["ps"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains(&format!("t{asks:x}: asked for PvmRouteDirect")),
        "{said}"
    );
    assert!(
        said.contains(&format!("t{has:x}: has direct routes")),
        "{said}"
    );
    client.exit().unwrap();
}
