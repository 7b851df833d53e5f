//! A resource manager: tasks ask it instead of their pvmd.

use mistctl::pvm::tid::Tid;
use mistctl::pvm::wire::{Body, Message, tm};

use super::*;
use crate::stage::LIMIT;

/// pvmproto.h: TM_SCHED, and SM_TASK.
const REGISTER: u32 = tm::CONNECT + 16;
const TASK: u32 = 0x8004_0004;

/// Its real tid is another task's name, and it has a name of its own: what goes to it and what comes from it is in R, or the
/// question gets lost, or the answer.
pub fn answers(kit: &Path) {
    let vm = Vm::start(kit);
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    let mut manager = Client::enrol(&pvmd, 0).unwrap();
    let m = manager.tid();
    manager.ask(REGISTER, Body::new()).unwrap();
    let mut task = vm.actor();
    let t = task.enrol();
    let mut other = vm.bare_actor();
    let o = other.enrol();
    let mut table = vm.table();
    for (r, v) in [(m.0, m.0 + 1000), (o, m.0)] {
        table.add_incarnation(r, v).unwrap();
        table.open_gate(v, r).unwrap();
    }
    task.tell("tasks");
    let asked = loop {
        let message = manager.recv(Some(LIMIT)).unwrap();
        let message = message.expect("no question came to it");
        // pvmds tell it of tasks that come and go.
        if !message.src.is_pvmd() {
            break message;
        }
    };
    assert_eq!((asked.src, asked.tag, asked.ctx), (Tid(t), TASK, 0));
    let own = |task: u32| {
        let body = Body::new().uint(task).uint(0).uint(t & 0x3ffc_0000);
        body.int(4).string(b"program").int(1)
    };
    let all = Body::new().int(0).bytes(&own(t).into_bytes());
    let all = all.bytes(&own(o).into_bytes());
    let answer = Message {
        body: all.into_bytes(),
        ..asked.clone()
    };
    let wait = asked.wait as i32;
    manager.pass_on(Tid(t), answer, wait).unwrap();
    let seen = task.answer();
    // What it tells is translated where the program gets it.
    let of = |tid: u32| format!(" {tid:x}/0/{:x}/program", t & 0x3ffc_0000);
    assert_eq!(seen, format!("0:{}{}", of(t), of(m.0)));
}
