//! The programs of Debian's package pvm-examples, which nobody here built, on three hosts: each
//! does under the shim what it does without it. `docs/pvm-examples.md` describes them.

mod common;
mod testhosts;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use common::both;
use testhosts::{Hosts, shared_folder, shim};

/// One way to run some of the programs.
struct Scenario {
    name: &'static str,
    /// Run by bash on h0, as the test user.
    shell: &'static str,
    /// What it must print, shim or no shim.
    prints: &'static [&'static str],
}

/// Shell functions for the scenarios.
///
/// `console N PROGRAM`: N tasks of PROGRAM started by PVM's console, which prints what they print until the last has
/// ended. Its prompt stands before whatever comes first.
const FUNCTIONS: &str = r#"
console() {
    local dir; dir=$(mktemp -d); mkfifo $dir/in
    stdbuf -oL pvm <$dir/in >$dir/out 2>&1 & exec 3>$dir/in
    echo "spawn -$1 -> $2" >&3
    until grep -q '] finished' $dir/out; do sleep 0.02; done
    echo quit >&3; exec 3>&-; wait; sed 's/pvm> //g' $dir/out; rm -r $dir
}
"#;

const SCENARIOS: &[Scenario] = &[
    Scenario { name: "hello", shell: "hello.pvm", prints: &["hello, world"] },
    Scenario {
        name: "master1 and slave1",
        shell: "master1",
        prints: &["I got 1500.000000 from 8; (expecting 1500.000000)", "I got 100.000000 from 1"],
    },
    Scenario { name: "fmaster1 and fslave1", shell: "fmaster1", prints: &["(expected    1500.0000000 )"] },
    Scenario {
        name: "spmd",
        shell: "console 4 spmd",
        prints: &["Pass a token through the   4 tid ring", "token ring done"],
    },
    Scenario { name: "fspmd", shell: "console 4 fspmd", prints: &["token ring done"] },
    Scenario { name: "hitc and hitc_slave", shell: "hitc", prints: &["I got result from tid"] },
    Scenario { name: "timing and timing_slave", shell: "timing", prints: &["done"] },
    Scenario {
        name: "gexample",
        shell: r"printf '20\n3\n' | gexample",
        prints: &["The 1-Norm is 210", "2.4329e+18"],
    },
    Scenario { name: "fgexample", shell: "fgexample", prints: &["5050"] },
    Scenario { name: "gexamp", shell: "gexamp 4", prints: &["gexamp 0: sync"] },
    Scenario { name: "gs", shell: "gs.pvm 4", prints: &["waiting on kids to join"] },
    Scenario { name: "joinleave", shell: "joinleave 200", prints: &["Joined 200 times"] },
    Scenario { name: "thb and tnb", shell: "thb 3", prints: &["joined group31"] },
    Scenario { name: "trsg", shell: r"printf '4\n3\n' | trsg", prints: &["first 12 integers is 650", "Test Ok"] },
    Scenario { name: "frsg", shell: r"printf '4\n3\n' | frsg", prints: &["integers is          650", "Test Ok"] },
    Scenario { name: "tst", shell: "tst", prints: &["joined prognosis", "left prognosis"] },
    Scenario { name: "tjf", shell: "tjf", prints: &["joined group7"] },
    Scenario { name: "tjl", shell: "tjl", prints: &["joined group7"] },
    Scenario {
        name: "inherita, inherit1 and inherit2",
        shell: "inherita inherit1",
        prints: &["I just spawned inherit2", "END - sent from inherit1"],
    },
    Scenario {
        name: "inherita, inherit3 and inherit2",
        shell: "inherita inherit3",
        prints: &["I just spawned inherit2", "END - sent from inherit3"],
    },
    Scenario {
        name: "task0, task1 and task_end",
        shell: "task0 svc d >/tmp/task0 2>&1 &
            until gmbi svc | grep -q svc; do sleep 0.02; done
            task1 svc 0 d; task_end svc 0; wait; cat /tmp/task0",
        prints: &["welcome to my server", "handled 2 service requests"],
    },
    Scenario {
        name: "lmbi, gmbi and rme",
        // What a task has left for ever nobody else may remove.
        shell: "lmbi 3 p e; gmbi '*lmbi*'
            for name in $(gmbi '*lmbi*' | sed -n 's/.*class name: <\\(.*\\)>/\\1/p'); do rme $name 0; done",
        prints: &["mbox entries returned", "PvmMboxPersistent", "Key locked by another task"],
    },
    Scenario {
        name: "mhf_server and mhf_tickle",
        // List the handlers; let the server leave PVM and come back; find it again; list; end both.
        shell: r"mhf_server >/tmp/server 2>&1 &
            until gmbi | grep -q -i mhf; do sleep 0.02; done
            printf '0\n9\n8\n' | mhf_tickle; wait; cat /tmp/server",
        prints: &["PMH - display present message handlers", "mhf_server"],
    },
    Scenario {
        name: "bwtest, packed",
        shell: "dbwtest >/tmp/bw 2>&1 & ssh h1 ${LD_PRELOAD:+env LD_PRELOAD=$LD_PRELOAD} dbwtest; wait; cat /tmp/bw",
        prints: &["100000 doubles received correctly", "Data size: 800000"],
    },
    Scenario {
        name: "bwtest, raw",
        shell: "rbwtest >/tmp/bw 2>&1 & ssh h1 ${LD_PRELOAD:+env LD_PRELOAD=$LD_PRELOAD} rbwtest; wait; cat /tmp/bw",
        prints: &["100000 doubles received correctly", "Data size: 800000"],
    },
    Scenario {
        name: "bwtest, in place",
        shell: "ibwtest >/tmp/bw 2>&1 & ssh h1 ${LD_PRELOAD:+env LD_PRELOAD=$LD_PRELOAD} ibwtest; wait; cat /tmp/bw",
        prints: &["100000 doubles received correctly", "Data size: 800000"],
    },
    Scenario {
        name: "bwtest, psend",
        shell: "pbwtest >/tmp/bw 2>&1 & ssh h1 ${LD_PRELOAD:+env LD_PRELOAD=$LD_PRELOAD} pbwtest; wait; cat /tmp/bw",
        prints: &["100000 doubles received correctly", "Data size: 800000"],
    },
];

/// Three hosts and the shim's library.
struct Stage {
    hosts: Hosts,
    dir: tempfile::TempDir,
}

fn main() -> ExitCode {
    let tests = SCENARIOS.iter().map(|scenario| (scenario.name, scenario));
    testhosts::main(tests, set_up, same_under_the_shim)
}

fn same_under_the_shim(Stage { hosts, dir }: &Stage, scenario: &Scenario) -> Result<()> {
    let library = dir.path().join("libmistshim.so");
    // PVM_EXPORT makes pvm_spawn hand the variable on to the tasks, on whatever host.
    let shim = format!(
        "export LD_PRELOAD={} PVM_EXPORT=LD_PRELOAD",
        library.display()
    );
    let plain = play(hosts, scenario, "true")?;
    let with = play(hosts, scenario, &shim)?;
    let (plain, with) = (essence(&plain), essence(&with));
    let lost: Vec<_> = plain.difference(&with).collect();
    let new: Vec<_> = with.difference(&plain).collect();
    ensure!(
        lost.is_empty() && new.is_empty(),
        "under the shim these lines are missing: {lost:#?}\nand these are new: {new:#?}"
    );
    Ok(())
}

fn set_up() -> Result<Stage> {
    let hosts = Hosts::up(3)?;
    hosts.start_pvm("")?;
    let dir = shared_folder(0o755)?;
    let library = dir.path().join("libmistshim.so");
    fs::copy(shim()?, &library)?;
    fs::set_permissions(&library, fs::Permissions::from_mode(0o755))?;
    Ok(Stage { hosts, dir })
}

/// Runs a scenario in a virtual machine without other tasks; what it printed.
fn play(hosts: &Hosts, scenario: &Scenario, environment: &str) -> Result<String> {
    // The group server ends with the rest, and starts again in the new environment.
    hosts.console("reset")?;
    let before = hosts.exec("h0", "cat /tmp/pvml.*")?;
    let shell = format!("exec 2>&1\n{FUNCTIONS}\n{environment}\n{}", scenario.shell);
    let output = hosts.try_verb(&["exec", "h0", "timeout", "60", "bash", "-c", &shell])?;
    // What tasks print and nobody collects goes there.
    let log = hosts.exec("h0", "cat /tmp/pvml.*")?;
    let log = log.strip_prefix(&before).unwrap_or(&log);
    let said = both(&output);
    for expected in scenario.prints {
        ensure!(
            said.contains(expected) || log.contains(expected),
            "{environment}: '{expected}' is not among what it printed:\n{said}\nlog:\n{log}"
        );
    }
    ensure!(
        !log.contains("ld.so"),
        "the library was not loaded everywhere: {log}"
    );
    Ok(said)
}

/// What is the same in every run: lines without numbers, tids and hosts, in no order, once each.
fn essence(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(|line| {
            let words: Vec<String> = line.split_whitespace().map(word).collect();
            words.join(" ")
        })
        .collect()
}

/// A word with everything varying in it replaced: it all has a digit somewhere near.
fn word(word: &str) -> String {
    let mut out = String::new();
    let mut run = String::new();
    for c in word.chars().chain([' ']) {
        if c.is_ascii_alphanumeric() {
            run.push(c);
            continue;
        }
        out += if run.chars().any(|c| c.is_ascii_digit()) {
            "#"
        } else {
            &run
        };
        run.clear();
        if c != ' ' {
            out.push(c);
        }
    }
    out
}
