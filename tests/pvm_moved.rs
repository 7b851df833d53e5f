//! What a task has that has moved: its place under its pvmd, what it asked of it, and its partners' messages in order.

#[path = "common/clog.rs"]
mod clog;
mod common;
#[path = "pvm_moved/ends.rs"]
mod ends;
#[path = "pvm_moved/output.rs"]
mod output;
#[path = "pvm_moved/rounds.rs"]
mod rounds;
#[path = "testhosts/scene.rs"]
mod scene;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;
#[path = "pvm_moved/woken.rs"]
mod woken;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{wait_child, wait_for};
use mistctl::pvm::shimabi::table::State;
use scene::Scene;
use stage::Actor;

const LIMIT: Duration = Duration::from_secs(60);

type Test = fn(&Scene) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 24] = [
        ("its_last_words_and_its_status_arrive", last_words),
        ("its_environment_says_where_it_is", environment),
        ("who_looks_for_it_elsewhere_is_told_where_it_is", elsewhere),
        ("agents_that_follow_others_are_hidden", hidden_agents),
        ("sizes_are_its_pvmds_or_its_own", sizes),
        ("it_has_the_siblings_it_had", siblings),
        ("its_mailbox_entries_are_its_own", mailbox),
        (
            "what_cannot_go_is_listed_and_nothing_stopped",
            ends::refused,
        ),
        ("files_it_has_open_are_to_be_the_same_there", ends::files),
        ("one_that_is_ending_has_ended", ends::ending),
        ("what_one_had_sent_that_is_ending_arrives", ends::dying),
        (
            "what_its_pvmd_does_not_read_any_more_is_not_waited_for",
            ends::dying_child,
        ),
        ("a_child_of_the_last_moment_is_told_of", ends::late_fork),
        ("its_contexts_are_its_own", contexts),
        ("what_it_asked_to_be_told_is_told", notices),
        ("hosts_that_come_on_its_way_are_told", added),
        ("what_it_collects_follows_it", output::collector),
        (
            "what_others_print_meanwhile_is_whole",
            output::printed_meanwhile,
        ),
        ("what_a_child_prints_that_moves_with_it", output::both_move),
        ("a_child_that_enrols_late_prints_to_it", output::late_child),
        (
            "what_it_said_before_comes_before_what_it_says_after",
            output::in_order,
        ),
        ("who_is_woken_is_a_task_already", woken::rebuilt),
        ("gates_are_open_until_the_last_round", rounds::open),
        (
            "a_move_that_is_not_decided_can_be_called_off",
            rounds::called_off,
        ),
    ];
    testhosts::main(tests, || Ok(()), |(), test| Scene::new(3)?.play(test))
}

/// A move that a test does something in the middle of.
struct Move {
    mover: Child,
    log: PathBuf,
}

impl Move {
    fn begin(scene: &Scene, v: u32, to: &str) -> Result<Move> {
        let log = scene.path("move");
        let command = format!(
            "{} migrate t{v:x} {to} >{} 2>&1",
            scene.mistctl.path(),
            log.display()
        );
        let mover = scene.hosts.command("h0", &command).spawn()?;
        Ok(Move { mover, log })
    }

    /// How it ended, and what it said.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        let status = wait_child(&mut self.mover, "the move", LIMIT)?;
        Ok((status, fs::read_to_string(self.log)?))
    }
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
    scene.migrate(v, "h0")?;
    let r2 = scene.present(v)?;
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

/// A dump is made on the task's host.
fn elsewhere(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    scene.migrate(v, "h0")?;
    let dump = format!("{} dump t{v:x} -o /tmp/x 2>&1; true", scene.mistctl.path());
    let said = scene.hosts.exec("h1", &dump)?;
    let expected = format!("task t{v:x} is on host h0: run mistctl there");
    ensure!(said.contains(&expected), "{said}");
    worker.leave();
    boss.leave();
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
    scene.migrate(v, "h0")?;
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

/// Whoever has killed the one before; and its parent is its parent, not the agent that its pvmd takes for that.
fn hidden_agents(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let b = boss.enrol();
    let (worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let worker_of = |said: &str| {
        let mut tasks = said.split_whitespace();
        let own = tasks.find(|task| task.starts_with(&format!("{v:x}/")));
        own.and_then(|own| own.split('/').nth(1)).map(str::to_owned)
    };
    let ps = format!("{} ps", scene.mistctl.path());
    for host in ["h0", "h1"] {
        scene.hosts.exec("h0", &ps)?;
        let agent = "ps -C mistctl -o pid=,args= | awk '$3 == \"agent\" { print $1 }'";
        scene.hosts.exec(host, &format!("kill -KILL $({agent})"))?;
    }
    scene.migrate(v, "h0")?;
    wait_for("the agents to be hidden", LIMIT, || {
        let said = boss.ask("tasks");
        Ok((!said.contains("mistctl")).then_some(()))
    })?;
    let said = boss.ask("tasks");
    ensure!(worker_of(&said) == Some(format!("{b:x}")), "{said}");
    // And the console of another host does not show them.
    let said = (scene.hosts).exec(
        "h1",
        &format!("echo ps -a | {} exec pvm", scene.mistctl.path()),
    )?;
    ensure!(!said.contains("mistctl"), "{said}");
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
    scene.migrate(v, "h0")?;
    let there = worker.ask("sizes");
    ensure!(there == here, "{there}, not {here}");
    // PvmFragSize 3000
    worker.ask("setopt 8 bb8");
    worker.ask(&format!("setsizes {mtu} 3000"));
    scene.migrate(v, "h1")?;
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
    scene.migrate(v, "h0")?;
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
        scene.migrate(v, host)?;
        for name in ["kept", name] {
            let owner = boss.ask(&format!("boxes {name}"));
            ensure!(owner == format!("{v:x}"), "{name} is {owner}'s");
            let got = boss.ask(&format!("get {name} 0 0"));
            ensure!(got.contains("text text"), "{got}");
        }
    }
    // PvmMboxMultiInstance: those of one name keep their numbers, and what they are.
    ensure!(boss.ask("put several other 2") == "0");
    ensure!(worker.ask("put several text 2") == "1");
    for host in ["h1", "h0"] {
        scene.migrate(v, host)?;
        let me = boss.enrol();
        ensure!(boss.ask("boxes several") == format!("{me:x} {v:x}"));
        let flags = boss.ask("boxflags several");
        ensure!(flags == "0/2 1/2", "{flags}");
    }
    ensure!(worker.ask("put several third 2") == "2");
    // PvmNoReset is such an entry, which says whom the console's reset is to spare.
    ensure!(worker.ask("setopt 25 1") == "0");
    ensure!(worker.ask("setopt 25 0") == "1");
    ensure!(worker.ask("setopt 25 1") == "0");
    scene.migrate(v, "h1")?;
    // Agents are spared, too, and not seen.
    let spared = boss.ask("noresets");
    ensure!(spared == format!("{v:x}"), "{spared}");
    boss.ask("reset");
    ensure!(boss.ask(&format!("pstat {v:x}")) == "0", "reset ended it");
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
        scene.migrate(v, host)?;
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
    // It is still its to give back, once.
    for expected in ["0", "-32"] {
        let freed = worker.ask(&format!("freecontext {context:x}"));
        ensure!(freed == expected, "{freed}, not {expected}");
    }
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
    for tag in 84..88 {
        worker.ask(&format!("notify 1 {tag} {o:x}"));
    }
    worker.ask("added 78");
    boss.ask(&format!("notify 1 79 {v:x}"));
    // Of its own requests one is answered in its old place, the others in its new one.
    partner.leave();
    ensure!(worker.ask("notice 77") == format!("{p:x}"));
    // PvmTaskExit with PvmNotifyCancel is answered at once, once: also before either of them moves, and behind that.
    let mut take_back = |tag: u32| -> Result<()> {
        let told = worker.ask(&format!("notify 257 {tag} {o:x}"));
        ensure!(told == "0", "{told}");
        Ok(())
    };
    take_back(84)?;
    scene.migrate(v, "h0")?;
    take_back(85)?;
    scene.migrate(o, "h1")?;
    take_back(86)?;
    for tag in 84..87 {
        ensure!(worker.ask(&format!("notice {tag}")) == format!("{o:x}"));
    }
    boss.ask(&format!("kill {o:x}"));
    for tag in [77, 87] {
        ensure!(worker.ask(&format!("notice {tag}")) == format!("{o:x}"));
    }
    for tag in 84..88 {
        ensure!(
            worker.ask(&format!("nnotice {tag}")) == "none",
            "{tag}: twice"
        );
    }
    ensure!(boss.ask("addhost h2") == "1: 1");
    let added = worker.ask("notice 78");
    let host = added
        .split_whitespace()
        .last()
        .context("no host")?
        .to_owned();
    worker.ask(&format!("notify 2 80 {host}"));
    scene.migrate(v, "h1")?;
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

/// What comes between the stop and its first call in its new place no pvmd tells it.
fn added(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let (_other, o) = scene.worker(&mut boss, "h0", "other")?;
    worker.ask("added 78");
    worker.ask("added 79 2");
    // By the same tag, but of a task.
    worker.ask(&format!("notify 1 78 {o:x}"));
    ensure!(worker.ask("nnotice 78") == "none");
    let add = |boss: &mut Actor| -> Result<String> {
        let added = boss.ask("addhost h2");
        ensure!(added == "1: 1", "{added}");
        let conf = scene.hosts.console("conf")?;
        let h2 = conf.lines().find(|line| line.contains(" h2 "));
        let tid = h2.and_then(|line| line.split_whitespace().nth(1));
        Ok(tid.context(conf.clone())?.to_owned())
    };
    let delete = |boss: &mut Actor| -> Result<()> {
        let command = format!(
            "{} exec pvm <<'END'\ndelete h2\nquit\nEND",
            scene.mistctl.path()
        );
        scene.hosts.exec("h0", &command)?;
        // Its own pvmd has nothing more to say of that.
        ensure!(!boss.ask("pstat 40fff").is_empty());
        Ok(())
    };
    // It computes.
    scene.migrate(v, "h0")?;
    let first = add(&mut boss)?;
    for tag in [78, 79] {
        let told = worker.ask(&format!("notice {tag}"));
        ensure!(told == format!("1 {first}"), "{tag}: {told}, not 1 {first}");
    }
    delete(&mut boss)?;
    let killed = boss.ask(&format!("kill {o:x}"));
    ensure!(killed == "0", "{killed}");
    ensure!(worker.ask("notice 78") == format!("{o:x}"));
    // Of what is told it twice it hears once.
    let second = add(&mut boss)?;
    scene.migrate(v, "h1")?;
    for tag in [78, 79] {
        let told = worker.ask(&format!("notice {tag}"));
        ensure!(
            told == format!("1 {second}"),
            "{tag}: {told}, not 1 {second}"
        );
    }
    // Two were wanted by 79.
    delete(&mut boss)?;
    scene.migrate(v, "h0")?;
    let third = add(&mut boss)?;
    let told = worker.ask("notice 78");
    ensure!(told == format!("1 {third}"), "{told}, not 1 {third}");
    delete(&mut boss)?;
    let fourth = add(&mut boss)?;
    let told = worker.ask("notice 78");
    ensure!(told == format!("1 {fourth}"), "{told}, not 1 {fourth}");
    for tag in [78, 79] {
        let more = worker.ask(&format!("nnotice {tag}"));
        ensure!(more == "none", "{tag}: {more}");
    }
    worker.leave();
    boss.leave();
    Ok(())
}
