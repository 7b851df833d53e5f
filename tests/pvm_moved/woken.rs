//! An agent that opens a gate wakes all tasks of its host. What is to become one is none yet.

use std::time::Duration;

use anyhow::bail;
use mistctl::pvm::block::TaskBlock;
use mistctl::pvm::shimabi::block::state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

/// How long a tracer runs between two looks at what it does.
const SLICE: Duration = Duration::from_micros(200);

/// Another task moves when one is rebuilt and has not got yet what it had not read: nothing comes before that.
pub fn rebuilt(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h0", "worker")?;
    let (other, o) = scene.worker(&mut boss, "h0", "other")?;
    // Agents are there from here on.
    scene.migrate(o, "h1")?;
    for hosts in [["h1", "h0"], ["h0", "h1"]].repeat(5) {
        let [to, others] = hosts;
        for text in ["one", "two"] {
            ensure!(boss.ask(&format!("send {v:x} 5 {text}")) == "0");
        }
        let moving = Move::begin(scene, v, to)?;
        let held = hold(scene, to)?;
        scene.migrate(o, others)?;
        if let Some((tracer, unread)) = &held {
            let woken = scene.hosts.root(to, unread).is_ok();
            ensure!(!woken, "it was sent something");
            kill(*tracer, Signal::SIGCONT)?;
        }
        let (status, said) = moving.end()?;
        ensure!(status.success(), "{said}");
        for text in ["one", "two"] {
            let got = worker.ask("recv -1 5");
            ensure!(got.contains(&format!("text {text}")), "{got}");
        }
        if held.is_some() {
            worker.leave();
            other.leave();
            boss.leave();
            return Ok(());
        }
    }
    bail!("it was never held in time")
}

/// Stops who rebuilds a task on that host when its memory is there, and what it had not read is not; none when that was
/// missed. And a command that fails as long as it has nothing to read.
fn hold(scene: &Scene, host: &str) -> Result<Option<(Pid, String)>> {
    let body = wait_for("the lander", LIMIT, || lander(scene, host))?;
    let status = |pid: i32, key: &str| -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        Ok(line.context("no such line")?.trim().to_owned())
    };
    let tracer = wait_for("its tracer", LIMIT, || {
        let tracer: i32 = status(body, "TracerPid:")?.parse()?;
        Ok((tracer != 0).then_some(tracer))
    })?;
    let enrolled = || {
        let block = TaskBlock::find(body).ok().flatten();
        block.is_some_and(|block| block.state().ok() == Some(state::ENROLLED))
    };
    loop {
        kill(Pid::from_raw(tracer), Signal::SIGSTOP)?;
        wait_for("it to stop", LIMIT, || {
            Ok(status(tracer, "State:")?.starts_with('T').then_some(()))
        })?;
        if enrolled() {
            break;
        }
        kill(Pid::from_raw(tracer), Signal::SIGCONT)?;
        std::thread::sleep(SLICE);
    }
    let pid = status(body, "NSpid:")?;
    let pid = pid.split_whitespace().last().context("no pid")?;
    let unread = format!("ss -xpnH | awk '$3 > 0' | grep -q pid={pid},");
    let tracer = Pid::from_raw(tracer);
    if scene.hosts.root(host, &unread).is_ok() {
        kill(tracer, Signal::SIGCONT)?;
        return Ok(None);
    }
    Ok(Some((tracer, unread)))
}

/// What is to become a task on a host.
fn lander(scene: &Scene, host: &str) -> Result<Option<i32>> {
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let there = space(&scene.hosts.pid(host)?.to_string());
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse() else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let lands = command.windows(13).any(|words| words == b"\0land\0--agent");
        if lands && space(&name) == there {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}
