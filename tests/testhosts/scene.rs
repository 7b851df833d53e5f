//! A virtual machine of mistctl's on test hosts, with tasks that do what they are told.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

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

    /// Runs a test; when it fails, what the hosts have to say is in the error.
    pub fn play(&self, test: fn(&Scene) -> Result<()>) -> Result<()> {
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
