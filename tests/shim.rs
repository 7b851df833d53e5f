//! The PVM shim, in a virtual machine of one host. A move is played by hand: a second task is enrolled
//! whose R the tid table gives to the first one's V.

#[path = "shim/answers.rs"]
mod answers;
mod common;
#[path = "shim/gates.rs"]
mod gates;
#[path = "shim/manager.rs"]
mod manager;
#[path = "shim/names.rs"]
mod names;
#[path = "shim/notices.rs"]
mod notices;
#[path = "shim/output.rs"]
mod output;
#[path = "shim/own.rs"]
mod own;
#[path = "shim/routes.rs"]
mod routes;
#[path = "shim/mod.rs"]
mod stage;

use std::collections::BTreeSet;
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
        ("the task itself knows V only", own::own_tid),
        ("callbacks count as outside", own::callbacks),
        ("a jump out of a callback does no harm", own::jumps),
        (
            "tasks are listed once, by V, without agents",
            answers::tasks,
        ),
        (
            "status, kill and signals reach the present incarnation",
            answers::control,
        ),
        ("spawned tasks, parents and siblings are V", answers::family),
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
        (
            "who waits long at a gate looks less often",
            gates::long_at_a_gate,
        ),
        ("a gate holds multicasts", gates::gate_multicast),
        ("a gate inside a message handler", gates::gate_in_handler),
        ("a gate leaves errno alone", gates::errno_at_a_gate),
        ("an expired gate is resolved by asking", gates::expired_gate),
        ("sends to a host can be held", gates::held_host),
        ("markers follow everything sent before", gates::markers),
        ("mailbox owners are V", answers::mailboxes),
        ("options that carry tids", answers::options),
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
        (
            "a route is promised, and messages go through pvmd",
            routes::routes,
        ),
        (
            "a direct route is refused to a task without the shim",
            routes::refuses_routes,
        ),
        (
            "what an old route holds comes before what follows it",
            routes::old_routes,
        ),
        (
            "inside libpvm, also after a callback, the real tid is in pvmmytid",
            own::inside,
        ),
        (
            "a task that has moved keeps its name, and landers have none",
            answers::names_of_moved,
        ),
        (
            "a real tid that is another one's name is told apart from it",
            names::told_apart,
        ),
        (
            "a child whose real tid is another one's name",
            names::children,
        ),
        (
            "routes to a task whose real tid is another one's name",
            names::routes,
        ),
        ("who waits for a route is sending", routes::connecting),
        ("a task whose name is taken says so", names::unnoticed),
        ("nothing that pvmd has is defined anew", exports),
        ("what it publishes", published),
        ("a new pvmd has a new table", new_pvmd),
        ("a resource manager is asked, and heard", manager::answers),
        ("errors name the task by V", own::errors),
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
    assert_eq!(block.route().unwrap(), 0, "it has changed libpvm's route");
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

/// The names that an ELF file defines for others.
fn defines(path: &Path) -> BTreeSet<String> {
    let bytes = std::fs::read(path).unwrap();
    let elf = goblin::elf::Elf::parse(&bytes).unwrap();
    let defined = elf.dynsyms.iter().filter(|symbol| symbol.st_shndx != 0);
    let names = defined.map(|symbol| elf.dynstrtab.get_at(symbol.st_name).unwrap_or_default());
    names.map(str::to_owned).collect()
}

fn exports(kit: &Path) {
    let shim = defines(&kit.join("libmistshim.so"));
    assert!(shim.contains("mesg_input"), "{shim:?}");
    let pvmd = defines(Path::new("/usr/bin/pvmd"));
    let both: Vec<_> = shim.intersection(&pvmd).collect();
    assert!(!pvmd.is_empty() && both.is_empty(), "{both:?}");
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
