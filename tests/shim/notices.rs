//! Notices of the end of tasks that move.

use super::*;

pub fn notices(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = prepare(&vm);
    let v = task.v;
    assert_eq!(task.partner.ask(&format!("notify 1 77 {v:x}")), "0");
    assert_eq!(task.partner.block().notifies().unwrap(), 1);
    // The request has reached pvmd when a question behind it is answered.
    task.partner.ask(&format!("pstat {v:x}"));
    vm.table().close_gate(v, task.r2, 0).unwrap();
    vm.table().open_gate(v, task.r2).unwrap();
    task.old.crash();
    let present = task.r2;
    until("pvmd to forget the old incarnation", || {
        !vm.bare_actor().ask("tasks").contains(&format!(" {v:x}/"))
    });
    assert_eq!(
        task.partner.ask("nnotice 77"),
        "none",
        "the old incarnation's exit shows"
    );
    task.new.crash();
    assert_eq!(
        task.partner.ask("notice 77"),
        format!("{v:x}"),
        "asked again about t{present:x}"
    );
    assert_eq!(task.partner.block().notifies().unwrap(), 0);
    // A request that was refused is none.
    assert_eq!(task.partner.ask("notify 1 79 0"), "-2");
    assert_eq!(task.partner.block().notifies().unwrap(), 0);
    // There is no route to it, which is told at once.
    assert_eq!(task.partner.ask(&format!("notify 5 80 {v:x}")), "0");
    assert_eq!(task.partner.ask("nnotice 80"), format!("{v:x}"));
    // A request made about V now is about its present incarnation, which is gone.
    assert_eq!(task.partner.ask(&format!("notify 1 78 {v:x}")), "0");
    assert_eq!(task.partner.ask("notice 78"), format!("{v:x}"));
}

pub fn held_notices(kit: &Path) {
    let vm = Vm::start(kit);
    let mut task = prepare(&vm);
    let v = task.v;
    task.partner.ask(&format!("notify 1 77 {v:x}"));
    task.partner.ask(&format!("pstat {v:x}"));
    vm.table().close_gate(v, task.r2, 0).unwrap();
    task.old.crash();
    let block = task.partner.block();
    until("the notice to be held back", || {
        assert_eq!(task.partner.ask("nnotice 77"), "none");
        block.held().unwrap() == 1
    });
    // The move fails: the task is dead.
    vm.table().open_gate(v, v).unwrap();
    assert_eq!(task.partner.ask("nnotice 77"), format!("{v:x}"));
    assert_eq!(block.held().unwrap(), 0);
}

pub fn requests_again(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut asker, mut other) = (vm.actor(), vm.actor());
    let (a, o) = (asker.enrol(), other.enrol());
    asker.ask(&format!("notify 1 77 {o:x}"));
    asker.ask(&format!("pstat {o:x}"));
    // As mistctl does when a new incarnation takes over. Here pvmd still has the first request too.
    let block = asker.block();
    block.take_over(a).unwrap();
    asker.ask(&format!("pstat {o:x}"));
    assert_ne!(block.seen().unwrap(), u64::MAX);
    other.crash();
    assert_eq!(asker.ask("notice 77"), format!("{o:x}"));
    asker.ask("pstat 40fff");
    until("the second answer to be swallowed", || {
        assert_eq!(asker.ask("nnotice 77"), "none");
        block.notifies().unwrap() == 0
    });
}
