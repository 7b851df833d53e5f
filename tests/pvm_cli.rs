//! The task-pvmd protocol and the PVM commands, in virtual machines of one host with real pvmds and tasks.

mod common;
#[path = "shim/mod.rs"]
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mistctl::error::Failure;
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::mailbox;
use mistctl::pvm::shimabi::{CTX_TC, NOOP_MAGIC};
use mistctl::pvm::spawn::{Sink, Spawn};
use mistctl::pvm::tid::Tid;
use mistctl::pvm::virtual_machine::{Notify, Stream, noticed};
use mistctl::pvm::wire::{Body, tc};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use stage::{LIMIT, Vm};

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
        ("enrols, and leaves", enrols),
        ("takes over the task a pvmd started", takes_over),
        ("lists hosts and tasks", lists),
        ("a message goes to a C task and back", messages),
        ("large messages go both ways", large_messages),
        ("a marker comes behind what was sent before", marker),
        ("is told when a task ends", notices),
        ("starts a task where, and with what, it was asked", spawns),
        ("output goes where it is sent", output_goes),
        ("mailbox entries move from owner to owner", mailbox),
        ("who looks for one meanwhile finds it", mailbox_read),
        ("a wish for a direct route is refused", refuses_route),
        ("hosts that cannot be added are named", bad_hosts),
        ("the end of the pvmd is an error that names it", pvmd_ends),
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

fn pvmd_of(vm: &Vm) -> Pvmd {
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    Pvmd::find_at(None, &file).unwrap().unwrap()
}

fn client_of(vm: &Vm) -> Client {
    Client::enrol(&pvmd_of(vm), 0).unwrap()
}

fn enrols(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut one = client_of(&vm);
    let two = client_of(&vm);
    assert_eq!(one.tid(), Tid(0x40001));
    assert_eq!(two.tid(), Tid(0x40002));
    assert_eq!(one.parent(), Tid::NONE);
    assert_eq!(one.pvmd_pid(), Some(vm.pvmd.id() as i32));
    let tid = two.tid();
    assert!(one.lives(tid).unwrap());
    two.exit().unwrap();
    assert!(!one.lives(tid).unwrap());
    // Nothing is left of the files by which both showed whose they are.
    let left = std::fs::read_dir(&vm.dir).unwrap().flatten();
    let ours = left.filter(|e| e.file_name().to_string_lossy().contains(".mist."));
    assert_eq!(ours.count(), 0);
}

/// A task the pvmd has forked is taken over by whoever knows its cookie, which is its pid.
fn takes_over(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut actor = vm.actor();
    let parent = actor.enrol();
    // A program that never calls PVM: its tid is free to be taken.
    let answer = actor.ask("spawn 1 /usr/bin/sleep 1000");
    let tid = u32::from_str_radix(answer.split(' ').next_back().unwrap(), 16).unwrap();
    let mut asker = client_of(&vm);
    let all = asker.tasks(Tid::NONE).unwrap();
    let task = all.iter().find(|t| t.tid == Tid(tid)).unwrap();
    let client = Client::enrol(&pvmd_of(&vm), task.pid).unwrap();
    assert_eq!(client.tid(), Tid(tid));
    assert_eq!(client.parent(), Tid(parent));
    let sleeper = nix::unistd::Pid::from_raw(task.pid);
    nix::sys::signal::kill(sleeper, Signal::SIGKILL).unwrap();
    client.exit().unwrap();
}

fn lists(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let hosts = client.hosts().unwrap();
    assert_eq!(hosts.len(), 1);
    assert_eq!(hosts[0].tid, Tid(0x40000));
    assert_eq!(hosts[0].name, "127.0.0.1");
    assert_eq!(hosts[0].arch, "LINUX64");
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    let tasks = client.tasks(Tid::NONE).unwrap();
    // Not the client itself, which is no task of the user's.
    let [task] = &tasks[..] else {
        panic!("{tasks:?}");
    };
    assert_eq!(task.tid, tid);
    assert_eq!(task.pid, actor.pid());
    assert_eq!(task.host, hosts[0].tid);
    assert_eq!(task.parent, Tid::NONE);
    let (stage, arguments) = vm.stage("child");
    actor.ask(&format!(
        "spawn 1 {} {arguments}",
        vm.kit.join("actor").display()
    ));
    let child = Tid(stage.actor().enrol());
    let tasks = client.tasks(hosts[0].tid).unwrap();
    let task = tasks.iter().find(|t| t.tid == child).unwrap();
    assert!(task.program.ends_with("actor"), "{task:?}");
    assert_eq!(task.parent, tid);
    let error = client.tasks(Tid(0x7c0000)).unwrap_err().to_string();
    assert!(error.contains("t7c0000"), "{error}");
}

fn messages(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    client.send(tid, 5, Body::new().string(b"hello")).unwrap();
    assert_eq!(
        actor.ask("recv -1 5"),
        format!("from {0:x} tag 5 text hello info {0:x}", client.tid().0)
    );
    actor.ask(&format!("send {:x} 6 other", client.tid().0));
    actor.ask(&format!("send {:x} 7 welcome", client.tid().0));
    let message = client.recv_from(Some(tid), 7, LIMIT).unwrap().unwrap();
    assert_eq!(message.src, tid);
    assert_eq!(message.reader().string().unwrap(), b"welcome");
    // What was not asked for has been kept.
    let message = client.recv(Some(LIMIT)).unwrap().unwrap();
    assert_eq!((message.tag, message.src), (6, tid));
    assert!(client.recv(Some(Duration::ZERO)).unwrap().is_none());
}

fn large_messages(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    actor.ask(&format!("big {:x} 8 3000000", client.tid().0));
    let message = client.recv_from(Some(tid), 8, LIMIT).unwrap().unwrap();
    assert!(message.body.len() >= 3_000_000, "{}", message.body.len());
    // More than a socket holds, to one that reads only later.
    let large = vec![7; 3_000_000];
    let body = Body::new().string(b"large").bytes(&large);
    client.send(tid, 9, body).unwrap();
    assert!(actor.ask("recv -1 9").contains("text large"));
}

fn marker(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let (mut one, mut two) = (client_of(&vm), client_of(&vm));
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    let to = two.tid();
    one.send(to, 1, Body::new().bytes(&vec![1; 500_000]))
        .unwrap();
    one.send_noop(to, 9, b"mark").unwrap();
    one.send_noop(tid, 9, b"unseen").unwrap();
    one.send(tid, 5, Body::new().string(b"seen")).unwrap();
    assert_eq!(two.recv(Some(LIMIT)).unwrap().unwrap().tag, 1);
    let noop = two.recv(Some(LIMIT)).unwrap().unwrap();
    assert_eq!((noop.tag, noop.ctx), (tc::NOOP, CTX_TC as u32));
    let mut reader = noop.reader();
    assert_eq!(reader.uint().unwrap(), NOOP_MAGIC);
    assert_eq!(reader.uint().unwrap(), 9);
    assert_eq!(reader.rest(), b"mark");
    // libpvm discards it.
    assert!(actor.ask("recv -1 -1").contains("text seen"));
}

fn notices(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    client.notify(Notify::TaskExit, 77, &[tid]).unwrap();
    client.notify(Notify::HostAdd, 78, &[]).unwrap();
    assert!(client.lives(tid).unwrap());
    actor.crash();
    let notice = client.recv_from(None, 77, LIMIT).unwrap().unwrap();
    assert_eq!(noticed(&notice), [tid]);
    // About the dead it comes at once.
    client.notify(Notify::TaskExit, 79, &[tid]).unwrap();
    let notice = client.recv_from(None, 79, LIMIT).unwrap().unwrap();
    assert_eq!(noticed(&notice), [tid]);
}

/// Output as it comes to a collector: the task's tid, then bytes, or a word below 1 that says what happened.
fn printed(client: &mut Client, tag: i32) -> (Tid, String) {
    let mut text = String::new();
    loop {
        let message = client.recv_from(None, tag, LIMIT).unwrap().unwrap();
        let mut reader = message.reader();
        let (tid, count) = (reader.tid().unwrap(), reader.int().unwrap());
        if count > 0 {
            text.push_str(&String::from_utf8_lossy(
                reader.bytes(count as usize).unwrap(),
            ));
        } else if count == 0 {
            return (tid, text);
        }
    }
}

fn spawns(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let output = Sink {
        tid: client.tid().0,
        ctx: 0,
        tag: 33,
    };
    let what = Spawn {
        file: b"/bin/sh",
        args: &[
            "-c",
            "echo $0 $WORD $PVMEPID; exec cat /proc/self/stat",
            "a b",
        ],
        host: "127.0.0.1",
        environment: &["WORD=yes"],
        output,
        trace: Sink::default(),
    };
    let tid = client.spawn(&what).unwrap();
    let (from, text) = printed(&mut client, 33);
    assert_eq!(from, tid);
    let (line, stat) = text.split_once('\n').unwrap();
    // The pvmd forked the very process that says so.
    let pid = stat.split(' ').next().unwrap();
    assert_eq!(line, format!("a b yes {pid}"));
    let nowhere = client.spawn(&Spawn {
        host: "h9",
        ..what.clone()
    });
    let error = nowhere.unwrap_err();
    assert_eq!(Failure::of(&error), Failure::Refused);
    assert!(
        format!("{error:#}").contains("on h9: PvmNoHost"),
        "{error:#}"
    );
    let nothing = client.spawn(&Spawn {
        file: b"/no/such",
        ..what
    });
    let error = format!("{:#}", nothing.unwrap_err());
    assert!(
        error.contains("/no/such") && error.contains("PvmNoFile"),
        "{error}"
    );
}

fn output_goes(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let collector = client_of(&vm);
    let mut task = client_of(&vm);
    let to = Sink {
        tid: collector.tid().0,
        ctx: 5,
        tag: 34,
    };
    task.set_sink(Stream::Output, to).unwrap();
    assert_eq!(task.sinks().unwrap(), (to, Sink::default()));
}

fn mailbox(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let (mut one, two) = (client_of(&vm), client_of(&vm));
    let (a, b) = (one.tid(), two.tid());
    let message = mailbox::packed(a, b"text");
    let multi = mailbox::MULTI_INSTANCE;
    for expected in 0..3 {
        let index = one.mailbox_put(a, "name", 0, multi, &message).unwrap();
        assert_eq!(index, expected);
    }
    // Of another owner, at the same number, with what it says.
    let kept = one.mailbox_get("name", 1).unwrap().unwrap();
    assert!(one.mailbox_remove(a, "name", 1).unwrap());
    assert_eq!(one.mailbox_put(b, "name", 1, multi, &kept).unwrap(), 1);
    assert!(!one.mailbox_remove(b, "nothing", 0).unwrap());
    assert_eq!(one.mailbox_get("nothing", 0).unwrap(), None);
    let owners: Vec<_> = one.mailbox_names("na*").unwrap();
    let owners: Vec<_> = owners.iter().map(|e| (e.index, e.owner)).collect();
    assert_eq!(owners, [(0, a), (1, b), (2, a)]);
    assert_eq!(one.mailbox_get("name", 1).unwrap().unwrap(), kept);
    two.exit().unwrap();
    assert_eq!(
        one.mailbox_get("name", 1).unwrap(),
        None,
        "it went with its owner"
    );
    assert!(one.mailbox_get("name", 2).unwrap().is_some());
    one.spare_from_reset(a).unwrap();
    let spared = one.mailbox_names(mailbox::NO_RESET).unwrap();
    assert_eq!(spared.iter().map(|e| e.owner).collect::<Vec<_>>(), [a]);
}

fn mailbox_read(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let (mut one, mut two, mut reader) = (client_of(&vm), client_of(&vm), client_of(&vm));
    let (a, b) = (one.tid(), two.tid());
    let message = mailbox::packed(a, b"text");
    one.mailbox_put(a, "name", 0, 0, &message).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let looks = std::thread::spawn(move || {
        let mut missed = 0;
        while !seen.load(Ordering::Relaxed) {
            missed += usize::from(reader.mailbox_get("name", 0).unwrap().is_none());
        }
        missed
    });
    for n in 0..500 {
        let [entry] = &one.mailbox_names("name").unwrap()[..] else {
            panic!("not one entry");
        };
        let (owner, next) = if n % 2 == 0 { (a, b) } else { (b, a) };
        assert_eq!((entry.owner, entry.flags), (owner, 0));
        assert!(one.mailbox_hand_over(entry, next).unwrap());
    }
    over.store(true, Ordering::Relaxed);
    assert_eq!(looks.join().unwrap(), 0, "times it was not found");
    // It is locked as before.
    assert!(two.mailbox_put(b, "name", 0, 0, &message).is_err());
    assert_eq!(one.mailbox_get("name", 0).unwrap(), Some(message));
}

fn refuses_route(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let mut actor = vm.bare_actor();
    let tid = Tid(actor.enrol());
    // PvmRoute, PvmRouteDirect
    actor.ask("setopt 1 3");
    actor.tell(&format!("send {:x} 5 direct", client.tid().0));
    let message = client.recv_from(Some(tid), 5, LIMIT).unwrap().unwrap();
    assert_eq!(message.reader().string().unwrap(), b"direct");
    actor.answer();
}

fn bad_hosts(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let added = client
        .add_hosts(&["no-such-host.invalid".to_owned()], LIMIT)
        .unwrap();
    let [Err(why)] = &added[..] else {
        panic!("{added:?}");
    };
    assert!(why.contains("Pvm"), "{why}");
    assert_eq!(client.hosts().unwrap().len(), 1);
}

fn pvmd_ends(kit: &Path) {
    let mut vm = started(|| Vm::start(kit));
    let mut client = client_of(&vm);
    let pvmd = pvmd_of(&vm);
    assert!(!pvmd.is_dead().unwrap());
    vm.pvmd.kill().unwrap();
    vm.pvmd.wait().unwrap();
    let error = client.hosts().unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(&vm.address), "{error}");
    assert!(pvmd.is_dead().unwrap());
    let error = format!("{:#}", Client::enrol(&pvmd, 0).err().unwrap());
    assert!(error.contains(&vm.address), "{error}");
}

/// Runs mistctl in the environment of a virtual machine.
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
