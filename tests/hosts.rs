//! `scripts/testhosts` does what it says: every verb, on real namespaces.
//!
//! The hosts are one set, so the tests take turns; each gets three fresh hosts.

mod common;
mod testhosts;

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{both, processes, status_field, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testhosts::Hosts;

const LIMIT: Duration = Duration::from_secs(30);

type Test = fn(&Hosts) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 11] = [
        ("hosts_look_like_hosts", hosts_look_like_hosts),
        ("each_host_has_its_own_tmp_run_and_shm", own_directories),
        ("up_again_changes_nothing_and_adds_hosts", up_again),
        ("init_reaps_orphans", init_reaps_orphans),
        ("a_command_ends_with_exec", command_ends_with_exec),
        ("cut_drops_everything_between_two_hosts_only", cut_and_join),
        ("shape_slows_both_directions", shape_and_unshape),
        ("kill_is_a_power_failure_and_up_repairs_it", kill_and_repair),
        ("down_leaves_nothing", down_leaves_nothing),
        ("killed_parts_are_cleaned_up_and_replaced", killed_parts),
        ("mistakes_are_explained", mistakes),
    ];
    testhosts::main(tests, || Ok(()), |(), test| test(&Hosts::up(3)?))
}

fn hosts_look_like_hosts(hosts: &Hosts) -> Result<()> {
    ensure!(hosts.exec("h1", "hostname")? == "h1");
    ensure!(
        hosts.exec("h1", "echo $USER $(id -un) $HOME; pwd")? == "mist mist /home/mist\n/home/mist"
    );
    ensure!(hosts.root("h1", "id -un")? == "root");
    // ssh asks nothing, and its shell has PVM's environment as well.
    for shell in [
        "echo $PVM_ROOT $PVM_ARCH $PVM_RSH",
        "ssh h2 'echo $PVM_ROOT $PVM_ARCH $PVM_RSH'",
    ] {
        ensure!(
            hosts.exec("h0", shell)? == "/usr/lib/pvm3 LINUX64 /usr/bin/ssh",
            "{shell}"
        );
    }
    ensure!(hosts.exec("h0", "ssh h2 hostname")? == "h2");
    // A host sees its own processes and no others.
    let seen = hosts.exec("h0", "ps -e -o args=")?;
    ensure!(seen.contains("testhost-init host h0"), "{seen}");
    ensure!(!seen.contains("host h1"), "{seen}");
    Ok(())
}

fn own_directories(hosts: &Hosts) -> Result<()> {
    for directory in ["/tmp", "/run", "/dev/shm"] {
        hosts.root("h0", &format!("echo h0 >{directory}/mine"))?;
        hosts.root("h1", &format!("test ! -e {directory}/mine"))?;
        ensure!(
            fs::metadata(format!("{directory}/mine")).is_err(),
            "{directory} is the machine's"
        );
    }
    // Everything else is shared, the home directory first of all.
    let file = format!(".mist-test-{}", std::process::id());
    hosts.exec("h0", &format!("touch {file}"))?;
    hosts.exec("h1", &format!("rm {file}"))?;
    Ok(())
}

fn up_again(hosts: &Hosts) -> Result<()> {
    let before = hosts.verb(&["status"])?;
    hosts.verb(&["up", "3"])?;
    ensure!(hosts.verb(&["status"])? == before);
    hosts.verb(&["up", "4"])?;
    let after = hosts.verb(&["status"])?;
    ensure!(
        after.starts_with(&before) && after.contains("h3 up"),
        "{after}"
    );
    ensure!(hosts.exec("h3", "ssh h0 hostname")? == "h0");
    Ok(())
}

fn init_reaps_orphans(hosts: &Hosts) -> Result<()> {
    hosts.exec("h0", "for i in 1 2 3 4 5; do (sh -c 'exit 3' &); done")?;
    wait_for("the last zombie's end", LIMIT, || {
        let states = hosts.exec("h0", "ps -e -o stat=")?;
        Ok((!states.contains('Z')).then_some(()))
    })
}

fn command_ends_with_exec(hosts: &Hosts) -> Result<()> {
    let mut child = hosts
        .command("h0", "echo $$ >/tmp/pid; exec sleep 1000")
        .spawn()?;
    let there = || Ok(hosts.exec("h0", "kill -0 $(cat /tmp/pid)").ok().map(drop));
    let began = wait_for("the command's start", LIMIT, there);
    child.kill()?;
    child.wait()?;
    began?;
    wait_for("the command's end", LIMIT, || {
        Ok(hosts.exec("h0", "! kill -0 $(cat /tmp/pid)").ok().map(drop))
    })
}

/// Whether one host's sshd can be reached from another; an error when it answers with a refusal.
fn reaches(hosts: &Hosts, from: &str, to: &str) -> Result<bool> {
    let said = hosts.exec(
        from,
        &format!("timeout 1 bash -c 'exec 3<>/dev/tcp/{to}/22' 2>&1; echo $?"),
    )?;
    match said.as_str() {
        "0" => Ok(true),
        "124" => Ok(false), // still waiting when the second was over
        other => anyhow::bail!("{from} to {to}: {other}"),
    }
}

fn cut_and_join(hosts: &Hosts) -> Result<()> {
    ensure!(reaches(hosts, "h0", "h1")?);
    hosts.verb(&["cut", "h0", "h1"])?;
    ensure!(!reaches(hosts, "h0", "h1")?);
    ensure!(!reaches(hosts, "h1", "h0")?);
    ensure!(reaches(hosts, "h0", "h2")?);
    ensure!(reaches(hosts, "h2", "h1")?);
    ensure!(hosts.verb(&["status"])?.contains("cut from h1"));
    // A cut stays when everything is brought in order.
    hosts.verb(&["up", "3"])?;
    ensure!(!reaches(hosts, "h1", "h0")?);
    hosts.verb(&["join", "h1", "h0"])?;
    ensure!(reaches(hosts, "h0", "h1")?);
    ensure!(reaches(hosts, "h1", "h0")?);
    Ok(())
}

fn shape_and_unshape(hosts: &Hosts) -> Result<()> {
    let there = "head -c 1000000 /dev/zero | ssh h1 'cat >/dev/null'";
    let back = "ssh h1 head -c 1000000 /dev/zero >/dev/null";
    hosts.verb(&["shape", "h1", "10mbit"])?;
    ensure!(hosts.verb(&["status"])?.contains("shaped 10mbit"));
    for transfer in [there, back] {
        let begin = Instant::now();
        hosts.exec("h0", transfer)?;
        // The wire alone takes 0.8 s; half of that could not be without a bucket's lie.
        ensure!(
            begin.elapsed() >= Duration::from_millis(400),
            "{transfer}: not slowed"
        );
    }
    hosts.verb(&["unshape", "h1"])?;
    ensure!(!hosts.verb(&["status"])?.contains("shaped"));
    ensure!(!hosts.root("h1", "tc qdisc show")?.contains("tbf"));
    Ok(())
}

fn kill_and_repair(hosts: &Hosts) -> Result<()> {
    hosts.exec("h2", "setsid sleep 1000 >/dev/null 2>&1 &")?;
    let inside = tree(hosts.pid("h2")?);
    ensure!(
        inside.len() >= 3,
        "init, sshd and the sleeper, not {inside:?}"
    );
    // A connection over which the end would be heard, if there were one to hear.
    let mut listener = hosts
        .command("h0", "ssh h2 'echo here; sleep 1000' | { read x; touch /tmp/open; read x; touch /tmp/shut; }")
        .spawn()?;
    let result = wait_for("the connection", LIMIT, || {
        Ok(hosts.exec("h0", "test -e /tmp/open").ok())
    })
    .and_then(|_| hosts.verb(&["kill", "h2"]))
    .and_then(|_| reaches_nothing(hosts));
    listener.kill()?;
    listener.wait()?;
    result?;
    for pid in inside {
        ensure!(gone(pid), "process {pid} of h2 outlived it");
    }
    ensure!(hosts.verb(&["status"])?.contains("h2 down"));
    ensure!(!hosts.try_verb(&["exec", "h2", "true"])?.status.success());
    hosts.verb(&["up", "3"])?;
    ensure!(reaches(hosts, "h0", "h2")? && reaches(hosts, "h2", "h0")?);
    Ok(())
}

fn reaches_nothing(hosts: &Hosts) -> Result<()> {
    // No refusal either: the host is silent, not closed.
    let said = hosts.exec(
        "h0",
        "timeout 1 bash -c 'exec 3<>/dev/tcp/h2/22' 2>/dev/null; echo $?",
    )?;
    ensure!(said == "124" || said == "1", "{said}");
    hosts.exec("h0", "test ! -e /tmp/shut")?;
    Ok(())
}

/// A process and all its descendants.
fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let parents: Vec<(u32, u32)> = processes()
        .into_iter()
        .filter_map(|pid| Some((pid, status_field(pid, "PPid")?.parse().ok()?)))
        .collect();
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found
}

/// Whether a process is gone, or a zombie that only its parent could remove.
fn gone(pid: u32) -> bool {
    status_field(pid, "State").is_none_or(|state| state.starts_with('Z'))
}

/// The namespaces of a process, by kind and number.
fn namespaces(pid: u32) -> BTreeSet<String> {
    fs::read_dir(format!("/proc/{pid}/ns"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.to_str()?.to_owned()))
        .collect()
}

fn links() -> Result<String> {
    let output = Command::new("ip")
        .args(["-o", "link"])
        .output()
        .context("cannot run ip")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn down_leaves_nothing(hosts: &Hosts) -> Result<()> {
    let own = namespaces(std::process::id());
    hosts.start_pvm("")?;
    hosts.exec("h1", "setsid sleep 1000 >/dev/null 2>&1 &")?;
    hosts.verb(&["shape", "h1", "100mbit"])?;
    hosts.verb(&["cut", "h1", "h2"])?;
    let inside = tree(hosts.pid("switch")?);
    let theirs: BTreeSet<String> = inside
        .iter()
        .flat_map(|pid| namespaces(*pid))
        .filter(|ns| !own.contains(ns))
        .collect();
    // Three hosts and the switch, five kinds each, and what is half born has none.
    ensure!(theirs.len() >= 20, "{theirs:?}");
    hosts.verb(&["down"])?;
    for pid in inside {
        ensure!(gone(pid), "process {pid} is left");
    }
    for pid in processes() {
        let left: Vec<_> = namespaces(pid).intersection(&theirs).cloned().collect();
        ensure!(left.is_empty(), "process {pid} still holds {left:?}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(
        !mounts.contains("testhosts") && !mounts.contains("nsfs"),
        "{mounts}"
    );
    let links = links()?;
    ensure!(!links.contains("br0") && !links.contains("h0@"), "{links}");
    ensure!(!hosts.state().exists());
    ensure!(hosts.verb(&["status"])? == "no hosts are up");
    hosts.verb(&["down"])?; // and once more does no harm
    Ok(())
}

fn killed_parts(hosts: &Hosts) -> Result<()> {
    let end = |pid: u32| -> Result<()> {
        kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
        wait_for("its end", LIMIT, || Ok(gone(pid).then_some(())))
    };
    // One host's init, another's sshd: both come back.
    end(hosts.pid("h1")?)?;
    hosts.root("h2", "kill -9 $(cat /run/sshd.pid)")?;
    hosts.verb(&["up", "3"])?;
    ensure!(hosts.exec("h0", "ssh h1 hostname; ssh h2 hostname")? == "h1\nh2");
    // The switch: everything goes with it, and everything comes back.
    let inside = tree(hosts.pid("switch")?);
    end(hosts.pid("switch")?)?;
    wait_for("the end of what was inside", LIMIT, || {
        Ok(inside.iter().all(|pid| gone(*pid)).then_some(()))
    })?;
    ensure!(hosts.verb(&["status"])? == "no hosts are up");
    hosts.verb(&["up", "3"])?;
    ensure!(hosts.exec("h0", "ssh h1 hostname")? == "h1");
    end(hosts.pid("switch")?)?;
    hosts.verb(&["down"])?;
    ensure!(!hosts.state().exists());
    Ok(())
}

fn mistakes(hosts: &Hosts) -> Result<()> {
    for (args, expected) in [
        (&["exec", "h7", "true"][..], "h7 is not up"),
        (&["exec", "h0"], "exec [--root] HOST"),
        (&["cut", "h0", "h0"], "twice"),
        (&["cut", "h0", "../x"], "no host"),
        (&["shape", "h0", "fast"], "fast"),
        (&["up", "many"], "how many"),
        (&["fly"], "usage"),
    ] {
        let output = hosts.try_verb(args)?;
        let said = both(&output);
        ensure!(!output.status.success(), "{args:?} went through: {said}");
        ensure!(said.contains(expected), "{args:?}: {said}");
    }
    ensure!(hosts.verb(&["--help"])?.contains("usage"));
    // Its exit code is the command's.
    ensure!(
        hosts
            .try_verb(&["exec", "h0", "sh", "-c", "exit 7"])?
            .status
            .code()
            == Some(7)
    );
    Ok(())
}
