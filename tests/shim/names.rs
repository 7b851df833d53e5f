//! Tasks whose real tid is the name of another one: a virtual machine that was started anew counts from 1 again.

use super::*;

/// Names that no pvmd of these gives out.
const FAR: [u32; 2] = [0x8_1234, 0x8_4321];

/// Two tasks, both there since an earlier virtual machine. The real tid of the first is the second one's name.
struct Names {
    asker: Actor,
    one: Actor,
    other: Actor,
    a: u32,
    x: u32,
    y: u32,
}

fn names(vm: &Vm, actor: impl Fn() -> Actor) -> Names {
    let mut asker = actor();
    let a = asker.enrol();
    let (x, y) = (FAR[0], after(a));
    let mut table = vm.table();
    for (v, r) in [(y, after(y)), (x, y)] {
        table.add_incarnation(r, v).unwrap();
        table.open_gate(v, r).unwrap();
    }
    drop(table);
    let (mut one, mut other) = (actor(), actor());
    assert_eq!((one.enrol(), one.block().r().unwrap()), (x, y));
    assert_eq!((other.enrol(), other.block().r().unwrap()), (y, after(y)));
    Names {
        asker,
        one,
        other,
        a,
        x,
        y,
    }
}

pub fn told_apart(kit: &Path) {
    let vm = Vm::start(kit);
    let Names {
        mut asker,
        mut one,
        mut other,
        a,
        x,
        y,
    } = names(&vm, || vm.actor());
    for task in [&mut one, &mut other] {
        assert_eq!(task.block().flags().unwrap() & flag::TID_TAKEN, 0);
    }
    for (tid, task) in [(x, &mut one), (y, &mut other)] {
        asker.ask(&format!("send {tid:x} 1 sent"));
        asker.ask(&format!("psend {tid:x} 2 psent"));
        asker.ask(&format!("mcast 3 cast {tid:x}"));
        let got = |tag: u32, text: &str| format!("from {a:x} tag {tag} text {text} info {a:x}");
        assert_eq!(task.ask(&format!("recv {a:x} 1")), got(1, "sent"));
        let psent = format!("0 from {a:x} tag 2 text psent");
        assert_eq!(task.ask(&format!("precv {a:x} 2")), psent);
        assert_eq!(task.ask(&format!("recv {a:x} 3")), got(3, "cast"));
        task.ask(&format!("send {a:x} 4 back"));
        let back = format!("from {tid:x} tag 4 text back info {tid:x}");
        assert_eq!(asker.ask(&format!("recv {tid:x} 4")), back);
        assert_eq!(task.tid("raw"), tid);
    }
    // The host in a name stays what it was.
    assert_eq!(asker.tid(&format!("host {x:x}")), x & 0x3ffc_0000);
    // And between the two.
    one.ask(&format!("send {y:x} 5 over"));
    let over = format!("from {x:x} tag 5 text over info {x:x}");
    assert_eq!(other.ask("recv -1 5"), over);
    let tasks = asker.ask("tasks");
    for tid in [a, x, y] {
        let listed = tasks.matches(&format!(" {tid:x}/")).count();
        assert_eq!(listed, 1, "{tid:x} in {tasks}");
    }
    assert_eq!(asker.ask(&format!("notify 1 77 {x:x} {y:x}")), "0");
    one.crash();
    assert_eq!(asker.ask("notice 77"), format!("{x:x}"));
    let alive = [x, y].map(|tid| asker.ask(&format!("pstat {tid:x}")));
    assert_eq!(alive, ["-31", "0"]);
    other.crash();
    assert_eq!(asker.ask("notice 77"), format!("{y:x}"));
}

pub fn children(kit: &Path) {
    let vm = Vm::start(kit);
    let Names {
        asker: mut parent,
        mut other,
        a,
        y,
        ..
    } = names(&vm, || vm.actor());
    // Another name that a child will get as its real tid.
    let (held_r, v) = (after(after(y)), FAR[1]);
    let r = after(held_r);
    let mut table = vm.table();
    for (v, r) in [(r, held_r), (v, r)] {
        table.add_incarnation(r, v).unwrap();
        table.open_gate(v, r).unwrap();
    }
    drop(table);
    let mut held = vm.actor();
    assert_eq!(held.enrol(), r);
    let (stage, args) = vm.stage("child");
    let spawned = parent.ask(&format!("spawn 1 actor {args}"));
    assert_eq!(spawned, format!("1: {v:x}"));
    let mut child = stage.actor();
    assert_eq!((child.enrol(), child.tid("parent")), (v, a));
    // What its parent sends it at birth reaches it, and nobody else.
    assert_eq!(child.ask("siblings"), format!("{v:x}"));
    parent.ask(&format!("send {v:x} 1 hello"));
    let hello = format!("from {a:x} tag 1 text hello info {a:x}");
    assert_eq!(child.ask("recv -1 1"), hello);
    for task in [&mut held, &mut other] {
        task.ask("context -1");
        assert_eq!(task.ask("nrecv -1 -1"), "0");
    }
    child.leave();
}

pub fn routes(kit: &Path) {
    let vm = Vm::start(kit);
    let Names {
        mut asker,
        mut one,
        mut other,
        a,
        x,
        y,
    } = names(&vm, || vm.direct_actor());
    asker.ask("setopt 1 3");
    one.tell("recv -1 1");
    assert_eq!(asker.ask(&format!("send {x:x} 1 opens")), "0");
    assert!(one.answer().contains("text opens"));
    let mut routes = || [&mut asker, &mut one, &mut other].map(|task| task.ask("fds"));
    assert_eq!(routes(), ["2", "2", "1"]);
    asker.ask(&format!("mcast 2 cast {x:x}"));
    assert!(one.ask(&format!("recv {a:x} 2")).contains("text cast"));
    one.ask("setopt 1 3");
    one.ask(&format!("send {a:x} 3 back"));
    let back = format!("from {x:x} tag 3 text back info {x:x}");
    assert_eq!(asker.ask("recv -1 3"), back);
    let mut routes = || [&mut asker, &mut one, &mut other].map(|task| task.ask("fds"));
    assert_eq!(routes(), ["2", "2", "1"]);
    assert_eq!(other.ask("nrecv -1 -1"), "0");
    // Who has that real tid asks for a route: the answer goes to it, not to whom the name belongs.
    other.tell("recv -1 5");
    assert_eq!(one.ask(&format!("send {y:x} 5 over")), "0");
    let over = format!("from {x:x} tag 5 text over info {x:x}");
    assert_eq!(other.answer(), over);
    let mut routes = || [&mut asker, &mut one, &mut other].map(|task| task.ask("fds"));
    assert_eq!(routes(), ["2", "3", "2"]);
}

pub fn unnoticed(kit: &Path) {
    let vm = Vm::start(kit);
    let mut asker = vm.actor();
    let y = after(asker.enrol());
    let mut table = vm.table();
    table.add_incarnation(after(y), y).unwrap();
    table.open_gate(y, after(y)).unwrap();
    drop(table);
    let (mut one, mut other) = (vm.actor(), vm.actor());
    assert_eq!((one.enrol(), other.enrol()), (y, y));
    let taken = [one, other].map(|mut task| task.block().flags().unwrap() & flag::TID_TAKEN != 0);
    assert_eq!(taken, [true, false]);
}
