//! Tasks that talk to each other in every way PVM has move about three hosts at random, a hundred times.
//!
//! MIST_MOVES: how many moves the soak has to bear (default 100); MIST_SEED: which ones.

mod common;
mod testhosts;

use std::cell::Cell;
use std::fs;
use std::process::{Child, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::wait_child;
use serde_json::Value;
use testhosts::{Examples, Hosts, Installed, shared_folder};

const HOSTS: [&str; 3] = ["h0", "h1", "h2"];
/// How long an application may take that tasks of are moved meanwhile.
const LIMIT: Duration = Duration::from_secs(400);

/// Three hosts with a virtual machine under the shim, and the examples.
struct Stage {
    hosts: Hosts,
    mistctl: Installed,
    examples: Examples,
    /// For files that all hosts see at the same place, as tasks that move need them.
    shared: tempfile::TempDir,
    random: Cell<u64>,
}

/// A task that can be moved.
struct Task {
    tid: String,
    host: String,
    program: String,
}

type Test = fn(&Stage) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 1] = [("soak_finds_nothing_in_a_hundred_moves", soak)];
    testhosts::main(tests, set_up, |stage, test| test(stage))
}

fn set_up() -> Result<Stage> {
    let mistctl = Installed::new()?;
    let examples = Examples::build()?;
    let shared = shared_folder(0o1777)?;
    let hosts = Hosts::up(HOSTS.len())?;
    hosts.exec(
        "h0",
        &format!(
            "printf '{}\\n' >/tmp/hosts; {} pvm start --name h0 /tmp/hosts",
            HOSTS.join("\\n"),
            mistctl.path()
        ),
    )?;
    let seed = std::env::var("MIST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("MIST_SEED={seed}");
    Ok(Stage {
        hosts,
        mistctl,
        examples,
        shared,
        random: Cell::new(seed | 1),
    })
}

impl Stage {
    /// A number below `n` (xorshift).
    fn below(&self, n: usize) -> usize {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x >> 33) as usize % n.max(1)
    }

    /// Starts an example on h0 under the shim; what it prints goes to the file `out`.
    fn start(&self, command: &str) -> Result<Child> {
        let shell = format!(
            "{} exec -- {}/{command} >{}/out 2>&1",
            self.mistctl.path(),
            self.examples.dir(),
            self.shared.path().display()
        );
        let child = self.hosts.command("h0", &shell).spawn();
        child.with_context(|| format!("cannot start {command}"))
    }

    /// What it printed.
    fn said(&self) -> String {
        fs::read_to_string(self.shared.path().join("out")).unwrap_or_default()
    }

    /// Ends whatever still runs of an application that failed.
    fn clear(&self) {
        for host in HOSTS {
            let _ = self.hosts.exec(host, "pkill -KILL soak");
        }
    }

    /// The tasks that mistctl says can be moved.
    fn tasks(&self) -> Result<Vec<Task>> {
        let listing = self
            .hosts
            .exec("h0", &format!("{} ps --json", self.mistctl.path()))?;
        let listing: Value = serde_json::from_str(&listing)?;
        let tasks = listing["tasks"].as_array().context("no list of tasks")?;
        let movable = tasks.iter().filter(|task| task["shim"] == "yes");
        let text = |task: &Value, key: &str| task[key].as_str().unwrap_or_default().to_owned();
        Ok(movable
            .map(|task| Task {
                tid: text(task, "virtual_tid"),
                host: text(task, "host"),
                program: text(task, "program"),
            })
            .collect())
    }

    /// Moves tasks to hosts, all at the same time. How many moved; those that ended meanwhile do not count.
    fn move_all(&self, moves: &[(&Task, &str)]) -> Result<usize> {
        let mut running = Vec::new();
        for (task, host) in moves {
            let from = HOSTS[self.below(HOSTS.len())];
            let log = format!("/tmp/move.{}", task.tid);
            let shell = format!(
                "{} migrate {} {host} >{log} 2>&1; c=$?; [ $c = 0 ] || {{ cat {log} >&2; exit $c; }}",
                self.mistctl.path(),
                task.tid
            );
            running.push((
                self.hosts.command(from, &shell).spawn()?,
                task,
                host,
                from,
                log,
            ));
        }
        let mut moved = 0;
        for (mut child, task, host, from, log) in running {
            let what = format!(
                "moving {} ({}) from {} to {host}",
                task.tid, task.program, task.host
            );
            let status = wait_child(&mut child, &what, LIMIT)?;
            match status.code() {
                Some(0) => moved += 1,
                // It ended by itself, before or meanwhile.
                Some(3) => {}
                _ => {
                    let said = self.hosts.exec(from, &format!("cat {log}"))?;
                    bail!("{what}: {status}: {said}");
                }
            }
        }
        Ok(moved)
    }

    /// One random thing: a task moves, two move at once, or two partners change places.
    fn step(&self, tasks: &[Task]) -> Result<usize> {
        if tasks.is_empty() {
            return Ok(0);
        }
        let elsewhere = |task: &Task| {
            let others: Vec<&str> = HOSTS.into_iter().filter(|h| *h != task.host).collect();
            others[self.below(others.len())]
        };
        let one = &tasks[self.below(tasks.len())];
        let other = &tasks[self.below(tasks.len())];
        if one.tid == other.tid {
            return self.move_all(&[(one, elsewhere(one))]);
        }
        match self.below(3) {
            0 if one.host != other.host => self.move_all(&[(one, &other.host), (other, &one.host)]),
            1 => self.move_all(&[(one, elsewhere(one)), (other, elsewhere(other))]),
            _ => self.move_all(&[(one, elsewhere(one))]),
        }
    }

    /// Moves tasks about until the application ends. How many moves there were, and its last line.
    ///
    /// The process that the shell has started ends when that task moves; the application has ended when PVM knows
    /// no task of it any more.
    fn until_it_ends(&self, command: &str) -> Result<(usize, String)> {
        let mut child = self.start(command)?;
        let done = self.move_about(&mut child);
        if done.is_err() {
            self.clear();
        }
        let _ = wait_child(&mut child, command, LIMIT)?;
        let said = self.said();
        let moves = done.with_context(|| format!("{command}; it said: {said}"))?;
        println!("{command}: {moves} moves");
        Ok((moves, said.lines().last().unwrap_or_default().to_owned()))
    }

    fn move_about(&self, child: &mut Child) -> Result<usize> {
        let mut moves = 0;
        loop {
            let tasks = self.tasks()?;
            let works = tasks.iter().any(|task| !task.program.ends_with("pvmgs"));
            if !works && child.try_wait()?.is_some() {
                return Ok(moves);
            }
            moves += self
                .step(&tasks)
                .with_context(|| format!("after {moves} moves"))?;
        }
    }
}

fn soak(stage: &Stage) -> Result<()> {
    let wanted = std::env::var("MIST_MOVES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100);
    let mut moves = 0;
    while moves < wanted {
        let seed = stage.below(1 << 30);
        let (n, said) = stage.until_it_ends(&format!("soak -n 6 -t 30 -s {seed}"))?;
        moves += n;
        ensure!(said.starts_with("soak: OK "), "after {moves} moves: {said}");
        ensure!(n > 0, "nothing moved");
    }
    Ok(())
}
