//! Tasks that are away: saved as they ended, and waited for.

use super::*;

pub fn with_agents(scene: &Scene) -> Result<()> {
    let (mut boss, mut other) = (scene.actor("h0", "boss")?, scene.actor("h1", "other")?);
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    // PvmTaskExit
    boss.ask(&format!("notify 1 66 {v:x}"));
    boss.ask(&format!("send {v:x} 7 before"));
    // One that cannot be saved now is there for its partners as before (PvmMboxWaitForInfo, PvmMboxReadAndDelete).
    let block = TaskBlock::find(scene.pid_outside("h1", pid)?)?.context("no block")?;
    worker.tell("get later 0 48");
    stage::until("the task to wait for its pvmd", || {
        block.asking().unwrap() == 1
    });
    ensure!(scene.dump("h1", pid, "no", "--kill --away").is_err());
    ensure!(boss.ask(&format!("send {v:x} 8 still")) == "0");
    boss.ask("put later now 4");
    ensure!(worker.answer().contains("text now"));
    ensure!(worker.ask("recv -1 8").contains("text still"));
    let image = scene.dump("h1", pid, "image", "--kill --away")?;
    let gone = scene.hosts.exec("h1", &format!("kill -0 {pid}"));
    ensure!(gone.is_err(), "it lives");
    is_listed_as_away(scene, v, Some(&image))?;
    for (actor, host) in [(&mut boss, "h0"), (&mut other, "h1")] {
        let pid = actor.pid();
        actor.tell(&format!("send {v:x} 7 {host}"));
        let block = TaskBlock::find(scene.pid_outside(host, pid)?)?.context("no block")?;
        stage::until_waits(&block, mistctl::pvm::shimabi::block::wait::GATE);
    }
    // Of two at once one makes a task of it.
    let both = std::thread::scope(|scope| {
        let one = scope.spawn(|| restore(scene, "h0", &image, "--host h0"));
        let two = restore(scene, "h0", &image, "--host h1");
        [one.join().expect("no panic"), two]
    });
    let done = both.iter().filter(|r| r.is_ok()).count();
    ensure!(done == 1, "{both:?}");
    is_listed_as_away(scene, v, None)?;
    ensure!(boss.answer() == "0" && other.answer() == "0");
    let got: Vec<String> = (0..3).map(|_| worker.ask("recv -1 7")).collect();
    ensure!(got[0].contains("text before"), "{got:?}");
    for text in ["text h0", "text h1"] {
        ensure!(got.iter().any(|said| said.contains(text)), "{got:?}");
    }
    ensure!(boss.ask("nnotice 66") == "none", "it was told of an end");
    worker.leave();
    ensure!(boss.ask("notice 66").contains(&format!("{v:x}")));
    boss.leave();
    other.leave();
    Ok(())
}

/// Whether `mistctl ps` says, on both hosts, that the task is away, and where its image is; or that it is there.
fn is_listed_as_away(scene: &Scene, v: u32, image: Option<&Path>) -> Result<()> {
    for host in ["h0", "h1"] {
        let ps = format!("{} ps --json", scene.mistctl.path());
        let listing: Value = serde_json::from_str(&scene.hosts.exec(host, &ps)?)?;
        let tasks = listing["tasks"].as_array().context("no tasks")?;
        let mut rows = (tasks.iter()).filter(|row| row["virtual_tid"] == format!("t{v:x}"));
        let row = rows.next().context("it is not listed")?;
        ensure!(rows.next().is_none(), "it is listed twice: {tasks:?}");
        ensure!((row["state"] == "away") == image.is_some(), "{row}");
        let Some(image) = image else { continue };
        ensure!(row["image"] == image.to_string_lossy().as_ref(), "{row}");
        ensure!(row["saved_on"] == "h1" && row["since"].is_u64(), "{row}");
        let program = row["program"].as_str().unwrap_or_default();
        ensure!(program.ends_with("/actor") && row["pid"].is_null(), "{row}");
    }
    // It cannot be moved, and who tries is told why.
    if image.is_some() {
        let said = scene.migrate(v, "h0").unwrap_err().to_string();
        ensure!(said.contains("is away"), "{said}");
    }
    Ok(())
}

/// An agent that has closed the gate ends before the task does: the next one knows it from the table.
pub fn without_agents(scene: &Scene) -> Result<()> {
    let (mut boss, mut other) = (scene.actor("h0", "boss")?, scene.actor("h1", "other")?);
    let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
    let pid = worker.pid();
    // So that saving it takes longer than ending an agent.
    worker.ask("hoard 200");
    boss.ask(&format!("notify 1 66 {v:x}"));
    let image = std::thread::scope(|scope| {
        let dump = scope.spawn(|| scene.dump("h1", pid, "image", "--kill --away"));
        // Its gate is closed on all hosts, and all that was sent to it is there.
        wait_for("its memory to be written", LIMIT, || {
            let pages = fs::metadata(scene.path("image.partial/pages"));
            Ok(pages.is_ok_and(|pages| pages.len() > 1 << 20).then_some(()))
        })?;
        let agent = "ps -C mistctl -o pid=,args= | awk '$3 == \"agent\" { print $1 }'";
        (scene.hosts).exec("h0", &format!("kill -KILL $({agent})"))?;
        dump.join().expect("no panic")
    })?;
    for (actor, host) in [(&mut boss, "h0"), (&mut other, "h1")] {
        let pid = actor.pid();
        actor.tell(&format!("send {v:x} 7 {host}"));
        let block = TaskBlock::find(scene.pid_outside(host, pid)?)?.context("no block")?;
        stage::until_waits(&block, mistctl::pvm::shimabi::block::wait::GATE);
    }
    restore(scene, "h0", &image, "--host h1")?;
    ensure!(boss.answer() == "0" && other.answer() == "0");
    let got: Vec<String> = (0..2).map(|_| worker.ask("recv -1 7")).collect();
    for text in ["text h0", "text h1"] {
        ensure!(got.iter().any(|said| said.contains(text)), "{got:?}");
    }
    ensure!(boss.ask("nnotice 66") == "none", "it was told of an end");
    worker.leave();
    boss.leave();
    other.leave();
    Ok(())
}
