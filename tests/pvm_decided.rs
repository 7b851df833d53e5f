//! It is decided that a task goes, and what it was to become ends, or the host that it was to be on: the old incarnation
//! stands still yet, and goes on.

mod common;
#[path = "testhosts/scene.rs"]
mod scene;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use common::{wait_child, wait_for};
use mistctl::pvm::shimabi::table::State;
use scene::Scene;
use stage::Actor;

const LIMIT: Duration = Duration::from_secs(60);

/// The part of a tid that is its host's.
const HOST: u32 = 0x3ffc_0000;

/// What ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    /// What was to become the task.
    Task,
    /// That, and the mover.
    TaskAndMover,
    /// The host is deleted.
    Host,
    /// It is, and the mover dies.
    HostAndMover,
    /// The host's pvmd is killed. Who asks after its tasks waits until others declare it dead.
    Pvmd,
    /// The agent of the host that the task leaves. The mover does what is decided.
    Agent,
}

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 9] = [
        ("a_target_that_dies_leaves_the_task", || goes_on(Ends::Task)),
        ("it_does_so_when_the_mover_dies_too", || {
            goes_on(Ends::TaskAndMover)
        }),
        ("so_does_a_host_that_leaves", || goes_on(Ends::Host)),
        ("and_when_the_mover_dies_too", || {
            goes_on(Ends::HostAndMover)
        }),
        ("so_does_a_host_without_a_pvmd", || goes_on(Ends::Pvmd)),
        ("without_the_agent_it_is_said_where_the_task_is", || {
            goes_on(Ends::Agent)
        }),
        ("hosts_that_lose_each_other_do_not_both_have_it", || {
            Scene::new(3)?.play(|scene| lost(scene, Lost::Both))
        }),
        ("it_is_too_late_to_call_it_off", || {
            Scene::new(2)?.play(too_late)
        }),
        ("a_task_whose_own_pvmd_is_killed_goes_on_elsewhere", || {
            Scene::new(3)?.play(|scene| lost(scene, Lost::Source))
        }),
    ];
    testhosts::main(tests, || Ok(()), |(), test| test())
}

fn goes_on(ends: Ends) -> Result<()> {
    Scene::new(2)?.play(|scene| left_behind(scene, ends))
}

/// Tasks whose output goes to `boss`. When that moves, it goes to another incarnation behind the decision, and each of
/// them is waited for in vain, a second long.
fn children(scene: &Scene, boss: &mut Actor, host: &str) -> Result<Vec<(Actor, u32)>> {
    let mut children = Vec::new();
    for n in 0..5 {
        let (child, tid) = scene.worker(boss, host, &format!("child{n}"))?;
        // PvmMboxWaitForInfo and PvmMboxReadAndDelete
        child.tell("get later 0 48");
        children.push((child, tid));
    }
    Ok(children)
}

/// Who is taken for dead.
#[derive(Clone, Copy, PartialEq)]
enum Lost {
    /// Source and target, by each other. Neither has left the virtual machine: its master has both, and knows who lives.
    Both,
    /// The source, whose pvmd is killed.
    Source,
}

fn lost(scene: &Scene, lost: Lost) -> Result<()> {
    scene.hosts.console("add h2")?;
    let mut boss = scene.actor("h1", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    ensure!(scene.present(me)? == me);
    let children = children(scene, &mut boss, "h1")?;
    let (mut one, mut two) = (scene.actor("h1", "one")?, scene.actor("h2", "two")?);
    let mut master = scene.actor("h0", "master")?;
    let (h1, h2) = (one.enrol() & HOST, two.enrol() & HOST);
    let (mistctl, log) = (scene.mistctl.path(), scene.path("move"));
    let command = format!("{mistctl} migrate t{me:x} h2 >{} 2>&1", log.display());
    let mut migrate = scene.hosts.command("h0", &command).spawn()?;
    wait_for("the decision", LIMIT, || {
        scene.is_in(State::Decided, "h1", me)
    })?;
    // What their pvmds would find out in three minutes.
    match lost {
        Lost::Both => {
            ensure!(two.ask(&format!("fail {h1:x}")) == "1");
            ensure!(one.ask(&format!("fail {h2:x}")) == "1");
        }
        Lost::Source => {
            scene.hosts.root("h1", "pkill -KILL -x pvmd")?;
            ensure!(master.ask(&format!("fail {h1:x}")) == "1");
        }
    }
    // Stopped, traced and zombies do not run.
    let runs = |host: &str| -> Result<(usize, usize)> {
        let states =
            "for pid in $(pgrep -f 'bin/[a]ctor .*/boss.in'); do ps -o stat= -p $pid; done; true";
        let states = scene.hosts.root(host, states)?;
        let (stand, run): (Vec<&str>, Vec<&str>) =
            states.lines().partition(|s| s.starts_with(['T', 't', 'Z']));
        Ok((run.len(), stand.len()))
    };
    let there = wait_for("one of the two to go on", LIMIT, || {
        // One that is being killed runs to its end, and only then the other begins.
        let there = runs("h2")?;
        let here = runs("h1")?;
        ensure!(here.0 == 0 || there.0 == 0, "both go on");
        Ok((here.0 + there.0 == 1 && here.1 + there.1 == 0).then_some(there.0 == 1))
    })?;
    ensure!(there, "it was decided that it goes");
    wait_child(&mut migrate, "the move", LIMIT)?;
    ensure!(boss.ask("getenv HOME").starts_with('/'));
    drop(children);
    Ok(())
}

/// Who wants that is told so, and how it ends.
fn too_late(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    ensure!(scene.present(me)? == me);
    let children = children(scene, &mut boss, "h0")?;
    let (mistctl, log) = (scene.mistctl.path(), scene.path("move"));
    let command = format!("{mistctl} migrate t{me:x} h1 >{} 2>&1", log.display());
    let mut migrate = scene.hosts.command("h0", &command).spawn()?;
    wait_for("the decision", LIMIT, || {
        scene.is_in(State::Decided, "h0", me)
    })?;
    let end = "pkill -TERM -xf '[^ ]*/mistctl migrate t.*'";
    scene.hosts.root("h0", end)?;
    let status = wait_child(&mut migrate, "the move", LIMIT)?;
    let said = fs::read_to_string(log)?;
    ensure!(status.success(), "{said}");
    ensure!(said.contains("cannot be called off any more"), "{said}");
    ensure!(scene.present(me)? & HOST == 0x80000);
    ensure!(boss.enrol() == me);
    drop(children);
    Ok(())
}

fn left_behind(scene: &Scene, ends: Ends) -> Result<()> {
    let mover_too = matches!(ends, Ends::TaskAndMover | Ends::HostAndMover);
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    ensure!(scene.present(me)? == me);
    ensure!(boss.ask("put mine text 0") == "0");
    let mut children = children(scene, &mut boss, "h0")?;
    let mut other = scene.actor("h0", "other")?;
    let log = scene.path("move");
    let mistctl = scene.mistctl.path();
    let command = format!("{mistctl} migrate t{me:x} h1 >{} 2>&1", log.display());
    let mut migrate = scene.hosts.command("h0", &command).spawn()?;
    wait_for("the decision", LIMIT, || {
        scene.is_in(State::Decided, "h0", me)
    })?;
    // In brackets, so that the shell that says it does not match.
    let kill = |host: &str, what: &str| {
        let kill = format!("pkill -KILL {what}");
        scene.hosts.root(host, &kill).map(drop)
    };
    match ends {
        Ends::Task | Ends::TaskAndMover => kill("h1", "-f -- '[ ]land --agent|[/]bin/actor '")?,
        Ends::Host | Ends::HostAndMover => scene.hosts.console("delete h1").map(drop)?,
        Ends::Pvmd => kill("h1", "-x pvmd")?,
        Ends::Agent => kill("h0", "-f -- '[/]mistctl agent$'")?,
    }
    if mover_too {
        kill("h0", "-f -- '[ ]mover$'")?;
    }
    if ends == Ends::Pvmd {
        // Nothing that it was to become is left on a host that nobody hears of any more.
        wait_for("it to end there", LIMIT, || {
            let none = "! pgrep -f -- '[ ]land --agent|[/]bin/actor '";
            Ok(scene.hosts.root("h1", none).ok())
        })?;
        ensure!(migrate.try_wait()?.is_none());
        ensure!(scene.is_in(State::Decided, "h0", me)?.is_some());
        // What h0's pvmd would find out in three minutes.
        let failed = other.ask("fail 80000");
        ensure!(failed == "1", "{failed}");
    }
    let status = wait_child(&mut migrate, "the move", LIMIT)?;
    let said = fs::read_to_string(log)?;
    ensure!(!status.success(), "{said}");
    let why = match ends {
        Ends::Task => "was not moved, and runs on: what was to become the task ended, on h1",
        Ends::TaskAndMover | Ends::HostAndMover => "the mover has died",
        Ends::Agent => "the task runs on h1",
        Ends::Host | Ends::Pvmd => "was not moved, and runs on: h1 has left the virtual machine",
    };
    ensure!(said.contains(why), "{said}");
    if ends == Ends::Agent {
        ensure!(scene.present(me)? & HOST == 0x80000);
        ensure!(boss.enrol() == me);
        return Ok(());
    }
    // It goes on, by its old tid, and once.
    ensure!(boss.ask("pstat 40fff") != "");
    wait_for("its gate to open", LIMIT, || {
        scene.is_in(State::Settled, "h0", me)
    })?;
    ensure!(scene.present(me)? == me);
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
    other.leave();
    children.into_iter().for_each(|(child, _)| child.leave());
    boss.leave();
    Ok(())
}
