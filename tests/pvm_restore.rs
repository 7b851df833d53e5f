//! PVM tasks that come back from images: real pvmds, real tasks, on hosts of their own.

#[path = "pvm_restore/anew.rs"]
mod anew;
#[path = "pvm_restore/away.rs"]
mod away;
mod common;
#[path = "pvm_restore/deaths.rs"]
mod deaths;
#[path = "pvm_restore/parking.rs"]
mod parking;
#[path = "testhosts/scene.rs"]
mod scene;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;

use std::fs;
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::wait_for;
use mistctl::pvm::block::TaskBlock;
use mistctl::pvm::land::protocol::{self, Commit, Order, Source, ToAgent, ToLander};
use mistctl::pvm::shimabi::table::{Entry, Mapped, State, lease_clock};
use nix::libc;
use parking::Case;
use scene::{Scene, spawned};
use serde_json::Value;
use stage::{Actor, Stage};

const LIMIT: Duration = Duration::from_secs(30);
/// Where tasks are that one host is enough for.
const HOST: &str = "h1";

type Test = fn(&Scene) -> Result<()>;

fn main() -> ExitCode {
    let tests: &[(&str, Test)] = &[
        ("a_task_comes_back_and_its_partners_go_on", comes_back),
        ("a_task_comes_back_on_another_host", on_another_host),
        ("a_task_comes_back_into_a_new_virtual_machine", anew::tids),
        (
            "nobody_gets_a_context_that_a_restored_task_knows",
            anew::contexts,
        ),
        (
            "nobody_on_a_host_that_is_added_gets_the_name_of_a_restored_task",
            anew::added_host,
        ),
        ("a_task_comes_back_within_a_message_handler", in_a_handler),
        ("a_task_that_lives_is_not_restored", living),
        ("megabytes_that_were_not_read_move_along", much_unread),
        ("a_task_that_waits_for_info_asks_again", waits_for_info),
        ("a_task_goes_on_seeing_its_clocks", own_clocks),
        ("a_family_comes_back_eagerly", |scene| family(scene, "")),
        ("a_family_comes_back_lazily", |scene| {
            family(scene, "--lazy")
        }),
        ("last_words_of_restored_tasks_arrive", last_words),
        (
            "killed_at_any_moment_a_lander_leaves_nothing_or_a_task",
            deaths::killed_landers,
        ),
        (
            "partners_of_a_task_that_is_away_wait_for_it",
            away::with_agents,
        ),
        (
            "so_they_do_when_agents_end_while_it_is_saved",
            away::without_agents,
        ),
        (
            "what_is_sent_is_not_lost_when_an_agent_ends_while_gates_open",
            deaths::agent_of_the_target,
        ),
        (
            "all_gates_open_though_who_restores_it_has_ended",
            deaths::restore_that_is_done,
        ),
        (
            "a_restore_that_is_killed_leaves_the_task_away",
            deaths::restore_that_has_begun,
        ),
        (
            "a_task_that_is_killed_on_its_way_is_still_away",
            deaths::lander,
        ),
        (
            "what_others_print_goes_to_a_collector_that_came_back",
            collects,
        ),
        (
            "a_move_runs_when_the_old_one_has_ended",
            parking::runs_when_ended,
        ),
        (
            "a_parked_task_that_is_sent_a_sigcont_waits_and_runs",
            parking::continued,
        ),
        (
            "a_move_that_was_decided_runs_when_nobody_says_so",
            parking::runs_when_it_finds_out,
        ),
        (
            "a_move_that_was_not_decided_ends_with_the_old_one",
            parking::ended_by_itself,
        ),
        (
            "a_lease_that_ends_beside_a_living_task_ends_the_new_one",
            parking::lease_ends,
        ),
        (
            "a_move_that_is_called_off_leaves_nothing",
            parking::called_off,
        ),
        (
            "an_agent_that_dies_before_the_decision_has_decided_nothing",
            |scene| parking::agent_dies(scene, State::Moving),
        ),
        (
            "an_agent_that_dies_after_the_decision_has_decided",
            |scene| parking::agent_dies(scene, State::Decided),
        ),
        (
            "a_tracer_killed_while_parked_does_not_keep_a_committed_task",
            |scene| parking::tracer_dies_committed(scene, &Case::default()),
        ),
        (
            "a_tracer_killed_while_others_write_does_not_keep_a_committed_task",
            // What stands in the connection differs from what stood there when the keeper was born.
            |scene| {
                let case = Case {
                    writes: 5000,
                    ..Case::default()
                };
                parking::tracer_dies_committed(scene, &case)
            },
        ),
        (
            "a_tracer_killed_while_parked_leaves_nothing_uncommitted",
            parking::tracer_dies_uncommitted,
        ),
        (
            "a_committed_task_whose_tracer_and_keeper_are_killed_runs",
            |scene| parking::both_die(scene, State::Decided),
        ),
        (
            "a_parked_task_whose_tracer_and_keeper_are_killed_ends_with_its_move",
            |scene| parking::both_die(scene, State::Moving),
        ),
        (
            "a_tracer_killed_before_it_fills_memory_leaves_that_to_another",
            |scene| parking::tracer_dies_committed(scene, &parking::LAZY),
        ),
        (
            "a_task_whose_memory_is_filled_survives_who_fills_it",
            |scene| parking::one_dies_while_it_fills(scene, |p| p.tracer()),
        ),
        (
            "a_task_whose_memory_is_filled_survives_who_stands_by",
            |scene| parking::one_dies_while_it_fills(scene, |p| p.understudy()),
        ),
        (
            "a_task_that_nobody_can_fill_any_more_ends",
            parking::both_die_before_they_fill,
        ),
    ];
    testhosts::main(tests.iter().copied(), || Ok(()), |(), test| on_scene(test))
}

fn on_scene(test: Test) -> Result<()> {
    Scene::new(2)?.play(test)
}

fn comes_back(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h1", "boss")?;
    boss.ask("catchout");
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let host = "h1";
    let pid = worker.pid();
    ensure!(worker.ask("print one") == "ok");
    // It is saved while it waits for a message; another one stands unread.
    worker.tell("recv -1 7");
    until_receives(scene, host, pid)?;
    boss.ask(&format!("send {v:x} 8 early"));
    let image = scene.dump(host, pid, "image", "--kill")?;
    wait_for("the end of the old one", LIMIT, || {
        Ok((boss.ask(&format!("pstat {v:x}")) == "-31").then_some(()))
    })?;
    // Whoever starts the lander is not who collects.
    let mut agent = scene.actor(host, "agent")?;
    let r2 = scene.land(&mut agent, host, &image, "")?;
    wait_for("the task", LIMIT, || {
        Ok((boss.ask(&format!("pstat {v:x}")) == "0").then_some(()))
    })?;
    boss.ask(&format!("send {v:x} 7 hello"));
    ensure!(worker.answer().contains("text hello"));
    ensure!(worker.ask("recv -1 8").contains("text early"));
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    ensure!(worker.pid() != pid && worker.ask("signals_itself") == "0");
    ensure!(worker.ask("print two") == "ok");
    let me = boss.enrol();
    worker.ask(&format!("send {me:x} 9 back"));
    let said = boss.ask("recv -1 9");
    ensure!(said.contains(&format!("from {v:x}")), "{said}");
    // The process that pvmd forked, and no other, is the task; nothing else is left of the landing.
    let landed = worker.pid();
    let parent = scene
        .hosts
        .exec(host, &format!("ps -o comm= -p $(ps -o ppid= -p {landed})"))?;
    ensure!(parent == "pvmd", "{parent}");
    let children = scene
        .hosts
        .exec(host, &format!("pgrep -P {landed}; pgrep mistctl; true"))?;
    ensure!(children.is_empty(), "{children}");
    // It can leave, and come again as a task of its own.
    ensure!(worker.ask("exit") == "0");
    let again = worker.tid("mytid");
    ensure!(again != v && again != r2, "t{again:x}");
    worker.leave();
    agent.leave();
    ensure!(boss.ask("exit") == "0");
    let of = |what: &str| format!("[t{v:x}] {what}");
    let expected = ["BEGIN", "one", "EOF", "BEGIN", "two", "EOF"].map(of);
    ensure!(boss.said == expected, "{:?}", boss.said);
    Ok(())
}

/// `mistctl restore` of a task: what it says.
fn restore(scene: &Scene, host: &str, image: &Path, more: &str) -> Result<Value> {
    let command = format!(
        "{} restore --json {more} {}",
        scene.mistctl.path(),
        image.display()
    );
    Ok(serde_json::from_str(&scene.hosts.exec(host, &command)?)?)
}

/// Until a task of a host waits in pvm_recv.
fn until_receives(scene: &Scene, host: &str, pid: i32) -> Result<()> {
    let block = TaskBlock::find(scene.pid_outside(host, pid)?)?.context("no block")?;
    stage::until_waits(&block, mistctl::pvm::shimabi::block::wait::RECEIVE);
    Ok(())
}

/// Its pvmd forgot with it that it waits for an entry of the mailbox.
fn waits_for_info(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    let block = TaskBlock::find(scene.pid_outside("h1", pid)?)?.context("no block")?;
    // PvmMboxWaitForInfo
    worker.tell("get later 0 32");
    stage::until("the task to wait for its pvmd", || {
        block.asking().unwrap() == 1
    });
    let image = scene.dump("h1", pid, "image", "--kill")?;
    restore(scene, "h0", &image, "")?;
    ensure!(boss.ask("put later text 0") == "0");
    let answer = worker.answer();
    ensure!(answer.contains("text text"), "{answer}");
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    worker.leave();
    boss.leave();
    Ok(())
}

/// Nobody else tells a child that does not call PVM, and its pvmd, where its collector is.
fn collects(scene: &Scene) -> Result<()> {
    for how in ["--kill --away", "--kill"] {
        let name = |who: &str| format!("{who}{}", how.len());
        let mut boss = scene.actor("h0", &name("boss"))?;
        boss.ask("catchout");
        let (mut worker, v) = scene.worker(&mut boss, "h1", &name("worker"))?;
        ensure!(worker.ask("print one") == "ok");
        let one = format!("[t{v:x}] one");
        wait_for("what it prints", LIMIT, || {
            boss.ask("probe 1 1");
            Ok(boss.said.contains(&one).then_some(()))
        })?;
        let image = scene.dump("h0", boss.pid(), &name("image"), how)?;
        restore(scene, "h1", &image, "--host h1")?;
        ensure!(worker.ask("print two") == "ok");
        worker.leave();
        ensure!(boss.ask("exit") == "0");
        let expected = ["BEGIN", "one", "two", "EOF"].map(|what| format!("[t{v:x}] {what}"));
        ensure!(boss.said == expected, "{how}: {:?}", boss.said);
    }
    Ok(())
}

fn on_another_host(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    ensure!(worker.ask("print one") == "ok");
    ensure!(worker.ask("put name value 0") == "0");
    // It wants to hear of two others. One of them ends while it is away.
    let mut others = [scene.actor("h0", "first")?, scene.actor("h0", "last")?];
    let tids = others.each_mut().map(Actor::enrol);
    // PvmMboxPersistent, once with PvmMboxOverWritable: these stay, without an owner.
    for (name, flags) in [("kept", 1), ("open", 5)] {
        ensure!(worker.ask(&format!("put {name} value {flags}")) == "0");
    }
    ensure!(others[0].ask("put foreign value 1") == "0");
    worker.ask(&format!("notify 1 66 {:x} {:x}", tids[0], tids[1]));
    worker.tell("recv -1 7");
    until_receives(scene, "h1", pid)?;
    boss.ask(&format!("send {v:x} 8 early"));
    boss.ask(&format!("notify 1 77 {v:x}"));
    let image = scene.dump("h1", pid, "image", "--kill")?;
    ensure!(boss.ask("notice 77") == format!("{v:x}"));
    let [first, last] = others;
    first.leave();
    let said = restore(scene, "h1", &image, "--host h0")?;
    ensure!(
        said["host"] == "h0" && said["virtual_tid"] == format!("t{v:x}"),
        "{said}"
    );
    ensure!(
        said["warnings"].as_array().is_some_and(Vec::is_empty),
        "{said}"
    );
    boss.ask(&format!("send {v:x} 7 hello"));
    ensure!(worker.answer().contains("text hello"));
    ensure!(worker.ask("recv -1 8").contains("text early"));
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    ensure!(worker.ask("print two") == "ok");
    let me = boss.enrol();
    ensure!(worker.ask("parent") == format!("{me:x}"));
    ensure!(worker.ask("notice 66") == format!("{:x}", tids[0]));
    ensure!(worker.ask("nnotice 66") == "none");
    last.leave();
    ensure!(worker.ask("notice 66") == format!("{:x}", tids[1]));
    for name in ["name", "kept", "open"] {
        let owner = boss.ask(&format!("boxes {name}"));
        ensure!(owner == format!("{v:x}"), "the entry '{name}' is {owner}'s");
    }
    ensure!(worker.ask("put kept again 1") == "0");
    ensure!(boss.ask("get kept 0 0").contains("text again"));
    ensure!(boss.ask("boxes foreign") == "0");
    worker.ask(&format!("send {me:x} 9 back"));
    let back = boss.ask("recv -1 9");
    ensure!(back.contains(&format!("from {v:x}")), "{back}");
    // What its environment says is true.
    let landed = worker.pid();
    ensure!(worker.ask("getenv PVMEPID") == landed.to_string());
    let sock = scene.hosts.exec("h0", "cat /tmp/pvmd.$(id -u)")?;
    ensure!(worker.ask("getenv PVMSOCK") == sock);
    // It is killed by its name, and its end is told.
    boss.ask(&format!("notify 1 78 {v:x}"));
    boss.ask(&format!("kill {v:x}"));
    ensure!(boss.ask("notice 78") == format!("{v:x}"));
    ensure!(boss.ask("exit") == "0");
    let of = |what: &str| format!("[t{v:x}] {what}");
    let expected = ["BEGIN", "one", "EOF", "BEGIN", "two", "EOF"].map(of);
    ensure!(boss.said == expected, "{:?}", boss.said);
    Ok(())
}

fn in_a_handler(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    let block = TaskBlock::find(scene.pid_outside("h1", pid)?)?.context("no block")?;
    ensure!(worker.ask("works 4") == "1");
    worker.tell("recv -1 5");
    until_receives(scene, "h1", pid)?;
    boss.ask(&format!("send {v:x} 4 work"));
    stage::until("the handler to run", || block.callbacks().unwrap() == 1);
    boss.ask(&format!("send {v:x} 5 early"));
    let image = scene.dump("h1", pid, "image", "--kill")?;
    restore(scene, "h1", &image, "--host h0")?;
    // The handler ends, and the call that it was in goes on.
    worker.tell("on");
    let answer = worker.answer();
    let early = format!("[worked] from {me:x} tag 5 text early info {me:x}");
    ensure!(answer == early, "{answer}");
    ensure!(worker.ask("raw") == format!("{v:x}"));
    worker.ask(&format!("send {me:x} 6 back"));
    ensure!(boss.ask("recv -1 6").contains(&format!("from {v:x} ")));
    worker.leave();
    boss.leave();
    Ok(())
}

fn living(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    let image = scene.dump("h1", pid, "image", "")?;
    let refused = restore(scene, "h0", &image, "").unwrap_err().to_string();
    ensure!(
        refused.contains(&format!("a task t{v:x} is running")),
        "{refused}"
    );
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    let missing = restore(scene, "h0", &image, "--host h7")
        .unwrap_err()
        .to_string();
    ensure!(missing.contains("there is no host h7"), "{missing}");
    let nowhere = restore(scene, "h0", &image.join("none"), "--host h1")
        .unwrap_err()
        .to_string();
    ensure!(nowhere.contains("No such file"), "{nowhere}");
    let shown = format!("{} show {}", scene.mistctl.path(), image.display());
    let shown = scene.hosts.exec("h1", &shown)?;
    ensure!(shown.contains(&format!("\nPVM task t{v:x}\n")), "{shown}");
    worker.leave();
    boss.leave();
    Ok(())
}

fn much_unread(scene: &Scene) -> Result<()> {
    const COUNT: usize = 40;
    let mut boss = scene.actor("h1", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    worker.ask("pid");
    // More than a socket's buffer.
    for _ in 0..COUNT {
        boss.ask(&format!("big {v:x} 8 100000"));
    }
    // Well before any lease ends.
    let migrate = format!("timeout 20 {} migrate t{v:x} h0", scene.mistctl.path());
    scene.hosts.exec("h1", &migrate)?;
    boss.ask(&format!("send {v:x} 8 last"));
    for n in 0..COUNT {
        let got = worker.ask("recv -1 8");
        ensure!(got.contains("text big"), "message {n}: {got}");
    }
    let got = worker.ask("recv -1 8");
    ensure!(got.contains("text last"), "{got}");
    worker.leave();
    boss.leave();
    Ok(())
}

/// A task of another boot, or of a time namespace, whose clocks are far from this host's.
fn own_clocks(scene: &Scene) -> Result<()> {
    let (stage, args) = Stage::new(scene.dir.path(), "worker");
    let shim = scene
        .mistctl
        .path()
        .replace("bin/mistctl", "lib/libmistshim.so");
    scene.hosts.root(
        HOST,
        &format!(
            "cd /; setsid unshare --time --monotonic 1000000 --boottime 1000000 --fork \
             setpriv --reuid mist --regid mist --init-groups \
             env LD_PRELOAD={shim} {} {args} </dev/null >/dev/null 2>&1 &",
            scene.path("bin/actor").display()
        ),
    )?;
    let mut worker = stage.actor();
    let v = worker.enrol();
    let pid = worker.pid();
    let before: i64 = worker.ask("clock").parse()?;
    let image = scene.dump(HOST, pid, "image", "--kill")?;
    let said = restore(scene, HOST, &image, "")?;
    ensure!(said["virtual_tid"] == format!("t{v:x}"), "{said}");
    ensure!(
        said["warnings"].as_array().is_some_and(Vec::is_empty),
        "{said}"
    );
    let after: i64 = worker.ask("clock").parse()?;
    // The host's own is a million seconds behind.
    ensure!(
        (before..before + 1000).contains(&after),
        "{before}, then {after}"
    );
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    worker.leave();
    Ok(())
}

/// A task with memory, a thread and a child, on one host and then the other.
fn family(scene: &Scene, more: &str) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let program = scene.path("bin/family");
    // On real hosts ids are seldom taken.
    for (host, id) in [("h0", 20_000), ("h1", 10_000)] {
        let above = format!("echo {id} >/proc/sys/kernel/ns_last_pid");
        scene.hosts.root(host, &above)?;
    }
    let log = scene.path("log");
    let spawn = format!("spawnat h1 {} {}", program.display(), log.display());
    let v = spawned(&boss.ask(&spawn))?;
    let check = |boss: &mut Actor| -> Result<()> {
        boss.ask(&format!("send {v:x} 1 check"));
        let said = boss.ask("recv -1 2");
        ensure!(
            said.contains(&format!("from {v:x} tag 2 text ok")),
            "{said}"
        );
        Ok(())
    };
    check(&mut boss)?;
    for (from, to) in [("h1", "h0"), ("h0", "h1")] {
        let pid = scene.hosts.exec(from, "pgrep -o -x family")?;
        until_receives(scene, from, pid.parse()?)?;
        let image = scene.dump(from, pid.parse()?, &format!("{from}{to}"), "--kill --tree")?;
        // What is written behind the dump has never been.
        let mut text = fs::read_to_string(&log)?;
        text.push_str("garbage");
        fs::write(&log, text)?;
        restore(scene, "h0", &image, &format!("{more} --host {to}"))?;
        check(&mut boss)?;
        check(&mut boss)?;
    }
    boss.ask(&format!("kill {v:x}"));
    ensure!(boss.ask("exit") == "0");
    let rounds = boss.said.iter().filter(|line| line.contains("ok")).count();
    ensure!(rounds == 5, "{:?}", boss.said);
    let log = fs::read_to_string(&log)?;
    ensure!(
        log == "round 1\nround 2\nround 3\nround 4\nround 5\n",
        "{log}"
    );
    Ok(())
}

fn last_words(scene: &Scene) -> Result<()> {
    // MIST_DEATHS=100 is what it takes to be sure.
    let deaths = std::env::var("MIST_DEATHS").ok();
    let deaths: u32 = deaths.and_then(|n| n.parse().ok()).unwrap_or(12);
    let mut boss = scene.actor("h1", "boss")?;
    boss.ask("catchout");
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    let image = scene.dump("h1", pid, "image", "--kill")?;
    let of = |what: &str| format!("[t{v:x}] {what}");
    // One that has said nothing shows no beginning.
    let mut expected = Vec::new();
    for n in 0..deaths {
        restore(scene, "h1", &image, "")?;
        worker.tell(&format!("last words-{n}"));
        worker.answer();
        wait_for("its end", LIMIT, || {
            Ok((boss.ask(&format!("pstat {v:x}")) == "-31").then_some(()))
        })?;
        expected.extend([of("BEGIN"), of(&format!("words-{n}")), of("EOF")]);
    }
    ensure!(boss.ask("exit") == "0");
    ensure!(boss.said == expected, "{:?}", boss.said);
    Ok(())
}
