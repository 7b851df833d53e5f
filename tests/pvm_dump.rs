//! Dumps of PVM tasks: the quiet point, and what an image holds of a task. Real pvmds, one host.

mod common;
#[path = "shim/mod.rs"]
mod stage;

use std::path::Path;
use std::process::{ExitCode, Output};
use std::sync::Arc;
use std::time::Duration;

use mistctl::error::Failure;
use mistctl::image::files::Kind;
use mistctl::image::{Image, Manifest};
use mistctl::kernel::arch::Regs;
use mistctl::kernel::guardian::Guardian;
use mistctl::kernel::tracee::{Stop, Tracee};
use mistctl::pvm::block::Freezable;
use mistctl::pvm::capture::{Fragment, Task, fragments};
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::flush::{self, Drain};
use mistctl::pvm::local;
use mistctl::pvm::quiet;
use mistctl::pvm::shimabi::block::wait;
use mistctl::pvm::tid::Tid;
use mistctl::pvm::wire::{Body, Reader};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stage::{Actor, LIMIT, Vm, until};

fn main() -> ExitCode {
    stage::main(&[
        ("a task is dumped by its tid and notices nothing", dumps),
        ("an image holds what the task had not read", unread),
        (
            "an image names its output, mailbox entries and place",
            belongings,
        ),
        ("a task without the shim is refused", without_shim),
        ("a task with a role is refused", roles),
        ("not while it waits for an answer of its pvmd", asking),
        (
            "not between a multicast's receivers and its message",
            multicast,
        ),
        ("not while a send is half out", sending),
        ("while it waits for an entry of the mailbox", waits_for_info),
        (
            "not while it waits for an entry that it will take away",
            waits_to_take,
        ),
        ("while it waits for messages, and outside libpvm", waiting),
        ("while a message handler of its runs", in_a_handler),
        (
            "what stands in a sender's socket comes before a marker",
            drained,
        ),
        (
            "so does what a task had sent that has ended",
            drained_of_the_dead,
        ),
        (
            "a task that sends without pause marks its own stream",
            streaming,
        ),
        (
            "a sender at the gate, or inside a send, is waited for",
            inside_send,
        ),
        ("what a task sent, and its output, has left it", left),
        ("every agent's marker is waited for", markers),
    ])
}

/// How long a task that must not be frozen is waited for.
const SHORT: Duration = Duration::from_millis(300);

fn dump(vm: &Vm, arguments: &[&str]) -> Output {
    vm.command("mistctl", false)
        .args(["dump", "--json"])
        .args(arguments)
        .output()
        .unwrap()
}

/// Dumps a task that must let itself be dumped; what the image says.
fn dumped(vm: &Vm, what: &str, name: &str) -> Manifest {
    let output = dump(vm, &[what, "-o", name]);
    assert!(output.status.success(), "{output:?}");
    Image::open(&vm.dir.join(name)).unwrap().manifest.clone()
}

fn client_of(vm: &Vm) -> Client {
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    Client::enrol(&pvmd, 0).unwrap()
}

fn dumps(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut one, mut two) = (vm.actor(), vm.actor());
    let (v, from) = (one.enrol(), two.enrol());
    one.tell("recv -1 5");
    stage::until_waits(&one.block(), wait::RECEIVE);
    for (what, name) in [
        (format!("t{v:x}"), "first"),
        (format!("0x{v:x}"), "second"),
        (one.pid().to_string(), "third"),
    ] {
        let pvm = dumped(&vm, &what, name).pvm.unwrap();
        assert_eq!((pvm.v, pvm.r), (v, v));
        assert_eq!(pvm.host, "127.0.0.1");
        assert!(pvm.unread.inline.is_empty() && pvm.unread.object.is_none());
    }
    two.ask(&format!("send {v:x} 5 hello"));
    assert_eq!(
        one.answer(),
        format!("from {from:x} tag 5 text hello info {from:x}")
    );
    let output = dump(&vm, &["t7c0001", "-o", "no"]);
    assert_eq!(
        output.status.code(),
        Some(Failure::NoSuchProcess.code().into()),
        "{output:?}"
    );
}

/// What stands in the socket is in the image, in whole fragments and without mist's markers; it stays in the socket.
fn unread(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = vm.actor();
    let v = task.enrol();
    let mut client = client_of(&vm);
    client.send(Tid(v), 5, Body::new().string(b"one")).unwrap();
    client.send_noop(Tid(v), 1, b"marker").unwrap();
    client.send(Tid(v), 5, Body::new().string(b"two")).unwrap();
    // The pvmd has passed them on when it answers.
    assert!(client.lives(Tid(v)).unwrap());
    let pvm = dumped(&vm, &format!("t{v:x}"), "small").pvm.unwrap();
    let all = fragments(&pvm.unread.inline, Tid(v)).unwrap();
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(
        all.iter()
            .all(|f| f.src == client.tid() && f.noop().is_none())
    );
    // More than a socket holds: some of it is still in the pvmd.
    let large = vec![7; 2_000_000];
    let body = Body::new().string(b"large").bytes(&large);
    client.send(Tid(v), 5, body).unwrap();
    let manifest = dumped(&vm, &format!("t{v:x}"), "large");
    let pvm = manifest.pvm.unwrap();
    assert!(pvm.unread.inline.is_empty());
    let image = Image::open(&vm.dir.join("large")).unwrap();
    let mut object = image.object_verified(&pvm.unread.object.unwrap()).unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut object, &mut bytes).unwrap();
    assert!(fragments(&bytes, Tid(v)).unwrap().len() > 10);
    for text in ["one", "two", "large"] {
        assert!(task.ask("recv -1 5").contains(&format!("text {text}")));
    }
}

fn belongings(kit: &Path) {
    let vm = Vm::start(kit);
    let mut parent = vm.actor();
    let p = parent.enrol();
    // The parent collects its children's output.
    parent.ask("catchout");
    let (stage, arguments) = vm.stage("child");
    let program = vm.kit.join("actor");
    parent.ask(&format!("spawn 1 {} {arguments}", program.display()));
    let mut child = stage.actor();
    let v = child.enrol();
    child.ask("put mine text 0");
    child.ask("put kept text 1");
    child.ask("put open text 5");
    let manifest = dumped(&vm, &format!("t{v:x}"), "image");
    let pvm = manifest.pvm.unwrap();
    assert!(pvm.program.ends_with("actor"), "{}", pvm.program);
    assert_eq!(pvm.output_to.0, p);
    let names: Vec<&str> = pvm.mailbox.iter().map(|e| e.class.as_str()).collect();
    assert_eq!(
        names,
        ["mine", "kept"],
        "what is persistent and anybody's stays where it is"
    );
    assert!(pvm.mailbox[0].message.len() > 32);
    let kind = |id: u32| &manifest.descriptions[id as usize].kind;
    assert!(matches!(kind(pvm.connection), Kind::Socket { .. }));
    assert_eq!(pvm.output.len(), 2, "{:?}", pvm.output);
    assert!(
        pvm.output
            .iter()
            .all(|id| matches!(kind(*id), Kind::External(_)))
    );
    assert_eq!(pvm.block, child.block().address());
    assert_eq!(pvm.table.0, child.block().table().unwrap());
}

fn refused(vm: &Vm, pid: i32, why: &str) {
    let output = dump(vm, &[&pid.to_string(), "-o", "refused"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        output.status.code(),
        Some(Failure::Refused.code().into()),
        "{output:?}"
    );
    assert!(said.contains(why), "{said}");
    assert!(!vm.dir.join("refused").exists());
}

fn without_shim(kit: &Path) {
    let vm = Vm::start(kit);
    let mut bare = vm.bare_actor();
    bare.enrol();
    refused(&vm, bare.pid(), "start it with `mistctl exec`");
    let mut direct = vm.direct_actor();
    direct.enrol();
    refused(&vm, direct.pid(), "direct routes");
    // A program that is no task is dumped as ever.
    let mut plain = vm.actor();
    let output = dump(&vm, &[&plain.pid().to_string(), "-o", "plain"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!said.contains("PVM"), "{said}");
}

fn roles(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = vm.actor();
    task.enrol();
    assert_eq!(task.ask("hoster"), "0");
    refused(&vm, task.pid(), "registered as a hoster");
}

/// Gives a command to a task whose pvmd sleeps meanwhile. The task must not be frozen in it, for the reason given,
/// and the command be answered in the end.
fn not_frozen(vm: &Vm, task: &mut Actor, command: &str, why: &str) -> String {
    let found = Task::find(task.pid()).unwrap().unwrap();
    let pvmd = Pid::from_raw(vm.pvmd.id() as i32);
    kill(pvmd, Signal::SIGSTOP).unwrap();
    task.tell(command);
    // It sleeps in select(), as it does when it waits for messages.
    until("the task to sleep in select", || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", found.block.pid()));
        call.is_ok_and(|call| call.starts_with("23 ") || call.starts_with("270 "))
    });
    let stopped = quiet::stop(&found, SHORT);
    kill(pvmd, Signal::SIGCONT).unwrap();
    let error = format!("{:#}", stopped.map(drop).expect_err("it was frozen"));
    assert!(error.contains(why), "{error}");
    let answer = task.answer();
    quiet::stop(&found, LIMIT).unwrap().release().unwrap();
    answer
}

fn asking(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = vm.actor();
    task.enrol();
    let answer = not_frozen(&vm, &mut task, "tasks", "waits for an answer");
    assert!(answer.starts_with("0: "), "{answer}");
}

/// The list of receivers goes out first, the message after it, and in between nothing waits for anything: the task is
/// stopped at each of its system calls, to be there.
fn multicast(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut one, mut two) = (vm.actor(), vm.actor(), vm.actor());
    task.enrol();
    let (a, b) = (one.enrol(), two.enrol());
    let found = Task::find(task.pid()).unwrap().unwrap();
    let tracee = Tracee::seize(task.pid(), libc::PTRACE_O_TRACESYSGOOD).unwrap();
    tracee.interrupt().unwrap();
    tracee.wait_interrupted().unwrap();
    task.tell(&format!("mcast 7 all {a:x} {b:x}"));
    let is_write = |r: &Regs| {
        r.syscall() == Some(libc::SYS_write as u64) && r.arg(0) == found.connection.fd as u64
    };
    let mut ends = 0;
    let mut between = Vec::new();
    while ends < 4 {
        tracee.cont_to_syscall().unwrap();
        if matches!(tracee.wait().unwrap(), Stop::Syscall) {
            // Each of the two writes is seen when it begins and when it ends.
            ends += usize::from(is_write(&tracee.regs().unwrap()));
            if (2..4).contains(&ends) {
                between.push(found.block.freezable().unwrap());
            }
        }
    }
    tracee.detach(0).unwrap();
    assert_eq!(task.answer(), "0");
    assert!(
        between.iter().all(|f| matches!(f, Freezable::No(_))),
        "{between:?}"
    );
    assert!(one.ask("recv -1 7").contains("text all"));
    assert!(two.ask("recv -1 7").contains("text all"));
}

fn sending(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut other) = (vm.actor(), vm.actor());
    task.enrol();
    let to = other.enrol();
    not_frozen(&vm, &mut task, &format!("big {to:x} 7 3000000"), "sending");
    assert!(other.ask("recv -1 7").contains("text big"));
}

/// pvm_recvinfo with PvmMboxWaitForInfo may wait for ever: the image says what is to be asked again.
fn waits_for_info(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut other) = (vm.actor(), vm.actor());
    let v = task.enrol();
    other.enrol();
    let block = task.block();
    task.tell("get later 0 32");
    until("the task to wait", || block.asking().unwrap() == 1);
    let asked = dumped(&vm, &format!("t{v:x}"), "image").pvm.unwrap().asked;
    let asked = asked.expect("it asks nothing");
    assert_ne!(asked.wait_id, 0);
    let mut reader = Reader::new(&asked.body);
    assert_eq!(reader.int().unwrap(), 3, "TMDB_GET");
    assert_eq!(reader.tid().unwrap(), Tid(v));
    assert_eq!(reader.text().unwrap(), "later");
    // Where it runs on, the answer comes to it.
    other.ask("put later now 0");
    assert!(task.answer().contains("text now"));
    let asked = dumped(&vm, &format!("t{v:x}"), "idle").pvm.unwrap().asked;
    assert_eq!(asked, None);
}

fn waits_to_take(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut other) = (vm.actor(), vm.actor());
    task.enrol();
    other.enrol();
    let found = Task::find(task.pid()).unwrap().unwrap();
    // PvmMboxWaitForInfo and PvmMboxReadAndDelete
    task.tell("get later 0 48");
    until("the task to wait", || found.block.asking().unwrap() == 1);
    let stopped = quiet::stop(&found, SHORT);
    let error = format!("{:#}", stopped.map(drop).expect_err("it was frozen"));
    assert!(error.contains("PvmMboxReadAndDelete"), "{error}");
    // PvmMboxOverWritable: others may take it away.
    other.ask("put later now 4");
    assert!(task.answer().contains("text now"));
}

fn waiting(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut other) = (vm.actor(), vm.actor());
    let v = task.enrol();
    other.enrol();
    let found = Task::find(task.pid()).unwrap().unwrap();
    // Outside: it reads its next command.
    quiet::stop(&found, LIMIT).unwrap().release().unwrap();
    for command in ["recv -1 5", "precv -1 5", "trecv -1 5 100000000"] {
        task.tell(command);
        stage::until_waits(&found.block, wait::RECEIVE);
        quiet::stop(&found, LIMIT).unwrap().release().unwrap();
        other.ask(&format!("send {v:x} 5 hello"));
        let answer = task.answer();
        assert!(answer.contains("tag 5"), "{answer}");
    }
}

/// A message handler may run for as long as anything else of the program.
fn in_a_handler(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut other) = (vm.actor(), vm.actor());
    let v = task.enrol();
    other.enrol();
    let found = Task::find(task.pid()).unwrap().unwrap();
    assert_eq!(task.ask("works 4"), "1");
    task.tell("recv -1 5");
    stage::until_waits(&found.block, wait::RECEIVE);
    other.ask(&format!("send {v:x} 4 work"));
    until("the handler to run", || {
        found.block.callbacks().unwrap() == 1
    });
    quiet::stop(&found, SHORT).unwrap().release().unwrap();
    task.tell("on");
    other.ask(&format!("send {v:x} 5 hello"));
    let answer = task.answer();
    assert!(answer.starts_with("[worked] from"), "{answer}");
}

const KIND: u32 = 77;

/// The agent's marker, behind what a drain has waited for; the messages in the task's socket and then the marker.
fn flushed(vm: &Vm, task: &mut Actor, client: &mut Client, number: u32) -> Vec<Option<u32>> {
    let found = Task::find(task.pid()).unwrap().unwrap();
    client
        .send_noop(found.r, KIND, &number.to_be_bytes())
        .unwrap();
    let guardian = Arc::new(Guardian::start().unwrap());
    let agents = [client.tid()];
    let raised = flush::arrived(&found, &guardian, (KIND, number), &agents, LIMIT).unwrap();
    let unread = found.connection.unread(&guardian).unwrap();
    drop(raised);
    let tag = |f: &Fragment| {
        let tag = f.body.get(4..8)?.try_into().ok()?;
        (f.noop().is_none() && f.flags & 1 != 0).then_some(u32::from_be_bytes(tag))
    };
    let _ = vm;
    fragments(&unread, found.r)
        .unwrap()
        .iter()
        .map(tag)
        .collect()
}

/// A pvmd reads one fragment of each task in turn: without the drain the marker comes second.
fn drained(kit: &Path) {
    held_by_pvmd(kit, false);
}

/// Nothing but its pvmd's socket tells of it.
fn drained_of_the_dead(kit: &Path) {
    held_by_pvmd(kit, true);
}

fn drain_of(v: u32, agent: Tid, number: u32) -> Drain {
    let tasks: Vec<i32> = local::tasks().unwrap().map(|(pid, _)| pid).collect();
    Drain::begin(&tasks, Tid(v), Tid(v), agent, number).unwrap()
}

/// Its pvmd has not read yet what a partner has sent, which lives or does not.
fn held_by_pvmd(kit: &Path, dead: bool) {
    let vm = Vm::start(kit);
    let (mut task, mut sender) = (vm.actor(), vm.actor());
    let (v, _) = (task.enrol(), sender.enrol());
    let mut client = client_of(&vm);
    let pvmd = Pid::from_raw(vm.pvmd.id() as i32);
    kill(pvmd, Signal::SIGSTOP).unwrap();
    for _ in 0..5 {
        assert_eq!(sender.ask(&format!("send {v:x} 7 text")), "0");
    }
    if dead {
        sender.crash();
    }
    vm.table().close_gate(v, 0, 0).unwrap();
    let mut drain = drain_of(v, client.tid(), 1);
    assert!(!drain.look().unwrap(), "its pvmd sleeps");
    let who = if dead { "have ended" } else { "has written" };
    assert!(drain.waits_for().contains(who));
    kill(pvmd, Signal::SIGCONT).unwrap();
    until("the drain to end", || drain.look().unwrap());
    let tags = flushed(&vm, &mut task, &mut client, 4711);
    assert_eq!(tags, [Some(7), Some(7), Some(7), Some(7), Some(7), None]);
    vm.table().open_gate(v, v).unwrap();
}

fn streaming(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut sender) = (vm.actor(), vm.actor());
    let (v, _) = (task.enrol(), sender.enrol());
    let mut client = client_of(&vm);
    let own = client.tid();
    let pvmd = Pid::from_raw(vm.pvmd.id() as i32);
    sender.ask(&format!("send {v:x} 7 text"));
    sender.tell(&format!("stream {:x} 8 100000", own.0));
    client.recv_from(None, 8, LIMIT).unwrap().unwrap();
    kill(pvmd, Signal::SIGSTOP).unwrap();
    vm.table().close_gate(v, 0, 0).unwrap();
    let mut drain = drain_of(v, own, 5);
    let block = sender.block();
    until("the task to be asked for its own marker", || {
        assert!(!drain.look().unwrap(), "its pvmd sleeps");
        block.free_marker().unwrap() == Some(1)
    });
    kill(pvmd, Signal::SIGCONT).unwrap();
    // From here on nobody looks at the socket: the marker alone ends it.
    loop {
        let message = client.recv(Some(LIMIT)).unwrap().expect("no marker came");
        if drain.marker(&message) {
            break;
        }
    }
    assert!(drain.look().unwrap());
    let tags = flushed(&vm, &mut task, &mut client, 4712);
    assert_eq!(tags, [Some(7), None]);
    while client.recv(Some(Duration::ZERO)).unwrap().is_some() {}
    vm.table().open_gate(v, v).unwrap();
}

fn inside_send(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut sender) = (vm.actor(), vm.actor());
    let (v, _) = (task.enrol(), sender.enrol());
    let mut client = client_of(&vm);
    let pvmd = Pid::from_raw(vm.pvmd.id() as i32);
    kill(pvmd, Signal::SIGSTOP).unwrap();
    sender.tell(&format!("big {v:x} 7 1000000"));
    stage::until_waits(&sender.block(), wait::SEND);
    vm.table().close_gate(v, 0, 0).unwrap();
    let mut drain = drain_of(v, client.tid(), 6);
    assert!(!drain.look().unwrap());
    assert!(
        drain.waits_for().contains("inside a send"),
        "{}",
        drain.waits_for()
    );
    kill(pvmd, Signal::SIGCONT).unwrap();
    until("the drain to end", || drain.look().unwrap());
    // The next one waits at the gate, and is in nobody's way.
    assert_eq!(sender.answer(), "0");
    sender.tell(&format!("send {v:x} 9 late"));
    stage::until_waits(&sender.block(), wait::GATE);
    let mut drain = drain_of(v, client.tid(), 7);
    until("the drain to end", || drain.look().unwrap());
    let tags = flushed(&vm, &mut task, &mut client, 4713);
    assert_eq!((tags.first(), tags.last()), (Some(&Some(7)), Some(&None)));
    assert!(!tags.contains(&Some(9)), "it is held");
    vm.table().open_gate(v, v).unwrap();
    assert!(task.ask("recv -1 7").contains("text big"));
    assert!(task.ask("recv -1 9").contains("text late"));
}

/// As long as its pvmd has not read what a task wrote, to others or to its standard output, it has not left it.
fn left(kit: &Path) {
    let vm = Vm::start(kit);
    let mut parent = vm.actor();
    let p = parent.enrol();
    let (stage, arguments) = vm.stage("child");
    let program = vm.kit.join("actor");
    parent.ask(&format!("spawn 1 {} {arguments}", program.display()));
    let mut child = stage.actor();
    child.enrol();
    let found = Task::find(child.pid()).unwrap().unwrap();
    let guardian = Arc::new(Guardian::start().unwrap());
    let arrived = |limit| flush::arrived(&found, &guardian, (KIND, 1), &[], limit).map(drop);
    arrived(LIMIT).unwrap();
    let pvmd = Pid::from_raw(vm.pvmd.id() as i32);
    for command in ["print words".to_owned(), format!("send {p:x} 7 text")] {
        kill(pvmd, Signal::SIGSTOP).unwrap();
        child.ask(&command);
        let error = arrived(SHORT).unwrap_err().to_string();
        assert!(error.contains("not been read by its pvmd"), "{error}");
        kill(pvmd, Signal::SIGCONT).unwrap();
        arrived(LIMIT).unwrap();
    }
}

/// What another host has on its way is there when the marker behind it is, and not before; markers of another kind,
/// number or sender are none.
fn markers(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = vm.actor();
    let v = task.enrol();
    let found = Task::find(task.pid()).unwrap().unwrap();
    let (mut one, mut two) = (client_of(&vm), client_of(&vm));
    let agents = [one.tid(), two.tid()];
    let guardian = Arc::new(Guardian::start().unwrap());
    let arrived = |limit| flush::arrived(&found, &guardian, (KIND, 8), &agents, limit).map(drop);
    let mark = |client: &mut Client, kind: u32, number: u32| {
        let number = number.to_be_bytes();
        client.send_noop(Tid(v), kind, &number).unwrap();
        // The pvmd has passed it on when it answers.
        assert!(client.lives(Tid(v)).unwrap());
    };
    mark(&mut one, KIND, 8);
    mark(&mut two, KIND, 7);
    mark(&mut two, KIND + 1, 8);
    let error = arrived(SHORT).unwrap_err().to_string();
    assert!(error.contains("missing from 1 agents"), "{error}");
    mark(&mut two, KIND, 8);
    arrived(LIMIT).unwrap();
}
