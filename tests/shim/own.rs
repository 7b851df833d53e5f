//! Under which tid a task knows itself, inside libpvm and outside.

use super::*;

pub fn own_tid(kit: &Path) {
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

pub fn callbacks(kit: &Path) {
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

pub fn jumps(kit: &Path) {
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

pub fn errors(kit: &Path) {
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

/// pvmmytid as it is in the memory of a task that may be inside libpvm.
fn raw(task: &mut Actor) -> u32 {
    use std::os::unix::fs::FileExt;
    let at = task.block().globals().unwrap()[0];
    let memory = std::fs::File::open(format!("/proc/{}/mem", task.pid())).unwrap();
    let mut bytes = [0; 4];
    memory.read_exact_at(&mut bytes, at).unwrap();
    u32::from_ne_bytes(bytes)
}

pub fn inside(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        r2,
        ..
    } = moved(&vm);
    let block = new.block();
    assert_eq!(raw(&mut new), v);
    new.ask("echo 4");
    new.tell("recv -1 5");
    until_waits(&block, wait::RECEIVE);
    assert_eq!(raw(&mut new), r2);
    partner.ask(&format!("send {v:x} 4 ping"));
    assert!(partner.ask(&format!("recv {v:x} 5")).contains("text ping"));
    // The handler has answered; when it has returned it is R again.
    until("the handler to return", || block.callbacks().unwrap() == 0);
    until("the real tid", || raw(&mut new) == r2);
    partner.ask(&format!("send {v:x} 5 done"));
    assert!(new.answer().contains("text done"));
    assert_eq!(raw(&mut new), v);
}
