//! What tasks print while they, or those who collect it, move.

use super::*;
use crate::stage::Stage;

pub fn collector(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    ensure!(worker.ask("print one") == "ok");
    scene.migrate(me, "h1")?;
    // It hears of it in its next call.
    worker.ask("probe 1 1");
    worker.ask("pstat 40fff");
    ensure!(worker.ask("print two") == "ok");
    let (mut late, l) = scene.worker(&mut boss, "h1", "late")?;
    ensure!(late.ask("print three") == "ok");
    late.leave();
    worker.leave();
    ensure!(boss.ask("exit") == "0");
    let mut said: Vec<&String> = boss
        .said
        .iter()
        .filter(|s| !s.contains(&format!("t{l:x}")))
        .collect();
    let of = |tid: u32, what: &str| format!("[t{tid:x}] {what}");
    let expected = ["BEGIN", "one", "two", "EOF"].map(|what| of(v, what));
    ensure!(
        said == expected.iter().collect::<Vec<_>>(),
        "{:?}",
        boss.said
    );
    said = boss
        .said
        .iter()
        .filter(|s| s.contains(&format!("t{l:x}")))
        .collect();
    let expected = ["BEGIN", "three", "EOF"].map(|what| of(l, what));
    ensure!(
        said == expected.iter().collect::<Vec<_>>(),
        "{:?}",
        boss.said
    );
    Ok(())
}

/// A child that never calls PVM again prints all the time while its collector moves: before the stop, under it, between
/// the decision and the end of the old incarnation, and afterwards.
pub fn printed_meanwhile(scene: &Scene) -> Result<()> {
    const LINES: usize = 6000;
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut near, _) = scene.worker(&mut boss, "h0", "near")?;
    let (mut far, _) = scene.worker(&mut boss, "h1", "far")?;
    for child in [&near, &far] {
        child.tell(&format!("count {LINES} 400"));
    }
    for host in ["h1", "h0", "h1"] {
        let said = migrate_said(scene, me, host)?;
        ensure!(!said.contains("print"), "{said}");
    }
    for child in [&mut near, &mut far] {
        ensure!(child.answer() == "ok");
    }
    near.leave();
    far.leave();
    ensure!(boss.ask("exit") == "0");
    ensure!(
        boss.said.len() == 2 * (LINES + 2),
        "{} lines",
        boss.said.len()
    );
    let mut of: std::collections::HashMap<&str, Vec<&str>> = Default::default();
    for (child, line) in boss.said.iter().filter_map(|said| said.split_once(' ')) {
        of.entry(child).or_default().push(line);
    }
    let numbers: Vec<String> = (0..LINES).map(|n| n.to_string()).collect();
    let expected = || numbers.iter().map(String::as_str);
    let expected: Vec<&str> = ["BEGIN"]
        .into_iter()
        .chain(expected())
        .chain(["EOF"])
        .collect();
    for (child, lines) in of {
        let wrong = lines
            .iter()
            .zip(&expected)
            .find(|(got, wanted)| got != wanted);
        ensure!(wrong.is_none(), "{child}: {wrong:?}");
    }
    Ok(())
}

/// A child and its collector move at once: while the one is on its way nobody can say that its output goes to another
/// incarnation of the other.
pub fn both_move(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut child, c) = scene.worker(&mut boss, "h1", "child")?;
    child.ask("catchout");
    // Behind the decision that it moves each of these is waited for in vain, a second long.
    let mut theirs = Vec::new();
    for n in 0..2 {
        let (grandchild, _) = scene.worker(&mut child, "h1", &format!("grandchild{n}"))?;
        // PvmMboxWaitForInfo and PvmMboxReadAndDelete
        grandchild.tell("get later 0 48");
        theirs.push(grandchild);
    }
    let first = Move::begin(scene, c, "h0")?;
    wait_for("the decision", LIMIT, || {
        scene.is_in(State::Decided, "h1", c)
    })?;
    scene.hosts.root("h1", "pkill -STOP -f -- '[ ]mover$'")?;
    // Nothing tells of somebody who does not go on: the child is on its way some seconds longer.
    let go_on = "setsid sh -c \"sleep 6; pkill -CONT -f -- '[ ]mover$'\" >/dev/null 2>&1 &";
    scene.hosts.root("h1", go_on)?;
    let said = migrate_said(scene, me, "h1")?;
    ensure!(!said.contains("print"), "{said}");
    let (status, said) = first.end()?;
    ensure!(status.success(), "{status}: {said}");
    // It does not call PVM for this.
    ensure!(child.ask("print one") == "ok");
    for _ in &theirs {
        ensure!(boss.ask("put later now 4") == "0");
    }
    for mut grandchild in theirs {
        grandchild.answer();
        grandchild.leave();
    }
    child.leave();
    ensure!(boss.ask("exit") == "0");
    // libpvm may say that it waits for the grandchildren's last output.
    boss.said.retain(|line| !line.contains("libpvm"));
    let of = |what: &str| format!("[t{c:x}] {what}");
    ensure!(
        boss.said == ["BEGIN", "one", "EOF"].map(of),
        "{:?}",
        boss.said
    );
    Ok(())
}

/// It was spawned before its collector moved, and enrols when that is elsewhere.
pub fn late_child(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h0", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (stage, args) = Stage::new(scene.dir.path(), "late");
    let program = scene.path("bin/actor");
    boss.ask(&format!("spawnat h1 {} {args}", program.display()));
    let said = migrate_said(scene, me, "h1")?;
    ensure!(said.contains("has not called PVM yet"), "{said}");
    let mut late = stage.actor();
    let l = late.enrol();
    ensure!(late.ask("print one") == "ok");
    late.leave();
    ensure!(boss.ask("exit") == "0");
    let line = format!("[t{l:x}] one");
    ensure!(boss.said.contains(&line), "{:?}", boss.said);
    Ok(())
}

/// What its old host still had to send, slowly, comes before what it sends from its new one. It is stopped when its
/// pvmd has not read anything of that.
pub fn in_order(scene: &Scene) -> Result<()> {
    let added = "pvm <<'END'\nadd h2\nquit\nEND";
    scene
        .hosts
        .exec("h0", &format!("{} exec {added}", scene.mistctl.path()))?;
    let mut boss = scene.actor("h2", "boss")?;
    boss.ask("catchout");
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    // Agents are there from here on.
    scene.migrate(v, "h0")?;
    scene.migrate(v, "h1")?;
    let pid = worker.pid();
    slow_link(scene)?;
    // PvmMboxWaitForInfo and PvmMboxReadAndDelete: nothing stops it there.
    worker.tell(&format!("burst later 48 {me:x} 7"));
    let mover = Move::begin(scene, v, "h0")?;
    for host in ["h0", "h1", "h2"] {
        wait_for("the gates to be closed", LIMIT, || scene.is_moving(host, v))?;
    }
    let signal = |signal: &str, pid: &str| scene.hosts.exec("h1", &format!("kill -{signal} {pid}"));
    signal("STOP", &pid.to_string())?;
    // PvmMboxOverWritable: others may take it away.
    boss.ask("put later now 4");
    wait_for("the entry to reach it", LIMIT, || {
        let there = format!("ss -xpnH | awk '$3 > 0' | grep -q pid={pid},");
        Ok(scene.hosts.exec("h1", &there).ok())
    })?;
    signal("STOP", "$(pgrep -x pvmd)")?;
    signal("CONT", &pid.to_string())?;
    let stopped = format!("grep -q '^TracerPid:.[1-9]' /proc/{pid}/status");
    let held = wait_for("the mover to stop it", LIMIT, || {
        Ok(scene.hosts.exec("h1", &stopped).ok())
    });
    signal("CONT", "$(pgrep -x pvmd)")?;
    held?;
    // It goes on before all hosts know of that. (What stood in its FIFO as it moved would be there twice: here both
    // hosts have the same one.)
    wait_for("the end of the old one", LIMIT, || {
        Ok(scene.hosts.exec("h1", &format!("! kill -0 {pid}")).ok())
    })?;
    ensure!(worker.answer() == "0");
    worker.ask(&format!("send {me:x} 8 last"));
    ensure!(worker.ask("print last") == "ok");
    for text in ["burst", "last"] {
        let got = boss.ask("recv -1 -1");
        ensure!(got.contains(&format!("text {text}")), "{got}");
    }
    let (status, said) = mover.end()?;
    ensure!(status.success(), "{status}: {said}");
    worker.leave();
    ensure!(boss.ask("exit") == "0");
    let lines = boss.said.iter().filter_map(|said| said.split(' ').nth(1));
    let lines: Vec<&str> = lines
        .filter(|word| !["BEGIN", "EOF"].contains(word))
        .collect();
    let numbers: Vec<String> = (0..60).map(|n| n.to_string()).collect();
    let expected: Vec<&str> = numbers.iter().map(String::as_str).chain(["last"]).collect();
    ensure!(lines == expected, "{lines:?}");
    Ok(())
}

/// What h1 sends to h2 takes its time; nothing else does.
fn slow_link(scene: &Scene) -> Result<()> {
    let script = "set -e
        to=$(getent ahostsv4 h2 | awk '{print $1; exit}')
        tc qdisc replace dev eth0 root handle 1: htb default 20
        tc class add dev eth0 parent 1: classid 1:10 htb rate 400kbit burst 8k
        tc class add dev eth0 parent 1: classid 1:20 htb rate 10gbit
        tc filter add dev eth0 parent 1: protocol ip u32 match ip dst $to/32 flowid 1:10";
    scene.hosts.root("h1", script).map(drop)
}

/// What mistctl says of a move.
fn migrate_said(scene: &Scene, v: u32, to: &str) -> Result<String> {
    let command = format!("{} migrate t{v:x} {to} 2>&1", scene.mistctl.path());
    scene.hosts.exec("h0", &command)
}
