//! Calls that were broken off more than once.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::time::TimeSpec;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags};

const LIMIT: Duration = Duration::from_secs(60);

/// A program in a directory of its own, which is ready.
struct Running {
    dir: tempfile::TempDir,
    child: Child,
}

impl Running {
    /// None where this cannot be tested.
    fn start(source: &str) -> Result<Option<Self>> {
        Self::start_with(source, &[])
    }

    fn start_with(source: &str, args: &[&str]) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: restoring ids and clocks needs root");
            return Ok(None);
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let program = common::build_c(&source, &["-pthread".into()])?;
        let dir = tempfile::tempdir()?;
        let child = Command::new(&program)
            .args(args)
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

    /// By its id, which it has again when it was restored.
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

    fn restore(&self, image: &str, how: &[&str]) -> Result<()> {
        let mut restore = common::mistctl();
        restore.arg("restore").args(how).arg(self.path(image));
        self.run(restore, "restore")
    }

    /// What the second finds is what the first has made of the calls.
    fn dump_twice(&mut self, and_restore: bool) -> Result<()> {
        for image in ["first", "second"] {
            self.dump(image, and_restore)?;
            if and_restore {
                self.restore(image, &["-d"])?;
            }
        }
        Ok(())
    }

    /// How its only thread's call goes on, by an image.
    fn resume(&self, image: &str) -> Result<serde_json::Value> {
        let manifest = std::fs::read(self.path(image).join("manifest.json"))?;
        let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
        Ok(manifest["processes"][0]["threads"][0]["resume"].clone())
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
    p.dump("second", true)?;
    p.restore("second", &[])?;
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
    p.restore("second", &["-d"])?;
    p.dump("third", true)?;
    std::fs::write(p.path("go"), "")?;
    p.restore("third", &[])?;
    ensure!(p.result()? == "EINTR\n", "{}", p.result()?);
    Ok(())
}

#[test]
fn a_dump_made_in_another_time_namespace_does_not_make_a_call_last_longer() -> Result<()> {
    let Some(p) = Running::start("tests/calls/recv.c")? else {
        return Ok(());
    };
    p.sleeps_in(libc::SYS_recvfrom)?;
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    let uptime: f64 = uptime.split('.').next().unwrap_or_default().parse()?;
    // Clocks may not stand before zero.
    let behind = format!("-{}", (uptime as i64 - 60).clamp(1, 10_000));
    let mut dump = Command::new("unshare");
    dump.args(["--time", "--monotonic", &behind]);
    dump.args([env!("CARGO_BIN_EXE_mistctl"), "dump", "-o"]);
    dump.arg(p.path("image")).arg(p.child.id().to_string());
    p.run(dump, "dump with another clock")?;
    p.has("result")?;
    let text = p.result()?;
    ensure!(text.starts_with("-1 1 "), "{text}");
    Ok(())
}

#[test]
fn a_connect_that_goes_on_says_the_same_when_its_time_is_up() -> Result<()> {
    for (which, outcome) in [("first", "now"), ("again", "already"), ("soon", "already")] {
        for restored in [false, true] {
            let Some(mut p) = Running::start_with("tests/calls/connect.c", &[which])? else {
                return Ok(());
            };
            p.sleeps_in(libc::SYS_connect)?;
            p.dump_twice(restored)?;
            p.has("result")?;
            let text = p.result()?;
            let wanted = format!("-1 Operation {outcome} in progress");
            ensure!(text == wanted, "{which}, restored: {restored}: {text}");
        }
    }
    Ok(())
}

#[test]
fn each_of_two_calls_on_one_socket_ends_at_its_own_time() -> Result<()> {
    for restored in [true, false] {
        let Some(mut p) = Running::start("tests/calls/two.c")? else {
            return Ok(());
        };
        p.dump("image", restored)?;
        if restored {
            p.restore("image", &["-d"])?;
        }
        p.has("result")?;
        ensure!(p.result()? == "-1 1", "{}", p.result()?);
        let pid = p.child.id() as i32;
        let wakers = || -> Result<Option<()>> {
            let none = wakers_of(pid)?.is_empty();
            Ok(none.then_some(()))
        };
        if restored {
            ensure!(wakers()?.is_none(), "nobody waits for the other call");
        }
        let it = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(it, nix::sys::signal::Signal::SIGKILL)?;
        common::wait_for("the end of who waits", LIMIT, wakers)?;
    }
    Ok(())
}

#[test]
fn however_many_calls_sleep_each_ends_when_it_was_to() -> Result<()> {
    for restored in [true, false] {
        let Some(mut p) = Running::start("tests/calls/many.c")? else {
            return Ok(());
        };
        p.dump_twice(restored)?;
        p.has("result")?;
        let text = p.result()?;
        ensure!(text == "50 0\n".repeat(5), "ended, and early: {text}");
    }
    Ok(())
}

#[test]
fn the_time_left_is_known_also_where_the_kernel_lists_hundreds_of_timers_for_long() -> Result<()> {
    // While the list is written the clock that sockets time out by ticks more than once.
    let timers: Vec<TimerFd> = (0..800)
        .map(|_| {
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty())?;
            let far = Expiration::OneShot(TimeSpec::new(3600, 0));
            timer.set(far, TimerSetTimeFlags::empty())?;
            Ok(timer)
        })
        .collect::<Result<_>>()?;
    let Some(mut p) = Running::start("tests/calls/recv.c")? else {
        return Ok(());
    };
    p.sleeps_in(libc::SYS_recvfrom)?;
    // Of a second and a half.
    std::thread::sleep(Duration::from_millis(300));
    p.dump("image", true)?;
    let left = p.resume("image")?["left_ns"].as_i64();
    ensure!(left.is_some_and(|left| left < 1_400_000_000), "{left:?}");
    drop(timers);
    Ok(())
}

#[test]
fn what_has_part_of_its_bytes_waits_for_the_rest_of_its_time_only() -> Result<()> {
    for (way, nr) in [("receive", libc::SYS_recvfrom), ("send", libc::SYS_sendto)] {
        for restored in [false, true] {
            let Some(mut p) = Running::start_with("tests/calls/waitall.c", &[way])? else {
                return Ok(());
            };
            p.sleeps_in(nr)?;
            p.dump("image", restored)?;
            let resume = p.resume("image")?;
            let left = resume["left_ns"].as_i64().unwrap_or(-1);
            ensure!((1..1_500_000_000).contains(&left), "{way}: {resume}");
            if restored {
                p.restore("image", &["-d"])?;
                // The time-out of its socket would end it too, later.
                let ended = || p.path("result").exists();
                if !ended() {
                    common::wait_for("somebody to end the call", LIMIT, || {
                        let waits = !wakers_of(p.child.id() as i32)?.is_empty();
                        ensure!(waits || !ended(), "nobody has ended the call");
                        Ok(waits.then_some(()))
                    })?;
                }
            }
            p.has("result")?;
            let text = p.result()?;
            let (n, took) = text.split_once(' ').context("two words")?;
            // Of what was sent as much as has come.
            let wanted = if way == "send" { "0" } else { "1000" };
            ensure!(n == wanted, "{way}: {text}");
            let took: f64 = took.trim().parse()?;
            ensure!(took >= 1.5, "{way}: it ended after {took} s");
        }
    }
    Ok(())
}

#[test]
fn however_many_calls_have_part_of_their_bytes_each_transfers_all() -> Result<()> {
    for restored in [false, true] {
        let Some(mut p) = Running::start("tests/calls/partial.c")? else {
            return Ok(());
        };
        let maps = format!("/proc/{}/maps", p.child.id());
        // Code that came from no file.
        let added = || -> Result<bool> {
            let text = std::fs::read_to_string(&maps)?;
            let mut lines = text.lines().filter(|l| !l.ends_with("[vdso]"));
            Ok(lines.any(|l| l.contains(" r-xp ") && l.contains(" 00:00 0")))
        };
        ensure!(!added()?, "the program has such mappings itself");
        p.dump_twice(restored)?;
        ensure!(added()?, "nothing was added for them");
        std::fs::write(p.path("go"), "")?;
        p.has("result")?;
        let text = p.result()?;
        ensure!(text == "8 8 8 8 8", "restored: {restored}, whole: {text}");
        // What they had needed is gone when they are looked at again.
        p.dump("third", false)?;
        ensure!(!added()?, "what was added stays");
        std::fs::write(p.path("end"), "")?;
    }
    Ok(())
}

/// Processes that are to end calls of this process's threads.
fn wakers_of(pid: i32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for waker in common::processes() {
        let of = |name: &str| std::fs::read_to_string(format!("/proc/{waker}/{name}"));
        if of("comm").unwrap_or_default().trim() != "mist-waker" {
            continue;
        }
        let Ok(open) = std::fs::read_dir(format!("/proc/{waker}/fdinfo")) else {
            continue;
        };
        for fd in open.flatten() {
            let info = std::fs::read_to_string(fd.path()).unwrap_or_default();
            let known = info.lines().find_map(|l| l.strip_prefix("Pid:"));
            let known: Option<i32> = known.and_then(|v| v.trim().parse().ok());
            let process = known.and_then(|tid| common::status_field(tid as u32, "Tgid"));
            if known == Some(pid) || process.is_some_and(|p| p == pid.to_string()) {
                found.push(waker);
                break;
            }
        }
    }
    Ok(found)
}
