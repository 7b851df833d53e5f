//! The agent of a host, in virtual machines of one host with real pvmds.

mod common;
#[path = "shim/mod.rs"]
mod stage;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use mistctl::pvm::agent::Caller;
use mistctl::pvm::agent::control::{Answer, Envelope, Landing, Request, TAG, VERSION, What};
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::spawn::{Sink, Spawn};
use mistctl::pvm::tid::Tid;
use mistctl::pvm::virtual_machine::Notify;
use mistctl::pvm::wire::Body;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use stage::{LIMIT, Vm};

/// A pvmd that ends sends SIGTERM to all its tasks, and these tests are some; what they start must not inherit that
/// it is blocked.
fn sigterm() -> SigSet {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term
}

fn started(kit: &Path) -> Vm {
    let pending = SignalFd::with_flags(&sigterm(), SfdFlags::SFD_NONBLOCK).unwrap();
    while pending.read_signal().unwrap().is_some() {}
    sigterm().thread_unblock().unwrap();
    let vm = Vm::start(kit);
    sigterm().thread_block().unwrap();
    vm
}

fn main() -> ExitCode {
    sigterm().thread_block().unwrap();
    stage::main(&[
        ("of several that are started at once one stays", one_stays),
        ("programs do not see it", hidden),
        ("it survives the console's reset", reset),
        ("whatever comes in, it goes on", hostile),
        ("a gate closes and opens, and tasks know", gates),
        ("a gate whose closer has gone opens by itself", lease),
        ("a gate that was closed for good stays closed", away),
        ("one of a task that was saved when it had ended, too", saved),
        ("while both incarnations live nothing is decided", undecided),
        ("it ends with the virtual machine and leaves nothing", ends),
    ])
}

fn client_of(vm: &Vm) -> Client {
    let file = vm.dir.join(format!("pvmd.{}", nix::unistd::geteuid()));
    let pvmd = Pvmd::find_at(None, &file).unwrap().unwrap();
    Client::enrol(&pvmd, 0).unwrap()
}

fn start(client: &mut Client, vm: &Vm) -> Tid {
    let program = vm.kit.join("mistctl").canonicalize().unwrap();
    client
        .spawn(&Spawn {
            file: program.as_os_str().as_bytes(),
            args: &["agent"],
            host: "127.0.0.1",
            environment: &[],
            output: Sink::default(),
            trace: Sink::default(),
        })
        .unwrap()
}

fn agents(client: &mut Client) -> Vec<Tid> {
    let mut tasks = client.tasks(Tid::NONE).unwrap();
    tasks.retain(|task| task.program.ends_with("/mistctl"));
    tasks.into_iter().map(|task| task.tid).collect()
}

fn ask(client: &mut Client, agent: Tid, request: Request) -> anyhow::Result<Answer> {
    Caller::new(client).ask(agent, request, LIMIT)
}

fn answers(client: &mut Client, agent: Tid) {
    let answer = ask(client, agent, Request::Hello).unwrap();
    assert!(matches!(answer, Answer::Hello { .. }), "{answer:?}");
}

fn one_stays(kit: &Path) {
    let vm = started(kit);
    let mut client = client_of(&vm);
    for _ in 0..4 {
        start(&mut client, &vm);
    }
    stage::until("one agent to be left", || agents(&mut client).len() == 1);
    let agent = agents(&mut client)[0];
    answers(&mut client, agent);
    // Another one that comes later leaves, too.
    let late = start(&mut client, &vm);
    stage::until("the late one to leave", || !client.lives(late).unwrap());
    answers(&mut client, agent);
}

fn hidden(kit: &Path) {
    let vm = started(kit);
    let mut client = client_of(&vm);
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let mut actor = vm.actor();
    let own = actor.enrol();
    let seen = actor.ask("tasks");
    assert!(seen.contains(&format!("{own:x}")), "{seen}");
    for mists in [agent, client.tid()] {
        assert!(!seen.contains(&format!("{:x}", mists.0)), "{seen}");
    }
}

fn reset(kit: &Path) {
    let vm = started(kit);
    let mut client = client_of(&vm);
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    // A task ends by SIGTERM.
    sigterm().thread_unblock().unwrap();
    let mut actor = vm.actor();
    sigterm().thread_block().unwrap();
    let tid = Tid(actor.enrol());
    client.spare_from_reset(client.tid()).unwrap();
    let mut other = vm.actor();
    other.enrol();
    // What the console's command does, too: every task ends that has not asked to be spared.
    assert_eq!(other.ask("reset"), "0");
    stage::until("the other task to end", || !client.lives(tid).unwrap());
    answers(&mut client, agent);
}

fn hostile(kit: &Path) {
    let vm = started(kit);
    let mut client = client_of(&vm);
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let huge = vec![b'['; 5 << 20];
    let deep = vec![b'['; 100_000];
    let bodies: [&[u8]; 6] = [b"", b"{}", b"nonsense", &[0xff; 100], &deep, &huge];
    for body in bodies {
        client.send(agent, TAG, Body::new().bytes(body)).unwrap();
    }
    for tag in [TAG + 1, TAG + 2, 7] {
        client.send(agent, tag, Body::new().uint(0x40001)).unwrap();
    }
    client.send_noop(agent, 77, b"odd").unwrap();
    // Answers that nobody has asked for.
    let envelope = Envelope {
        version: VERSION,
        id: 1,
        what: What::Answer(Answer::Done),
    };
    let body = serde_json::to_vec(&envelope).unwrap();
    client.send(agent, TAG, Body::new().bytes(&body)).unwrap();
    // Another version is told so.
    let envelope = Envelope {
        version: VERSION + 1,
        id: 9,
        what: What::Request(Request::Hello),
    };
    let body = serde_json::to_vec(&envelope).unwrap();
    client.send(agent, TAG, Body::new().bytes(&body)).unwrap();
    let answer = client.recv_from(Some(agent), TAG, LIMIT).unwrap().unwrap();
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.contains("speaks version"), "{text}");
    // Requests that make no sense are refused with a reason.
    let landing = |id: &str| Landing {
        id: id.to_owned(),
        v: 0,
        parent: 0,
        program: "../../x".to_owned(),
        moves: None,
        image: Some("/nowhere".into()),
        lazy: false,
        announce: false,
    };
    for request in [
        Request::AddIncarnation { r: 0, v: u32::MAX },
        Request::OpenGate {
            v: 0x40001,
            r: 0x40077,
        },
        Request::Hide {
            tids: vec![u32::MAX],
        },
        Request::Land {
            order: landing("../../x"),
        },
        Request::Land { order: landing("") },
        Request::Parked { id: "none".into() },
        Request::Run { id: "none".into() },
        Request::Migrate {
            tid: 0x40077,
            to: "h9".into(),
            agents: Vec::new(),
        },
    ] {
        let error = ask(&mut client, agent, request.clone());
        assert!(error.is_err(), "{request:?}: {error:?}");
    }
    // And one that could be, of an image that is not there.
    let error = ask(
        &mut client,
        agent,
        Request::Land {
            order: landing("a-1"),
        },
    )
    .and_then(|_| ask(&mut client, agent, Request::Parked { id: "a-1".into() }));
    assert!(error.is_err(), "{error:?}");
    answers(&mut client, agent);
}

fn gates(kit: &Path) {
    at_a_gate(kit, |_, client, agent, v| {
        ask(client, agent, Request::OpenGate { v, r: v }).unwrap();
    });
}

fn lease(kit: &Path) {
    at_a_gate(kit, |closer, _, _, _| closer.exit().unwrap());
}

/// The task behind it is away: whoever closed it ends, and that is no reason to look who lives.
fn away(kit: &Path) {
    at_a_gate(kit, |mut closer, client, agent, v| {
        let close = Request::CloseGate {
            v,
            from: v,
            next: 0,
            lease_ms: 0,
            saved: false,
        };
        ask(&mut closer, agent, close).unwrap();
        let gone = closer.tid();
        closer.exit().unwrap();
        // The agent is told of the end at the same time as we.
        client.notify(Notify::TaskExit, 66, &[gone]).unwrap();
        let told = client.recv_from(None, 66, LIMIT).unwrap();
        assert!(told.is_some());
        answers(client, agent);
        let answer = ask(client, agent, Request::Table).unwrap();
        let Answer::Table { entries, .. } = answer else {
            panic!("{answer:?}");
        };
        assert!(
            entries.iter().any(|entry| entry.v == v && entry.away),
            "{entries:?}"
        );
        ask(client, agent, Request::OpenGate { v, r: v }).unwrap();
    });
}

/// Whoever has saved a task dies when it has ended, before he could say so; or before.
fn saved(kit: &Path) {
    let vm = started(kit);
    let mut client = client_of(&vm);
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let (mut from, mut ended, mut lives) = (vm.actor(), vm.actor(), vm.actor());
    from.enrol();
    let (e, l) = (ended.enrol(), lives.enrol());
    for v in [e, l] {
        let mut closer = client_of(&vm);
        let close = |lease_ms, saved| Request::CloseGate {
            v,
            from: v,
            next: 0,
            lease_ms,
            saved,
        };
        ask(&mut closer, agent, close(60_000, false)).unwrap();
        ask(&mut closer, agent, close(1000, true)).unwrap();
        if v == e {
            let pid = nix::unistd::Pid::from_raw(ended.pid());
            nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        }
        closer.exit().unwrap();
    }
    assert_eq!(from.ask(&format!("send {l:x} 1 x")), "0");
    assert!(lives.ask("recv -1 1").contains("text x"));
    stage::until("the gate of the other to stay closed", || {
        let answer = ask(&mut client, agent, Request::Table).unwrap();
        let Answer::Table { entries, .. } = answer else {
            panic!("{answer:?}");
        };
        entries.iter().any(|entry| entry.v == e && entry.away)
    });
}

/// Whoever closed a gate has gone, and with him its agent. The next one opens it for the old incarnation when the new one
/// has ended, and not before; for the new one when the old one has.
fn undecided(kit: &Path) {
    let vm = started(kit);
    let (mut closer, mut client) = (client_of(&vm), client_of(&vm));
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let (mut from, mut to) = (vm.actor(), vm.actor());
    let (_, v) = (from.enrol(), to.enrol());
    let close = |next: u32| Request::CloseGate {
        v,
        from: v,
        next,
        lease_ms: 1,
        saved: false,
    };
    let mut other = vm.bare_actor();
    let first = other.enrol();
    ask(&mut closer, agent, close(first)).unwrap();
    closer.exit().unwrap();
    from.tell(&format!("send {v:x} 5 one"));
    // Long enough for several questions.
    assert_eq!(to.ask("trecv -1 5 2000"), "0");
    stage::until_waits(&from.block(), mistctl::pvm::shimabi::block::wait::GATE);
    other.crash();
    assert_eq!(from.answer(), "0");
    assert!(to.ask("recv -1 5").contains("text one"));
    let mut other = vm.bare_actor();
    let second = other.enrol();
    let known = Request::AddIncarnation { r: second, v };
    ask(&mut client, agent, known).unwrap();
    ask(&mut client, agent, close(second)).unwrap();
    from.tell(&format!("send {v:x} 6 two"));
    to.crash();
    assert_eq!(from.answer(), "0");
    assert!(other.ask("recv -1 6").contains("text two"));
}

/// A task that sends waits at a gate until `open`, which gets the client that closed it, another one, the agent, and
/// the task behind the gate.
fn at_a_gate(kit: &Path, open: fn(Client, &mut Client, Tid, u32)) {
    let vm = started(kit);
    let (mut closer, mut client) = (client_of(&vm), client_of(&vm));
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let (mut from, mut to) = (vm.actor(), vm.actor());
    let (_, v) = (from.enrol(), to.enrol());
    let close = Request::CloseGate {
        v,
        from: v,
        next: 0,
        lease_ms: 600_000,
        saved: false,
    };
    ask(&mut closer, agent, close).unwrap();
    from.tell(&format!("send {v:x} 5 later"));
    stage::until_waits(&from.block(), mistctl::pvm::shimabi::block::wait::GATE);
    open(closer, &mut client, agent, v);
    from.answer();
    assert!(to.ask("recv -1 5").contains("text later"));
}

fn ends(kit: &Path) {
    let mut vm = started(kit);
    let mut client = client_of(&vm);
    let agent = start(&mut client, &vm);
    answers(&mut client, agent);
    let folders = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap().flatten();
        entries
            .filter(|e| e.file_name().to_string_lossy().ends_with(".d"))
            .count()
    };
    assert_eq!(folders(&vm.dir), 1);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vm.pvmd.id() as i32),
        Signal::SIGTERM,
    )
    .unwrap();
    vm.pvmd.wait().unwrap();
    stage::until("the agent's folder to go", || folders(&vm.dir) == 0);
    stage::until("the tid table to go", || {
        let mut entries = std::fs::read_dir(&vm.dir).unwrap().flatten();
        !entries.any(|e| e.file_name().to_string_lossy().contains(".mist-"))
    });
}
