//! A virtual machine of several hosts that `mistctl pvm start` makes: every task on every host gets the shim, hosts
//! come and go, and PVM's console sees one task where there is one.

mod common;
#[path = "testhosts/scene.rs"]
mod scene;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;

use std::fs::File;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::wait_for;
use mistctl::pvm::shimabi::table::Mapped;
use scene::Scene;
use serde_json::Value;
use stage::Actor;
use testhosts::{Hosts, Installed};

const LIMIT: Duration = Duration::from_secs(30);

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 6] = [
        ("every_task_on_every_host_gets_the_shim", every_host),
        ("hosts_come_and_go_and_tasks_move_between_them", || {
            Scene::new(3)?.play(come_and_go)
        }),
        (
            "every_host_knows_a_new_incarnation_before_the_old_one_ends",
            || Scene::new(3)?.play(known_before),
        ),
        ("nothing_is_begun_without_a_host_that_is_silent", || {
            Scene::new(3)?.play(silent)
        }),
        ("the_console_sees_one_task_where_there_is_one", || {
            Scene::new(2)?.play(console)
        }),
        ("where_there_is_no_room_for_a_byte_that_is_said", || {
            Scene::new(2)?.play(no_room)
        }),
    ];
    testhosts::main(tests, || Ok(()), |(), test| test())
}

/// The pvmd cannot show whose it is then, and is not somebody else's for that.
fn no_room(scene: &Scene) -> Result<()> {
    // What fits behind this is the file's name.
    let fill = "mount -o remount,size=$(($(df --output=used /tmp | tail -n 1) + 8))k /tmp
        ! head -c 1M /dev/zero >/tmp/fill";
    scene.hosts.root("h0", fill)?;
    let ps = format!("! {} ps 2>&1", scene.mistctl.path());
    let said = scene.hosts.exec("h0", &ps)?;
    ensure!(said.contains("No space left on device"), "{said}");
    Ok(())
}

fn every_host() -> Result<()> {
    let installed = Installed::new()?;
    let mistctl = installed.path();
    let hosts = Hosts::up(4)?;
    // h1 as it is, h2 with a pvmd of its own choice, h3 is added later; and one that cannot be.
    let hostfile = "h0\\nh1\\nh2 dx=/usr/bin/pvmd\\nh9\\n";
    let started = hosts.exec(
        "h0",
        &format!(
            "printf '{hostfile}' >/tmp/hosts; {mistctl} pvm start --json /tmp/hosts; test $? = 1"
        ),
    )?;
    let started: Value = serde_json::from_str(&started)?;
    ensure!(
        started["hosts"].as_array().map(Vec::len) == Some(3),
        "{started}"
    );
    ensure!(started["failed"][0]["host"] == "h9", "{started}");
    let said = hosts.console("add h3\nspawn -4 /bin/sleep 1000")?;
    ensure!(said.contains("4 successful"), "{said}");
    for host in ["h0", "h1", "h2", "h3"] {
        wait_for(&format!("the shim on {host}"), LIMIT, || {
            let mapped = "grep -q libmistshim.so /proc/$(pgrep -x sleep -P $(pgrep -x pvmd))/maps";
            Ok(hosts.exec(host, mapped).ok())
        })?;
    }
    let listing = hosts.exec("h0", &format!("{mistctl} ps --json"))?;
    let listing: Value = serde_json::from_str(&listing)?;
    let tasks = listing["tasks"].as_array().context("no tasks")?;
    ensure!(tasks.len() == 4, "{listing}");
    for task in tasks {
        ensure!(task["shim"].is_string(), "{task}");
        ensure!(task["memory"].is_u64(), "{task}");
        ensure!(task["pid"].is_i64(), "{task}");
    }
    // Asked on another host, it is the same.
    let said = hosts.exec("h2", &format!("{mistctl} ps"))?;
    let lines = said.lines().filter(|line| line.contains(" yes "));
    ensure!(lines.count() == 4, "{said}");
    // From any host the whole of it ends.
    // (Only the user's processes: the hosts' own init sleeps too.)
    hosts.exec("h1", &format!("{mistctl} pvm stop"))?;
    for host in ["h0", "h1", "h2", "h3"] {
        wait_for(&format!("the end of PVM on {host}"), LIMIT, || {
            Ok(hosts.exec(host, "! pgrep -u $(id -u) -x 'pvmd|sleep'").ok())
        })?;
    }
    let left = hosts.exec("h1", "ls /tmp")?;
    ensure!(!left.contains(".mist-"), "{left}");
    Ok(())
}

fn migrate(scene: &Scene, v: u32, to: &str) -> Result<()> {
    let command = format!("{} migrate t{v:x} {to}", scene.mistctl.path());
    scene.hosts.exec("h0", &command).map(drop)
}

/// Both find each other by the tids they have always known.
fn talk(one: &mut Actor, other: &mut Actor) -> Result<()> {
    say(one, other)?;
    say(other, one)
}

fn say(from: &mut Actor, to: &mut Actor) -> Result<()> {
    let (me, you) = (from.enrol(), to.enrol());
    ensure!(from.ask(&format!("send {you:x} 5 hello")) == "0");
    let got = to.ask(&format!("recv {me:x} 5"));
    ensure!(
        got.contains(&format!("from {me:x}")) && got.contains("text hello"),
        "{got}"
    );
    Ok(())
}

/// What PVM's console, under the shim, says to some lines.
fn says(scene: &Scene, lines: &str) -> Result<String> {
    let command = format!(
        "{} exec pvm <<'END'\n{lines}\nquit\nEND",
        scene.mistctl.path()
    );
    scene.hosts.exec("h0", &command)
}

/// Processes of a host's agent.
const AGENT: &str = "pgrep -u $(id -u) -f 'mistctl agent$'";

fn come_and_go(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    migrate(scene, v, "h0")?;
    talk(&mut boss, &mut worker)?;
    // A program adds a host, and the task that has moved starts another there, before the host's agent is there.
    scene.hosts.exec("h0", &format!("kill -STOP $({AGENT})"))?;
    ensure!(boss.ask("addhost h2") == "1: 1");
    let (stage, args) = stage::Stage::new(scene.dir.path(), "kid");
    let actor = scene.path("bin/actor");
    let kid = scene::spawned(&worker.ask(&format!("spawnat h2 {} {args}", actor.display())))?;
    let mut there = stage.actor();
    there.tell("parent");
    wait_for("the task on the new host to enrol", LIMIT, || {
        let state = "ps -o pid= -C actor | xargs -I{} grep -l libmistshim.so /proc/{}/maps";
        Ok(scene.hosts.exec("h2", state).ok())
    })?;
    scene.hosts.exec("h0", &format!("kill -CONT $({AGENT})"))?;
    let parent = there.answer();
    ensure!(parent == format!("{v:x}"), "{parent}");
    ensure!(there.enrol() == kid);
    talk(&mut there, &mut worker)?;
    // There and back, and the other way round.
    migrate(scene, v, "h2")?;
    migrate(scene, kid, "h1")?;
    talk(&mut there, &mut worker)?;
    talk(&mut boss, &mut worker)?;
    // The host that the task was born on goes; and a task with it.
    boss.ask(&format!("notify 1 77 {kid:x}"));
    says(scene, "delete h1")?;
    ensure!(boss.ask("notice 77") == format!("{kid:x}"));
    talk(&mut boss, &mut worker)?;
    wait_for("the host to be gone", LIMIT, || {
        Ok((!says(scene, "conf")?.contains(" h1 ")).then_some(()))
    })?;
    migrate(scene, v, "h0")?;
    talk(&mut boss, &mut worker)?;
    // It comes back, as another one.
    let said = says(scene, "add h1")?;
    ensure!(said.contains("1 successful"), "{said}");
    let (mut second, _) = scene.worker(&mut worker, "h1", "second")?;
    ensure!(second.ask("parent") == format!("{v:x}"));
    migrate(scene, v, "h1")?;
    talk(&mut second, &mut worker)?;
    talk(&mut boss, &mut worker)?;
    // One that is cut off keeps nobody from seeing what is on the others.
    for other in ["h0", "h1"] {
        scene.hosts.verb(&["cut", "h2", other])?;
    }
    let command = format!("timeout 25 {} ps --json", scene.mistctl.path());
    let listing = scene.hosts.exec("h0", &command);
    for other in ["h0", "h1"] {
        scene.hosts.verb(&["join", "h2", other])?;
    }
    let listing: Value = serde_json::from_str(&listing?)?;
    ensure!(listing["silent"] == serde_json::json!(["h2"]), "{listing}");
    let tasks = listing["tasks"].as_array().context("no tasks")?;
    ensure!(
        tasks
            .iter()
            .any(|task| task["virtual_tid"] == format!("t{v:x}").as_str()),
        "{listing}"
    );
    ensure!(tasks.len() == 3, "{listing}");
    for actor in [second, worker, boss] {
        actor.leave();
    }
    Ok(())
}

/// PVM waits for such a host for minutes before it gives it up. It is said who is waited for, and not for long.
fn silent(scene: &Scene) -> Result<()> {
    scene.hosts.console("add h2")?;
    let mut boss = scene.actor("h0", "boss")?;
    let (mut saved, _) = scene.worker(&mut boss, "h1", "saved")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    migrate(scene, v, "h0")?;
    let image = scene.dump("h1", saved.pid(), "image", "--kill")?;
    let mistctl = scene.mistctl.path();
    // What a command says that is to be tried again.
    let busy = |command: &str| -> Result<String> {
        let command = format!("{mistctl} {command} 2>&1; test $? = 4");
        scene.hosts.exec("h0", &command)
    };
    for other in ["h0", "h1"] {
        scene.hosts.verb(&["cut", "h2", other])?;
    }
    let moved = busy(&format!("migrate t{v:x} h1"));
    let restored = busy(&format!("restore {}", image.display()));
    for other in ["h0", "h1"] {
        scene.hosts.verb(&["join", "h2", other])?;
    }
    for said in [moved?, restored?] {
        let in_vain = "h2 has not answered within 30 s";
        ensure!(
            said.contains("waiting for h2, which does not answer"),
            "{said}"
        );
        ensure!(said.contains(in_vain), "{said}");
    }
    talk(&mut boss, &mut worker)?;
    migrate(scene, v, "h1")?;
    // An agent that says nothing is called by its host, too.
    scene.hosts.exec("h1", &format!("kill -STOP $({AGENT})"))?;
    let said = busy(&format!("migrate t{v:x} h0"))?;
    scene.hosts.exec("h1", &format!("kill -CONT $({AGENT})"))?;
    ensure!(said.contains("mistctl's agent on h1 (t8"), "{said}");
    ensure!(said.contains("try again"), "{said}");
    migrate(scene, v, "h0")?;
    scene
        .hosts
        .exec("h0", &format!("{mistctl} restore {}", image.display()))?;
    talk(&mut boss, &mut worker)?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// The tid table of a host.
fn table(scene: &Scene, host: &str) -> Result<Mapped> {
    let found = scene
        .hosts
        .exec(host, "ls -d /tmp/*.mist-* | grep -v '\\.d$'")?;
    let root = format!("/proc/{}/root", scene.hosts.pid(host)?);
    let file = File::options()
        .read(true)
        .write(true)
        .open(format!("{root}{}", found.trim()))?;
    Mapped::new(&file).context("the table")
}

/// On a host that the move only passes by: while the gate is closed, whom it may open for is known. From the moment that
/// the task goes on its messages come from there, and who has looked at one as a stranger's does not look again.
fn known_before(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    ensure!(boss.ask("addhost h2") == "1: 1");
    // Its agent is there, too.
    scene
        .hosts
        .exec("h2", &format!("{} ps", scene.mistctl.path()))?;
    let table = table(scene, "h2")?;
    let seen = std::thread::scope(|scope| {
        let moving = scope.spawn(|| migrate(scene, v, "h0"));
        let mut seen = None;
        while seen.is_none() && !moving.is_finished() {
            let closed = table.entry(v).filter(|entry| entry.state.is_closed());
            seen = closed.map(|entry| (entry.next, table.v_of(entry.next)));
            std::thread::sleep(Duration::from_micros(100));
        }
        moving.join().unwrap_or_else(|_| bail!("panicked"))?;
        seen.context("the gate was not seen closed")
    })?;
    ensure!(seen.0 != 0 && seen.1 == Some(v), "{seen:x?}");
    talk(&mut boss, &mut worker)?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// Tids and names in a list of the console's.
fn listed(list: &str) -> Result<Vec<(u32, String)>> {
    let rows = list.lines().map(str::split_whitespace);
    rows.map(|mut words| {
        let tid = words.nth(1).context("no tid")?;
        let tid = u32::from_str_radix(tid, 16).with_context(|| list.to_owned())?;
        Ok((tid, words.next_back().unwrap_or_default().to_owned()))
    })
    .collect()
}

fn console(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let (idle, i) = scene.worker(&mut boss, "h0", "idle")?;
    let program = scene.path("bin/actor").display().to_string();
    // Agents are there from here on.
    migrate(scene, v, "h0")?;
    migrate(scene, me, "h1")?;
    // It lists the tasks again and again while two move.
    let mistctl = scene.mistctl.path();
    let shim = mistctl.replace("bin/mistctl", "lib/libmistshim.so");
    let script = format!(
        "cd $(mktemp -d); mkfifo in
        LD_PRELOAD={shim} stdbuf -oL pvm <in >out 2>&1 & exec 3>in
        ask() {{ echo \"$1\" >&3; asked=$((asked + 1)); until [ $(grep -c \"$2\" out) -ge $asked ]; do sleep 0.01; done; }}
        {{ {mistctl} migrate t{v:x} h1 && {mistctl} migrate t{me:x} h0; echo code $? >done; }} >moved 2>&1 &
        until [ -e done ]; do ask 'ps -a' COMMAND; done
        ask 'ps -a' COMMAND
        echo quit >&3; wait; cat done moved; cat out"
    );
    let said = scene.hosts.exec("h0", &script)?;
    ensure!(said.starts_with("code 0"), "{said}");
    let expected = vec![
        (me, "-".to_owned()),
        (v, program.clone()),
        (i, program.clone()),
    ];
    let mut lists = 0;
    for list in said.split("COMMAND").skip(1) {
        let rows: Vec<&str> = list
            .lines()
            .skip(1)
            .take_while(|l| l.starts_with("      "))
            .collect();
        let mut tasks = listed(&rows.join("\n"))?;
        tasks.sort();
        let mut expected = expected.clone();
        expected.sort();
        ensure!(
            tasks == expected,
            "{tasks:x?}, not {expected:x?}, in {said}"
        );
        lists += 1;
    }
    ensure!(lists >= 2, "{said}");
    // What it does to the tid that it shows reaches the task.
    let pid = worker.pid();
    says(scene, &format!("sig 19 t{v:x}"))?;
    wait_for("the task to stop", LIMIT, || {
        Ok(scene
            .hosts
            .exec("h1", &format!("ps -o stat= -p {pid} | grep T"))
            .ok())
    })?;
    says(scene, &format!("sig 18 t{v:x}"))?;
    ensure!(worker.enrol() == v);
    let status = says(scene, &format!("pstat t{v:x}"))?;
    ensure!(
        status.contains("Ok") || !status.contains("No such task"),
        "{status}"
    );
    boss.ask(&format!("notify 1 77 {v:x}"));
    says(scene, &format!("kill t{v:x}"))?;
    ensure!(boss.ask("notice 77") == format!("{v:x}"));
    // A reset ends all of them but mist's agents, which go on.
    let before = scene.hosts.exec("h1", AGENT)?;
    let conf = says(scene, "reset\nconf")?;
    ensure!(conf.contains("2 hosts"), "{conf}");
    let tasks = wait_for("the end of the others", LIMIT, || {
        let said = says(scene, "ps -a")?;
        Ok((!said.contains("actor") && !said.contains(" - ")).then_some(said))
    })?;
    ensure!(!tasks.contains("mistctl"), "{tasks}");
    ensure!(
        scene.hosts.exec("h1", AGENT)? == before,
        "the agent is another one"
    );
    let mut next = scene.actor("h0", "next")?;
    let (mut fresh, f) = scene.worker(&mut next, "h0", "fresh")?;
    migrate(scene, f, "h1")?;
    talk(&mut next, &mut fresh)?;
    drop((boss, worker, idle));
    fresh.leave();
    next.leave();
    if scene.hosts.exec("h1", AGENT)? != before {
        bail!("the agent is another one");
    }
    Ok(())
}
