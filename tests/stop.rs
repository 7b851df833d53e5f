//! A stop does not show, and a mistctl that dies does no harm: a program that checks itself all the
//! time is dumped again and again, and mistctl is killed at random moments of dumps and restores.
//!
//! `MIST_DUMPS` (200 unless set) and `MIST_KILLS` (100) say how often, `MIST_SEED` repeats a run.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use common::{build_c, describe, mistctl, processes, run, sandbox, status_field, tail, wait_for};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

const LIMIT: Duration = Duration::from_secs(30);
/// Signal 40: not in the mask of a thread that waits for it in sigtimedwait(2).
const WAITED_FOR: u64 = 1 << 39;

fn main() -> ExitCode {
    if sandbox::play_role() {
        return worker();
    }
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(1);
    let names = [
        "dumps",
        "dumps_tree",
        "dumps_of_parents",
        "dumps_of_sleepers",
        "dumps_of_sleepers_by_their_owner",
        "killed_dumps",
        "killed_tracers",
        "killed_restores",
    ];
    let trials = names
        .into_iter()
        .map(|name| Trial::ignorable_test(format!("stop::{name}"), move || outer(name)))
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

fn outer(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root, to make namespaces");
        return Ok(Completion::ignored_with("needs root, to make namespaces"));
    }
    let story = |e: anyhow::Error| format!("{e:#}");
    let program = match name {
        "dumps_of_parents" => "tests/stop/parents.c",
        _ if name.starts_with("dumps_of_sleepers") => "tests/stop/sleepers.c",
        _ => "tests/stop/victim.c",
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(program);
    let lo = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/lo_up.c");
    build_c(&lo, &[]).map_err(story)?;
    let victim = build_c(&source, &["-pthread".to_owned()]).map_err(story)?;
    // Images in memory: the disk is not what is tested.
    let dir = tempfile::Builder::new()
        .prefix("mist-stop-")
        .tempdir_in("/dev/shm")?;
    let args = [
        name.to_owned(),
        victim.to_string_lossy().into_owned(),
        dir.path().to_string_lossy().into_owned(),
    ];
    let limit =
        Duration::from_secs(600) + Duration::from_secs(2) * (number("MIST_KILLS", 100) as u32);
    match sandbox::run_self(&args, dir.path(), limit).map_err(story)? {
        sandbox::Verdict::Passed(told) => {
            print!("{told}");
            Ok(Completion::Completed)
        }
        sandbox::Verdict::Skipped(why) => Ok(Completion::ignored_with(why)),
        sandbox::Verdict::Failed(why) => Err(Failed::from(why)),
    }
}

fn worker() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, victim, dir] = args.as_slice() else {
        return ExitCode::FAILURE;
    };
    let mut test = match Test::new(victim, dir) {
        Ok(t) => t,
        Err(e) => {
            println!("{e:#}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = match name.as_str() {
        "dumps" => test.dumps(&["alone"], &[]),
        "dumps_tree" | "dumps_of_parents" => test.dumps(&[], &["--tree"]),
        "dumps_of_sleepers" => test.dumps(&["alone"], &[]),
        // When calls are to end is then not read from the kernel's memory.
        "dumps_of_sleepers_by_their_owner" => test
            .become_ordinary()
            .and_then(|()| test.dumps(&["estimated"], &[])),
        "killed_dumps" => test.killed_dumps(false),
        "killed_tracers" => test.killed_dumps(true),
        _ => test.killed_restores(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!(
                "{e:#}\nthe program's verdict: {}\nprocesses:\n{}",
                tail(&test.cwd.join("result"), 2000),
                describe(&processes())
            );
            ExitCode::FAILURE
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |d| d.as_nanos() as u64);
        let seed = number("MIST_SEED", now) | 1;
        println!("MIST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

/// What of a process an outsider can compare.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    /// Of every thread.
    masks: BTreeSet<(String, u64)>,
    maps: Vec<String>,
    descriptors: BTreeSet<String>,
}

struct Test {
    victim: PathBuf,
    dir: PathBuf,
    cwd: PathBuf,
    program: Option<Child>,
    pid: u32,
    mistctl: PathBuf,
    /// Whom program and mistctl belong to.
    user: u32,
}

impl Test {
    fn new(victim: &str, dir: &str) -> Result<Self> {
        let dir = PathBuf::from(dir);
        let cwd = dir.join("run");
        fs::create_dir(&cwd)?;
        Ok(Self {
            victim: victim.into(),
            dir,
            cwd,
            program: None,
            pid: 0,
            mistctl: env!("CARGO_BIN_EXE_mistctl").into(),
            user: 0,
        })
    }

    /// From here on the program and mistctl are an ordinary user's, without any privilege.
    fn become_ordinary(&mut self) -> Result<()> {
        const NOBODY: u32 = 65534;
        self.user = NOBODY;
        for (name, program) in [("victim", &mut self.victim), ("mistctl", &mut self.mistctl)] {
            // Where the user finds it.
            let copy = self.dir.join(name);
            fs::copy(&*program, &copy)?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
            *program = copy;
        }
        for dir in [&self.dir, &self.cwd] {
            chown(dir, Some(NOBODY), Some(NOBODY))?;
        }
        Ok(())
    }

    fn start(&mut self, args: &[&str]) -> Result<()> {
        let log = File::create(self.dir.join("log"))?;
        let mut child = Command::new(&self.victim)
            .args(args)
            .current_dir(&self.cwd)
            .uid(self.user)
            .gid(self.user)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.pid = child.id();
        let ready = self.cwd.join("ready");
        wait_for("the program to be ready", LIMIT, || {
            if let Some(status) = child.try_wait()? {
                bail!("the program ended with {status}");
            }
            Ok(ready.exists().then_some(()))
        })?;
        self.program = Some(child);
        Ok(())
    }

    fn turns(&self) -> Result<Vec<u64>> {
        let bytes = fs::read(self.cwd.join("turns"))?;
        let words = bytes.chunks_exact(8).take(4);
        Ok(words
            .map(|c| c.try_into().map_or(0, u64::from_le_bytes))
            .collect())
    }

    /// It runs: all of its threads make progress, and none has found anything wrong.
    fn runs(&self) -> Result<()> {
        let before = self.turns()?;
        wait_for("a turn of every thread", LIMIT, || {
            if self.cwd.join("result").exists() {
                bail!(
                    "the program noticed: {}",
                    tail(&self.cwd.join("result"), 2000)
                );
            }
            let field = |key| status_field(self.pid, key).unwrap_or_default();
            if field("State").is_empty() || field("State").starts_with('Z') {
                bail!("the program has ended");
            }
            let now = self.turns()?;
            let all = now.iter().zip(&before).all(|(a, b)| a > b);
            Ok((all && field("TracerPid") == "0").then_some(()))
        })
    }

    fn look(&self) -> Result<Look> {
        let mut masks = BTreeSet::new();
        let task = format!("/proc/{}/task", self.pid);
        for t in fs::read_dir(&task)?.flatten() {
            let tid = t.file_name().to_string_lossy().into_owned();
            let text = fs::read_to_string(t.path().join("status")).unwrap_or_default();
            let mask = text.lines().find_map(|l| l.strip_prefix("SigBlk:"));
            let mask = u64::from_str_radix(mask.unwrap_or_default().trim(), 16).unwrap_or(0);
            masks.insert((tid, mask | WAITED_FOR));
        }
        // Without the heap arenas' inner borders, which the program's own work moves.
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid))?
            .lines()
            .filter(|l| !l.contains("[stack]") && !l.contains("[heap]"))
            .map(str::to_owned)
            .collect();
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid))?
            .flatten()
            .filter_map(|e| {
                let to = fs::read_link(e.path()).ok()?;
                // It looks for the file `go` now and then, and opens nothing.
                Some(format!("{:?} {}", e.file_name(), to.display()))
            })
            .collect();
        Ok(Look {
            masks,
            maps,
            descriptors,
        })
    }

    /// It looks as before. Some of it (masks within the C library's fork) changes for moments.
    fn same(&self, before: &Look) -> Result<()> {
        let mut last = None;
        wait_for(
            "the program to look as before",
            Duration::from_secs(5),
            || {
                let now = self.look()?;
                let same = now == *before;
                last = Some(now);
                Ok(same.then_some(()))
            },
        )
        .with_context(|| format!("wanted {before:#?}, got {last:#?}"))
    }

    /// Nobody is here but its init, us, the program and its children.
    fn alone(&self, with_program: bool) -> Result<()> {
        let known = [
            1,
            std::process::id(),
            if with_program { self.pid } else { 1 },
        ];
        wait_for("others to be gone", LIMIT, || {
            let strangers = processes().into_iter().filter(|p| {
                let of_program = status_field(*p, "PPid") == Some(self.pid.to_string());
                !(known.contains(p) || with_program && of_program)
            });
            Ok((strangers.count() == 0).then_some(()))
        })
    }

    fn finish(&mut self) -> Result<()> {
        fs::write(self.cwd.join("go"), "")?;
        let mut child = self.program.take().context("no program")?;
        let status = common::wait_child(&mut child, "the program's end", LIMIT)?;
        let verdict = tail(&self.cwd.join("result"), 2000);
        if !verdict.starts_with("PASS") || !status.success() {
            bail!("the program ended with {status}: {verdict}");
        }
        Ok(())
    }

    fn command(&self, more: &[&str], image: &Path) -> Command {
        let mut command = Command::new(&self.mistctl);
        command.uid(self.user).gid(self.user).stdin(Stdio::null());
        command.arg("dump").arg(self.pid.to_string());
        command.arg("-o").arg(image).arg("--json").args(more);
        command
    }

    fn dumps(&mut self, args: &[&str], more: &[&str]) -> Result<()> {
        self.start(args)?;
        let before = if args.is_empty() {
            None
        } else {
            Some(self.look()?)
        };
        let rounds = number("MIST_DUMPS", 200);
        let pid = nix::unistd::Pid::from_raw(self.pid as i32);
        let over = AtomicBool::new(false);
        let worst = std::thread::scope(|scope| {
            // A signal that the program ignores: without a dump the kernel drops it.
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH);
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
            let worst = self.dump_again_and_again(rounds, more);
            over.store(true, Ordering::Relaxed);
            worst
        })?;
        self.runs()?;
        if let Some(before) = &before {
            self.same(before)?;
        }
        self.alone(true)?;
        println!("{rounds} dumps, longest stop {worst} us");
        self.finish()
    }

    /// The longest stop, us.
    fn dump_again_and_again(&self, rounds: u64, more: &[&str]) -> Result<u64> {
        let mut worst = 0;
        for i in 0..rounds {
            let image = self.dir.join("image");
            let out = run(self.command(more, &image), &self.dir, "dump", LIMIT)?;
            if !out.status.success() {
                bail!("dump {i}: {}", common::both(&out));
            }
            let json: serde_json::Value = serde_json::from_slice(&out.stdout)?;
            worst = worst.max(json["blackout_us"].as_u64().unwrap_or(0));
            fs::remove_dir_all(&image)?;
            if self.cwd.join("result").exists() {
                bail!("after dump {i}: {}", tail(&self.cwd.join("result"), 2000));
            }
        }
        Ok(worst)
    }

    /// Starts a command and kills it after a random time of up to `span` microseconds, or its `tracer`: the child that
    /// does the work. Whether it was still there then.
    fn kill_within(
        mut command: Command,
        span: u64,
        tracer: bool,
        random: &mut Random,
    ) -> Result<bool> {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_micros(random.below(span)));
        let there = child.try_wait()?.is_none();
        if tracer {
            let pid = child.id();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            for pid in children.unwrap_or_default().split_whitespace() {
                let pid = nix::unistd::Pid::from_raw(pid.parse()?);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        } else {
            child.kill()?;
        }
        child.wait()?;
        Ok(there)
    }

    /// Who is killed is what was started, in which case no call of the program may be broken off, or the process that
    /// traces it, in which case it may happen between a stop and the first act after it.
    fn killed_dumps(&mut self, tracer: bool) -> Result<()> {
        let mut random = Random::new();
        self.start(&[if tracer { "lenient" } else { "alone" }])?;
        let before = self.look()?;
        let image = self.dir.join("image");
        let begun = Instant::now();
        run(self.command(&[], &image), &self.dir, "dump", LIMIT)?;
        let span = begun.elapsed().as_micros() as u64;
        let kills = number("MIST_KILLS", 100);
        let mut hits = 0;
        for i in 0..kills {
            clear(&self.dir, "image")?;
            let hit = Self::kill_within(self.command(&[], &image), span, tracer, &mut random)?;
            hits += u64::from(hit);
            self.alone(true)
                .and_then(|()| self.runs())
                .and_then(|()| self.same(&before))
                .with_context(|| format!("after kill {i}"))?;
        }
        let bytes = fs::read(self.cwd.join("turns"))?;
        let seen = bytes.chunks_exact(8).nth(6);
        let seen = seen.map_or(0, |c| c.try_into().map_or(0, u64::from_le_bytes));
        println!(
            "{kills} kills, {hits} of them in the middle of a dump of {span} us; {seen} calls broken off"
        );
        self.finish()
    }

    fn killed_restores(&mut self) -> Result<()> {
        let mut random = Random::new();
        self.start(&["lenient"])?;
        let image = self.dir.join("image");
        let out = run(self.command(&["--kill"], &image), &self.dir, "dump", LIMIT)?;
        if !out.status.success() {
            bail!("dump: {}", common::both(&out));
        }
        if let Some(mut c) = self.program.take() {
            c.wait()?;
        }
        let restore = || {
            let mut c = mistctl();
            c.arg("restore")
                .arg(&image)
                .args(["--detach", "--same-pid"]);
            c
        };
        let begun = Instant::now();
        let out = run(restore(), &self.dir, "restore", LIMIT)?;
        let span = begun.elapsed().as_micros() as u64;
        if !out.status.success() {
            bail!("restore: {}", common::both(&out));
        }
        let kills = number("MIST_KILLS", 100);
        let (mut hits, mut alive) = (0, 0);
        for i in 0..=kills {
            // Of the restore before: gone, or there and right.
            let there = wait_for("everything or nothing", LIMIT, || {
                let others = processes()
                    .into_iter()
                    .filter(|p| ![1, std::process::id()].contains(p));
                let others: Vec<u32> = others.collect();
                Ok(match others.as_slice() {
                    [] => Some(false),
                    [p] if *p == self.pid => {
                        let tracer = status_field(self.pid, "TracerPid");
                        (tracer.as_deref() == Some("0")).then_some(true)
                    }
                    _ => None,
                })
            })
            .with_context(|| format!("after kill {i}"))?;
            // Half-built ones die a moment after their tracer.
            if there && status_field(self.pid, "Threads").as_deref() == Some("6") {
                match self.runs() {
                    Ok(()) => alive += 1,
                    Err(e) if status_field(self.pid, "State").is_some() => {
                        return Err(e.context(format!("after kill {i}")));
                    }
                    Err(_) => {}
                }
            }
            let pid = nix::unistd::Pid::from_raw(self.pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            self.alone(false)?;
            if i < kills {
                hits += u64::from(Self::kill_within(restore(), span, false, &mut random)?);
            }
        }
        println!(
            "{kills} kills, {hits} of them in the middle of a restore of {span} us; {alive} times the \
             program ran"
        );
        Ok(())
    }
}

/// Removes what begins with that name.
fn clear(dir: &Path, name: &str) -> Result<()> {
    for e in fs::read_dir(dir)?.flatten() {
        let file = e.file_name().to_string_lossy().into_owned();
        if file.trim_start_matches('.').starts_with(name) {
            if e.file_type()?.is_dir() {
                fs::remove_dir_all(e.path())?;
            } else {
                fs::remove_file(e.path())?;
            }
        }
    }
    Ok(())
}
