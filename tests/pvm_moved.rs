//! What a task has that has moved: its place under its pvmd, what it asked of it, and its partners' messages in order.

mod common;
#[path = "testhosts/scene.rs"]
mod scene;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{wait_child, wait_for};
use memmap2::MmapMut;
use mistctl::kernel::uffd::Uffd;
use mistctl::pvm::shimabi::table::{Mapped, State};
use scene::Scene;
use stage::Stage;

const LIMIT: Duration = Duration::from_secs(60);

type Test = fn(&Scene) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 16] = [
        ("its_last_words_and_its_status_arrive", last_words),
        ("its_environment_says_where_it_is", environment),
        ("sizes_are_its_pvmds_or_its_own", sizes),
        ("it_has_the_siblings_it_had", siblings),
        ("its_mailbox_entries_are_its_own", mailbox),
        ("what_cannot_go_is_listed_and_nothing_stopped", refused),
        ("one_that_is_ending_has_ended", ending),
        ("a_child_of_the_last_moment_is_told_of", late_fork),
        ("a_target_that_dies_behind_the_decision_leaves_it", |s| {
            target_dies(s, false)
        }),
        ("it_does_so_when_the_mover_dies_too", |s| {
            target_dies(s, true)
        }),
        ("its_contexts_are_its_own", contexts),
        ("what_it_asked_to_be_told_is_told", notices),
        ("what_it_collects_follows_it", collector),
        ("what_others_print_meanwhile_is_whole", printed_meanwhile),
        ("a_child_that_enrols_late_prints_to_it", late_child),
        (
            "what_it_said_before_comes_before_what_it_says_after",
            in_order,
        ),
    ];
    testhosts::main(tests, || Ok(()), |(), test| Scene::new(3)?.play(test))
}

fn migrate(scene: &Scene, v: u32, to: &str) -> Result<()> {
    let command = format!("{} migrate t{v:x} {to}", scene.mistctl.path());
    scene.hosts.exec("h0", &command).map(drop)
}

/// The incarnation that a task has now.
fn present(scene: &Scene, v: u32) -> Result<u32> {
    let said = scene
        .hosts
        .exec("h0", &format!("{} ps --json", scene.mistctl.path()))?;
    let listing: serde_json::Value = serde_json::from_str(&said)?;
    let tasks = listing["tasks"].as_array().context("no tasks")?;
    let of = |task: &&serde_json::Value| task["virtual_tid"] == format!("t{v:x}");
    let tid = tasks.iter().find(of).and_then(|task| task["tid"].as_str());
    let tid = tid
        .and_then(|tid| tid.strip_prefix('t'))
        .context(said.clone())?;
    Ok(u32::from_str_radix(tid, 16)?)
}

/// Under its pvmd it is the process that was forked: what it prints when it has left PVM is collected, and pvmd tells
/// those who trace it how it ended.
fn last_words(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    // PvmTraceTid, PvmTraceCode, PvmTraceOptions
    boss.ask(&format!("setopt 6 {me:x}"));
    boss.ask("setopt 7 63");
    boss.ask("setopt 9 1");
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    migrate(scene, v, "h0")?;
    let r2 = present(scene, v)?;
    // PvmTraceTid, PvmSelfTraceTid: who traces it, and its children.
    for option in [6, 14] {
        ensure!(worker.tid(&format!("getopt {option}")) == me);
    }
    ensure!(worker.ask("print before") == "ok");
    ensure!(worker.ask("exit") == "0");
    ensure!(worker.ask("print after") == "ok");
    worker.ask("status 3");
    // Its tid, and what wait(2) says of exit(3).
    let ended = format!("{r2:x} ");
    wait_for("what pvmd tells of its end", LIMIT, || {
        let event = boss.ask("notice 99");
        let behind = event.split_once(&ended).map(|(_, behind)| behind);
        Ok(behind
            .is_some_and(|behind| behind.contains(" 300 "))
            .then_some(()))
    })?;
    ensure!(boss.ask("exit") == "0");
    let of = |what: &str| format!("[t{v:x}] {what}");
    let expected = ["BEGIN", "before", "after", "EOF"].map(of);
    ensure!(boss.said == expected, "{:?}", boss.said);
    Ok(())
}

fn environment(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let names = ["PVMSOCK", "PVM_TMP", "PVM_VMID", "PVMEPID"];
    // As another host may have them.
    for name in names {
        worker.ask(&format!("setenv {name} elsewhere"));
    }
    migrate(scene, v, "h0")?;
    let sock = scene.hosts.exec("h0", "cat /tmp/pvmd.$(id -u)")?;
    let pid = worker.pid().to_string();
    for (name, value) in names.into_iter().zip([sock.as_str(), "-", "-", &pid]) {
        let got = worker.ask(&format!("getenv {name}"));
        ensure!(got == value, "{name}: {got}, not {value}");
    }
    // It finds its pvmd with that.
    ensure!(worker.ask("exit") == "0");
    let again = worker.tid("mytid");
    ensure!(
        again & 0x3ffc_0000 == boss.enrol() & 0x3ffc_0000,
        "t{again:x}"
    );
    worker.leave();
    boss.leave();
    Ok(())
}

fn sizes(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let here = worker.ask("sizes");
    let (mtu, fragment) = here.split_once(' ').context(here.clone())?;
    ensure!(mtu == fragment, "{here}");
    // Those of a pvmd that is otherwise.
    worker.ask("setsizes 2000 2000");
    migrate(scene, v, "h0")?;
    let there = worker.ask("sizes");
    ensure!(there == here, "{there}, not {here}");
    // PvmFragSize 3000
    worker.ask("setopt 8 bb8");
    worker.ask(&format!("setsizes {mtu} 3000"));
    migrate(scene, v, "h1")?;
    let own = worker.ask("sizes");
    ensure!(own == format!("{mtu} 3000"), "{own}");
    worker.leave();
    boss.leave();
    Ok(())
}

fn siblings(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let before = worker.ask("siblings");
    ensure!(before == format!("{v:x}"), "{before}");
    migrate(scene, v, "h0")?;
    // It has read all that came to its new place.
    ensure!(worker.ask("probe 1 1") == "no");
    ensure!(worker.ask("siblings") == before);
    worker.leave();
    boss.leave();
    Ok(())
}

fn mailbox(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // PvmMboxPersistent: nobody takes that away.
    for (name, flags, host) in [("kept", 1, "h0"), ("mine", 0, "h1"), ("more", 0, "h0")] {
        ensure!(worker.ask(&format!("put {name} text {flags}")) == "0");
        migrate(scene, v, host)?;
        for name in ["kept", name] {
            let owner = boss.ask(&format!("boxes {name}"));
            ensure!(owner == format!("{v:x}"), "{name} is {owner}'s");
            let got = boss.ask(&format!("get {name} 0 0"));
            ensure!(got.contains("text text"), "{got}");
        }
    }
    // It is its own to take away, and goes with it.
    ensure!(worker.ask("del mine 0") == "0");
    worker.leave();
    wait_for("its entry to go", LIMIT, || {
        Ok(boss.ask("boxes more").is_empty().then_some(()))
    })?;
    ensure!(!boss.ask("boxes kept").is_empty());
    boss.leave();
    Ok(())
}

/// One that cannot go is told everything that is in its way, and never stood: whoever is stopped wakes for that.
fn refused(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // Agents are there from here on.
    migrate(scene, v, "h0")?;
    migrate(scene, v, "h1")?;
    let address = scene
        .hosts
        .exec("h1", "getent ahostsv4 h0 | awk '{print $1; exit}'")?;
    let opened = worker.ask(&format!("open {address}"));
    let numbers = opened.strip_prefix("0 ").context(opened.clone())?;
    let entangled = worker.ask("entangle");
    let (other, ends) = entangled.split_once(' ').context(entangled.clone())?;
    let child = worker.ask("child");
    let pid = worker.pid();
    let woken = || {
        let count = format!("grep ctxt_switches /proc/{pid}/status");
        scene.hosts.exec("h1", &count)
    };
    wait_for("it to wait for its next command", LIMIT, || {
        let state = format!("grep -q '^State:.S' /proc/{pid}/status");
        Ok(scene.hosts.exec("h1", &state).ok())
    })?;
    let before = woken()?;
    let said = migrate(scene, v, "h0").unwrap_err().to_string();
    for why in [
        "it is a namespace",
        "it is a pidfd of process",
        "of its TCP connection",
        "it is the terminal of session",
        "descriptor in flight (uts:[",
        &format!("has children (process {other})"),
        "mistctl dump --tree --kill --away",
        "was not moved, and runs on",
    ] {
        ensure!(said.contains(why), "no '{why}' in: {said}");
    }
    let after = woken()?;
    ensure!(before == after, "it was stopped: {before}, then {after}");
    // It can, when that is gone.
    ensure!(worker.ask(&format!("close {numbers} {ends}")) == "ok");
    scene.hosts.exec("h1", &format!("kill -9 {other}"))?;
    ensure!(worker.ask("reap") == other);
    scene.hosts.exec("h1", &format!("kill -9 {child}"))?;
    let said = migrate(scene, v, "h0").unwrap_err().to_string();
    ensure!(
        said.contains("has children") && !said.contains("namespace"),
        "{said}"
    );
    ensure!(worker.ask("reap") == child);
    migrate(scene, v, "h0")?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// A process on its way out has no memory and no descriptors any more, and lives for whoever asks the kernel or pvmd:
/// it is not taken for somebody else's.
fn ending(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (_other, o) = scene.worker(&mut boss, "h1", "other")?;
    // Agents are there from here on.
    migrate(scene, o, "h0")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    Stage::new(scene.dir.path(), "held");
    let path = scene.path("held.in");
    let clog = Clog::new(&path)?;
    // Its connection to pvmd, which has a lower number, is closed after this one.
    let held = worker.ask(&format!("hold {}", path.display()));
    ensure!(held.parse::<u32>().is_ok(), "{held}");
    let clogged = clog.begin()?;
    scene.hosts.exec("h1", &format!("kill -9 {pid}"))?;
    wait_for("it to lose its memory", LIMIT, || {
        let bare = format!("[ -z \"$(cat /proc/{pid}/maps)\" ]");
        Ok(scene.hosts.root("h1", &bare).ok())
    })?;
    let shell = format!("{} migrate --json t{v:x} h0", scene.mistctl.path());
    let said = scene
        .hosts
        .try_verb(&["exec", "h0", "bash", "-c", &shell])?;
    drop(clogged);
    let said: serde_json::Value = serde_json::from_slice(&said.stdout)?;
    ensure!(said["failure"] == "no_such_process", "{said}");
    let why = said["error"].as_str().unwrap_or_default();
    ensure!(why.contains("has ended before it was moved"), "{why}");
    boss.leave();
    Ok(())
}

/// It is born when the gates are closed already, and the task has been looked at.
fn late_fork(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // PvmMboxWaitForInfo and PvmMboxReadAndDelete: nothing stops it there.
    worker.tell("getfork later 48");
    let log = scene.path("move");
    let command = format!(
        "{} migrate t{v:x} h0 >{} 2>&1",
        scene.mistctl.path(),
        log.display()
    );
    let mut mover = scene.hosts.command("h0", &command).spawn()?;
    wait_for("the gates to be closed", LIMIT, || closed(scene, "h1", v))?;
    boss.ask("put later now 4");
    let child = worker.answer();
    let status = wait_child(&mut mover, "the move", LIMIT)?;
    let said = fs::read_to_string(log)?;
    ensure!(status.code() == Some(4), "{status}: {said}");
    let why = format!("has got a child meanwhile (process {child})");
    ensure!(said.contains(&why) && !said.contains("--tree"), "{said}");
    scene.hosts.exec("h1", &format!("kill -9 {child}"))?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// All that was to become the task dies when it is decided that it goes, and the old incarnation stands still yet.
fn target_dies(scene: &Scene, mover_too: bool) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    ensure!(present(scene, me)? == me);
    ensure!(boss.ask("put mine text 0") == "0");
    // What they print goes to another incarnation from then on: each is waited for in vain, a second long.
    let mut children = Vec::new();
    for n in 0..8 {
        let (child, tid) = scene.worker(&mut boss, "h0", &format!("child{n}"))?;
        // PvmMboxWaitForInfo and PvmMboxReadAndDelete
        child.tell("get later 0 48");
        children.push((child, tid));
    }
    let log = scene.path("move");
    let command = format!(
        "{} migrate t{me:x} h1 >{} 2>&1",
        scene.mistctl.path(),
        log.display()
    );
    let mut mover = scene.hosts.command("h0", &command).spawn()?;
    wait_for("the decision", LIMIT, || {
        in_state(scene, "h0", me, State::Decided)
    })?;
    // In brackets, so that the shell that says it does not match.
    let kill = |host: &str, what: &str| {
        scene
            .hosts
            .root(host, &format!("pkill -KILL -f -- '{what}'"))
    };
    kill("h1", "[ ]land --agent|[/]bin/actor ")?;
    if mover_too {
        kill("h0", "[ ]mover$")?;
    }
    let status = wait_child(&mut mover, "the move", LIMIT)?;
    let said = fs::read_to_string(log)?;
    ensure!(!status.success(), "{said}");
    let why = match mover_too {
        true => "the mover has died",
        false => "was not moved, and runs on: what was to become the task ended, on h1",
    };
    ensure!(said.contains(why), "{said}");
    // It goes on, by its old tid, and once.
    ensure!(boss.ask("pstat 40fff") != "");
    wait_for("its gate to open", LIMIT, || {
        in_state(scene, "h0", me, State::Settled)
    })?;
    ensure!(present(scene, me)? == me);
    if !mover_too {
        ensure!(boss.ask("boxes mine") == format!("{me:x}"));
    }
    for _ in &children {
        ensure!(boss.ask("put later now 4") == "0");
    }
    for (child, tid) in &mut children {
        let got = child.answer();
        ensure!(got.contains("text now"), "{got}");
        ensure!(child.ask("print after") == "ok");
        let line = format!("[t{tid:x}] after");
        wait_for("what it prints", LIMIT, || {
            boss.ask("probe 1 1");
            Ok(boss.said.contains(&line).then_some(()))
        })?;
    }
    children.into_iter().for_each(|(child, _)| child.leave());
    boss.leave();
    Ok(())
}

/// A FIFO that nobody can close: whoever writes to it waits for a page meanwhile, with the FIFO's lock.
struct Clog {
    fifo: fs::File,
    page: MmapMut,
    missing: Uffd,
}

/// One that is clogged until this is dropped.
struct Clogged {
    missing: Option<Uffd>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Clog {
    fn new(path: &Path) -> Result<Clog> {
        let page = MmapMut::map_anon(4096)?;
        let missing = Uffd::ours()?;
        missing.api(0)?;
        missing.register_missing(page.as_ptr() as u64, 4096)?;
        let fifo = fs::File::options().read(true).write(true).open(path)?;
        Ok(Clog {
            fifo,
            page,
            missing,
        })
    }

    fn begin(self) -> Result<Clogged> {
        let (page, mut fifo, missing) = (self.page, self.fifo, self.missing);
        let clogged = Clogged {
            writer: Some(std::thread::spawn(move || drop(fifo.write_all(&page)))),
            missing: Some(missing),
        };
        let writes = || match &clogged.missing {
            Some(missing) => missing.event(),
            None => Ok(None),
        };
        wait_for("somebody to write", LIMIT, writes)?;
        Ok(clogged)
    }
}

impl Drop for Clogged {
    fn drop(&mut self) {
        // Without it the page is there as any other.
        self.missing = None;
        let _ = self.writer.take().map(std::thread::JoinHandle::join);
    }
}

/// pvmd takes them back with the old incarnation; nobody else gets one that is still used.
fn contexts(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let context = worker.tid("newcontext");
    for actor in [&mut boss, &mut worker] {
        actor.ask(&format!("context {context}"));
    }
    // One message reaches it here, and one waits for it there.
    for (n, host) in ["h0", "h1"].into_iter().enumerate() {
        ensure!(boss.ask(&format!("send {v:x} 5 unread{n}")) == "0");
        migrate(scene, v, host)?;
        for _ in 0..3 {
            let (other, own) = (boss.tid("newcontext"), worker.tid("newcontext"));
            ensure!(other != context && own != context, "{context:x} twice");
        }
        ensure!(boss.ask(&format!("send {v:x} 5 later{n}")) == "0");
        for text in ["unread", "later"] {
            let got = worker.ask("recv -1 5");
            ensure!(got.contains(&format!("text {text}{n}")), "{got}");
        }
    }
    worker.ask("context 0");
    ensure!(worker.ask("probe -1 5") == "no");
    worker.leave();
    boss.leave();
    Ok(())
}

fn notices(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let (_other, o) = scene.worker(&mut boss, "h0", "other")?;
    let (partner, p) = scene.worker(&mut boss, "h1", "partner")?;
    worker.ask(&format!("notify 1 77 {o:x} {p:x}"));
    worker.ask("added 78");
    boss.ask(&format!("notify 1 79 {v:x}"));
    // Of its own requests one is answered in its old place, the others in its new one.
    partner.leave();
    ensure!(worker.ask("notice 77") == format!("{p:x}"));
    migrate(scene, v, "h0")?;
    boss.ask(&format!("kill {o:x}"));
    ensure!(worker.ask("notice 77") == format!("{o:x}"));
    ensure!(boss.ask("addhost h2") == "1: 1");
    let added = worker.ask("notice 78");
    let host = added
        .split_whitespace()
        .last()
        .context("no host")?
        .to_owned();
    worker.ask(&format!("notify 2 80 {host}"));
    migrate(scene, v, "h1")?;
    let delete = format!(
        "{} exec pvm <<'END'\ndelete h2\nquit\nEND",
        scene.mistctl.path()
    );
    scene.hosts.exec("h0", &delete)?;
    let gone = worker.ask("notice 80");
    ensure!(gone == host, "{gone}, not {host}");
    // No move was an end.
    ensure!(boss.ask("nnotice 79") == "none");
    worker.leave();
    ensure!(boss.ask("notice 79") == format!("{v:x}"));
    boss.leave();
    Ok(())
}

fn collector(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    ensure!(worker.ask("print one") == "ok");
    migrate(scene, me, "h1")?;
    // It hears of it in its next call.
    worker.ask("probe 1 1");
    worker.ask("pstat 40fff");
    ensure!(worker.ask("print two") == "ok");
    let (mut late, l) = scene.worker(&mut boss, "h1", "late")?;
    ensure!(late.ask("print three") == "ok");
    late.leave();
    worker.leave();
    ensure!(boss.ask("exit") == "0");
    let mut said: Vec<&String> = boss
        .said
        .iter()
        .filter(|s| !s.contains(&format!("t{l:x}")))
        .collect();
    let of = |tid: u32, what: &str| format!("[t{tid:x}] {what}");
    let expected = ["BEGIN", "one", "two", "EOF"].map(|what| of(v, what));
    ensure!(
        said == expected.iter().collect::<Vec<_>>(),
        "{:?}",
        boss.said
    );
    said = boss
        .said
        .iter()
        .filter(|s| s.contains(&format!("t{l:x}")))
        .collect();
    let expected = ["BEGIN", "three", "EOF"].map(|what| of(l, what));
    ensure!(
        said == expected.iter().collect::<Vec<_>>(),
        "{:?}",
        boss.said
    );
    Ok(())
}

/// A child that never calls PVM again prints all the time while its collector moves: before the stop, under it, between
/// the decision and the end of the old incarnation, and afterwards.
fn printed_meanwhile(scene: &Scene) -> Result<()> {
    const LINES: usize = 6000;
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut near, _) = scene.worker(&mut boss, "h0", "near")?;
    let (mut far, _) = scene.worker(&mut boss, "h1", "far")?;
    for child in [&near, &far] {
        child.tell(&format!("count {LINES} 400"));
    }
    for host in ["h1", "h0", "h1"] {
        let said = migrate_said(scene, me, host)?;
        ensure!(!said.contains("print"), "{said}");
    }
    for child in [&mut near, &mut far] {
        ensure!(child.answer() == "ok");
    }
    near.leave();
    far.leave();
    ensure!(boss.ask("exit") == "0");
    ensure!(
        boss.said.len() == 2 * (LINES + 2),
        "{} lines",
        boss.said.len()
    );
    let mut of: std::collections::HashMap<&str, Vec<&str>> = Default::default();
    for (child, line) in boss.said.iter().filter_map(|said| said.split_once(' ')) {
        of.entry(child).or_default().push(line);
    }
    let numbers: Vec<String> = (0..LINES).map(|n| n.to_string()).collect();
    let expected = || numbers.iter().map(String::as_str);
    let expected: Vec<&str> = ["BEGIN"]
        .into_iter()
        .chain(expected())
        .chain(["EOF"])
        .collect();
    for (child, lines) in of {
        let wrong = lines
            .iter()
            .zip(&expected)
            .find(|(got, wanted)| got != wanted);
        ensure!(wrong.is_none(), "{child}: {wrong:?}");
    }
    Ok(())
}

/// It was spawned before its collector moved, and enrols when that is elsewhere.
fn late_child(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (stage, args) = Stage::new(scene.dir.path(), "late");
    let program = scene.path("bin/actor");
    boss.ask(&format!("spawnat h1 {} {args}", program.display()));
    let said = migrate_said(scene, me, "h1")?;
    ensure!(said.contains("has not called PVM yet"), "{said}");
    let mut late = stage.actor();
    let l = late.enrol();
    ensure!(late.ask("print one") == "ok");
    late.leave();
    ensure!(boss.ask("exit") == "0");
    let line = format!("[t{l:x}] one");
    ensure!(boss.said.contains(&line), "{:?}", boss.said);
    Ok(())
}

/// What mistctl says of a move.
fn migrate_said(scene: &Scene, v: u32, to: &str) -> Result<String> {
    let command = format!("{} migrate t{v:x} {to} 2>&1", scene.mistctl.path());
    scene.hosts.exec("h0", &command)
}

/// What its old host still had to send, slowly, comes before what it sends from its new one. It is stopped when its
/// pvmd has not read anything of that.
fn in_order(scene: &Scene) -> Result<()> {
    let added = "pvm <<'END'\nadd h2\nquit\nEND";
    scene
        .hosts
        .exec("h0", &format!("{} exec {added}", scene.mistctl.path()))?;
    let mut boss = scene.actor("h2", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // Agents are there from here on.
    migrate(scene, v, "h0")?;
    migrate(scene, v, "h1")?;
    let pid = worker.pid();
    slow_link(scene)?;
    // PvmMboxWaitForInfo and PvmMboxReadAndDelete: nothing stops it there.
    worker.tell(&format!("burst later 48 {me:x} 7"));
    let command = format!("{} migrate t{v:x} h0", scene.mistctl.path());
    let mut mover = scene.hosts.command("h0", &command).spawn()?;
    for host in ["h0", "h1", "h2"] {
        wait_for("the gates to be closed", LIMIT, || closed(scene, host, v))?;
    }
    let signal = |signal: &str, pid: &str| scene.hosts.exec("h1", &format!("kill -{signal} {pid}"));
    signal("STOP", &pid.to_string())?;
    // PvmMboxOverWritable: others may take it away.
    boss.ask("put later now 4");
    wait_for("the entry to reach it", LIMIT, || {
        let there = format!("ss -xpnH | awk '$3 > 0' | grep -q pid={pid},");
        Ok(scene.hosts.exec("h1", &there).ok())
    })?;
    signal("STOP", "$(pgrep -x pvmd)")?;
    signal("CONT", &pid.to_string())?;
    let stopped = format!("grep -q '^TracerPid:.[1-9]' /proc/{pid}/status");
    let held = wait_for("the mover to stop it", LIMIT, || {
        Ok(scene.hosts.exec("h1", &stopped).ok())
    });
    signal("CONT", "$(pgrep -x pvmd)")?;
    held?;
    // It goes on before all hosts know of that. (What stood in its FIFO as it moved would be there twice: here both
    // hosts have the same one.)
    wait_for("the end of the old one", LIMIT, || {
        Ok(scene.hosts.exec("h1", &format!("! kill -0 {pid}")).ok())
    })?;
    ensure!(worker.answer() == "0");
    worker.ask(&format!("send {me:x} 8 last"));
    ensure!(worker.ask("print last") == "ok");
    for text in ["burst", "last"] {
        let got = boss.ask("recv -1 -1");
        ensure!(got.contains(&format!("text {text}")), "{got}");
    }
    let moved = wait_child(&mut mover, "the move", LIMIT)?;
    ensure!(moved.success(), "{moved}");
    worker.leave();
    ensure!(boss.ask("exit") == "0");
    let lines = boss.said.iter().filter_map(|said| said.split(' ').nth(1));
    let lines: Vec<&str> = lines
        .filter(|word| !["BEGIN", "EOF"].contains(word))
        .collect();
    let numbers: Vec<String> = (0..60).map(|n| n.to_string()).collect();
    let expected: Vec<&str> = numbers.iter().map(String::as_str).chain(["last"]).collect();
    ensure!(lines == expected, "{lines:?}");
    Ok(())
}

/// What h1 sends to h2 takes its time; nothing else does.
fn slow_link(scene: &Scene) -> Result<()> {
    let script = "set -e
        to=$(getent ahostsv4 h2 | awk '{print $1; exit}')
        tc qdisc replace dev eth0 root handle 1: htb default 20
        tc class add dev eth0 parent 1: classid 1:10 htb rate 400kbit burst 8k
        tc class add dev eth0 parent 1: classid 1:20 htb rate 10gbit
        tc filter add dev eth0 parent 1: protocol ip u32 match ip dst $to/32 flowid 1:10";
    scene.hosts.root("h1", script).map(drop)
}

/// Whether a host's table says that a task is moving.
fn closed(scene: &Scene, host: &str, v: u32) -> Result<Option<()>> {
    in_state(scene, host, v, State::Moving)
}

/// Whether it says so of the task.
fn in_state(scene: &Scene, host: &str, v: u32, state: State) -> Result<Option<()>> {
    let tmp = format!("/proc/{}/root/tmp", scene.hosts.pid(host)?);
    for entry in fs::read_dir(tmp)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.contains(".mist-") || name.ends_with(".d") {
            continue;
        }
        let table = Mapped::new(
            &fs::File::options()
                .read(true)
                .write(true)
                .open(entry.path())?,
        )?;
        let is_so = table.entry(v).is_some_and(|e| e.state == state);
        return Ok(is_so.then_some(()));
    }
    Ok(None)
}
