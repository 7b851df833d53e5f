//! Direct routes.

use super::*;

pub fn routes(kit: &Path) {
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

pub fn refuses_routes(kit: &Path) {
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

pub fn old_routes(kit: &Path) {
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

pub fn connecting(kit: &Path) {
    let vm = Vm::start(kit);
    let (mut one, mut two) = (vm.direct_actor(), vm.direct_actor());
    let (_, t) = (one.enrol(), two.enrol());
    one.ask("setopt 1 3");
    // The other one does not answer before it is in libpvm again.
    let block = one.block();
    one.tell(&format!("send {t:x} 1 x"));
    until_waits(&block, wait::SEND);
    until("it to sleep in select", || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", block.pid()));
        call.is_ok_and(|call| call.starts_with("23 ") || call.starts_with("270 "))
    });
    assert_eq!(block.sending().unwrap(), Some(vec![t]));
    assert!(matches!(block.freezable().unwrap(), Freezable::No(_)));
    assert!(two.ask("recv -1 1").contains("text x"));
    assert_eq!(one.answer(), "0");
}
