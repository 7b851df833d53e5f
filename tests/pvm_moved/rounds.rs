//! While the memory of a task is sent it runs, and its partners send to it as ever.

use super::*;

/// Makes the stream from h0 to a host slow; nothing else is.
fn slow(scene: &Scene, host: &str) -> Result<()> {
    let slow = format!(
        "set -e
        to=$(getent ahostsv4 {host} | awk '{{print $1; exit}}')
        tc qdisc replace dev eth0 root handle 1: htb default 20
        tc class add dev eth0 parent 1: classid 1:10 htb rate 64kbit burst 8k
        tc class add dev eth0 parent 1: classid 1:20 htb rate 10gbit
        tc filter add dev eth0 parent 1: protocol ip u32 match ip dst $to/32 match ip protocol 6 0xff flowid 1:10"
    );
    scene.hosts.root("h0", &slow).map(drop)
}

fn on_the_way(scene: &Scene) -> Result<()> {
    wait_for("its memory to be on the way", LIMIT, || {
        let queued = "ss -tnpH | awk '$3 > 100000' | grep -q .";
        Ok(scene.hosts.root("h0", queued).ok())
    })
    .map(drop)
}

/// The stream is held up; nothing else is.
pub fn open(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h1", "boss")?;
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h0", "worker")?;
    worker.ask("hoard 8");
    slow(scene, "h1")?;
    let moving = Move::begin(scene, v, "h1")?;
    on_the_way(scene)?;
    for host in ["h0", "h1"] {
        ensure!(scene.is_moving(host, v)?.is_none(), "its gate is closed");
    }
    ensure!(boss.ask(&format!("send {v:x} 5 there")) == "0");
    ensure!(worker.ask("recv -1 5").contains("text there"));
    ensure!(worker.ask(&format!("send {me:x} 6 back")) == "0");
    ensure!(boss.ask("recv -1 6").contains("text back"));
    scene.hosts.root("h0", "tc qdisc del dev eth0 root")?;
    let (status, said) = moving.end()?;
    ensure!(status.success(), "{said}");
    ensure!(worker.ask("hoarded") == "good");
    worker.leave();
    boss.leave();
    Ok(())
}

/// Whoever asked for a move may not want to wait for it.
pub fn called_off(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h1", "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, "h0", "worker")?;
    worker.ask("hoard 8");
    slow(scene, "h1")?;
    let moving = Move::begin(scene, v, "h1")?;
    on_the_way(scene)?;
    // Not SIGINT, which whoever runs tests in the background has ignored.
    let end = "pkill -TERM -xf '[^ ]*/mistctl migrate t.*'";
    scene.hosts.root("h0", end)?;
    let (status, said) = moving.end()?;
    ensure!(status.code() == Some(143), "{status}: {said}");
    let what = format!("the move is called off; task t{v:x} runs on h0 as before");
    ensure!(said.contains(&what), "{said}");
    ensure!(scene.present(v)? == v);
    ensure!(worker.ask("hoarded") == "good");
    wait_for("what was prepared there to go", LIMIT, || {
        let none = "! pgrep -f -- '[ ]land --agent|[/]bin/actor .*/worker'";
        Ok(scene.hosts.root("h1", none).ok())
    })?;
    for host in ["h0", "h1"] {
        ensure!(scene.is_moving(host, v)?.is_none(), "its gate is closed");
    }
    scene.hosts.root("h0", "tc qdisc del dev eth0 root")?;
    scene.migrate(v, "h1")?;
    ensure!(worker.ask("hoarded") == "good");
    worker.leave();
    boss.leave();
    Ok(())
}
