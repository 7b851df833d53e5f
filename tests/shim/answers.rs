//! What PVM answers outside of messages: tasks, families, mailboxes, options.

use std::fs;
use std::os::unix::fs::symlink;

use mistctl::pvm::shimabi::place;

use super::*;

pub fn tasks(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        old,
        mut partner,
        new,
        v,
        p,
        r2,
    } = prepare(&vm);
    let mut agent = vm.bare_actor();
    let a = agent.enrol();
    let listed = |actor: &mut Actor, at: &str| {
        let answer = actor.ask(&format!("tasks {at}"));
        let mut tids: Vec<u32> = answer
            .split_whitespace()
            .skip(1)
            .map(|task| u32::from_str_radix(task.split('/').next().unwrap(), 16).unwrap())
            .collect();
        tids.sort();
        tids
    };
    vm.table().hide(a).unwrap();
    // mistctl, when it asks something.
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    let helper = Client::enrol(&pvmd, 0).unwrap();
    // The prepared incarnation is not a task yet, and then at any moment one of the two is.
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    vm.table().close_gate(v, r2, 0).unwrap();
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    old.leave();
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    // On the host that the task leaves.
    assert!(vm.table().decide(v, r2).unwrap());
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    vm.table().open_gate(v, r2).unwrap();
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    // Again: libpvm frees its list by its own count.
    assert_eq!(listed(&mut partner, "0"), [v, p]);
    assert_eq!(listed(&mut partner, &format!("{v:x}")), [v]);
    new.leave();
    assert_eq!(listed(&mut partner, "0"), [p]);
    drop(helper);
}

/// The task that a spawn has started.
fn spawned(answer: &str) -> u32 {
    let tid = answer.strip_prefix("1: ").unwrap();
    u32::from_str_radix(tid, 16).unwrap()
}

/// The tasks that `actor` sees, by tid, each with its name.
/// Tid, parent and name of every task.
fn named(actor: &mut Actor) -> Vec<(u32, u32, String)> {
    let answer = actor.ask("tasks");
    let mut tasks: Vec<(u32, u32, String)> = answer
        .split_whitespace()
        .skip(1)
        .map(|task| {
            let mut words = task.splitn(4, '/');
            let mut tid = || u32::from_str_radix(words.next().unwrap(), 16).unwrap();
            let (tid, parent) = (tid(), tid());
            (tid, parent, words.nth(1).unwrap().to_owned())
        })
        .collect();
    tasks.sort();
    tasks
}

pub fn names_of_moved(kit: &Path) {
    let vm = Vm::start(kit);
    let mut boss = vm.actor();
    let b = boss.enrol();
    let (stage, args) = vm.stage("old");
    boss.ask(&format!("spawn 1 actor {args}"));
    let mut old = stage.actor();
    let v = old.enrol();
    let before = named(&mut boss);
    assert!(
        before.len() == 2 && before[1].1 == b && before[1].2.ends_with("actor"),
        "{before:?}"
    );
    // As mistctl starts a lander.
    let mut folder = vm.table().path().as_os_str().to_owned();
    folder.push(".d");
    let link = place::link(Path::new(&folder), "m1", b, &before[1].2);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    symlink(kit.join("actor"), &link).unwrap();
    // Not by its parent.
    let mut agent = vm.actor();
    agent.enrol();
    let before = named(&mut boss);
    let (stage, args) = vm.stage("new");
    let r2 = spawned(&agent.ask(&format!("spawn 1 {} {args}", link.display())));
    assert_eq!(named(&mut boss), before, "a lander shows");
    vm.table().add_incarnation(r2, v).unwrap();
    assert_eq!(named(&mut boss), before);
    let mut new = stage.actor();
    assert_eq!(new.enrol(), v);
    vm.table().close_gate(v, r2, 0).unwrap();
    assert_eq!(named(&mut boss), before);
    vm.table().open_gate(v, r2).unwrap();
    // Both are there, for a moment.
    assert_eq!(named(&mut boss), before);
    assert_eq!(named(&mut new), before);
    old.leave();
    assert_eq!(named(&mut boss), before);
    new.leave();
    let mut others = before.clone();
    others.retain(|(tid, ..)| *tid != v);
    until("the end of the task", || named(&mut boss) == others);
}

pub fn control(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        old,
        mut partner,
        mut new,
        v,
        ..
    } = moved(&vm);
    old.leave();
    assert_eq!(
        partner.ask(&format!("pstat {v:x}")),
        "0",
        "alive as its present incarnation"
    );
    assert_eq!(new.ask(&format!("pstat {v:x}")), "0");
    let pid = new.pid();
    assert_eq!(partner.ask(&format!("sendsig {v:x} 0")), "0");
    assert_eq!(partner.ask(&format!("hostsync {v:x}")), "0");
    assert_eq!(partner.ask(&format!("kill {v:x}")), "0");
    until("the killed task to end", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    until("pvmd to notice", || {
        partner.ask(&format!("pstat {v:x}")) == "-31"
    });
}

pub fn family(kit: &Path) {
    let vm = Vm::start(kit);
    let Move { mut new, v, r2, .. } = moved(&vm);
    let (stage, args) = vm.stage("child");
    // The child is an incarnation too, of a task that pvmd never had, on a host it never had.
    let (child_r, child_v) = (after(r2), 0x8_1234);
    vm.table().add_incarnation(child_r, child_v).unwrap();
    vm.table().open_gate(child_v, child_r).unwrap();
    assert_eq!(
        new.ask(&format!("spawn 1 actor {args}")),
        format!("1: {child_v:x}")
    );
    let mut child = stage.actor();
    assert_eq!(child.enrol(), child_v);
    assert_eq!(child.tid("parent"), v);
    assert_eq!(child.ask("siblings"), format!("{child_v:x}"));
    assert_eq!(new.ask(&format!("hostsync {child_v:x}")), "0");
    new.ask(&format!("send {child_v:x} 1 hello"));
    assert_eq!(
        child.ask(&format!("recv {v:x} 1")),
        format!("from {v:x} tag 1 text hello info {v:x}")
    );
    assert!(new.ask("tasks").contains(&format!("{child_v:x}/{v:x}/")));
    child.leave();
}

pub fn mailboxes(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        p,
        ..
    } = moved(&vm);
    assert_eq!(new.ask("put shop bread 0"), "0");
    assert_eq!(partner.ask("boxes shop"), format!("{v:x}"));
    assert!(partner.ask("get shop 0 0").contains("text bread"));
    assert_eq!(partner.ask("put stall milk 0"), "0");
    assert_eq!(new.ask("boxes stall"), format!("{p:x}"));
    // The owner may take it away, by its R.
    assert_eq!(new.ask("del shop 0"), "0");
    assert_eq!(new.ask(&format!("insert who {v:x}")), "0");
    assert_eq!(partner.ask("lookup who"), format!("0 {v:x}"));
    // Not to be killed by a reset, which kills another one that has moved.
    let (mut first, mut second) = (vm.actor(), vm.actor());
    let (w, second_r) = (first.enrol(), second.enrol());
    vm.table().add_incarnation(second_r, w).unwrap();
    vm.table().open_gate(w, second_r).unwrap();
    first.leave();
    assert_eq!(new.ask("setopt 25 1"), "0");
    assert_ne!(new.block().flags().unwrap() & flag::NO_RESET, 0);
    assert_eq!(partner.ask("noresets"), format!("{v:x}"));
    assert_eq!(partner.ask("reset"), "0");
    until("the other one to be killed", || {
        partner.ask(&format!("pstat {w:x}")) == "-31"
    });
    assert_eq!(partner.ask(&format!("pstat {v:x}")), "0");
    // Nor is who resets.
    assert_eq!(new.ask("setopt 25 0"), "1");
    assert_eq!(new.ask("reset"), "0");
    until("the others to be killed", || {
        new.ask(&format!("pstat {p:x}")) == "-31"
    });
    assert_eq!(new.ask(&format!("pstat {v:x}")), "0");
}

pub fn options(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut new,
        mut partner,
        v,
        p,
        ..
    } = moved(&vm);
    assert_eq!(new.ask("getopt 4"), "0");
    assert_eq!(new.ask(&format!("setopt 4 {v:x}")), "0");
    assert_eq!(new.tid("getopt 4"), v);
    assert_ne!(new.block().flags().unwrap() & flag::COLLECTOR, 0);
    assert_eq!(new.tid("setopt 4 0"), v);
    assert_eq!(new.ask("getopt 4"), "0");
    assert_eq!(partner.ask(&format!("setopt 12 {v:x}")), "0");
    assert_eq!(partner.tid("getopt 12"), v);
    assert_eq!(partner.tid("getopt 4"), v);
    assert_eq!(new.ask(&format!("setopt 14 {p:x}")), "0");
    assert_eq!(new.tid("getopt 14"), p);
    for (task, traces) in [(&mut new, 6), (&mut partner, 14)] {
        task.ask(&format!("setopt {traces} {v:x}"));
        assert_eq!(task.tid(&format!("getopt {traces}")), v);
        assert_eq!(task.tid(&format!("setopt {traces} 0")), v);
    }
    // What is not one's own to set is refused as without the shim.
    assert_eq!(new.ask("setopt 4 40fff"), "fffffffe");
    assert_eq!(new.tid("raw"), v);
}
