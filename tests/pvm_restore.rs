//! PVM tasks that come back from images: real pvmds, real tasks, on hosts of their own.

mod common;
#[path = "shim/mod.rs"]
mod stage;
mod testhosts;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::wait_for;
use libtest_mimic::{Arguments, Completion, Trial};
use mistctl::pvm::block::TaskBlock;
use stage::{Actor, Stage};
use testhosts::{Hosts, Installed};

const LIMIT: Duration = Duration::from_secs(30);

type Test = fn(&Scene) -> Result<()>;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let tests: [(&str, Test); 1] = [("a_task_comes_back_and_its_partners_go_on", comes_back)];
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            Trial::ignorable_test(name, move || {
                if let Some(why) = testhosts::cannot_run() {
                    println!("SKIPPED: {why}");
                    return Ok(Completion::ignored_with(why));
                }
                let scene = Scene::new().map_err(|e| format!("{e:#}"))?;
                let run = std::panic::AssertUnwindSafe(|| test(&scene));
                match std::panic::catch_unwind(run) {
                    Ok(done) => done.map_err(|e| format!("{e:#}\n{}", scene.log()))?,
                    Err(panic) => {
                        eprintln!("{}", scene.log());
                        std::panic::resume_unwind(panic);
                    }
                }
                Ok(Completion::Completed)
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// A virtual machine of two hosts, and what its tasks are.
struct Scene {
    hosts: Hosts,
    mistctl: Installed,
    /// Seen by all hosts: images, FIFOs, and `bin/actor`.
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Scene> {
        let hosts = Hosts::up(2)?;
        let mistctl = Installed::new()?;
        let dir = tempfile::tempdir_in("/var/tmp")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
        for name in ["bin", "links"] {
            fs::create_dir(dir.path().join(name))?;
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/actor.c");
        let built = common::build_c(&source, &["-lgpvm3".into(), "-lpvm3".into()])?;
        fs::copy(built, dir.path().join("bin/actor"))?;
        symlink(mistctl.path(), dir.path().join("links/actor"))?;
        let scene = Scene {
            hosts,
            mistctl,
            dir,
        };
        let start = format!(
            "printf 'h0\\nh1\\n' >/tmp/hosts; {} pvm start /tmp/hosts",
            scene.mistctl.path()
        );
        scene.hosts.exec("h0", &start)?;
        Ok(scene)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A task that is started by hand on a host.
    fn actor(&self, host: &str, name: &str) -> Result<Actor> {
        let (stage, args) = Stage::new(self.dir.path(), name);
        let shim = self
            .mistctl
            .path()
            .replace("bin/mistctl", "lib/libmistshim.so");
        let program = self.path("bin/actor");
        self.hosts.exec(
            host,
            &format!(
                "LD_PRELOAD={shim} setsid {} {args} </dev/null >>/tmp/boss.log 2>&1 &",
                program.display()
            ),
        )?;
        let mut actor = stage.actor();
        actor.enrol();
        Ok(actor)
    }

    /// A task that `boss` spawns: the task, and its tid.
    fn worker(&self, boss: &mut Actor, host: &str, name: &str) -> Result<(Actor, u32)> {
        let (stage, args) = Stage::new(self.dir.path(), name);
        let program = self.path("bin/actor");
        let tid = spawned(&boss.ask(&format!("spawnat {host} {} {args}", program.display())))?;
        let mut worker = stage.actor();
        ensure!(worker.enrol() == tid);
        Ok((worker, tid))
    }

    /// Saves a task of a host and ends it.
    fn capture(&self, host: &str, pid: i32, name: &str) -> Result<PathBuf> {
        let image = self.path(name);
        self.hosts.exec(
            host,
            &format!(
                "{} dump --kill {pid} -o {}",
                self.mistctl.path(),
                image.display()
            ),
        )?;
        Ok(image)
    }

    /// Has `boss` start the lander; its real tid, or what `boss` takes it for.
    fn land(&self, boss: &mut Actor, host: &str, image: &Path, more: &str) -> Result<u32> {
        let link = self.path("links/actor");
        spawned(&boss.ask(&format!(
            "spawnat {host} {} land --image {} {more}",
            link.display(),
            image.display()
        )))
    }

    fn log(&self) -> String {
        ["h0", "h1"]
            .map(|host| {
                let said = self
                    .hosts
                    .exec(host, "cat /tmp/pvml.* /tmp/boss.log 2>&1; ps -ef");
                format!("{host}: {}", said.unwrap_or_default())
            })
            .join("\n")
    }
}

/// What the actor says of a spawn: `1: TID`.
fn spawned(answer: &str) -> Result<u32> {
    let tid = answer
        .strip_prefix("1: ")
        .with_context(|| format!("spawn: {answer}"))?;
    Ok(u32::from_str_radix(tid.trim(), 16)?)
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
    let block = TaskBlock::find(inside(scene, host, pid)?)?.context("no block")?;
    stage::until_waits(&block, mistctl::pvm::shimabi::block::wait::RECEIVE);
    boss.ask(&format!("send {v:x} 8 early"));
    let image = scene.capture(host, pid, "image")?;
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

/// The pid that this machine has for a host's.
fn inside(scene: &Scene, host: &str, pid: i32) -> Result<i32> {
    let root = scene.hosts.pid(host)?;
    let ns = fs::read_link(format!("/proc/{root}/ns/pid"))?;
    for p in common::processes() {
        let same = fs::read_link(format!("/proc/{p}/ns/pid")).is_ok_and(|other| other == ns);
        let nspid = common::status_field(p, "NSpid").unwrap_or_default();
        if same && nspid.split_whitespace().next_back() == Some(&pid.to_string()) {
            return Ok(p as i32);
        }
    }
    bail!("{host} has no process {pid}")
}
