//! While the memory of a task is sent it runs, and its partners send to it as ever.

use super::*;

/// The stream is held up; nothing else is.
pub fn open(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor("h1", "boss")?;
    let me = boss.enrol();
    let (mut worker, v) = scene.worker(&mut boss, "h0", "worker")?;
    worker.ask("hoard 8");
    scene.hosts.root(
        "h0",
        "set -e
        to=$(getent ahostsv4 h1 | awk '{print $1; exit}')
        tc qdisc replace dev eth0 root handle 1: htb default 20
        tc class add dev eth0 parent 1: classid 1:10 htb rate 64kbit burst 8k
        tc class add dev eth0 parent 1: classid 1:20 htb rate 10gbit
        tc filter add dev eth0 parent 1: protocol ip u32 match ip dst $to/32 match ip protocol 6 0xff flowid 1:10",
    )?;
    let moving = Move::begin(scene, v, "h1")?;
    wait_for("its memory to be on the way", LIMIT, || {
        let queued = "ss -tnpH | awk '$3 > 100000' | grep -q .";
        Ok(scene.hosts.root("h0", queued).ok())
    })?;
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
