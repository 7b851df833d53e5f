//! What the task-pvmd protocol is asked for, and what comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mistctl::error::Failure;
use mistctl::pvm::mailbox;
use mistctl::pvm::shimabi::{CTX_TC, NOOP_MAGIC};
use mistctl::pvm::spawn::{Sink, Spawn};
use mistctl::pvm::virtual_machine::{Notify, Stream, noticed};
use mistctl::pvm::wire::{Body, tc};

use super::*;
use crate::stage::LIMIT;

pub fn enrols(kit: &Path) {
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
pub fn takes_over(kit: &Path) {
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

pub fn lists(kit: &Path) {
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

pub fn messages(kit: &Path) {
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

pub fn large_messages(kit: &Path) {
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

pub fn marker(kit: &Path) {
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

pub fn notices(kit: &Path) {
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

pub fn spawns(kit: &Path) {
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

pub fn output_goes(kit: &Path) {
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

pub fn mailbox(kit: &Path) {
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

pub fn mailbox_read(kit: &Path) {
    let vm = started(|| Vm::start(kit));
    let (mut one, mut two) = (client_of(&vm), client_of(&vm));
    let (a, b) = (one.tid(), two.tid());
    let (multi, over) = (mailbox::MULTI_INSTANCE, mailbox::OVERWRITABLE);
    let other = mailbox::packed(b, b"else");
    two.mailbox_put(b, "several", 0, multi, &other).unwrap();
    two.mailbox_put(b, "anybody's", 0, multi, &other).unwrap();
    let message = mailbox::packed(a, b"text");
    let kinds = [
        ("single", 0, 0),
        ("several", 1, multi),
        ("written over", 0, over),
        ("anybody's", 1, multi | over),
    ];
    for (name, index, flags) in kinds {
        let put = one.mailbox_put(a, name, 0, flags, &message).unwrap();
        assert_eq!(put, index, "{name}");
        let (mut reader, over) = (client_of(&vm), Arc::new(AtomicBool::new(false)));
        let seen = Arc::clone(&over);
        let looks = std::thread::spawn(move || {
            let mut missed = 0;
            while !seen.load(Ordering::Relaxed) {
                missed += usize::from(reader.mailbox_get(name, index).unwrap().is_none());
            }
            missed
        });
        for n in 0..500 {
            let entries = one.mailbox_names(name).unwrap();
            let entry = entries.iter().find(|entry| entry.index == index).unwrap();
            let (owner, next) = if n % 2 == 0 { (a, b) } else { (b, a) };
            assert_eq!((entry.owner, entry.flags), (owner, flags), "{name}");
            assert!(one.mailbox_hand_over(entry, next).unwrap());
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(looks.join().unwrap(), 0, "times {name} was not found");
        assert_eq!(one.mailbox_get(name, index).unwrap(), Some(message.clone()));
    }
    // It is locked as before.
    assert!(two.mailbox_put(b, "single", 0, 0, &other).is_err());
    // What somebody has written over, or taken away, is his.
    let entry = one.mailbox_names("written over").unwrap().remove(0);
    two.mailbox_put(b, "written over", 0, over, &other).unwrap();
    let third = client_of(&vm).tid();
    assert!(!one.mailbox_hand_over(&entry, third).unwrap());
    assert_eq!(one.mailbox_names("written over").unwrap()[0].owner, b);
    assert_eq!(one.mailbox_get("written over", 0).unwrap(), Some(other));
    assert!(two.mailbox_remove(b, "written over", 0).unwrap());
    assert!(!one.mailbox_hand_over(&entry, third).unwrap());
    assert_eq!(one.mailbox_get("written over", 0).unwrap(), None);
}

pub fn refuses_route(kit: &Path) {
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

pub fn bad_hosts(kit: &Path) {
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

pub fn pvmd_ends(kit: &Path) {
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
