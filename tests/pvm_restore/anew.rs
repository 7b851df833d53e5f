//! Restores into a virtual machine that was started anew, where everything is counted from 1 again.

use super::*;

/// Ends the virtual machine and starts another.
fn again(scene: &Scene, boss: Actor) -> Result<()> {
    scene
        .hosts
        .exec("h0", &format!("{} pvm stop", scene.mistctl.path()))?;
    drop(boss);
    scene.start()
}

pub fn tids(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    // PvmMboxPersistent: it would outlive the task, but not the virtual machine.
    ensure!(worker.ask("put kept value 1") == "0");
    worker.tell("recv -1 7");
    until_receives(scene, "h1", pid)?;
    let image = scene.dump("h1", pid, "image", "--kill")?;
    let (mut other, o) = scene.worker(&mut boss, "h0", "other")?;
    let other_pid = other.pid();
    let other_image = scene.dump("h0", other_pid, "other-image", "--kill")?;
    again(scene, boss)?;
    // The first to come back brings agents, and that of h1 has the name of the second.
    restore(scene, "h0", &other_image, "")?;
    let ps = format!("{} ps --json", scene.mistctl.path());
    scene.hosts.exec("h0", &ps)?;
    ensure!(
        scene.is_in(State::Hidden, "h0", v)?.is_some(),
        "t{v:x} is free"
    );
    let said = restore(scene, "h0", &image, "")?;
    ensure!(said["host"] == "h1", "{said}");
    other.ask(&format!("send {v:x} 8 between"));
    // Nobody gets the tid that it knows itself by.
    let mut boss = scene.actor("h1", "second")?;
    let me = boss.enrol();
    ensure!(me & 0x3ffff > v & 0x3ffff, "{me:x} {v:x}");
    boss.ask(&format!("send {v:x} 7 hello"));
    ensure!(worker.answer().contains(&format!("from {me:x}")));
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    ensure!(worker.ask("recv -1 8").contains(&format!("from {o:x}")));
    scene.migrate(v, "h0")?;
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    other.leave();
    ensure!(boss.ask("get kept 0 0").contains("text value"));
    ensure!(boss.ask("boxes kept") == format!("{v:x}"));
    worker.leave();
    boss.leave();
    Ok(())
}

pub fn contexts(scene: &Scene) -> Result<()> {
    for agents in [false, true] {
        contexts_with(scene, agents).with_context(|| format!("agents: {agents}"))?;
    }
    Ok(())
}

fn contexts_with(scene: &Scene, agents: bool) -> Result<()> {
    let name = |who: &str| format!("{who}-{agents}");
    let mut boss = scene.actor("h0", &name("boss"))?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", &name("worker"))?;
    // One it has made, of many; and one that it has from a task of another host.
    let last = |actor: &mut Actor, count: usize| {
        let made: Vec<u32> = (0..count).map(|_| actor.tid("newcontext")).collect();
        made.last().copied().unwrap_or_default()
    };
    let (own, given) = (last(&mut worker, 300), last(&mut boss, 5));
    let present = if agents {
        // It remembers the other one: only the agent there can tell.
        let ps = format!("{} ps", scene.mistctl.path());
        scene.hosts.exec("h1", &ps)?;
        0
    } else {
        worker.ask(&format!("context {given}"));
        given
    };
    let pid = worker.pid();
    let image = scene.dump("h1", pid, &name("image"), "--kill")?;
    again(scene, boss)?;
    restore(scene, "h0", &image, "")?;
    for (host, known) in [("h0", given), ("h1", own)] {
        let mut stranger = scene.actor(host, &name(host))?;
        let new = stranger.tid("newcontext");
        ensure!(new & !0x3ffff == known & !0x3ffff, "{new:x} {known:x}");
        ensure!(new > known, "{new:x} is given out, and {known:x} known");
        stranger.leave();
    }
    // It goes on using what it has.
    ensure!(worker.ask("context 0") == present.to_string());
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    worker.leave();
    Ok(())
}

pub fn added_host(scene: &Scene) -> Result<()> {
    for slow in [false, true] {
        let done = added_host_with(scene, slow);
        done.with_context(|| format!("the agent is slow: {slow}"))?;
    }
    Ok(())
}

/// A host comes back as the one that the restored task has its name of: its pvmd counts from 1 again, too.
fn added_host_with(scene: &Scene, slow: bool) -> Result<()> {
    const AGENT: &str = "$(pgrep -u $(id -u) -f 'mistctl agent$')";
    let name = |who: &str| format!("{who}-{slow}");
    let mistctl = scene.mistctl.path();
    let mut boss = scene.actor("h0", &name("boss"))?;
    let (mut worker, v) = scene.worker(&mut boss, "h1", &name("worker"))?;
    let pid = worker.pid();
    let image = scene.dump("h1", pid, &name("image"), "--kill")?;
    let alone = format!("{mistctl} pvm stop; echo h0 >/tmp/hosts; {mistctl} pvm start /tmp/hosts");
    scene.hosts.exec("h0", &alone)?;
    drop(boss);
    restore(scene, "h0", &image, "")?;
    let mut boss = scene.actor("h0", &name("second"))?;
    if slow {
        scene.hosts.exec("h0", &format!("kill -STOP {AGENT}"))?;
    }
    ensure!(boss.ask("addhost h1") == "1: 1");
    if !slow {
        // The agent of h1 would be the first there, with the tid that is the name of the task.
        scene.hosts.exec("h0", &format!("{mistctl} ps"))?;
    }
    let (stage, args) = Stage::new(scene.dir.path(), &name("kid"));
    boss.tell(&format!(
        "spawnat h1 {} {args}",
        scene.path("bin/actor").display()
    ));
    if slow {
        wait_for("the task to begin", LIMIT, || {
            Ok(scene.hosts.exec("h1", "pgrep -x actor").ok())
        })?;
        scene.hosts.exec("h0", &format!("kill -CONT {AGENT}"))?;
    }
    let kid = spawned(&boss.answer())?;
    let mut there = stage.actor();
    ensure!(
        kid != v && there.enrol() == kid,
        "t{kid:x}, and t{v:x} is taken"
    );
    ensure!(worker.ask("mytid") == format!("{v:x}"));
    for (tid, task) in [(v, &mut worker), (kid, &mut there)] {
        boss.ask(&format!("send {tid:x} 7 hello"));
        ensure!(task.ask("recv -1 7").contains("text hello"));
        let me = boss.enrol();
        task.ask(&format!("send {me:x} 8 back"));
        let back = boss.ask("recv -1 8");
        ensure!(back.contains(&format!("from {tid:x} ")), "{back}");
    }
    there.ask(&format!("send {v:x} 9 over"));
    ensure!(worker.ask("recv -1 9").contains(&format!("from {kid:x} ")));
    for task in [worker, there] {
        task.leave();
    }
    again(scene, boss)
}
