//! Output of tasks that move, and of tasks whose collector moves.

use super::*;

pub fn output_of_moved(kit: &Path) {
    let vm = Vm::start(kit);
    let mut parent = vm.actor();
    let p = parent.enrol();
    parent.ask("catchout");
    parent.ask("showtids 1");
    let (stage, args) = vm.stage("old");
    let v = after(p);
    assert_eq!(
        parent.ask(&format!("spawn 1 actor {args}")),
        format!("1: {v:x}")
    );
    let mut old = stage.actor();
    old.enrol();
    old.ask("print one");
    let show = |parent: &mut Actor, line: &str| {
        until(line, || {
            parent.ask("probe 1 1");
            parent.said.iter().any(|said| said == line)
        });
    };
    show(&mut parent, &format!("[t{v:x}] one"));
    let r2 = after(v);
    vm.table().add_incarnation(r2, v).unwrap();
    vm.table().close_gate(v, r2, 0).unwrap();
    let (stage, args) = vm.stage("new");
    parent.ask(&format!("spawn 1 actor {args}"));
    let mut new = stage.actor();
    new.enrol();
    vm.table().open_gate(v, r2).unwrap();
    old.ask("exit");
    old.tell("quit");
    new.ask("print two");
    show(&mut parent, &format!("[t{v:x}] two"));
    until("the old incarnation to be gone", || {
        !vm.bare_actor().ask("tasks").contains(&format!(" {v:x}/"))
    });
    new.ask("print three");
    show(&mut parent, &format!("[t{v:x}] three"));
    let begins = |parent: &Actor, what: &str| {
        parent
            .said
            .iter()
            .filter(|said| **said == format!("[t{v:x}] {what}"))
            .count()
    };
    assert_eq!(
        (begins(&parent, "BEGIN"), begins(&parent, "EOF")),
        (1, 0),
        "{:?}",
        parent.said
    );
    new.ask("exit");
    new.tell("quit");
    show(&mut parent, &format!("[t{v:x}] EOF"));
    assert_eq!(
        (begins(&parent, "BEGIN"), begins(&parent, "EOF")),
        (1, 1),
        "{:?}",
        parent.said
    );
    assert!(
        !parent
            .said
            .iter()
            .any(|said| said.contains(&format!("{r2:x}"))),
        "{:?}",
        parent.said
    );
    assert_eq!(parent.ask("exit"), "0");
}

pub fn raw_output_of_moved(kit: &Path) {
    let vm = Vm::start(kit);
    let mut parent = vm.actor();
    let p = parent.enrol();
    parent.ask(&format!("setopt 4 {p:x}"));
    parent.ask("setopt 5 63"); // PvmOutputCode 99
    let (stage, args) = vm.stage("old");
    let v = after(p);
    assert_eq!(
        parent.ask(&format!("spawn 1 actor {args}")),
        format!("1: {v:x}")
    );
    let mut old = stage.actor();
    old.enrol();
    let mut begin = [parent.ask("notice 99"), parent.ask("notice 99")];
    begin.sort();
    assert_eq!(
        begin,
        [
            format!("{v:x} fffffffe {p:x}"),
            format!("{v:x} ffffffff {p:x}")
        ]
    );
    let r2 = after(v);
    vm.table().add_incarnation(r2, v).unwrap();
    vm.table().close_gate(v, r2, 0).unwrap();
    let (stage, args) = vm.stage("new");
    assert_eq!(
        parent.ask(&format!("spawn 1 actor {args}")),
        format!("1: {v:x}")
    );
    let mut new = stage.actor();
    new.enrol();
    old.leave();
    // Whether that was its end nobody knows before the move has come to one.
    until("the end of output to be held back", || {
        assert_eq!(parent.ask("probe -1 99"), "no");
        parent.block().held().unwrap() == 1
    });
    vm.table().open_gate(v, r2).unwrap();
    new.ask("print x");
    // Neither a second beginning nor an end comes before that.
    assert!(parent.ask("notice 99").starts_with(&format!("{v:x} 2 ")));
    new.leave();
    assert_eq!(parent.ask("notice 99"), format!("{v:x} 0"));
}

pub fn output_to_moved(kit: &Path) {
    let vm = Vm::start(kit);
    let mut old = vm.actor();
    let v = old.enrol();
    old.ask("catchout");
    let (stage, args) = vm.stage("child");
    old.ask(&format!("spawn 1 actor {args}"));
    let mut child = stage.actor();
    let c = child.enrol();
    assert_eq!(child.tid("getopt 12"), v);
    let r2 = after(c);
    vm.table().add_incarnation(r2, v).unwrap();
    let mut new = vm.actor();
    new.enrol();
    new.ask("catchout");
    new.ask("showtids 1");
    vm.table().open_gate(v, r2).unwrap();
    // The first that its collector's move concerns is a child of its own.
    let (stage, args) = vm.stage("grandchild");
    child.ask(&format!("spawn 1 actor {args}"));
    let mut grandchild = stage.actor();
    let g = grandchild.enrol();
    grandchild.ask("print deep");
    until("its output", || {
        new.ask("probe 1 1");
        new.said
            .iter()
            .any(|said| *said == format!("[t{g:x}] deep"))
    });
    grandchild.leave();
    child.ask("probe 1 1");
    assert_eq!(child.tid("getopt 12"), v);
    assert_eq!(child.tid("getopt 4"), v);
    child.ask("pstat 40fff");
    child.ask("print hello");
    until("the output", || {
        new.ask("probe 1 1");
        new.said
            .iter()
            .any(|said| *said == format!("[t{c:x}] hello"))
    });
    // Nobody waits for the answer to the request that did it: it is not left lying about.
    child.ask("context -1");
    assert_eq!(child.ask("nrecv -1 -1"), "0");
    child.ask("context 0");
    assert_eq!(child.tid(&format!("setopt 12 {v:x}")), v);
    child.leave();
}
