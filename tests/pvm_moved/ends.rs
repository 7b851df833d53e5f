//! Moves that do not take place, and what ends in the middle of them.

use anyhow::bail;
use mistctl::pvm::flush::Drain;
use mistctl::pvm::tid::Tid;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::clog::Clog;
use crate::stage::Stage;

/// One that cannot go is told everything that is in its way, and never stood: whoever is stopped wakes for that.
pub fn refused(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // Agents are there from here on.
    scene.migrate(v, "h0")?;
    scene.migrate(v, "h1")?;
    let address = scene
        .hosts
        .exec("h1", "getent ahostsv4 h0 | awk '{print $1; exit}'")?;
    let opened = worker.ask(&format!("open {address}"));
    let numbers = opened.strip_prefix("0 ").context(opened.clone())?;
    let entangled = worker.ask("entangle");
    let (other, ends) = entangled.split_once(' ').context(entangled.clone())?;
    let child = worker.ask("child");
    let pid = worker.pid();
    let woken = || {
        let count = format!("grep ctxt_switches /proc/{pid}/status");
        scene.hosts.exec("h1", &count)
    };
    wait_for("it to wait for its next command", LIMIT, || {
        let state = format!("grep -q '^State:.S' /proc/{pid}/status");
        Ok(scene.hosts.exec("h1", &state).ok())
    })?;
    let before = woken()?;
    let said = scene.migrate(v, "h0").unwrap_err().to_string();
    for why in [
        "it is a namespace",
        "it is a pidfd of process",
        "of its TCP connection",
        "it is the terminal of session",
        "descriptor in flight (uts:[",
        &format!("has children (process {other})"),
        "mistctl dump --tree --kill --away",
        "was not moved, and runs on",
    ] {
        ensure!(said.contains(why), "no '{why}' in: {said}");
    }
    let after = woken()?;
    ensure!(before == after, "it was stopped: {before}, then {after}");
    // It can, when that is gone.
    ensure!(worker.ask(&format!("close {numbers} {ends}")) == "ok");
    scene.hosts.exec("h1", &format!("kill -9 {other}"))?;
    ensure!(worker.ask("reap") == other);
    scene.hosts.exec("h1", &format!("kill -9 {child}"))?;
    let said = scene.migrate(v, "h0").unwrap_err().to_string();
    ensure!(
        said.contains("has children") && !said.contains("namespace"),
        "{said}"
    );
    ensure!(worker.ask("reap") == child);
    scene.migrate(v, "h0")?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// Of those that are missing there, or different, it is told; what was compared once is read again when it has changed.
pub fn files(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let (own, others) = ("/tmp/own", "/tmp/others");
    for host in ["h0", "h1"] {
        let write = format!("echo text >{others}; touch -d 2001-02-03 {others}");
        scene.hosts.root(host, &write)?;
    }
    scene.hosts.exec("h1", &format!("echo text >{own}"))?;
    for hold in [format!("hold {own}"), format!("hold {others} read")] {
        let fd = worker.ask(&hold);
        ensure!(fd.parse::<u32>().is_ok(), "{hold}: {fd}");
    }
    // What has just been written may be written once more in the same tick of the clock.
    wait_for("the file to be old enough", LIMIT, || {
        let old = format!("[ $(($(date +%s) - $(stat -c %Z {others}))) -gt 4 ]");
        Ok(scene.hosts.exec("h1", &old).ok())
    })?;
    let refused = |what: &str, why: &str| -> Result<()> {
        let said = scene.migrate(v, "h0").unwrap_err().to_string();
        for part in [what, why, "runs on"] {
            ensure!(said.contains(part), "no '{part}' in: {said}");
        }
        ensure!(scene.present(v)? == v, "{v:x} has moved");
        Ok(())
    };
    refused(own, "No such file")?;
    scene.hosts.exec("h0", &format!("echo TEXT >{own}"))?;
    refused(own, "content is different")?;
    scene.hosts.exec("h0", &format!("echo text >{own}"))?;
    // In place, and as old as before.
    let write = |text: &str| {
        let write = format!("echo {text} >{others}; touch -d 2001-02-03 {others}");
        scene.hosts.root("h0", &write)
    };
    write("TEXT")?;
    refused(others, "content is different")?;
    write("longer")?;
    refused(others, "it has 7 bytes there, and 5 here")?;
    write("text")?;
    scene.migrate(v, "h0")?;
    worker.leave();
    boss.leave();
    Ok(())
}

/// A process on its way out has no memory and no descriptors any more, and lives for whoever asks the kernel or pvmd:
/// it is not taken for somebody else's.
pub fn ending(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (_other, o) = scene.worker(&mut boss, "h1", "other")?;
    // Agents are there from here on.
    scene.migrate(o, "h0")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    Stage::new(scene.dir.path(), "held");
    let path = scene.path("held.in");
    let clog = Clog::new(&path)?;
    // Its connection to pvmd, which has a lower number, is closed after this one.
    let held = worker.ask(&format!("hold {}", path.display()));
    ensure!(held.parse::<u32>().is_ok(), "{held}");
    let clogged = clog.begin()?;
    scene.hosts.exec("h1", &format!("kill -9 {pid}"))?;
    wait_for("it to lose its memory", LIMIT, || {
        let bare = format!("[ -z \"$(cat /proc/{pid}/maps)\" ]");
        Ok(scene.hosts.root("h1", &bare).ok())
    })?;
    let shell = format!("{} migrate --json t{v:x} h0", scene.mistctl.path());
    let said = scene
        .hosts
        .try_verb(&["exec", "h0", "bash", "-c", &shell])?;
    drop(clogged);
    let said: serde_json::Value = serde_json::from_slice(&said.stdout)?;
    ensure!(said["failure"] == "no_such_process", "{said}");
    let why = said["error"].as_str().unwrap_or_default();
    ensure!(why.contains("has ended before it was moved"), "{why}");
    boss.leave();
    Ok(())
}

/// A task on its way out has no memory any more, and its connection is still open: what its pvmd has not read of it comes
/// before any marker.
pub fn dying(scene: &Scene) -> Result<()> {
    dies(scene, |_| {
        let mut sender = scene.actor("h1", "sender")?;
        sender.enrol();
        Ok(sender)
    })
}

/// A pvmd takes what it has started for dead as soon as the process is: then it reads no more of it, and nobody waits for that.
pub fn dying_child(scene: &Scene) -> Result<()> {
    dies(scene, |boss| Ok(scene.worker(boss, "h1", "sender")?.0))
}

fn dies(scene: &Scene, sender: impl FnOnce(&mut Actor) -> Result<Actor>) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let mut sender = sender(&mut boss)?;
    let is_child = !sender.ask("parent").starts_with("ffff");
    let [pid, own] = [sender.pid(), worker.pid()];
    let [pid, own] = [scene.pid_outside("h1", pid)?, scene.pid_outside("h1", own)?];
    Stage::new(scene.dir.path(), "held");
    let path = scene.path("held.in");
    let clog = Clog::new(&path)?;
    // Its connection, which has a lower number, is closed after this one.
    let held = sender.ask(&format!("hold {}", path.display()));
    ensure!(held.parse::<u32>().is_ok(), "{held}");
    let clogged = clog.begin()?;
    scene.hosts.root("h1", "pkill -STOP -x pvmd")?;
    ensure!(sender.ask(&format!("send {v:x} 7 text")) == "0");
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait_for("it to lose its memory", LIMIT, || {
        let maps = fs::read(format!("/proc/{pid}/maps"))?;
        Ok(maps.is_empty().then_some(()))
    })?;
    let net = fs::File::open(format!("/proc/{own}/ns/net"))?;
    let drains = || -> Result<()> {
        // The sockets that a host's agent sees.
        setns(&net, CloneFlags::CLONE_NEWNET)?;
        let agent = Tid(0x4_0001);
        let mut drain = Drain::begin(&[own, pid], Tid(v), Tid(v), agent, 1)?;
        ensure!(!drain.look()?, "it has not ended");
        let waits_for = drain.waits_for();
        ensure!(waits_for.contains("is just ending"), "{waits_for}");
        drop(clogged);
        wait_for("its end", LIMIT, || {
            ensure!(!drain.look()?, "its pvmd sleeps");
            Ok(drain.waits_for().contains("have ended").then_some(()))
        })?;
        scene.hosts.root("h1", "pkill -CONT -x pvmd")?;
        wait_for("the drain to end", LIMIT, || {
            Ok(drain.look()?.then_some(()))
        })
    };
    let drained = std::thread::scope(|scope| scope.spawn(drains).join());
    drained.unwrap_or_else(|_| bail!("a panic"))?;
    if !is_child {
        let got = worker.ask("recv -1 7");
        ensure!(got.contains("text text"), "{got}");
    }
    worker.leave();
    boss.leave();
    Ok(())
}

/// It is born when the gates are closed already, and the task has been looked at.
pub fn late_fork(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // PvmMboxWaitForInfo and PvmMboxReadAndDelete: nothing stops it there.
    worker.tell("getfork later 48");
    let mover = Move::begin(scene, v, "h0")?;
    wait_for("the gates to be closed", LIMIT, || scene.is_moving("h1", v))?;
    boss.ask("put later now 4");
    let child = worker.answer();
    let (status, said) = mover.end()?;
    ensure!(status.code() == Some(4), "{status}: {said}");
    let why = format!("has got a child meanwhile (process {child})");
    ensure!(said.contains(&why) && !said.contains("--tree"), "{said}");
    scene.hosts.exec("h1", &format!("kill -9 {child}"))?;
    worker.leave();
    boss.leave();
    Ok(())
}
