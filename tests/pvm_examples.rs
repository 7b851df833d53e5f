//! The programs of `examples/` on three hosts, without mist: each gives its right result, and
//! `soak` sees every kind of fault that it is there to see.

mod common;
mod testhosts;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::{both, wait_for};
use testhosts::{Examples, Hosts};

const LIMIT: Duration = Duration::from_secs(60);

/// Hosts with a virtual machine, and the examples where the test user can read them.
struct Stage {
    hosts: Hosts,
    examples: Examples,
}

type Test = fn(&Stage) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 12] = [
        ("heat_is_the_same_for_any_number_of_workers", heat),
        ("farm_counts_primes", farm),
        ("farm_survives_the_loss_of_a_worker", farm_loses_one),
        ("ring_passes_every_hop", ring),
        ("matmul_is_the_same_for_any_number_of_workers", matmul),
        (
            "wave_in_fortran_is_the_same_for_any_number_of_workers",
            wave,
        ),
        ("soak_finds_nothing", |s| soak(s, "-t 3")),
        ("soak_over_direct_routes_finds_nothing", |s| {
            soak(s, "-t 3 -d")
        }),
        ("soak_sees_a_lost_message", |s| sees(s, "lose", &["LOST"])),
        ("soak_sees_a_doubled_message", |s| {
            sees(s, "double", &["DOUBLED"])
        }),
        ("soak_sees_messages_change_places", |s| {
            sees(s, "swap", &["REORDERED"])
        }),
        ("soak_sees_a_damaged_and_a_misdelivered_message", |s| {
            sees(s, "damage", &["DAMAGED"])?;
            // Whoever is first: the one who gets it, or the one who does not.
            sees(s, "stray", &["MISATTRIBUTED", "LOST"])
        }),
    ];
    testhosts::main(tests, set_up, |stage, test| test(stage))
}

fn set_up() -> Result<Stage> {
    let hosts = Hosts::up(3)?;
    hosts.start_pvm("")?;
    let examples = Examples::build()?;
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"])
        .arg(examples.path().join("fault.so"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testhosts/fault.c"));
    let output = hosts.run(cc)?;
    ensure!(output.status.success(), "cc fault.c: {}", both(&output));
    Ok(Stage { hosts, examples })
}

impl Stage {
    /// The last line that an example prints, whatever its exit code.
    fn example(&self, command: &str) -> Result<String> {
        let shell = format!("{}/{command}", self.examples.dir());
        let output = self.hosts.try_verb(&["exec", "h0", "bash", "-c", &shell])?;
        let said = String::from_utf8_lossy(&output.stdout);
        said.lines()
            .last()
            .map(str::to_owned)
            .with_context(|| format!("{command}: {}", both(&output)))
    }

    /// Runs an example in several ways, which must all print the expected line.
    fn all_print(&self, expected: &str, commands: &[&str]) -> Result<()> {
        for command in commands {
            let said = self.example(command)?;
            ensure!(said == expected, "{command}: '{said}', not '{expected}'");
        }
        Ok(())
    }
}

fn heat(stage: &Stage) -> Result<()> {
    stage.all_print(
        "heat: 256x256, 200 steps, checksum 6196b2e4237475b3",
        &["heat -w 0", "heat", "heat -w 1", "heat -w 7"],
    )
}

fn farm(stage: &Stage) -> Result<()> {
    // The number of primes below 10^6 and 10^5 is in every table.
    stage.all_print(
        "farm: 78498 primes below 1000000, 60 jobs",
        &["farm", "farm -w 7"],
    )?;
    stage.all_print(
        "farm: 9592 primes below 100000, 3 jobs",
        &["farm -n 100000 -j 3 -w 5"],
    )
}

fn farm_loses_one(stage: &Stage) -> Result<()> {
    let hosts = &stage.hosts;
    let shell = format!(
        "{}/farm -n 8000000 -j 200 -w 6 >/tmp/farm 2>&1",
        stage.examples.dir()
    );
    let mut farm = hosts.command("h0", &shell).spawn()?;
    // The first worker on another host that can be seen is the one to die.
    let killed = wait_for("a worker on h1", LIMIT, || {
        Ok(hosts.exec("h1", "pkill -KILL -o -x farm").ok())
    });
    let ended = common::wait_child(&mut farm, "farm", LIMIT);
    killed?;
    ended?;
    let said = hosts.exec("h0", "cat /tmp/farm")?;
    ensure!(said.contains("is lost"), "{said}");
    ensure!(
        said.ends_with("farm: 539777 primes below 8000000, 200 jobs"),
        "{said}"
    );
    Ok(())
}

fn ring(stage: &Stage) -> Result<()> {
    let expected = "ring: OK, 4 tasks, 200 laps, checksum 686d47255268e425";
    stage.all_print(expected, &["ring", "ring -b 0", "ring -b 50000"])?;
    let said = stage.example("ring -w 1 -l 10")?;
    ensure!(said.starts_with("ring: OK, 1 tasks"), "{said}");
    Ok(())
}

fn matmul(stage: &Stage) -> Result<()> {
    stage.all_print(
        "matmul: 120x120, 20 rounds, trace 531100, checksum 4a007e5ad834e034",
        &["matmul -w 0", "matmul", "matmul -w 6"],
    )
}

fn wave(stage: &Stage) -> Result<()> {
    stage.all_print(
        "wave: 1000 points, 500 steps, checksum C77B0883A854C8CA",
        &["wave 1000 500 0", "wave", "wave 1000 500 7"],
    )
}

fn soak(stage: &Stage, options: &str) -> Result<()> {
    let said = stage.example(&format!("soak {options}"))?;
    ensure!(said.starts_with("soak: OK "), "{said}");
    Ok(())
}

/// With one fault made on purpose, soak reports that kind of fault, or one of those kinds.
fn sees(stage: &Stage, fault: &str, verdicts: &[&str]) -> Result<()> {
    let bin = stage.examples.dir();
    // PVM_EXPORT makes pvm_spawn hand these variables on to the tasks. Two tasks and a long phase:
    // the next message of the same pair, which shows the fault, comes soon and for certain.
    let shell = format!(
        "LD_PRELOAD={bin}/fault.so MIST_FAULT={fault} PVM_EXPORT=LD_PRELOAD:MIST_FAULT {bin}/soak -n 2 -p 600 -t 5 -q 20 -x 10000"
    );
    let output = stage
        .hosts
        .try_verb(&["exec", "h0", "bash", "-c", &shell])?;
    let said = both(&output);
    ensure!(
        said.contains("soak: FAULT") && verdicts.iter().any(|v| said.contains(v)),
        "{fault}: {said}"
    );
    ensure!(output.status.code() == Some(1), "{fault}: {said}");
    Ok(())
}
