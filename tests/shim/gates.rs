//! Gates, held hosts and markers.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

pub fn gate(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut old,
        mut partner,
        mut new,
        v,
        r2,
        p,
    } = prepare(&vm);
    let block = partner.block();
    vm.table().close_gate(v, r2, 0).unwrap();
    partner.tell(&format!("send {v:x} 5 late"));
    until_waits(&block, wait::GATE);
    assert_eq!(
        block.sending().unwrap(),
        Some(vec![]),
        "nothing is on its way to it"
    );
    assert_eq!(block.freezable().unwrap(), Freezable::IfInSelect);
    // It reads on: more than sockets hold gets through, and a handler runs.
    let mut third = vm.actor();
    third.enrol();
    assert_eq!(third.ask(&format!("big {p:x} 6 4000000")), "0");
    third.ask(&format!("pstat {p:x}"));
    // Questions about the task wait too, and others do not.
    third.tell(&format!("pstat {v:x}"));
    until_waits(&third.block(), wait::GATE);
    let mut fourth = vm.actor();
    fourth.enrol();
    assert_eq!(fourth.ask(&format!("send {p:x} 9 x")), "0");
    vm.table().open_gate(v, r2).unwrap();
    assert_eq!(partner.answer(), "0");
    assert_eq!(third.answer(), "0");
    assert_eq!(
        new.ask("recv -1 5"),
        format!("from {p:x} tag 5 text late info {p:x}")
    );
    assert_eq!(old.ask("nrecv -1 5"), "0");
    assert!(partner.ask("recv -1 6").contains("text big"));
}

/// Hundreds of tasks may wait at one gate.
pub fn long_at_a_gate(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner, v, r2, ..
    } = prepare(&vm);
    let block = partner.block();
    vm.table().close_gate(v, r2, 0).unwrap();
    partner.tell(&format!("send {v:x} 5 late"));
    until_waits(&block, wait::GATE);
    let pid = partner.pid();
    let looks = || {
        let task = procfs::process::Process::new(pid).unwrap();
        task.status().unwrap().voluntary_ctxt_switches.unwrap()
    };
    let (before, began) = (looks(), Instant::now());
    until("the task at the gate looks again and again", || {
        looks() >= before + 60
    });
    let took = began.elapsed();
    assert!(took > Duration::from_secs(1), "60 times in {took:?}");
    vm.table().open_gate(v, r2).unwrap();
    assert_eq!(partner.answer(), "0");
}

pub fn gate_multicast(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut old,
        mut partner,
        mut new,
        v,
        r2,
        p,
    } = prepare(&vm);
    let mut third = vm.actor();
    let t = third.enrol();
    vm.table().close_gate(v, r2, 0).unwrap();
    partner.tell(&format!("mcast 5 all {t:x} {v:x}"));
    until_waits(&partner.block(), wait::GATE);
    assert_eq!(third.ask("nrecv -1 5"), "0");
    vm.table().open_gate(v, r2).unwrap();
    assert_eq!(partner.answer(), "0");
    assert!(third.ask(&format!("recv {p:x} 5")).contains("text all"));
    assert!(new.ask(&format!("recv {p:x} 5")).contains("text all"));
    assert_eq!(old.ask("nrecv -1 5"), "0");
}

pub fn gate_in_handler(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut partner,
        mut new,
        v,
        r2,
        ..
    } = prepare(&vm);
    // The partner answers from a message handler.
    assert_eq!(partner.ask("echo 20"), "1");
    let p = partner.enrol();
    let block = partner.block();
    partner.tell("recv -1 30");
    until_waits(&block, wait::RECEIVE);
    // It asks as V before the gate closes.
    vm.table().close_gate(v, r2, 0).unwrap();
    new.ask(&format!("send {p:x} 20 ping"));
    until_waits(&block, wait::GATE_DEAF);
    assert_eq!(block.freezable().unwrap(), Freezable::IfInSelect);
    vm.table().open_gate(v, r2).unwrap();
    assert_eq!(
        new.ask("recv -1 21"),
        format!("from {p:x} tag 21 text ping info {p:x}")
    );
    new.ask(&format!("send {p:x} 30 done"));
    assert!(partner.answer().contains("text done"));
}

pub fn expired_gate(kit: &Path) {
    let vm = Vm::start(kit);
    let Move {
        mut old,
        mut partner,
        mut new,
        v,
        r2,
        ..
    } = prepare(&vm);
    // Whoever was to move it died, and the old incarnation lives. As long as the other does, too, nothing is decided.
    let mut third = vm.bare_actor();
    let r3 = third.enrol();
    vm.table().add_incarnation(r3, v).unwrap();
    vm.table().close_gate(v, r3, 1).unwrap();
    partner.tell(&format!("send {v:x} 5 one"));
    until_waits(&partner.block(), wait::GATE);
    assert_eq!(old.ask("trecv -1 5 1000"), "0");
    until_waits(&partner.block(), wait::GATE);
    third.crash();
    assert_eq!(partner.answer(), "0");
    assert!(old.ask("recv -1 5").contains("text one"));
    assert_eq!(new.ask("nrecv -1 5"), "0");
    // The next one also died, but after the commit.
    vm.table().open_gate(v, v).unwrap();
    partner.ask(&format!("send {v:x} 6 two"));
    assert!(old.ask("recv -1 6").contains("text two"));
    vm.table().close_gate(v, r2, 2).unwrap();
    old.crash();
    until("pvmd to forget it", || {
        vm.bare_actor().ask(&format!("pstat {v:x}")) == "-31"
    });
    let mut second = vm.actor();
    second.enrol();
    assert_eq!(second.ask(&format!("send {v:x} 7 three")), "0");
    assert!(new.ask("recv -1 7").contains("text three"));
}

pub fn held_host(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut one, mut two) = (vm.actor(), vm.actor());
    let (_, t) = (one.enrol(), two.enrol());
    let block = one.block();
    let host = ((t & 0x3ffc_0000) >> 18) as usize;
    let mut hosts = [0; 64];
    hosts[host / 64] |= 1 << (host % 64);
    block.hold_hosts(&hosts).unwrap();
    one.tell(&format!("send {t:x} 1 x"));
    until_waits(&block, wait::GATE);
    block.hold_hosts(&[0; 64]).unwrap();
    assert_eq!(one.answer(), "0");
    assert!(two.ask("recv -1 1").contains("text x"));
    hosts = [0; 64];
    hosts[63] = 1 << 63;
    block.hold_hosts(&hosts).unwrap();
    assert_eq!(one.ask(&format!("send {t:x} 2 x")), "0");
}

pub fn markers(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut one, mut agent) = (vm.actor(), vm.bare_actor());
    let (o, a) = (one.enrol(), agent.enrol());
    assert_eq!(agent.ask("noops"), "1");
    let block = one.block();
    block.ask_marker(3, a, 4711).unwrap();
    assert!(!block.marker_sent(3).unwrap());
    assert_eq!(one.ask(&format!("send {a:x} 1 before")), "0");
    assert!(block.marker_sent(3).unwrap());
    assert!(block.ask_marker(99, a, 1).is_err());
    let answer = agent.ask("recv -1 1");
    assert!(
        answer.starts_with(&format!("[noop from {o:x} 4d495354 1 1267 {o:x} {o:x}]")),
        "{answer}"
    );
    // A task that waits in pvm_recv is nudged with a TC_NOOP.
    one.tell("recv -1 9");
    until_waits(&block, wait::RECEIVE);
    block.ask_marker(0, a, 4712).unwrap();
    let mut said = agent.ask(&format!("nudge {o:x}"));
    until("the marker to be sent", || block.marker_sent(0).unwrap());
    said += &agent.ask(&format!("send {o:x} 9 x"));
    assert!(one.answer().contains("text x"));
    one.ask(&format!("send {a:x} 2 after"));
    said += &agent.ask("recv -1 2");
    assert!(
        said.contains(&format!("[noop from {o:x} 4d495354 1 1268 {o:x} {o:x}]")),
        "{said}"
    );
}

/// Whoever waits at a gate is waiting in the program's call: what signals that break that off leave in errno is not the
/// program's.
pub fn errno_at_a_gate(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut task, mut sender) = (vm.actor(), vm.actor());
    let (v, _) = (task.enrol(), sender.enrol());
    let r2 = v + 1000;
    let before = sender.ask(&format!("errnosend {v:x} 5"));
    assert!(before.starts_with("0 "), "{before}");
    assert_eq!(sender.ask("handles 10"), "0");
    vm.table().close_gate(v, r2, 60_000).unwrap();
    sender.tell(&format!("errnosend {v:x} 6"));
    until_waits(&sender.block(), wait::GATE);
    let (pid, status) = (
        Pid::from_raw(sender.pid()),
        format!("/proc/{}/status", sender.pid()),
    );
    for _ in 0..50 {
        kill(pid, Signal::SIGUSR1).unwrap();
        until("it to have the signal", || {
            let status = std::fs::read_to_string(&status).unwrap();
            status.contains("ShdPnd:\t0000000000000000")
        });
    }
    vm.table().open_gate(v, v).unwrap();
    assert_eq!(sender.answer(), before);
}
