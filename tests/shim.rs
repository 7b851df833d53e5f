//! The PVM shim, in a virtual machine of one host. A move is played by hand: a second task is enrolled
//! whose R the tid table gives to the first one's V.

mod common;
#[path = "shim/gates.rs"]
mod gates;
#[path = "shim/notices.rs"]
mod notices;
#[path = "shim/output.rs"]
mod output;
#[path = "shim/mod.rs"]
mod stage;

use std::path::Path;
use std::process::ExitCode;

use mistctl::pvm::block::{Freezable, TaskBlock};
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::shimabi::block::{flag, state, wait};
use stage::{Actor, Vm, until, until_waits};

fn main() -> ExitCode {
    stage::main(&[
        ("inert in pvmd and in programs that never call PVM", inert),
        ("fork and exec work as without it", fork_and_exec),
        ("the whole interface answers as without it", api),
        (
            "messages to V reach its present incarnation and come from V",
            messages,
        ),
        (
            "late messages of an old incarnation come from V too",
            late_messages,
        ),
        ("the task itself knows V only", own_tid),
        ("callbacks count as outside", callbacks),
        ("a jump out of a callback does no harm", jumps),
        ("tasks are listed once, by V, without agents", tasks),
        (
            "status, kill and signals reach the present incarnation",
            control,
        ),
        ("spawned tasks, parents and siblings are V", family),
        (
            "exit notices of old incarnations are swallowed, the last one shown",
            notices::notices,
        ),
        (
            "notices about a moving task are held back",
            notices::held_notices,
        ),
        (
            "requests are made again for a new incarnation and answered once",
            notices::requests_again,
        ),
        ("a gate holds sends while reading goes on", gates::gate),
        ("a gate holds multicasts", gates::gate_multicast),
        ("a gate inside a message handler", gates::gate_in_handler),
        ("an expired gate is resolved by asking", gates::expired_gate),
        ("sends to a host can be held", gates::held_host),
        ("markers follow everything sent before", gates::markers),
        ("mailbox owners are V", mailboxes),
        ("options that carry tids", options),
        (
            "collected output shows one task, not its incarnations",
            output::output_of_moved,
        ),
        (
            "output a program collects itself shows one task too",
            output::raw_output_of_moved,
        ),
        (
            "output follows a collector that moved",
            output::output_to_moved,
        ),
        (
            "messages inside messages, and their headers",
            nested_messages,
        ),
        ("a route is promised, and messages go through pvmd", routes),
        (
            "a direct route is refused to a task without the shim",
            refuses_routes,
        ),
        (
            "what an old route holds comes before what follows it",
            old_routes,
        ),
        ("what it publishes", published),
        ("a new pvmd has a new table", new_pvmd),
        ("errors name the task by V", errors),
    ])
}

/// The next tid pvmd gives out after `tid`.
fn after(tid: u32) -> u32 {
    tid + 1
}

/// A task V = R1, a partner, and a second incarnation R2 that is not yet the present one.
struct Move {
    old: Actor,
    partner: Actor,
    new: Actor,
    v: u32,
    r2: u32,
    p: u32,
}

fn prepare(vm: &Vm) -> Move {
    let mut old = vm.actor();
    let v = old.enrol();
    let mut partner = vm.actor();
    let p = partner.enrol();
    let r2 = after(p);
    vm.table().add_incarnation(r2, v).unwrap();
    let mut new = vm.actor();
    assert_eq!(
        new.enrol(),
        v,
        "an incarnation that is known enrols as its V"
    );
    Move {
        old,
        partner,
        new,
        v,
        r2,
        p,
    }
}

fn moved(vm: &Vm) -> Move {
    let task = prepare(vm);
    vm.table().open_gate(task.v, task.r2).unwrap();
    task
}

fn inert(kit: &Path) {
    let vm = Vm::start(kit);
    let mut actor = vm.actor();
    actor.enrol();
    let block = TaskBlock::find(vm.pvmd.id() as i32)
        .unwrap()
        .expect("pvmd has the shim");
    assert_eq!(
        (block.state().unwrap(), block.enrolled_pid().unwrap()),
        (state::IDLE, 0)
    );
    assert_eq!(
        block.globals().unwrap(),
        vec![0; block.globals().unwrap().len()]
    );
    let output = vm
        .command("sh", true)
        .args(["-c", "echo yes"])
        .output()
        .unwrap();
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"yes\n"[..], &b""[..])
    );
}

fn fork_and_exec(kit: &Path) {
    let vm = Vm::start(kit);
    let mut actor = vm.actor();
    actor.enrol();
    assert_eq!(actor.ask("fork"), "3");
    assert_eq!(actor.ask("errno"), "123");
}

fn api(kit: &Path) {
    let transcript = |shim| {
        let vm = if shim {
            Vm::start(kit)
        } else {
            Vm::start_bare(kit)
        };
        let output = vm.command("api", shim).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let (without, with) = (transcript(false), transcript(true));
    assert!(without.lines().count() > 100, "{without}");
    for (a, b) in without.lines().zip(with.lines()) {
        assert_eq!(a, b);
    }
    assert_eq!(without, with);
}

fn messages(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        p,
        ..
    } = moved(&vm);
    partner.ask(&format!("send {v:x} 5 one"));
    assert_eq!(
        new.ask("recv -1 5"),
        format!("from {p:x} tag 5 text one info {p:x}")
    );
    partner.ask(&format!("psend {v:x} 6 two"));
    assert_eq!(
        new.ask("precv -1 6"),
        format!("0 from {p:x} tag 6 text two")
    );
    partner.ask(&format!("mcast 7 three {v:x}"));
    assert_eq!(
        new.ask(&format!("trecv {p:x} 7 20000")),
        format!("from {p:x} tag 7 text three info {p:x}")
    );
    new.ask(&format!("send {p:x} 8 four"));
    assert_eq!(
        partner.ask(&format!("recv {v:x} 8")),
        format!("from {v:x} tag 8 text four info {v:x}")
    );
    new.ask(&format!("psend {p:x} 9 five"));
    assert_eq!(
        partner.ask(&format!("precv {v:x} 9")),
        format!("0 from {v:x} tag 9 text five")
    );
    new.ask(&format!("mcast 10 six {p:x}"));
    assert_eq!(
        partner.ask(&format!("recv {v:x} 10")),
        format!("from {v:x} tag 10 text six info {v:x}")
    );
    new.ask(&format!("send {p:x} 11 seven"));
    until("the message", || {
        partner.ask(&format!("probe {v:x} 11")) == "yes"
    });
    assert_eq!(
        partner.ask(&format!("nrecv {v:x} 11")),
        format!("from {v:x} tag 11 text seven info {v:x}")
    );
    // To itself, by V; a multicast leaves oneself out.
    new.ask(&format!("send {v:x} 12 me"));
    assert_eq!(
        new.ask(&format!("recv {v:x} 12")),
        format!("from {v:x} tag 12 text me info {v:x}")
    );
    new.ask(&format!("mcast 13 us {v:x} {p:x}"));
    assert_eq!(
        partner.ask("recv -1 13"),
        format!("from {v:x} tag 13 text us info {v:x}")
    );
    assert_eq!(new.ask("nrecv -1 13"), "0");
}

fn late_messages(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut old,
        mut partner,
        mut new,
        v,
        p,
        r2,
    } = moved(&vm);
    let mut third = vm.actor();
    let r3 = third.enrol();
    vm.table().add_incarnation(r3, v).unwrap();
    vm.table().open_gate(v, r3).unwrap();
    old.ask(&format!("send {p:x} 1 first"));
    assert_eq!(
        partner.ask(&format!("recv {v:x} 1")),
        format!("from {v:x} tag 1 text first info {v:x}")
    );
    new.ask(&format!("send {p:x} 2 second"));
    assert_eq!(
        partner.ask(&format!("recv {v:x} 2")),
        format!("from {v:x} tag 2 text second info {v:x}")
    );
    assert_ne!(r2, r3);
    partner.ask(&format!("send {v:x} 3 third"));
    assert!(third.ask("recv -1 3").contains("text third"));
}

fn own_tid(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        r2,
        p,
        ..
    } = moved(&vm);
    assert_eq!(new.tid("raw"), v);
    assert_eq!(new.tid("mytid"), v);
    assert_eq!(
        (new.block().v().unwrap(), new.block().r().unwrap()),
        (v, r2)
    );
    assert_eq!(new.tid(&format!("host {v:x}")), v & 0x3ffc_0000);
    assert_eq!(new.ask("siblings"), format!("{v:x}"));
    assert_eq!(new.tid("raw"), v);
    partner.ask(&format!("send {v:x} 1 x"));
    assert!(new.ask(&format!("recv {p:x} 1")).contains("text x"));
    assert_eq!(new.tid("raw"), v);
    // A notice about its own exit comes when it leaves, by V; here to a handler.
    new.ask("exits 90");
    new.ask(&format!("notify 1 90 {v:x}"));
    assert!(new.ask("exit").starts_with(&format!("[exit of {v:x}]")));
    // A new enrolment is a new task.
    assert_eq!(new.ask("raw"), "ffffffff");
    assert_eq!(new.enrol(), after(r2));
    assert_eq!(new.tid("raw"), after(r2));
}

fn callbacks(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        p,
        ..
    } = moved(&vm);
    new.ask(&format!("setopt 4 {v:x}"));
    assert_eq!(new.ask(&format!("handler {p:x} 4")), "1");
    partner.ask(&format!("send {v:x} 4 x"));
    partner.ask(&format!("send {v:x} 5 y"));
    let answer = new.ask("recv -1 5");
    assert!(
        answer.starts_with(&format!(
            "[handler from {p:x} tag 4 raw {v:x} mytid {v:x} collector {v:x}]"
        )),
        "{answer}"
    );
    assert!(
        answer.ends_with(&format!("from {p:x} tag 5 text y info {p:x}")),
        "{answer}"
    );
    // A handler for messages of V.
    assert_eq!(partner.ask(&format!("handler {v:x} 6")), "1");
    new.ask(&format!("send {p:x} 6 x"));
    new.ask(&format!("send {p:x} 7 y"));
    let answer = partner.ask("recv -1 7");
    assert!(
        answer.starts_with(&format!("[handler from {v:x} tag 6 raw {p:x}")),
        "{answer}"
    );
    assert_eq!(new.ask("recvf 1"), "1");
    assert_ne!(new.block().flags().unwrap() & flag::RECVF, 0);
    partner.ask(&format!("send {v:x} 8 z"));
    let answer = new.ask("recv -1 8");
    assert!(
        answer.starts_with(&format!("[match {p:x} raw {v:x}]")),
        "{answer}"
    );
    assert_eq!(new.ask("recvf 0"), "1");
    partner.ask(&format!("send {v:x} 9 z"));
    assert_eq!(
        new.ask("recv -1 9"),
        format!("from {p:x} tag 9 text z info {p:x}")
    );
    assert_eq!(new.tid("raw"), v);
}

fn jumps(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        p,
        ..
    } = moved(&vm);
    assert_eq!(new.ask("recvf 1"), "1");
    partner.ask(&format!("send {v:x} 8 z"));
    let answer = new.ask("jump 1 ffffffff 8");
    assert!(answer.ends_with(&format!("jumped raw {v:x}")), "{answer}");
    assert_eq!(new.ask("recvf 0"), "1");
    assert!(new.ask("recv -1 8").contains(&format!("from {p:x} tag 8")));
    assert_eq!(new.block().depth().unwrap(), 0);
    assert_eq!(new.tid("raw"), v);
}

fn tasks(kit: &Path) {
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

fn control(kit: &Path) {
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
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    until("pvmd to notice", || {
        partner.ask(&format!("pstat {v:x}")) == "-31"
    });
}

fn family(kit: &Path) {
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

fn mailboxes(kit: &Path) {
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
}

fn options(kit: &Path) {
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
    // What is not one's own to set is refused as without the shim.
    assert_eq!(new.ask("setopt 4 40fff"), "fffffffe");
    assert_eq!(new.tid("raw"), v);
}

fn nested_messages(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        p,
        ..
    } = moved(&vm);
    new.ask(&format!("send {p:x} 1 inner"));
    assert_eq!(partner.ask(&format!("forward {v:x} 1 {v:x} 2")), "0");
    assert_eq!(
        new.ask(&format!("unpack {p:x} 2")),
        format!("from {v:x} tag 1 text inner info {v:x}")
    );
    new.ask(&format!("send {p:x} 3 x"));
    assert_eq!(
        partner.ask(&format!("minfo {v:x} 3")),
        format!("0 from {v:x} tag 4 text x info {v:x}")
    );
}

fn routes(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut one, mut two) = (vm.actor(), vm.actor());
    let (o, t) = (one.enrol(), two.enrol());
    assert_eq!(one.ask("getopt 1"), "2");
    assert_eq!(one.ask("setopt 1 3"), "2");
    assert_eq!(one.ask("getopt 1"), "3");
    assert_eq!(one.block().route().unwrap(), 3);
    // The receiver is not in libpvm: a request for a direct route would wait for it.
    assert_eq!(one.ask(&format!("send {t:x} 1 x")), "0");
    assert!(two.ask(&format!("recv {o:x} 1")).contains("text x"));
    assert_eq!(one.ask("fds"), "1");
    assert_eq!(one.ask("setopt 1 9"), "fffffffe");
    assert_eq!(one.ask("setopt 1 2"), "3");
}

fn refuses_routes(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut with, mut without) = (vm.actor(), vm.bare_actor());
    let (w, b) = (with.enrol(), without.enrol());
    without.ask("setopt 1 3");
    with.tell("recv -1 1");
    assert_eq!(without.ask(&format!("send {w:x} 1 x")), "0");
    assert!(with.answer().contains(&format!("from {b:x} tag 1 text x")));
    assert_eq!(
        (with.ask("fds"), without.ask("fds")),
        ("1".into(), "1".into())
    );
}

fn old_routes(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut old, mut partner) = (vm.direct_actor(), vm.direct_actor());
    let (v, p) = (old.enrol(), partner.enrol());
    let r2 = after(p);
    old.ask("setopt 1 3");
    partner.tell("recv -1 1");
    assert_eq!(old.ask(&format!("send {p:x} 1 opens")), "0");
    assert!(partner.answer().contains("text opens"));
    assert_eq!(
        (old.ask("fds"), partner.ask("fds")),
        ("2".into(), "2".into())
    );
    let pid = nix::unistd::Pid::from_raw(partner.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    for tag in [2, 3] {
        old.ask(&format!("send {p:x} {tag} direct"));
    }
    old.ask(&format!("big {p:x} 4 30000"));
    old.crash();
    vm.table().add_incarnation(r2, v).unwrap();
    vm.table().open_gate(v, r2).unwrap();
    let mut new = vm.actor();
    assert_eq!(new.enrol(), v);
    new.ask(&format!("send {p:x} 5 later"));
    // pvmd answers in the order of what it was given, so the message is on its way by now.
    new.ask(&format!("pstat {p:x}"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    for (tag, text) in [(2, "direct"), (3, "direct"), (4, "big"), (5, "later")] {
        assert_eq!(
            partner.ask("recv -1 -1"),
            format!("from {v:x} tag {tag} text {text} info {v:x}")
        );
    }
    assert_eq!(partner.ask("fds"), "1");
}

fn published(kit: &Path) {
    let vm = Vm::start(kit);
    let mut one = vm.actor();
    let pid = one.pid();
    until("the program to load", || {
        TaskBlock::find(pid).is_ok_and(|block| block.is_some())
    });
    let block = one.block();
    assert_eq!(block.state().unwrap(), state::IDLE);
    let o = one.enrol();
    assert_eq!(
        (block.state().unwrap(), block.enrolled_pid().unwrap()),
        (state::ENROLLED, pid)
    );
    assert_eq!((block.v().unwrap(), block.r().unwrap()), (o, o));
    assert_eq!(block.freezable().unwrap(), Freezable::Outside);
    assert!(
        block.globals().unwrap().iter().all(|at| *at != 0),
        "{:?}",
        block.globals().unwrap()
    );
    assert_eq!(block.table_path().unwrap(), vm.table().path());
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps.contains(&format!("{:x}-", block.table().unwrap())));
    one.tell("recv -1 1");
    until_waits(&block, wait::RECEIVE);
    assert_eq!(block.freezable().unwrap(), Freezable::IfInSelect);
    let mut two = vm.actor();
    two.enrol();
    two.ask(&format!("send {o:x} 1 x"));
    one.answer();
    assert_eq!(
        (block.depth().unwrap(), block.wait().unwrap()),
        (0, wait::NONE)
    );
    // A mailbox entry that may never come: it waits for its pvmd, and is not to be frozen.
    one.tell("get never 0 32");
    until("it to wait for pvmd", || block.asking().unwrap() != 0);
    assert!(matches!(block.freezable().unwrap(), Freezable::No(_)));
    assert_eq!(block.call_flags().unwrap(), 32);
    two.ask("put never now 0");
    assert!(one.answer().contains("text now"));
    one.ask("exit");
    assert_eq!(
        (block.state().unwrap(), block.v().unwrap()),
        (state::IDLE, 0)
    );
}

fn new_pvmd(kit: &Path) {
    let mut vm = Vm::start(kit);
    let mut one = vm.actor();
    let o = one.enrol();
    let first = vm.table();
    let path = first.path().to_owned();
    drop(first);
    vm.table().add_incarnation(after(o), o).unwrap();
    vm.table().open_gate(o, after(o)).unwrap();
    one.leave();
    let pid = nix::unistd::Pid::from_raw(vm.pvmd.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    vm.pvmd.wait().unwrap();
    let again = Vm::start_in(kit, vm.dir.clone(), true);
    assert_ne!(again.table().path(), path);
    assert!(
        !path.exists(),
        "the table of a pvmd that is gone is taken away"
    );
    let (mut one, mut two) = (again.actor(), again.actor());
    let (o, t) = (one.enrol(), two.enrol());
    one.ask(&format!("send {t:x} 1 x"));
    assert!(two.ask(&format!("recv {o:x} 1")).contains("text x"));
}

fn errors(kit: &Path) {
    let vm = Vm::start(kit);
    let Move { mut new, v, .. } = moved(&vm);
    new.ask("perror here");
    new.ask("send 0 1 x");
    let named = |what: &str| {
        let line = format!("libpvm [t{v:x}]: {what}");
        new.said.iter().any(|said| said.starts_with(&line))
    };
    assert!(named("here: ") && named("pvm_send(): "), "{:?}", new.said);
}
