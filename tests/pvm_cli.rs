//! The task-pvmd protocol and the PVM commands, in virtual machines of one host with real pvmds and tasks.

mod common;
#[path = "shim/mod.rs"]
mod stage;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::shimabi::{CTX_TC, NOOP_MAGIC};
use mistctl::pvm::tid::Tid;
use mistctl::pvm::virtual_machine::{Notify, noticed};
use mistctl::pvm::wire::{Body, tc};
use stage::{LIMIT, Vm};

fn main() -> ExitCode {
    // A pvmd that ends sends SIGTERM to all its tasks, and here these are tests. What they start has it unblocked.
    let mut term = nix::sys::signal::SigSet::empty();
    term.add(nix::sys::signal::Signal::SIGTERM);
    term.thread_block().unwrap();
    stage::main(&[
        ("enrols, and leaves", enrols),
        ("takes over the task a pvmd started", takes_over),
        ("lists hosts and tasks", lists),
        ("a message goes to a C task and back", messages),
        ("large messages go both ways", large_messages),
        ("a marker comes behind what was sent before", marker),
        ("is told when a task ends", notices),
        ("a wish for a direct route is refused", refuses_route),
        ("hosts that cannot be added are named", bad_hosts),
        ("the end of the pvmd is an error that names it", pvmd_ends),
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
    let vm = Vm::start(kit);
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
    let vm = Vm::start(kit);
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
    nix::sys::signal::kill(sleeper, nix::sys::signal::Signal::SIGKILL).unwrap();
    client.exit().unwrap();
}

fn lists(kit: &Path) {
    let vm = Vm::start(kit);
    let mut client = client_of(&vm);
    let hosts = client.hosts().unwrap();
    assert_eq!(hosts.len(), 1);
    assert_eq!(hosts[0].tid, Tid(0x40000));
    assert_eq!(hosts[0].name, "127.0.0.1");
    assert_eq!(hosts[0].arch, "LINUX64");
    let mut actor = vm.actor();
    let tid = Tid(actor.enrol());
    let tasks = client.tasks(Tid::NONE).unwrap();
    assert_eq!(tasks.len(), 2, "{tasks:?}");
    let task = tasks.iter().find(|t| t.tid == tid).unwrap();
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
    let vm = Vm::start(kit);
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
    let vm = Vm::start(kit);
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
    let vm = Vm::start(kit);
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
    let vm = Vm::start(kit);
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

fn refuses_route(kit: &Path) {
    let vm = Vm::start(kit);
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
    let vm = Vm::start(kit);
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
    let mut vm = Vm::start(kit);
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
