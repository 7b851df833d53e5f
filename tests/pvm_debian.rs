//! The programs of Debian's package pvm-examples, which nobody here built, on three hosts: each does under the shim,
//! with its tasks moving between the hosts, what it does without. `docs/pvm-examples.md` describes them.

mod common;
mod testhosts;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::{wait_child, wait_for};
use serde_json::Value;
use testhosts::{Hosts, Installed};

const LIMIT: Duration = Duration::from_secs(60);
const HOSTS: [&str; 3] = ["h0", "h1", "h2"];

/// One way to run some of the programs.
struct Scenario {
    name: &'static str,
    /// Run by bash on h0, as the test user; `$dir` is seen by all hosts.
    shell: &'static str,
    /// What it must print, shim or no shim.
    prints: &'static [&'static str],
    /// What is done to its tasks meanwhile; without any it is run under the shim, and nothing moves.
    moves: &'static [Act],
}

/// Most of the programs end within a second. One task of those that are named in a `Free` is held before its first
/// step, by what pvmd finds first in PVM_PATH (or the scenario in `$dir/bin`), so that its partners wait for it.
#[derive(Clone, Copy)]
enum Act {
    /// A task of this program, one that has not moved yet, goes to the next host.
    Move(&'static str),
    /// Its last one is stopped, so that its partners wait for it; and goes on.
    Stop(&'static str),
    GoOn(&'static str),
    /// The one that is held begins.
    Free(&'static str),
}
use Act::{Free, GoOn, Move, Stop};

/// Begins every program, but not when it is to be held: then one waits until somebody opens a FIFO.
const WRAPPER: &str = r#"#!/bin/bash
name=${0##*/} dir=${0%/bin/*}
if [ -p "$dir/hold/$name" ] && mkdir "$dir/hold/$name.held" 2>/dev/null; then read -r _ <"$dir/hold/$name"; fi
exec /usr/bin/$name "$@"
"#;

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
    Scenario { name: "hello", shell: "hello.pvm", prints: &["hello, world"], moves: &[Move("hello.pvm"), Free("hello_other")] },
    Scenario {
        name: "master1 and slave1",
        shell: "master1",
        prints: &["I got 1500.000000 from 8; (expecting 1500.000000)", "I got 100.000000 from 1"], moves: &[Move("master1"), Move("slave1"), Free("slave1")] },
    Scenario { name: "fmaster1 and fslave1", shell: "fmaster1", prints: &["(expected    1500.0000000 )"], moves: &[Move("fmaster1"), Move("fslave1"), Free("fslave1")] },
    Scenario {
        name: "spmd",
        shell: "console 4 spmd",
        prints: &["Pass a token through the   4 tid ring", "token ring done"], moves: &[Move("spmd"), Free("spmd")] },
    Scenario { name: "fspmd", shell: "console 4 fspmd", prints: &["token ring done"], moves: &[Move("fspmd"), Free("fspmd")] },
    Scenario { name: "hitc and hitc_slave", shell: "hitc", prints: &["I got result from tid"], moves: &[Move("hitc"), Stop("hitc"), Free("hitc_slave"), Move("hitc_slave"), GoOn("hitc")] },
    Scenario { name: "timing and timing_slave", shell: "timing", prints: &["done"], moves: &[Move("timing"), Stop("timing"), Free("timing_slave"), Move("timing_slave"), GoOn("timing")] },
    Scenario {
        name: "gexample",
        shell: r"printf '20\n3\n' >$dir/in; gexample <$dir/in",
        prints: &["The 1-Norm is 210", "2.4329e+18"], moves: &[Move("gexample"), Move("gexample"), Free("gexample")] },
    Scenario { name: "fgexample", shell: "fgexample", prints: &["5050"], moves: &[Move("fgexample"), Move("fgexample"), Free("fgexample")] },
    Scenario { name: "gexamp", shell: "gexamp 4", prints: &["gexamp 0: sync"], moves: &[Move("gexamp"), Move("gexamp"), Free("gexamp")] },
    Scenario { name: "gs", shell: "gs.pvm 4", prints: &["waiting on kids to join"], moves: &[Move("gs.pvm"), Free("gs.pvm")] },
    Scenario { name: "joinleave", shell: "gexamp 1; $dir/bin/joinleave 200", prints: &["Joined 200 times"], moves: &[Stop("pvmgs"), Free("joinleave"), Move("joinleave"), GoOn("pvmgs")] },
    Scenario { name: "thb and tnb", shell: "thb 3", prints: &["joined group31"], moves: &[Move("thb"), Move("tnb"), Free("tnb")] },
    Scenario { name: "trsg", shell: r"printf '4\n3\n' >$dir/in; trsg <$dir/in", prints: &["first 12 integers is 650", "Test Ok"], moves: &[Move("trsg"), Move("trsg"), Free("trsg")] },
    // The first of its two sums begins with what stands on its stack, on some machines not 0.
    Scenario { name: "frsg", shell: r"printf '4\n3\n' >$dir/in; frsg <$dir/in", prints: &["        650", "Test Ok"], moves: &[Move("frsg"), Move("frsg"), Free("frsg")] },
    Scenario { name: "tst", shell: "gexamp 1; $dir/bin/tst", prints: &["joined prognosis", "left prognosis"], moves: &[Stop("pvmgs"), Free("tst"), Move("tst"), GoOn("pvmgs")] },
    Scenario { name: "tjf", shell: "gexamp 1; $dir/bin/tjf", prints: &["joined group7"], moves: &[Stop("pvmgs"), Free("tjf"), Move("tjf"), GoOn("pvmgs")] },
    Scenario { name: "tjl", shell: "gexamp 1; $dir/bin/tjl", prints: &["joined group7"], moves: &[Stop("pvmgs"), Free("tjl"), Move("tjl"), GoOn("pvmgs")] },
    Scenario {
        name: "inherita, inherit1 and inherit2",
        shell: "inherita inherit1",
        prints: &["I just spawned inherit2", "END - sent from inherit1"], moves: &[Move("inherita"), Move("inherit1"), Free("inherit2")] },
    Scenario {
        name: "inherita, inherit3 and inherit2",
        shell: "inherita inherit3",
        prints: &["I just spawned inherit2", "END - sent from inherit3"], moves: &[Move("inherita"), Move("inherit3"), Free("inherit2")] },
    Scenario {
        name: "task0, task1 and task_end",
        shell: "task0 svc d &
            until gmbi svc | grep -q svc; do sleep 0.02; done
            $dir/bin/task1 svc 0 d; task_end svc 0; wait",
        prints: &["welcome to my server", "handled 2 service requests"], moves: &[Move("task0"), Free("task1")] },
    Scenario {
        name: "lmbi, gmbi and rme",
        // What a task has left for ever nobody else may remove.
        shell: "lmbi 3 p e; gmbi '*lmbi*'
            for name in $(gmbi '*lmbi*' | sed -n 's/.*class name: <\\(.*\\)>/\\1/p'); do rme $name 0; done",
        prints: &["mbox entries returned", "PvmMboxPersistent", "Key locked by another task"], moves: &[] },
    Scenario {
        name: "mhf_server and mhf_tickle",
        // List the handlers; let the server leave PVM and come back; find it again; list; end both.
        shell: r"mhf_server &
            until gmbi | grep -q -i mhf; do sleep 0.02; done
            printf '0\n9\n8\n' >$dir/in; $dir/bin/mhf_tickle <$dir/in; wait",
        prints: &["PMH - display present message handlers", "mhf_server"], moves: &[Move("mhf_server"), Free("mhf_tickle")] },
    Scenario {
        name: "bwtest, packed",
        shell: "$dir/bin/dbwtest & ssh h1 \"LD_PRELOAD=$LD_PRELOAD PVM_EXPORT=$PVM_EXPORT dbwtest >>$dir/out 2>&1\"; wait",
        prints: &["100000 doubles received correctly", "Data size: 800000"], moves: &[Move("dbwtest"), Free("dbwtest")] },
    Scenario {
        name: "bwtest, raw",
        shell: "$dir/bin/rbwtest & ssh h1 \"LD_PRELOAD=$LD_PRELOAD PVM_EXPORT=$PVM_EXPORT rbwtest >>$dir/out 2>&1\"; wait",
        prints: &["100000 doubles received correctly", "Data size: 800000"], moves: &[Move("rbwtest"), Free("rbwtest")] },
    Scenario {
        name: "bwtest, in place",
        shell: "$dir/bin/ibwtest & ssh h1 \"LD_PRELOAD=$LD_PRELOAD PVM_EXPORT=$PVM_EXPORT ibwtest >>$dir/out 2>&1\"; wait",
        prints: &["100000 doubles received correctly", "Data size: 800000"], moves: &[Move("ibwtest"), Free("ibwtest")] },
    Scenario {
        name: "bwtest, psend",
        shell: "$dir/bin/pbwtest & ssh h1 \"LD_PRELOAD=$LD_PRELOAD PVM_EXPORT=$PVM_EXPORT pbwtest >>$dir/out 2>&1\"; wait",
        prints: &["100000 doubles received correctly", "Data size: 800000"], moves: &[Move("pbwtest"), Free("pbwtest")] },
];

/// Three hosts, with a virtual machine that knows nothing of mist.
struct Stage {
    hosts: Hosts,
    mistctl: Installed,
    /// Seen by all hosts: `bin` with a wrapper for each program, `hold`, and what the programs print in `out`.
    dir: tempfile::TempDir,
}

fn main() -> ExitCode {
    let tests = SCENARIOS.iter().map(|scenario| (scenario.name, scenario));
    testhosts::main(tests, Stage::set_up, on_stage)
}

fn on_stage(stage: &Stage, scenario: &'static Scenario) -> Result<()> {
    let plain = stage.play(scenario, "unset LD_PRELOAD", &[])?;
    // PVM_EXPORT makes pvm_spawn hand the variable on to the tasks, on whatever host.
    let shim = stage
        .mistctl
        .path()
        .replace("bin/mistctl", "lib/libmistshim.so");
    let shim = format!("export LD_PRELOAD={shim} PVM_EXPORT=LD_PRELOAD");
    let moved = stage.play(scenario, &shim, scenario.moves)?;
    let (plain, moved) = (essence(&plain), essence(&moved));
    let lost: Vec<_> = plain.difference(&moved).collect();
    let new: Vec<_> = moved.difference(&plain).collect();
    ensure!(
        lost.is_empty() && new.is_empty(),
        "under the shim, and with moves, these lines are missing: {lost:#?}\nand these are new: {new:#?}"
    );
    Ok(())
}

impl Stage {
    fn set_up() -> Result<Stage> {
        let hosts = Hosts::up(HOSTS.len())?;
        let mistctl = Installed::new()?;
        // Not /tmp, which is each host's own; not the checkout, which the user may not read.
        let dir = tempfile::tempdir_in("/var/tmp")?;
        let stage = Stage {
            hosts,
            mistctl,
            dir,
        };
        for name in ["", "bin", "hold"] {
            fs::create_dir_all(stage.path(name))?;
            fs::set_permissions(stage.path(name), fs::Permissions::from_mode(0o777))?;
        }
        let of = |act: &Act| match act {
            Free(program) => Some(*program),
            _ => None,
        };
        for program in SCENARIOS.iter().flat_map(|s| s.moves).filter_map(of) {
            let path = stage.path("bin").join(program);
            fs::write(&path, WRAPPER)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let path = format!("PVM_PATH={}:/usr/bin", stage.path("bin").display());
        stage
            .hosts
            .start_pvm(&format!("{path} PVM_DPATH='env {path} pvmd'"))?;
        Ok(stage)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a scenario in a virtual machine without other tasks; what it printed.
    fn play(&self, scenario: &Scenario, environment: &str, acts: &[Act]) -> Result<String> {
        // The group server ends with the rest, and starts again in the new environment.
        self.hosts.console("reset")?;
        let before = self.hosts.exec("h0", "cat /tmp/pvml.*")?;
        let dir = self.dir.path().display();
        self.hosts
            .exec("h0", &format!("cd {dir} && rm -rf hold/* out && touch out"))?;
        for act in acts {
            if let Free(program) = act {
                self.hosts
                    .exec("h0", &format!("mkfifo {dir}/hold/{program}"))?;
            }
        }
        let shell = format!(
            "dir={dir}; exec >>$dir/out 2>&1\n{FUNCTIONS}\n{environment}\n{}",
            scenario.shell
        );
        let mut shell = self.hosts.command("h0", &shell).spawn()?;
        let said = || fs::read_to_string(self.path("out")).unwrap_or_default();
        let done = self.act(acts).with_context(said);
        if done.is_err() {
            let _ = shell.kill();
            for host in HOSTS {
                let _ = self.hosts.exec(host, "pkill -CONT -u $(id -u)");
            }
        }
        let ended = wait_child(&mut shell, scenario.name, LIMIT).map(drop);
        done.and(ended)?;
        // What the shell has started ends for it when it moves.
        wait_for("the end of its tasks", LIMIT, || {
            let tasks = self.tasks()?;
            Ok(tasks
                .iter()
                .all(|task| task.program == "pvmgs")
                .then_some(()))
        })
        .with_context(said)?;
        // What tasks print and nobody collects goes there.
        let log = self.hosts.exec("h0", "cat /tmp/pvml.*")?;
        let log = log.strip_prefix(&before).unwrap_or(&log);
        let said = said();
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
        // The shell's own words about a task that has moved.
        let lines = said.lines().filter(|line| !line.contains(" Killed "));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    fn act(&self, acts: &[Act]) -> Result<()> {
        let mut moved = HashSet::new();
        let mut last: Option<Task> = None;
        for act in acts {
            match act {
                Move(program) => {
                    let task = wait_for(&format!("a move of {program}"), LIMIT, || {
                        self.try_move(program, &moved)
                    })?;
                    moved.insert(task.tid.clone());
                    last = Some(task);
                }
                Stop(program) | GoOn(program) => {
                    let signal = if matches!(act, Stop(_)) {
                        "STOP"
                    } else {
                        "CONT"
                    };
                    let fits = |task: &&Task| match (act, &last) {
                        (Stop(_), Some(moved)) => task.tid == moved.tid,
                        (Stop(_), None) => task.program == *program,
                        _ => task.program == *program && task.state == "stopped",
                    };
                    let task = wait_for(program, LIMIT, || {
                        Ok(self.tasks()?.into_iter().find(|task| fits(&task)))
                    })?;
                    self.hosts
                        .exec(&task.host, &format!("kill -{signal} {}", task.pid))?;
                }
                Free(program) => {
                    let path = self.path("hold").join(program);
                    // Blocks until it is there.
                    self.hosts.exec(
                        "h0",
                        &format!("timeout 50 bash -c 'echo >{}'", path.display()),
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Moves a task of this program that is not among those that have moved, if there is one yet.
    fn try_move(&self, program: &str, but: &HashSet<String>) -> Result<Option<Task>> {
        let tasks = self.tasks()?;
        let mut fit = tasks
            .into_iter()
            .filter(|t| t.program == program && t.shim && !but.contains(&t.tid));
        let Some(task) = fit.next() else {
            return Ok(None);
        };
        let at = HOSTS.iter().position(|host| *host == task.host);
        let next = at.and_then(|at| HOSTS.get(at + 1)).unwrap_or(&HOSTS[0]);
        let command = format!("{} migrate --json {} {next}", self.mistctl.path(), task.tid);
        let output = self
            .hosts
            .try_verb(&["exec", "h0", "bash", "-c", &command])?;
        let said: Value =
            serde_json::from_slice(&output.stdout).with_context(|| common::both(&output))?;
        match said["failure"].as_str() {
            None => Ok(Some(task)),
            // It has just begun; another one may be left.
            Some("busy" | "no_such_process") => Ok(None),
            Some(_) => bail!("{program}: {said}"),
        }
    }

    fn tasks(&self) -> Result<Vec<Task>> {
        let listing = self
            .hosts
            .exec("h0", &format!("{} ps --json", self.mistctl.path()))?;
        let listing: Value = serde_json::from_str(&listing)?;
        let tasks = listing["tasks"].as_array().context("no list of tasks")?;
        let text = |task: &Value, key: &str| task[key].as_str().unwrap_or_default().to_owned();
        Ok(tasks
            .iter()
            .map(|task| Task {
                tid: text(task, "virtual_tid"),
                host: text(task, "host"),
                pid: task["pid"].as_i64().unwrap_or_default(),
                program: text(task, "program")
                    .rsplit('/')
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
                state: text(task, "state"),
                shim: task["shim"] == "yes",
            })
            .collect())
    }
}

/// A row of `mistctl ps`.
struct Task {
    tid: String,
    host: String,
    pid: i64,
    /// Without its folder.
    program: String,
    state: String,
    shim: bool,
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
