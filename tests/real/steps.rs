//! One test: a program, started, saved in one of the ways while it works, and compared with an
//! undisturbed run.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};

use crate::common::{self, describe, ending, mistctl, processes, run, tail, wait_for};
use crate::{Case, LIMIT, Mode, redis, terminal, word};

/// How often a program is dumped while it goes on; more, to look for what happens rarely.
pub fn go_on_dumps() -> u32 {
    let wanted = std::env::var("MIST_TEST_DUMPS").ok();
    wanted.and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// One program, one way of saving it.
pub struct Test {
    case: &'static Case,
    pub mode: Mode,
    /// Everything of this test; the program runs in `run` below it.
    dir: PathBuf,
    cwd: PathBuf,
    /// The program while it is a child of ours.
    program: Option<Child>,
    pid: u32,
    /// Dumps made so far; they give the images their names.
    dumps: usize,
}

impl Test {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// From the arguments that `attempt` in the crate's root gave it.
    pub fn from_args(cases: &'static [Case], modes: &[Mode]) -> Result<Self> {
        let mut args = std::env::args().skip(1);
        let mut next = || args.next().context("too few arguments");
        let (name, mode, dir) = (next()?, next()?, PathBuf::from(next()?));
        let mode = modes.iter().find(|m| m.name() == mode);
        let case = cases.iter().find(|c| c.name == name);
        Ok(Self {
            case: case.context("no such case")?,
            mode: *mode.context("no such mode")?,
            cwd: dir.join("run"),
            dir,
            program: None,
            pid: 0,
            dumps: 0,
        })
    }

    pub fn carry_out(&mut self) -> Result<()> {
        self.private_tmp()?;
        let outcome = match self.case.name {
            redis::NAME => redis::carry_out(self),
            terminal::NAME => terminal::carry_out(self),
            _ => self.steps(),
        };
        outcome.map_err(|e| {
            let mut story = format!("{e:#}\n");
            for name in ["log", "restore.err"] {
                let text = tail(&self.dir.join(name), 4000);
                if !text.is_empty() {
                    story += &format!("{name}:\n{text}\n");
                }
            }
            story += &format!("progress: {} bytes\n", self.progress());
            story += &format!("processes:\n{}", describe(&processes()));
            anyhow!(story)
        })
    }

    /// Java virtual machines keep a file named after their pid there, and remove those of pids
    /// that are not in their namespace.
    fn private_tmp(&self) -> Result<()> {
        let (shared, own) = (Path::new("/tmp/hsperfdata_root"), self.dir.join("hsperf"));
        fs::create_dir(&own)?;
        fs::create_dir_all(shared)?;
        let none: Option<&str> = None;
        mount(Some(&own), shared, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("cannot mount {}", shared.display()))
    }

    fn steps(&mut self) -> Result<()> {
        self.start(&[])?;
        self.works()?;
        let last = match self.mode {
            Mode::GoOn => {
                for _ in 0..go_on_dumps() {
                    self.dump(false)?;
                    self.works()?;
                }
                None
            }
            Mode::Kill => {
                self.dump(true)?;
                Some(self.restore()?)
            }
            Mode::Twice => {
                self.dump(true)?;
                self.restore_detached()?;
                self.works()?;
                self.dump(true)?;
                Some(self.restore()?)
            }
            Mode::Lazy => {
                self.dump(true)?;
                let last = self.restore()?;
                self.works()?;
                self.dump(false)?;
                Some(last)
            }
        };
        self.works()?;
        fs::write(self.cwd.join("go"), "")?;
        let mut last = match last {
            Some(restore) => restore,
            None => self.program.take().context("no program")?,
        };
        let status = common::wait_child(&mut last, "the program's end", LIMIT)?;
        if !status.success() {
            bail!("the program ended with {}", ending(status));
        }
        self.compare()
    }

    /// Starts the program in its directory.
    pub fn start(&mut self, more: &[&str]) -> Result<()> {
        self.make_cwd()?;
        let log = File::create(self.dir.join("log"))?;
        let mut command = self.command(&self.cwd);
        command.args(more).stdout(log.try_clone()?).stderr(log);
        // Like a job of a shell.
        command.process_group(0);
        let child = command.spawn().context("cannot start the program")?;
        self.adopt(child);
        Ok(())
    }

    /// The directory that the program is to run in.
    pub fn make_cwd(&self) -> Result<PathBuf> {
        fs::create_dir(&self.cwd)?;
        Ok(self.cwd.clone())
    }

    /// Takes a child as the program.
    pub fn adopt(&mut self, child: Child) {
        self.pid = child.id();
        self.follow(child);
    }

    /// Takes a child that ends when the program does.
    pub fn follow(&mut self, child: Child) {
        self.program = Some(child);
    }

    pub fn command(&self, cwd: &Path) -> Command {
        let mut words = self.case.command.iter().map(|w| word(w));
        let mut command = Command::new(words.next().unwrap_or_default());
        command
            .args(words)
            .current_dir(cwd)
            .stdin(Stdio::null())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .envs(self.case.env.iter().copied());
        command
    }

    fn progress(&self) -> u64 {
        let made = fs::metadata(self.cwd.join("progress"));
        made.map(|m| m.len()).unwrap_or_default()
    }

    /// Waits until the program has made some steps more.
    fn works(&mut self) -> Result<()> {
        let before = self.progress();
        let child = &mut self.program;
        let file = self.cwd.join("progress");
        wait_for("steps of the program", LIMIT, || {
            if let Some(child) = child
                && let Some(status) = child.try_wait()?
            {
                bail!("the program ended with {} in the middle", ending(status));
            }
            let now = fs::metadata(&file).map(|m| m.len()).unwrap_or_default();
            Ok((now > before + 20).then_some(()))
        })
    }

    fn image(&self) -> PathBuf {
        self.dir.join(format!("image{}", self.dumps))
    }

    pub fn dump(&mut self, and_kill: bool) -> Result<()> {
        self.dumps += 1;
        let mut command = mistctl();
        command.arg("dump").arg(self.pid.to_string());
        command.arg("-o").arg(self.image()).args(self.case.flags);
        if and_kill {
            command.arg("--kill");
        }
        if !and_kill && self.dumps > 1 {
            // Not wanted any more.
            let _ = fs::remove_dir_all(self.dir.join(format!("image{}", self.dumps - 1)));
        }
        let what = format!("mistctl dump (no. {})", self.dumps);
        let output = run(command, &self.dir, "dump", LIMIT).with_context(|| what.clone())?;
        if !output.status.success() {
            let said = common::both(&output);
            bail!("{what} ended with {}: {said}", ending(output.status));
        }
        if !and_kill {
            return Ok(());
        }
        if let Some(mut child) = self.program.take() {
            common::wait_child(&mut child, "the program's end after dump --kill", LIMIT)?;
        }
        // Their pids have to be free again; the keeper of TCP connections stays.
        let me = std::process::id();
        wait_for("the end of all processes after dump --kill", LIMIT, || {
            let keeper = |p: &u32| {
                fs::read_to_string(format!("/proc/{p}/comm"))
                    .is_ok_and(|comm| comm.trim_end() == "mist-keeper")
            };
            let left = processes().into_iter().filter(|&p| p != 1 && p != me);
            Ok((left.filter(|p| !keeper(p)).count() == 0).then_some(()))
        })
    }

    pub fn restoring(&self) -> Command {
        let mut command = mistctl();
        command.arg("restore").arg(self.image());
        if self.mode == Mode::Lazy {
            command.arg("--lazy");
        }
        command
    }

    pub fn restore_detached(&mut self) -> Result<()> {
        let mut command = self.restoring();
        command.arg("--detach");
        let output = run(command, &self.dir, "restore-detached", LIMIT)?;
        let said = common::both(&output);
        if !output.status.success() {
            bail!(
                "mistctl restore ended with {}: {said}",
                ending(output.status)
            );
        }
        let pid = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if pid != self.pid.to_string() {
            bail!("restored as pid {pid}, wanted {}: {said}", self.pid);
        }
        Ok(())
    }

    /// Starts a restore in the foreground, which ends as the program does.
    pub fn restore(&self) -> Result<Child> {
        self.restoring()
            .stdout(File::create(self.dir.join("restore.out"))?)
            .stderr(File::create(self.dir.join("restore.err"))?)
            .spawn()
            .context("cannot start mistctl restore")
    }

    /// Ends well, or the child with it.
    pub fn ended(&mut self, restore: Option<Child>) -> Result<()> {
        let child = restore.or_else(|| self.program.take());
        let status = common::wait_child(
            &mut child.context("no program")?,
            "the program's end",
            LIMIT,
        )?;
        if !status.success() {
            bail!("the program ended with {}", ending(status));
        }
        Ok(())
    }

    /// An undisturbed run of as many steps has to have the same result.
    fn compare(&self) -> Result<()> {
        let count = fs::read_to_string(self.cwd.join("count")).context("no count")?;
        let cwd = self.dir.join("undisturbed");
        fs::create_dir(&cwd)?;
        let mut command = self.command(&cwd);
        command.env("STEPS", count.trim());
        let output = run(command, &self.dir, "undisturbed", 2 * LIMIT)?;
        if !output.status.success() {
            let said = common::both(&output);
            bail!(
                "the undisturbed run ended with {}: {said}",
                ending(output.status)
            );
        }
        let (got, wanted) = (self.result(&self.cwd)?, self.result(&cwd)?);
        if got != wanted {
            bail!("after {} steps, wanted {wanted}, got {got}", count.trim());
        }
        println!("{} steps", count.trim());
        Ok(())
    }

    /// What a run came to.
    fn result(&self, cwd: &Path) -> Result<String> {
        if !self.case.database {
            return fs::read_to_string(cwd.join("out")).context("no result");
        }
        let query = |sql: &str| -> Result<String> {
            let output = Command::new("/usr/bin/sqlite3")
                .args(["-batch", "db", sql])
                .current_dir(cwd)
                .stdin(Stdio::null())
                .output()?;
            let said = common::both(&output);
            if !output.status.success() {
                bail!(
                    "sqlite3 db '{sql}' ended with {}: {said}",
                    ending(output.status)
                );
            }
            Ok(said)
        };
        let sound = query("pragma integrity_check")?;
        if sound != "ok" {
            bail!("the database is damaged: {sound}");
        }
        query(
            "select count(*), sum(id), sum(k), sum(length(v)) from t; \
             select id, k, v from t order by id",
        )
    }
}
