//! Runs the self-checking programs of `tests/programs/`: each alone, dumped and left running,
//! killed and restored, twice so, and restored lazily. The protocol is in
//! `tests/programs/mist.h`.
//!
//! Each (program, variant, way) is a test, so `cargo test --test programs eventfd` and
//! `cargo test --test programs ::lazy` work. Each runs in namespaces of its own, where the
//! pids that a restore wants are free.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use common::{build_c, describe, ending, mistctl, processes, run, sandbox, tail, wait_for};
use libtest_mimic::{Arguments, Completion, Conclusion, Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long any one step may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(30);
/// How late a timed call may be. Generous: test machines are shared; `scripts/bench` measures.
const LATE_US: i64 = 250_000;
/// How early a timed call may seem to be after a restore. The program takes the time away from
/// its own two-millisecond steps, and in it is the time for which it already stood still while
/// its timers were still to be read.
const EARLY_US: i64 = 50_000;

/// The ways in which a program is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// Not at all: the program itself has to be right.
    Alone,
    /// Dumped three times while it goes on.
    GoOn,
    /// Dumped and killed, restored.
    Kill,
    /// Dumped and killed, restored, dumped and killed, restored.
    Twice,
    /// Dumped and killed, restored with its memory to follow.
    Lazy,
}

impl Mode {
    const ALL: [Mode; 5] = [Self::Alone, Self::GoOn, Self::Kill, Self::Twice, Self::Lazy];

    fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::GoOn => "go_on",
            Self::Kill => "kill_restore",
            Self::Twice => "twice",
            Self::Lazy => "lazy",
        }
    }

    /// The directive that leaves it out.
    fn without(self) -> &'static str {
        match self {
            Self::Alone => "no-alone",
            Self::GoOn => "no-go-on",
            Self::Kill => "no-kill",
            Self::Twice => "no-twice",
            Self::Lazy => "no-lazy",
        }
    }

    /// How often the program is away between its start and its end.
    fn absences(self) -> usize {
        match self {
            Self::Alone | Self::GoOn => 0,
            Self::Kill | Self::Lazy => 1,
            Self::Twice => 2,
        }
    }
}

/// What the head of a program's source asks for.
#[derive(Default, Debug)]
struct Spec {
    source: PathBuf,
    cflags: Vec<String>,
    variants: Vec<String>,
    /// Modes left out, as (directive, reason).
    without: Vec<(String, String)>,
    tree: bool,
    tcp_established: bool,
    peer: bool,
    stdout: bool,
    user: bool,
    setsid: bool,
    stopped: bool,
    /// A word of the error with which a dump may refuse this program.
    may_refuse: Option<String>,
    /// A word of the error with which a dump has to refuse it.
    refused: Option<String>,
}

impl Spec {
    fn read(source: &Path) -> Result<Self> {
        let text = fs::read_to_string(source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        let mut spec = Self {
            source: source.to_owned(),
            ..Self::default()
        };
        for line in text.lines() {
            let Some(directive) = line.strip_prefix("// mist: ") else {
                continue;
            };
            let mut words = directive.split_whitespace().map(str::to_owned);
            match words.next().unwrap_or_default().as_str() {
                "cflags" => spec.cflags.extend(words),
                "variants" => spec.variants.extend(words),
                "tree" => spec.tree = true,
                "tcp-established" => (spec.tcp_established, spec.peer) = (true, true),
                "peer" => spec.peer = true,
                "stdout" => spec.stdout = true,
                "user" => spec.user = true,
                "setsid" => spec.setsid = true,
                "stopped" => spec.stopped = true,
                "may-refuse" => spec.may_refuse = Some(words.collect::<Vec<_>>().join(" ")),
                "refused" => spec.refused = Some(words.collect::<Vec<_>>().join(" ")),
                word if Mode::ALL.iter().any(|m| m.without() == word) => {
                    let reason = words.collect::<Vec<_>>().join(" ");
                    spec.without.push((word.to_owned(), reason));
                }
                word => bail!("{}: unknown directive `{word}`", source.display()),
            }
        }
        if spec.variants.is_empty() {
            spec.variants.push(String::new());
        }
        Ok(spec)
    }

    fn name(&self) -> String {
        self.source
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default()
    }
}

fn programs_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs")
}

fn main() -> ExitCode {
    if sandbox::play_role() {
        return worker();
    }
    let mut args = Arguments::from_args();
    // Nearly all of a test's time is spent waiting.
    args.test_threads.get_or_insert(4);
    match tests() {
        Ok((trials, skipped)) => {
            let conclusion = libtest_mimic::run(&args, trials);
            summary(&conclusion, &skipped);
            conclusion.exit_code()
        }
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says again, at the end, what was not tested, by reason.
fn summary(conclusion: &Conclusion, skipped: &Mutex<BTreeMap<String, Vec<String>>>) {
    if conclusion.num_ignored == 0 {
        return;
    }
    println!("{} tests were SKIPPED:", conclusion.num_ignored);
    if let Ok(skipped) = skipped.lock() {
        for (why, names) in skipped.iter() {
            println!("  SKIPPED: {why}\n    {}", names.join(" "));
        }
    }
}

/// The names of skipped tests by reason.
type Skipped = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

fn tests() -> Result<(Vec<Trial>, Skipped)> {
    let skipped = Skipped::default();
    let mut sources: Vec<PathBuf> = fs::read_dir(programs_dir())
        .context("cannot list tests/programs")?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "c"))
        .collect();
    sources.sort();
    // Commands that are still to come say so.
    let unbuilt = |args: &[&str]| -> Result<bool> {
        let output = mistctl()
            .args(args)
            .output()
            .context("cannot run mistctl")?;
        Ok(common::both(&output).contains("not built yet"))
    };
    let mut sleeper = Command::new("sleep").arg("60").spawn().context("sleep")?;
    let pid = sleeper.id().to_string();
    let no_dump = unbuilt(&["dump", &pid, "-o", "/dev/null/image"]);
    sleeper.kill()?;
    sleeper.wait()?;
    let no_dump = no_dump?;
    let no_restore = unbuilt(&["restore", "/dev/null/image"])?;
    let mut trials = Vec::new();
    for source in sources {
        // Not a test: the sandbox runs it.
        if source.ends_with("lo_up.c") {
            continue;
        }
        let spec = Arc::new(Spec::read(&source)?);
        let built: Arc<OnceLock<Result<PathBuf, String>>> = Arc::default();
        for variant in &spec.variants {
            for mode in Mode::ALL {
                // There is no image to restore.
                if spec.refused.is_some() && mode.absences() > 0 {
                    continue;
                }
                let mut name = format!("programs::{}", spec.name());
                if !variant.is_empty() {
                    name = format!("{name}::{variant}");
                }
                name = format!("{name}::{}", mode.name());
                let without = spec.without.iter().find(|(w, _)| w == mode.without());
                let reason = without.map(|(_, r)| r.clone());
                let (spec, built, skipped, variant) = (
                    Arc::clone(&spec),
                    Arc::clone(&built),
                    Arc::clone(&skipped),
                    variant.clone(),
                );
                let trial_name = name.clone();
                trials.push(Trial::ignorable_test(name, move || {
                    let skip = |why: String| {
                        if let Ok(mut list) = skipped.lock() {
                            let name = trial_name.trim_start_matches("programs::");
                            list.entry(why.clone()).or_default().push(name.to_owned());
                        }
                        Ok(Completion::ignored_with(why))
                    };
                    if let Some(reason) = reason {
                        return skip(reason);
                    }
                    if mode != Mode::Alone && (no_dump || no_restore && mode != Mode::GoOn) {
                        return skip("this mistctl cannot dump and restore yet".to_owned());
                    }
                    if !nix::unistd::geteuid().is_root() {
                        return skip("needs root, to make namespaces".to_owned());
                    }
                    let binary = built
                        .get_or_init(|| {
                            build_c(&programs_dir().join("lo_up.c"), &[])
                                .and_then(|_| build_c(&spec.source, &spec.cflags))
                                .map_err(|e| format!("{e:#}"))
                        })
                        .clone()?;
                    let dir = tempfile::Builder::new()
                        .prefix("mist-programs-")
                        .tempdir()?;
                    let args = [
                        spec.source.to_string_lossy().into_owned(),
                        binary.to_string_lossy().into_owned(),
                        variant,
                        mode.name().to_owned(),
                        dir.path().to_string_lossy().into_owned(),
                    ];
                    let verdict = sandbox::run_self(&args, dir.path(), 5 * LIMIT)
                        .map_err(|e| format!("{e:#}"))?;
                    match verdict {
                        sandbox::Verdict::Passed(_) => Ok(Completion::Completed),
                        sandbox::Verdict::Skipped(why) => skip(why),
                        sandbox::Verdict::Failed(why) => Err(Failed::from(why)),
                    }
                }));
            }
        }
    }
    Ok((trials, skipped))
}

/// The process that carries one test out, inside of the sandbox.
fn worker() -> ExitCode {
    match Test::from_args().and_then(|mut t| t.carry_out()) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(why)) => {
            println!("{why}");
            ExitCode::from(sandbox::SKIPPED as u8)
        }
        Err(e) => {
            println!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// One program, one variant, one way of saving it.
struct Test {
    spec: Spec,
    binary: PathBuf,
    variant: String,
    mode: Mode,
    /// Everything of this test; the program runs in `run` below it.
    dir: PathBuf,
    cwd: PathBuf,
    /// The program while it is a child of ours.
    program: Option<Child>,
    pid: u32,
    peer: Option<Peer>,
    /// Dumps made so far; they give the images their names.
    dumps: usize,
    /// What the program wrote into a pipe that we hold.
    piped: Option<thread::JoinHandle<String>>,
}

impl Test {
    fn from_args() -> Result<Self> {
        let mut args = std::env::args().skip(1);
        let mut next = || args.next().context("too few arguments");
        let spec = Spec::read(Path::new(&next()?))?;
        let binary = PathBuf::from(next()?);
        let variant = next()?;
        let mode = next()?;
        let dir = PathBuf::from(next()?);
        let mode = Mode::ALL.into_iter().find(|m| m.name() == mode);
        Ok(Self {
            spec,
            binary,
            variant,
            mode: mode.context("no such mode")?,
            cwd: dir.join("run"),
            dir,
            program: None,
            pid: 0,
            peer: None,
            dumps: 0,
            piped: None,
        })
    }

    /// None when the test passed, or why it could not run here.
    fn carry_out(&mut self) -> Result<Option<String>> {
        let outcome = self.steps();
        outcome.map_err(|e| {
            let mut story = format!("{e:#}\n");
            let log = tail(&self.dir.join("log"), 4000);
            if !log.is_empty() {
                story += &format!("the program wrote:\n{log}\n");
            }
            let verdict = tail(&self.cwd.join("result"), 4000);
            if !verdict.is_empty() {
                story += &format!("its verdict: {verdict}");
            }
            story += &format!("processes:\n{}", describe(&processes()));
            anyhow!(story)
        })
    }

    fn steps(&mut self) -> Result<Option<String>> {
        if let Some(why) = self.start()? {
            return Ok(Some(why));
        }
        let mut away = false;
        match self.mode {
            Mode::Alone => {}
            Mode::GoOn => {
                for _ in 0..3 {
                    self.dump(false)?;
                    self.unharmed()?;
                }
            }
            Mode::Kill | Mode::Lazy => away = self.dump(true)?,
            Mode::Twice => {
                away = self.dump(true)?;
                if away {
                    self.restore_detached()?;
                    self.dump(true)?;
                }
            }
        }
        if !away {
            // Nothing happened to it, or nothing that it may see.
            self.go()?;
            let mut child = self.program.take().context("the program is gone")?;
            let status = common::wait_child(&mut child, "the program's end", LIMIT)?;
            return self.judge(
                &format!("the program ended with {}", ending(status)),
                status.success(),
            );
        }
        let (mut restore, out) = self.restore_foreground()?;
        self.go()?;
        let status = common::wait_child(&mut restore, "mistctl restore", LIMIT)
            .with_context(|| tail(&self.dir.join("restore.err"), 4000))?;
        let verdict = self.judge(
            &format!(
                "mistctl restore ended with {}: {}",
                ending(status),
                tail(&self.dir.join("restore.err"), 4000)
            ),
            status.success(),
        )?;
        // After a --detach it was /dev/null already.
        if self.spec.stdout && self.mode != Mode::Twice && !tail(&out, 4000).contains("after\n") {
            bail!(
                "the program's standard output was a pipe, so after the restore it is that of \
                 mistctl restore; wanted \"after\", got {:?}",
                tail(&out, 4000)
            );
        }
        Ok(verdict)
    }

    /// Starts the program and waits until it is ready.
    fn start(&mut self) -> Result<Option<String>> {
        fs::create_dir(&self.cwd)?;
        let log = File::create(self.dir.join("log"))?;
        let mut command = Command::new(&self.binary);
        command
            .current_dir(&self.cwd)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("MIST_MARK", "of this program");
        if !self.variant.is_empty() {
            command.arg(&self.variant);
        }
        if self.spec.user {
            // tempfile made the directory for its owner alone.
            std::os::unix::fs::chown(&self.cwd, Some(65534), Some(65534))?;
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&self.dir, open)?;
            command.uid(65534).gid(65534);
        }
        if self.spec.peer {
            let peer = Peer::start()?;
            command.env("MIST_PEER", peer.address.port().to_string());
            self.peer = Some(peer);
        }
        let mut reader = None;
        if self.spec.stdout {
            let (r, w) = std::io::pipe()?;
            command.stdout(w);
            reader = Some(r);
        }
        if self.spec.setsid {
            // The setsid of util-linux: as no group leader it execs in place.
            let mut outer = Command::new("/usr/bin/setsid");
            outer.arg(command.get_program()).args(command.get_args());
            outer.current_dir(&self.cwd).stdin(Stdio::null());
            let log = File::options().append(true).open(self.dir.join("log"))?;
            outer.stdout(log.try_clone()?).stderr(log);
            outer.env_clear();
            for (k, v) in command.get_envs() {
                if let Some(v) = v {
                    outer.env(k, v);
                }
            }
            command = outer;
        } else {
            // Like a job of a shell.
            command.process_group(0);
        }
        let mut child = command.spawn().context("cannot start the program")?;
        // Ends our copy of the pipe's other end.
        drop(command);
        self.pid = child.id();
        if let Some(mut r) = reader {
            self.piped = Some(thread::spawn(move || {
                let mut text = String::new();
                let _ = r.read_to_string(&mut text);
                text
            }));
        }
        let (ready, result) = (self.cwd.join("ready"), self.cwd.join("result"));
        let outcome = wait_for("the program to be ready", LIMIT, || {
            if result.exists() {
                return Ok(Some(false));
            }
            if let Some(status) = child.try_wait()? {
                bail!(
                    "the program ended with {} before it was ready",
                    ending(status)
                );
            }
            Ok(ready.exists().then_some(true))
        });
        let ready = outcome?;
        if !ready {
            let status = common::wait_child(&mut child, "the program's end", LIMIT)?;
            let text = tail(&result, 4000);
            if let Some(why) = text.strip_prefix("SKIPPED: ") {
                return Ok(Some(why.trim().to_owned()));
            }
            bail!("{} (before it was ready; {})", text.trim(), ending(status));
        }
        if self.spec.stopped {
            wait_for("the program to stop itself", LIMIT, || {
                let state = common::status_field(self.pid, "State").unwrap_or_default();
                Ok(state.starts_with('T').then_some(()))
            })?;
        }
        self.program = Some(child);
        Ok(None)
    }

    fn image(&self) -> PathBuf {
        self.dir.join(format!("image{}", self.dumps))
    }

    /// Whether it was saved; false: it was refused, as the program's directives allow.
    fn dump(&mut self, and_kill: bool) -> Result<bool> {
        self.dumps += 1;
        let mut command = mistctl();
        command.arg("dump").arg(self.pid.to_string());
        command.arg("-o").arg(self.image());
        command.arg("--json");
        if and_kill {
            command.arg("--kill");
        }
        if self.spec.tree {
            command.arg("--tree");
        }
        if self.spec.tcp_established {
            command.arg("--tcp-established");
        }
        let what = format!("mistctl dump (no. {})", self.dumps);
        let output = run(command, &self.dir, "dump", LIMIT).with_context(|| what.clone())?;
        let stderr = common::both(&output);
        if !output.status.success() {
            let (must, may) = (&self.spec.refused, &self.spec.may_refuse);
            if let Some(text) = must.as_ref().or(may.as_ref())
                && stderr.contains(text.as_str())
            {
                if self.image().exists() {
                    bail!("{what} was refused, but left {}", self.image().display());
                }
                self.unharmed()
                    .with_context(|| format!("{what}: {stderr}"))?;
                return Ok(false);
            }
            bail!("{what} ended with {}: {stderr}", ending(output.status));
        }
        if let Some(why) = &self.spec.refused {
            bail!("{what}, wanted a refusal for `{why}`, got an image");
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let json: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("{what} --json printed {text:?} {stderr}"))?;
        let pid = json.get("pid").and_then(serde_json::Value::as_u64);
        if pid != Some(u64::from(self.pid)) {
            bail!("{what} --json: wanted \"pid\": {}, got {text}", self.pid);
        }
        if and_kill {
            if let Some(mut child) = self.program.take() {
                common::wait_child(&mut child, "the program's end after dump --kill", LIMIT)?;
            }
            // Its children, and whatever mistctl used, are gone soon, too.
            let me = std::process::id();
            wait_for("the end of all processes after dump --kill", LIMIT, || {
                let left = processes().into_iter().filter(|&p| p != 1 && p != me);
                Ok((left.count() == 0).then_some(()))
            })?;
        }
        Ok(true)
    }

    /// After a dump that left the program running: untraced, not stopped.
    fn unharmed(&mut self) -> Result<()> {
        let field = |key| common::status_field(self.pid, key).unwrap_or_default();
        if field("TracerPid") != "0" {
            bail!(
                "after the dump the program is traced by {}",
                field("TracerPid")
            );
        }
        wait_for(
            "the program's state to be as before",
            Duration::from_secs(1),
            || {
                let state = common::status_field(self.pid, "State").unwrap_or_default();
                Ok(
                    (state.starts_with('T') == self.spec.stopped && !state.starts_with('t'))
                        .then_some(()),
                )
            },
        )?;
        if let Some(child) = &mut self.program
            && let Some(status) = child.try_wait()?
        {
            bail!("after the dump the program ended with {}", ending(status));
        }
        Ok(())
    }

    fn restore(&self) -> Command {
        let mut command = mistctl();
        command.arg("restore").arg(self.image()).arg("--same-pid");
        if self.mode == Mode::Lazy {
            command.arg("--lazy");
        }
        command
    }

    fn restore_detached(&mut self) -> Result<()> {
        let mut command = self.restore();
        command.arg("--detach").arg("--json");
        let output = run(command, &self.dir, "restore-detached", LIMIT)?;
        let stderr = common::both(&output);
        if !output.status.success() {
            bail!(
                "mistctl restore --detach ended with {}: {stderr}",
                ending(output.status)
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let json: serde_json::Value = serde_json::from_str(&text).with_context(|| {
            format!("mistctl restore --detach --json printed {text:?} {stderr}")
        })?;
        let pid = json.get("pid").and_then(serde_json::Value::as_u64);
        if pid != Some(u64::from(self.pid)) {
            bail!(
                "mistctl restore --same-pid: wanted pid {}, got {text}",
                self.pid
            );
        }
        self.unharmed()
    }

    /// Starts a restore in the foreground; its output goes to the file that is returned.
    fn restore_foreground(&self) -> Result<(Child, PathBuf)> {
        let mut command = self.restore();
        let out = self.dir.join("restore.out");
        let child = command
            .stdout(File::create(&out)?)
            .stderr(File::create(self.dir.join("restore.err"))?)
            .spawn()
            .context("cannot start mistctl restore")?;
        Ok((child, out))
    }

    /// Lets the program go on to its checks.
    fn go(&self) -> Result<()> {
        fs::write(self.cwd.join("go"), "")?;
        if self.spec.stopped {
            let pid = Pid::from_raw(i32::try_from(self.pid)?);
            wait_for("the program to be there and stopped", LIMIT, || {
                let field = |key| common::status_field(self.pid, key).unwrap_or_default();
                if self.cwd.join("result").exists() {
                    bail!("the program was to stay stopped, but it ran");
                }
                Ok((field("State").starts_with('T') && field("TracerPid") == "0").then_some(()))
            })?;
            kill(pid, Signal::SIGCONT).context("SIGCONT")?;
        }
        Ok(())
    }

    /// The program's own verdict, and the harness's about times.
    fn judge(&mut self, ended: &str, success: bool) -> Result<Option<String>> {
        let text = fs::read_to_string(self.cwd.join("result"))
            .with_context(|| format!("no verdict; {ended}"))?;
        let first = text.lines().next().unwrap_or_default();
        if let Some(why) = first.strip_prefix("SKIPPED: ") {
            return Ok(Some(why.to_owned()));
        }
        if first != "PASS" {
            bail!("{first}; {ended}");
        }
        if !success {
            bail!("the program passed, but {ended}");
        }
        let numbers = |line: &str| -> Vec<i64> {
            line.split_whitespace()
                .filter_map(|w| w.parse().ok())
                .collect()
        };
        let gaps = text.lines().find_map(|l| l.strip_prefix("gaps "));
        let gaps = gaps.map(numbers).unwrap_or_default();
        let away: i64 = gaps.iter().take(self.mode.absences()).sum();
        for line in text.lines().filter(|l| l.starts_with("timed ")) {
            let [elapsed, wanted] = numbers(line)[..] else {
                bail!("cannot read `{line}`");
            };
            // A point in time comes when it comes, however long one was away; unless one was
            // away when it came.
            let absolute = line.contains(" absolute ");
            let late = elapsed - wanted - if absolute { 0 } else { away };
            println!("{line}: late by {late} us, away {away} us, longest pauses {gaps:?}");
            let early = if self.mode.absences() == 0 || absolute {
                0
            } else {
                EARLY_US
            };
            let slack = if absolute { away } else { 0 };
            if late < -early {
                bail!("{line}: {} us too early (away for {away} us)", -late);
            }
            if late > LATE_US + slack {
                bail!("{line}: {late} us too late (away for {away} us)");
            }
        }
        if self.spec.stdout && self.mode.absences() == 0 {
            let piped = self.piped.take().context("no pipe")?;
            let text = piped.join().map_err(|_| anyhow!("reading the pipe"))?;
            if text != "before\nafter\n" {
                bail!("the program's output, wanted before and after, got {text:?}");
            }
        }
        if let Some(peer) = self.peer.take() {
            peer.finish()?;
        }
        Ok(None)
    }
}

/// A TCP peer that mist knows nothing of: it sends back each byte, plus one.
struct Peer {
    address: SocketAddr,
    thread: thread::JoinHandle<Result<u64>>,
}

impl Peer {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            Self::echo(stream)
        });
        Ok(Self { address, thread })
    }

    fn echo(mut stream: TcpStream) -> Result<u64> {
        use std::io::Write as _;
        let mut total = 0;
        let mut buffer = vec![0; 65536];
        loop {
            let n = stream.read(&mut buffer).context("the peer's read")?;
            if n == 0 {
                return Ok(total);
            }
            for byte in &mut buffer[..n] {
                *byte = byte.wrapping_add(1);
            }
            stream.write_all(&buffer[..n]).context("the peer's write")?;
            total += n as u64;
        }
    }

    fn finish(self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !self.thread.is_finished() {
            if Instant::now() > deadline {
                bail!("the peer outside saw no end-of-file");
            }
            thread::sleep(Duration::from_millis(5));
        }
        match self.thread.join() {
            Ok(outcome) => outcome.map(drop).context("the peer outside"),
            Err(_) => bail!("the peer outside panicked"),
        }
    }
}
