//! A virtual machine of mistctl's on test hosts, with tasks that do what they are told.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use mistctl::pvm::shimabi::table::{Mapped, State};

use crate::common;
use crate::stage::{Actor, Stage};
use crate::testhosts::{Hosts, Installed};

/// Hosts, a virtual machine of two of them, and what its tasks are.
pub struct Scene {
    pub hosts: Hosts,
    pub mistctl: Installed,
    /// Seen by all hosts: images, FIFOs, and `bin/actor`.
    pub dir: tempfile::TempDir,
}

impl Scene {
    /// With so many hosts; h0 and h1 make the virtual machine.
    pub fn new(count: usize) -> Result<Scene> {
        let hosts = Hosts::up(count)?;
        let mistctl = Installed::new()?;
        let dir = tempfile::tempdir_in("/var/tmp")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
        for name in ["bin", "links"] {
            fs::create_dir(dir.path().join(name))?;
        }
        // The same file on all hosts, so that who has it open can move.
        let log = dir.path().join("boss.log");
        fs::write(&log, "")?;
        fs::set_permissions(log, fs::Permissions::from_mode(0o666))?;
        for name in ["actor", "family"] {
            let source = format!("{}/tests/shim/{name}.c", env!("CARGO_MANIFEST_DIR"));
            let libraries = ["-lgpvm3", "-lpvm3", "-lpthread"].map(String::from);
            let built = common::build_c(Path::new(&source), &libraries)?;
            fs::copy(built, dir.path().join("bin").join(name))?;
        }
        symlink(mistctl.path(), dir.path().join("links/actor"))?;
        let scene = Scene {
            hosts,
            mistctl,
            dir,
        };
        scene.start()?;
        Ok(scene)
    }

    /// Starts the virtual machine.
    pub fn start(&self) -> Result<()> {
        let start = format!(
            "printf 'h0\\nh1\\n' >/tmp/hosts; {} pvm start /tmp/hosts",
            self.mistctl.path()
        );
        self.hosts.exec("h0", &start).map(drop)
    }

    /// Of something in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A task that is started by hand on a host.
    pub fn actor(&self, host: &str, name: &str) -> Result<Actor> {
        let (stage, args) = Stage::new(self.dir.path(), name);
        let shim = self
            .mistctl
            .path()
            .replace("bin/mistctl", "lib/libmistshim.so");
        let program = self.path("bin/actor");
        self.hosts.exec(
            host,
            &format!(
                "LD_PRELOAD={shim} setsid {} {args} </dev/null >>{} 2>&1 &",
                program.display(),
                self.path("boss.log").display()
            ),
        )?;
        let mut actor = stage.actor();
        actor.enrol();
        Ok(actor)
    }

    /// A task that `boss` spawns: the task, and its tid.
    pub fn worker(&self, boss: &mut Actor, host: &str, name: &str) -> Result<(Actor, u32)> {
        let (stage, args) = Stage::new(self.dir.path(), name);
        let program = self.path("bin/actor");
        let tid = spawned(&boss.ask(&format!("spawnat {host} {} {args}", program.display())))?;
        let mut worker = stage.actor();
        ensure!(worker.enrol() == tid);
        Ok((worker, tid))
    }

    /// Saves a task of a host.
    pub fn dump(&self, host: &str, pid: i32, name: &str, more: &str) -> Result<PathBuf> {
        let image = self.path(name);
        self.hosts.exec(
            host,
            &format!(
                "{} dump {more} {pid} -o {}",
                self.mistctl.path(),
                image.display()
            ),
        )?;
        Ok(image)
    }

    /// Has `boss` start the lander; its real tid, or what `boss` takes it for.
    pub fn land(&self, boss: &mut Actor, host: &str, image: &Path, more: &str) -> Result<u32> {
        let link = self.path("links/actor");
        spawned(&boss.ask(&format!(
            "spawnat {host} {} land --image {} {more}",
            link.display(),
            image.display()
        )))
    }

    /// Moves a task, as somebody at h0 does.
    pub fn migrate(&self, v: u32, to: &str) -> Result<()> {
        let command = format!("{} migrate t{v:x} {to}", self.mistctl.path());
        self.hosts.exec("h0", &command).map(drop)
    }

    /// The incarnation that a task has now.
    pub fn present(&self, v: u32) -> Result<u32> {
        let ps = format!("{} ps --json", self.mistctl.path());
        let said = self.hosts.exec("h0", &ps)?;
        let listing: serde_json::Value = serde_json::from_str(&said)?;
        let tasks = listing["tasks"].as_array().context("no tasks")?;
        let of = |task: &&serde_json::Value| task["virtual_tid"] == format!("t{v:x}");
        let tid = tasks.iter().find(of).and_then(|task| task["tid"].as_str());
        let tid = tid
            .and_then(|tid| tid.strip_prefix('t'))
            .context(said.clone())?;
        Ok(u32::from_str_radix(tid, 16)?)
    }

    /// The pid that this machine has for a host's.
    pub fn pid_outside(&self, host: &str, pid: i32) -> Result<i32> {
        let root = self.hosts.pid(host)?;
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

    /// Whether a host's table says that a task is moving.
    pub fn is_moving(&self, host: &str, v: u32) -> Result<Option<()>> {
        self.is_in(State::Moving, host, v)
    }

    /// What it says of the task.
    pub fn is_in(&self, state: State, host: &str, v: u32) -> Result<Option<()>> {
        let tmp = format!("/proc/{}/root/tmp", self.hosts.pid(host)?);
        for entry in fs::read_dir(tmp)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.contains(".mist-") || name.ends_with(".d") {
                continue;
            }
            let file = fs::File::options()
                .read(true)
                .write(true)
                .open(entry.path())?;
            let is_so = Mapped::new(&file)?
                .entry(v)
                .is_some_and(|e| e.state == state);
            return Ok(is_so.then_some(()));
        }
        Ok(None)
    }

    /// Runs a test; when it fails, what the hosts have to say is in the error.
    pub fn play(&self, test: impl Fn(&Scene) -> Result<()>) -> Result<()> {
        let run = std::panic::AssertUnwindSafe(|| test(self));
        match std::panic::catch_unwind(run) {
            Ok(done) => done.with_context(|| self.log()),
            Err(panic) => {
                eprintln!("{}", self.log());
                std::panic::resume_unwind(panic);
            }
        }
    }

    fn log(&self) -> String {
        ["h0", "h1"]
            .map(|host| {
                let said = self.hosts.exec(host, "cat /tmp/pvml.*; ps -ef");
                format!("{host}: {}", said.unwrap_or_default())
            })
            .join("\n")
            + &fs::read_to_string(self.path("boss.log")).unwrap_or_default()
    }
}

/// What the actor says of a spawn: `1: TID`.
pub fn spawned(answer: &str) -> Result<u32> {
    let tid = answer
        .strip_prefix("1: ")
        .with_context(|| format!("spawn: {answer}"))?;
    Ok(u32::from_str_radix(tid.trim(), 16)?)
}
