//! A virtual machine of several hosts that `mistctl pvm start` makes: every task on every host gets the shim.

mod common;
mod testhosts;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::wait_for;
use serde_json::Value;
use testhosts::{Hosts, Installed};

const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let tests = [("every_task_on_every_host_gets_the_shim", ())];
    testhosts::main(tests, || Ok(()), |(), ()| every_host())
}

fn every_host() -> Result<()> {
    let installed = Installed::new()?;
    let mistctl = installed.path();
    let hosts = Hosts::up(4)?;
    // h1 as it is, h2 with a pvmd of its own choice, h3 is added later; and one that cannot be.
    let hostfile = "h0\\nh1\\nh2 dx=/usr/bin/pvmd\\nh9\\n";
    let started = hosts.exec(
        "h0",
        &format!(
            "printf '{hostfile}' >/tmp/hosts; {mistctl} pvm start --json /tmp/hosts; test $? = 1"
        ),
    )?;
    let started: Value = serde_json::from_str(&started)?;
    ensure!(
        started["hosts"].as_array().map(Vec::len) == Some(3),
        "{started}"
    );
    ensure!(started["failed"][0]["host"] == "h9", "{started}");
    let said = hosts.console("add h3\nspawn -4 /bin/sleep 1000")?;
    ensure!(said.contains("4 successful"), "{said}");
    for host in ["h0", "h1", "h2", "h3"] {
        wait_for(&format!("the shim on {host}"), LIMIT, || {
            let mapped = "grep -q libmistshim.so /proc/$(pgrep -x sleep -P $(pgrep -x pvmd))/maps";
            Ok(hosts.exec(host, mapped).ok())
        })?;
    }
    let listing = hosts.exec("h0", &format!("{mistctl} ps --json"))?;
    let listing: Value = serde_json::from_str(&listing)?;
    let tasks = listing["tasks"].as_array().context("no tasks")?;
    ensure!(tasks.len() == 4, "{listing}");
    for task in tasks {
        ensure!(task["shim"].is_string(), "{task}");
        ensure!(task["memory"].is_u64(), "{task}");
        ensure!(task["pid"].is_i64(), "{task}");
    }
    // Asked on another host, it is the same.
    let said = hosts.exec("h2", &format!("{mistctl} ps"))?;
    let lines = said.lines().filter(|line| line.contains(" yes "));
    ensure!(lines.count() == 4, "{said}");
    // From any host the whole of it ends.
    // (Only the user's processes: the hosts' own init sleeps too.)
    hosts.exec("h1", &format!("{mistctl} pvm stop"))?;
    for host in ["h0", "h1", "h2", "h3"] {
        wait_for(&format!("the end of PVM on {host}"), LIMIT, || {
            Ok(hosts.exec(host, "! pgrep -u $(id -u) -x 'pvmd|sleep'").ok())
        })?;
    }
    let left = hosts.exec("h1", "ls /tmp")?;
    ensure!(!left.contains(".mist-"), "{left}");
    Ok(())
}
