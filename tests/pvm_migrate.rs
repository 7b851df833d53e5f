//! Tasks move between three hosts while their applications run: each gives the result that it gives without, whatever
//! the task that moves is doing, and whoever is killed meanwhile.

mod common;
mod testhosts;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::{both, wait_for};
use serde_json::Value;
use testhosts::{Examples, Hosts, Installed};

const LIMIT: Duration = Duration::from_secs(90);
const HOSTS: [&str; 3] = ["h0", "h1", "h2"];

/// Hosts with a virtual machine that mistctl started, and programs for it.
struct Stage {
    hosts: Hosts,
    installed: Installed,
    examples: Examples,
}

type Test = fn(&Stage) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 15] = [
        (
            "there_and_back_a_task_keeps_its_virtual_tid",
            there_and_back,
        ),
        ("what_cannot_move_is_refused_and_runs_on", refusals),
        ("advice_of_the_last_moment_moves_along", last_advice),
        ("memory_that_changes_its_shape_moves", shapes),
        ("heat_moves", |s| {
            same_result(s, |n| format!("heat -n 400 -s {} -w 4", 1500 * n), 4)
        }),
        ("matmul_moves_with_its_groups_and_barriers", |s| {
            same_result(s, |n| format!("matmul -n 300 -r {} -w 3", 20 * n), 4)
        }),
        ("farm_moves", |s| {
            same_result(s, |n| format!("farm -n {} -j 400 -w 4", 20_000_000 * n), 4)
        }),
        ("ring_moves", |s| {
            same_result(s, |n| format!("ring -l {} -b 20000 -w 4", 400 * n), 4)
        }),
        ("wave_moves", |s| {
            same_result(s, |n| format!("wave 4000 {} 3", 6000 * n), 4)
        }),
        ("the_group_server_moves", group_server),
        ("two_at_once_and_partners_that_change_places", at_once),
        ("soak_with_a_hundred_random_moves_finds_nothing", soaked),
        ("a_mover_that_is_killed_leaves_one_task", |s| {
            killed(s, 12, "mover")
        }),
        ("an_agent_that_is_killed_leaves_one_task", |s| {
            killed(s, 12, "agent")
        }),
        ("a_lander_that_is_killed_leaves_one_task", |s| {
            killed(s, 12, "land")
        }),
    ];
    testhosts::main(tests, set_up, on_stage)
}

fn set_up() -> Result<Stage> {
    Ok(Stage {
        hosts: Hosts::up(HOSTS.len())?,
        installed: Installed::new()?,
        examples: Examples::build()?,
    })
}

/// One set of hosts for all tests, a virtual machine of its own for each.
fn on_stage(stage: &Stage, test: Test) -> Result<()> {
    let hostfile = HOSTS.join("\\n");
    let mistctl = stage.installed.path();
    stage.hosts.exec(
        "h0",
        &format!(
            "printf '{hostfile}\\n' >/tmp/hosts; rm -f /tmp/pvml.*; {mistctl} pvm start /tmp/hosts"
        ),
    )?;
    let done = test(stage).with_context(|| {
        let mut logs = String::new();
        for host in HOSTS {
            let log = stage.hosts.exec(host, "tail -n 20 /tmp/pvml.*");
            let _ = writeln!(logs, "{host}: {}", log.unwrap_or_default());
        }
        logs
    });
    let stopped = stage.hosts.exec("h0", &format!("{mistctl} pvm stop"));
    done.and(stopped.map(drop))
}

/// A row of `mistctl ps`.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    v: String,
    tid: String,
    host: String,
    program: String,
    shim: bool,
    spawned: bool,
}

impl Stage {
    fn mistctl(&self, host: &str, arguments: &str) -> Result<Output> {
        let shell = format!("{} {arguments}", self.installed.path());
        self.hosts.try_verb(&["exec", host, "bash", "-c", &shell])
    }

    fn json(&self, host: &str, arguments: &str) -> Result<Value> {
        let output = self.mistctl(host, arguments)?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{arguments}: {}", both(&output)))
    }

    fn tasks(&self) -> Result<Vec<Row>> {
        let listing = self.json("h0", "ps --json")?;
        let tasks = listing["tasks"].as_array().context("no tasks")?;
        let text = |task: &Value, name: &str| task[name].as_str().unwrap_or_default().to_owned();
        Ok(tasks
            .iter()
            .map(|task| Row {
                v: text(task, "virtual_tid"),
                tid: text(task, "tid"),
                host: text(task, "host"),
                program: text(task, "program"),
                shim: task["shim"] == "yes",
                spawned: task["parent"].is_string(),
            })
            .collect())
    }

    fn task(&self, v: &str) -> Result<Row> {
        let tasks = self.tasks()?;
        let found: Vec<&Row> = tasks.iter().filter(|task| task.v == v).collect();
        match found[..] {
            [only] => Ok(only.clone()),
            _ => bail!("{v} is there {} times: {tasks:?}", found.len()),
        }
    }

    fn migrate(&self, v: &str, host: &str) -> Result<Value> {
        let moved = self.json("h0", &format!("migrate --json {v} {host}"))?;
        ensure!(moved["virtual_tid"] == v, "{v} to {host}: {moved}");
        Ok(moved)
    }

    /// Begins an example on h0, under the shim.
    fn begin(&self, command: &str) -> Result<Running<'_>> {
        let out = tempfile::NamedTempFile::new()?;
        let shell = format!(
            "exec {} exec -- {}/{command}",
            self.installed.path(),
            self.examples.dir()
        );
        let mut command = self.hosts.command("h0", &shell);
        command
            .stdout(out.reopen()?)
            .stderr(out.reopen()?)
            .stdin(Stdio::null());
        Ok(Running {
            stage: self,
            child: command.spawn()?,
            out,
        })
    }

    /// What an example prints last.
    fn result(&self, command: &str) -> Result<String> {
        self.begin(command)?.end()
    }
}

/// An example that runs.
struct Running<'s> {
    stage: &'s Stage,
    child: Child,
    out: tempfile::NamedTempFile,
}

impl Running<'_> {
    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    fn end(&mut self) -> Result<String> {
        let ended = wait_for("the example's end", LIMIT, || Ok(self.child.try_wait()?));
        let said = std::fs::read_to_string(self.out.path())?;
        let ended = ended.with_context(|| said.clone())?;
        ensure!(ended.success(), "{ended}: {said}");
        let last = said.lines().last().context("it said nothing")?;
        Ok(last.to_owned())
    }

    /// Its workers, as soon as there are some: tasks that were spawned, and are no group server.
    fn workers(&self) -> Result<Vec<Row>> {
        let mut all = self.stage.tasks()?;
        all.retain(|task| task.spawned && task.shim && !task.program.ends_with("pvmgs"));
        Ok(all)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Numbers that look random, and are the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % sides.max(1)
    }

    fn other_host(&mut self, than: &str) -> &'static str {
        let others: Vec<&str> = HOSTS.into_iter().filter(|host| *host != than).collect();
        others[self.roll(others.len())]
    }
}

fn there_and_back(stage: &Stage) -> Result<()> {
    let ring = stage.begin("ring -l 1000000 -b 1000 -w 3")?;
    let first = wait_for("workers", LIMIT, || {
        Ok(ring.workers()?.into_iter().find(|task| task.host != "h0"))
    })?;
    let mut before = first.clone();
    for (n, host) in ["h0", first.host.as_str(), "h0"].into_iter().enumerate() {
        // Its agents run, and so does its shim, from files that are gone.
        if n == 1 {
            stage.installed.again()?;
        }
        let moved = stage.migrate(&first.v, host)?;
        ensure!(moved["from"] == before.tid.as_str(), "{moved}");
        ensure!(moved["host"] == host, "{moved}");
        ensure!(moved["rounds"].as_u64() >= Some(1), "{moved}");
        ensure!(moved["bytes"].as_u64() > Some(100_000), "{moved}");
        ensure!(
            moved["blackout_us"].as_u64() <= moved["total_us"].as_u64(),
            "{moved}"
        );
        let now = stage.task(&first.v)?;
        ensure!(
            now.host == host && moved["tid"] == now.tid.as_str(),
            "{now:?} {moved}"
        );
        ensure!(
            now.tid != before.tid && now.program == first.program,
            "{now:?}"
        );
        before = now;
    }
    // Whose terminal goes is told that the move goes on without the command.
    let program = stage.installed.path();
    let interrupted = format!(
        "{program} migrate {} {} 2>&1 & p=$!; until pgrep -xf '[^ ]* mover' >/tmp/movers; do :; done; kill -HUP $p; wait $p; \
         test $? = 129",
        first.v, first.host
    );
    let said = stage.hosts.exec("h0", &interrupted)?;
    ensure!(said.contains("goes on without"), "{said}");
    wait_for("the move", LIMIT, || {
        let now = stage.task(&first.v)?;
        Ok((now.host == first.host).then_some(()))
    })?;
    stage.migrate(&first.v, "h0")?;
    before = stage.task(&first.v)?;
    // By the tid that it has now it is found as well.
    let moved = stage.json("h1", &format!("migrate --json {} h1", before.tid))?;
    ensure!(
        moved["virtual_tid"] == first.v.as_str() || first.host == "h1",
        "{moved}"
    );
    Ok(())
}

/// Begins a program of tests/testhosts, which ends when that file is there, and waits for its task.
fn until_told<'s>(stage: &'s Stage, name: &str) -> Result<(Running<'s>, Row, PathBuf)> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/testhosts/{name}.c"));
    let built = common::build_c(&source, &["-lpvm3".to_owned()])?;
    std::fs::copy(built, stage.examples.path().join(name))?;
    let end = stage.examples.path().join(format!("{name}.end"));
    let mut running = stage.begin(&format!("{name} {}", end.display()))?;
    let task = wait_for("the task", LIMIT, || {
        if running.has_ended()? {
            bail!("{}", running.end()?);
        }
        Ok(running.workers()?.into_iter().next())
    })?;
    Ok((running, task, end))
}

fn last_advice(stage: &Stage) -> Result<()> {
    let (mut advice, task, end) = until_told(stage, "advice")?;
    let mut at = task.host.as_str();
    for _ in 0..5 {
        at = if at == "h0" { "h1" } else { "h0" };
        wait_for("a move", LIMIT, || {
            let moved = stage.json("h0", &format!("migrate --json {} {at}", task.v))?;
            // It looked at its flags just then: no other host has that file.
            let looks = moved["error"]
                .as_str()
                .is_some_and(|e| e.contains("/smaps"));
            ensure!(looks || moved["virtual_tid"] == task.v.as_str(), "{moved}");
            Ok((!looks).then_some(()))
        })?;
    }
    std::fs::write(end, "")?;
    let said = advice.end()?;
    ensure!(said.starts_with("advice: as asked"), "{said}");
    Ok(())
}

fn shapes(stage: &Stage) -> Result<()> {
    let (mut shapes, task, end) = until_told(stage, "shapes")?;
    let mut at = task.host.as_str();
    for _ in 0..8 {
        at = if at == "h0" { "h1" } else { "h0" };
        let moved = stage.json("h0", &format!("migrate --json {} {at}", task.v))?;
        if moved["virtual_tid"] != task.v.as_str() {
            bail!("{moved}: {}", shapes.end()?);
        }
    }
    std::fs::write(end, "")?;
    let said = shapes.end()?;
    ensure!(said.starts_with("shapes: all there"), "{said}");
    Ok(())
}

fn refusals(stage: &Stage) -> Result<()> {
    let failure = |arguments: &str| stage.json("h0", arguments);
    let ring = stage.begin("ring -l 1000000 -b 1000 -w 3")?;
    let task = wait_for("workers", LIMIT, || {
        Ok(ring.workers()?.into_iter().find(|task| task.host == "h1"))
    })?;
    let nowhere = failure(&format!("migrate --json {} h9", task.v))?;
    ensure!(nowhere["failure"] == "refused", "{nowhere}");
    let same = failure(&format!("migrate --json {} h1", task.v))?;
    ensure!(same["failure"] == "refused", "{same}");
    ensure!(
        same["error"]
            .as_str()
            .unwrap_or("")
            .contains("on h1 already"),
        "{same}"
    );
    let nobody = failure("migrate --json t7ffff h1")?;
    ensure!(nobody["failure"] == "no_such_process", "{nobody}");
    let nonsense = failure("migrate --json tx h1")?;
    ensure!(nonsense["failure"] == "usage", "{nonsense}");
    // What stops a lander is told, and where: the stream that breaks for it says neither.
    let shrink = "size=$(($(df --output=used /tmp | tail -n 1) + 64))k";
    stage
        .hosts
        .root("h2", &format!("mount -o remount,{shrink} /tmp"))?;
    let full = failure(&format!("migrate --json {} h2", task.v));
    stage.hosts.root("h2", "mount -o remount,size=50% /tmp")?;
    let why = full?["error"].as_str().unwrap_or("").to_owned();
    for part in ["runs on", "agent of h2", "No space left"] {
        ensure!(why.contains(part), "{why}");
    }
    ensure!(stage.task(&task.v)?.host == "h1", "{}", task.v);
    // Enrolled without the shim.
    let mut bare = stage.hosts.command(
        "h1",
        &format!(
            "cd /tmp; exec {}/ring -l 1000000 -b 100 -w 1",
            stage.examples.dir()
        ),
    );
    let _bare = Reaped(bare.stdout(Stdio::null()).spawn()?);
    let without = wait_for("the task without the shim", LIMIT, || {
        let tasks = stage.tasks()?;
        Ok(tasks
            .into_iter()
            .find(|task| !task.shim && task.program.ends_with("ring")))
    })?;
    let refused = failure(&format!("migrate --json {} h2", without.v))?;
    ensure!(refused["failure"] == "refused", "{refused}");
    ensure!(
        refused["error"]
            .as_str()
            .unwrap_or("")
            .contains("mistctl exec"),
        "{refused}"
    );
    Ok(())
}

struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it without moves, and then with; some must have been made. It is given the more to do the fewer there was time
/// for: `command` says how many times as much.
fn same_result(stage: &Stage, command: fn(u32) -> String, least: usize) -> Result<()> {
    let mut dice = Dice(7);
    let mut moves = 0;
    for n in (0..6).map(|doublings| 1 << doublings) {
        let expected = stage.result(&command(n))?;
        let mut running = stage.begin(&command(n))?;
        while !running.has_ended()? {
            moves += usize::from(random_move(stage, &mut running, &mut dice)?);
        }
        let got = running.end()?;
        ensure!(
            got == expected,
            "'{got}', not '{expected}', after {moves} moves"
        );
        if moves >= least {
            return Ok(());
        }
    }
    bail!("there was time for {moves} moves only");
}

/// Moves some worker somewhere; false when it had ended before.
fn random_move(stage: &Stage, running: &mut Running<'_>, dice: &mut Dice) -> Result<bool> {
    let workers = running.workers()?;
    if workers.is_empty() {
        return Ok(false);
    }
    let task = &workers[dice.roll(workers.len())];
    let to = dice.other_host(&task.host);
    move_to(stage, running, &task.v, to)
}

/// Moves a worker; false when it had ended before.
fn move_to(stage: &Stage, running: &mut Running<'_>, v: &str, to: &str) -> Result<bool> {
    let moved = stage.json("h0", &format!("migrate --json {v} {to}"))?;
    is_made(running, v, to, &moved)
}

/// Whether a move was made; false when the worker had ended before.
fn is_made(running: &mut Running<'_>, v: &str, to: &str, moved: &Value) -> Result<bool> {
    if moved["failure"].is_string() {
        // The end of the application comes between.
        let ended = || {
            running
                .workers()
                .map(|all| all.iter().all(|other| other.v != v))
        };
        // Its tasks end as one; any other failure is one.
        const ENDING: Duration = Duration::from_secs(2);
        let gone = moved["failure"] == "no_such_process"
            || wait_for("its end", ENDING, || Ok(ended()?.then_some(()))).is_ok();
        ensure!(gone, "{v} to {to}: {moved}");
        return Ok(false);
    }
    ensure!(moved["warnings"] == serde_json::json!([]), "{moved}");
    Ok(true)
}

fn group_server(stage: &Stage) -> Result<()> {
    let command = "matmul -n 300 -r 20 -w 3";
    let expected = stage.result(command)?;
    let mut matmul = stage.begin(command)?;
    let server = wait_for("the group server", LIMIT, || {
        let tasks = stage.tasks()?;
        Ok(tasks
            .into_iter()
            .find(|task| task.program.ends_with("pvmgs") && task.shim))
    })?;
    let mut dice = Dice(3);
    let to = dice.other_host(&server.host);
    stage.migrate(&server.v, to)?;
    ensure!(matmul.end()? == expected, "another result");
    // It is still the only one, and serves the next application too.
    ensure!(stage.task(&server.v)?.host == to, "it is elsewhere");
    stage.migrate(&server.v, dice.other_host(to))?;
    ensure!(stage.result(command)? == expected, "another result");
    let tasks = stage.tasks()?;
    let servers = tasks.iter().filter(|task| task.program.ends_with("pvmgs"));
    ensure!(servers.count() == 1, "{tasks:?}");
    Ok(())
}

fn at_once(stage: &Stage) -> Result<()> {
    let mut soak = stage.begin("soak -t 15 -x 200000")?;
    let pair = wait_for("workers", LIMIT, || {
        let workers = soak.workers()?;
        let on = |host: &str| workers.iter().find(|task| task.host == host).cloned();
        Ok(on("h1").zip(on("h2")))
    })?;
    // Both ways, so that they are where they were at the end.
    for (first, second) in [("h2", "h1"), ("h1", "h2")] {
        std::thread::scope(|scope| {
            let one = scope.spawn(|| stage.migrate(&pair.0.v, first));
            let two = stage.migrate(&pair.1.v, second);
            let one = one.join().map_err(|_| anyhow::anyhow!("a panic"))?;
            one.and(two)
        })?;
        ensure!(stage.task(&pair.0.v)?.host == first, "not there");
        ensure!(stage.task(&pair.1.v)?.host == second, "not there");
    }
    let said = soak.end()?;
    ensure!(said.starts_with("soak: OK"), "{said}");
    Ok(())
}

/// Random moves while `soak` runs: of one, of two at once, of two that change places, and back to where one came from.
fn soaked(stage: &Stage) -> Result<()> {
    const MOVES: usize = 100;
    let mut dice = Dice(100);
    let mut made = 0;
    for seed in 0..10 {
        let mut soak = stage.begin(&format!("soak -t 30 -s {seed} -x 1000000"))?;
        while !soak.has_ended()? {
            made += random_moves(stage, &mut soak, &mut dice)?;
        }
        let said = soak.end()?;
        ensure!(said.starts_with("soak: OK"), "{said}, after {made} moves");
        if made >= MOVES {
            println!("{made} moves; at last {}", said.trim());
            return Ok(());
        }
    }
    bail!("there was time for {made} moves only")
}

/// How many it has made.
fn random_moves(stage: &Stage, soak: &mut Running<'_>, dice: &mut Dice) -> Result<usize> {
    let workers = soak.workers()?;
    if workers.is_empty() {
        return Ok(0);
    }
    let one = workers[dice.roll(workers.len())].clone();
    let other = workers[dice.roll(workers.len())].clone();
    let to = dice.other_host(&one.host);
    let how = dice.roll(3);
    if how == 0 {
        let there = move_to(stage, soak, &one.v, to)?;
        return Ok(
            usize::from(there) + usize::from(there && move_to(stage, soak, &one.v, &one.host)?)
        );
    }
    if how == 1 || one.v == other.v {
        return move_to(stage, soak, &one.v, to).map(usize::from);
    }
    let changes = one.host != other.host;
    let (to, to_too) = match changes {
        true => (other.host.as_str(), one.host.as_str()),
        false => (to, dice.other_host(&other.host)),
    };
    let both = [(&one.v, to), (&other.v, to_too)];
    let moved = std::thread::scope(|scope| {
        let both = both.map(|(v, to)| {
            scope.spawn(move || stage.json("h0", &format!("migrate --json {v} {to}")))
        });
        both.map(|one| one.join().unwrap_or_else(|_| bail!("a panic")))
    });
    let mut made = 0;
    for (moved, (v, to)) in moved.into_iter().zip(both) {
        made += usize::from(is_made(soak, v, to, &moved?)?);
    }
    Ok(made)
}

/// Moves where a process of ours, `victim`, is killed in the middle of each, while `soak` runs, again and again until there
/// was time for some.
fn killed(stage: &Stage, seconds: u32, victim: &str) -> Result<()> {
    let mut dice = Dice(seconds.into());
    let mut tried = 0;
    for _ in 0..10 {
        tried += killed_once(stage, seconds, &mut dice, victim)?;
        if tried >= 3 {
            return Ok(());
        }
    }
    bail!("there was time to try {tried} moves only")
}

/// How many moves were tried.
fn killed_once(stage: &Stage, seconds: u32, dice: &mut Dice, victim: &str) -> Result<usize> {
    let mut soak = stage.begin(&format!("soak -t {seconds} -x 200000"))?;
    let (mut moves, mut failed) = (0, 0);
    let mut whole = None;
    while !soak.has_ended()? {
        let workers = soak.workers()?;
        if workers.is_empty() {
            continue;
        }
        let task = workers[dice.roll(workers.len())].clone();
        let to = dice.other_host(&task.host);
        // At any moment of a move, or soon after it; the first one shows how long that is here.
        let delay = whole.map(|whole| whole * dice.roll(30) as u32 / 25);
        let where_it_is = match victim {
            "mover" => task.host.as_str(),
            "land" => to,
            _ => HOSTS[dice.roll(HOSTS.len())],
        };
        let started = Instant::now();
        let moved = std::thread::scope(|scope| {
            let kill = scope.spawn(move || {
                let Some(delay) = delay else {
                    return Ok(());
                };
                // The moment is what is random here.
                std::thread::sleep(delay);
                // In brackets, so that the shell that says it does not match.
                let shell = format!("pkill -KILL -f -- '[ ]{victim}( --|$)'");
                let kill = ["exec", where_it_is, "bash", "-c", &shell];
                stage.hosts.try_verb(&kill).map(drop)
            });
            let moved = stage.json("h0", &format!("migrate --json {} {to}", task.v));
            let _ = kill.join();
            moved
        })?;
        match moved["failure"].is_string() {
            true => failed += 1,
            false => {
                moves += 1;
                whole.get_or_insert(started.elapsed());
            }
        }
        // Exactly one, wherever it is, unless all is over.
        let began = Instant::now();
        while !soak.has_ended()? && stage.task(&task.v).is_err() {
            ensure!(
                began.elapsed() < LIMIT,
                "{} is not there once: {:?}",
                task.v,
                stage.tasks()?
            );
        }
    }
    let said = soak.end()?;
    // What shared the memory of a task while that was moved, for example.
    wait_for("the end of all that is left of it", LIMIT, || {
        let left = |host| stage.hosts.exec(host, "pgrep -l soak || true");
        let left = HOSTS.into_iter().map(left).collect::<Result<String>>()?;
        Ok(left.trim().is_empty().then_some(()))
    })?;
    ensure!(
        said.starts_with("soak: OK"),
        "{said}, after {moves} moves and {failed} that failed"
    );
    println!("{moves} moves, {failed} that failed");
    Ok(moves + failed)
}
