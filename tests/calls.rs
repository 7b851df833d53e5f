//! Calls that were broken off more than once.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// A program in a directory of its own, which is ready.
struct Running {
    dir: tempfile::TempDir,
    child: Child,
}

impl Running {
    /// None where this cannot be tested.
    fn start(source: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: restoring ids and clocks needs root");
            return Ok(None);
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let program = common::build_c(&source, &[])?;
        let dir = tempfile::tempdir()?;
        let child = Command::new(&program)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let me = Self { dir, child };
        me.has("ready")?;
        Ok(Some(me))
    }

    fn has(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        common::wait_for(name, LIMIT, || Ok(path.exists().then_some(())))
    }

    /// It sleeps in this call.
    fn sleeps_in(&self, nr: i64) -> Result<()> {
        let path = format!("/proc/{}/syscall", self.child.id());
        common::wait_for("the call", LIMIT, || {
            let text = std::fs::read_to_string(&path)?;
            Ok(text.starts_with(&format!("{nr} ")).then_some(()))
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, mut command: Command, what: &str) -> Result<()> {
        command.stdin(Stdio::null());
        let done = common::run(command, self.dir.path(), what, LIMIT)?;
        ensure!(done.status.success(), "{what}: {}", common::both(&done));
        Ok(())
    }

    fn dump(&mut self, image: &str, kill: bool) -> Result<()> {
        let mut dump = common::mistctl();
        dump.args(["dump", &self.child.id().to_string(), "-o"])
            .arg(self.path(image));
        if kill {
            dump.arg("--kill");
        }
        self.run(dump, "dump")?;
        if kill {
            self.child.wait()?;
        }
        Ok(())
    }

    fn result(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.path("result"))?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_call_restored_in_another_time_namespace_is_not_ended_early_by_the_next_dump() -> Result<()> {
    let Some(mut p) = Running::start("tests/calls/recv.c")? else {
        return Ok(());
    };
    p.sleeps_in(libc::SYS_recvfrom)?;
    p.dump("first", true)?;
    let mut restore = Command::new("unshare");
    restore.args(["--time", "--monotonic", "-10"]);
    restore.args([env!("CARGO_BIN_EXE_mistctl"), "restore", "-d"]);
    restore.arg(p.path("first"));
    p.run(restore, "restore with another clock")?;
    // Still under its old id.
    let mut dump = common::mistctl();
    dump.args(["dump", "--kill", &p.child.id().to_string(), "-o"])
        .arg(p.path("second"));
    p.run(dump, "second dump")?;
    let mut restore = common::mistctl();
    restore.arg("restore").arg(p.path("second"));
    p.run(restore, "second restore")?;
    let text = p.result()?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [n, timed_out, took] = words[..] else {
        anyhow::bail!("three words, got {text:?}")
    };
    ensure!((n, timed_out) == ("-1", "1"), "{text}");
    let took: f64 = took.parse().context("a time")?;
    ensure!(took >= 1.5, "it ended after {took} s");
    Ok(())
}

#[test]
fn a_signal_handler_above_a_broken_call_returns_to_it_when_restored() -> Result<()> {
    let Some(mut p) = Running::start("tests/calls/handler.c")? else {
        return Ok(());
    };
    p.sleeps_in(libc::SYS_epoll_wait)?;
    p.dump("first", false)?;
    let pid = nix::unistd::Pid::from_raw(p.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1)?;
    p.has("handling")?;
    p.dump("second", true)?;
    // Twice: what was put back is carried as well.
    let mut restore = common::mistctl();
    restore.args(["restore", "-d"]).arg(p.path("second"));
    p.run(restore, "restore")?;
    let mut dump = common::mistctl();
    dump.args(["dump", "--kill", &p.child.id().to_string(), "-o"])
        .arg(p.path("third"));
    p.run(dump, "third dump")?;
    std::fs::write(p.path("go"), "")?;
    let mut restore = common::mistctl();
    restore.arg("restore").arg(p.path("third"));
    p.run(restore, "second restore")?;
    ensure!(p.result()? == "EINTR\n", "{}", p.result()?);
    Ok(())
}
