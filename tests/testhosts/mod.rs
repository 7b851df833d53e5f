//! Test hosts for test binaries: `scripts/testhosts` with a set of hosts of this checkout's own,
//! one test binary at a time, gone when the value is dropped.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::{Arguments, Completion, Trial};
use nix::fcntl::{Flock, FlockArg};

use crate::common::{both, ending, run};

/// How long any one command may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(120);

/// A binary's tests, one after the other. They share one stage, which the first that needs it sets up and which is
/// struck in the end; `play` runs one test on it.
pub fn main<S, T>(
    tests: impl IntoIterator<Item = (&'static str, T)>,
    set_up: fn() -> Result<S>,
    play: fn(&S, T) -> Result<()>,
) -> ExitCode
where
    S: Send + 'static,
    T: Copy + Send + 'static,
{
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let stage = Arc::new(Mutex::new(None));
    let trial = |(name, test): (&'static str, T)| {
        let stage = Arc::clone(&stage);
        Trial::ignorable_test(name, move || {
            if let Some(why) = cannot_run() {
                println!("SKIPPED: {why}");
                return Ok(Completion::ignored_with(why));
            }
            // A test that panicked leaves the stage as a test that failed does.
            let mut stage = stage.lock().unwrap_or_else(|e| e.into_inner());
            let stage = match &mut *stage {
                Some(stage) => stage,
                none => none.insert(set_up().map_err(|e| format!("{e:#}"))?),
            };
            play(stage, test).map_err(|e| format!("{e:#}"))?;
            Ok(Completion::Completed)
        })
    };
    let trials = tests.into_iter().map(trial).collect();
    let conclusion = libtest_mimic::run(&args, trials);
    *stage.lock().unwrap_or_else(|e| e.into_inner()) = None;
    conclusion.exit_code()
}

/// Hosts h0 to hN-1, up.
pub struct Hosts {
    /// Their name among other sets of hosts on this machine.
    pub set: String,
    count: usize,
    /// Where commands' output goes.
    dir: tempfile::TempDir,
    runs: AtomicUsize,
    _lock: Flock<File>,
}

/// Why tests with hosts cannot run here, if so.
pub fn cannot_run() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("test hosts are namespaces and need root".into());
    }
    if !Path::new("/etc/debian_version").exists() && !Path::new("/usr/lib/pvm3").exists() {
        return Some("no PVM here, and no apt to install it".into());
    }
    None
}

/// The script itself, for a set of hosts.
fn script(set: &str) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/testhosts"));
    command.env("MIST_TESTHOSTS", set).stdin(Stdio::null());
    command
}

impl Hosts {
    /// Waits until nobody else who runs this test binary of this checkout has hosts, and starts `count` of them.
    pub fn up(count: usize) -> Result<Self> {
        let mut hash = DefaultHasher::new();
        (env!("CARGO_MANIFEST_DIR"), env!("CARGO_CRATE_NAME")).hash(&mut hash);
        let set = format!("test-{:08x}", hash.finish() as u32);
        let root = Path::new("/run/mist-testhosts");
        fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
        let path = root.join(format!("{set}.tests"));
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| e)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        let hosts = Self {
            set,
            count,
            dir: tempfile::tempdir()?,
            runs: AtomicUsize::new(0),
            _lock: lock,
        };
        // What a killed test run may have left.
        hosts.verb(&["down"])?;
        hosts.verb(&["up", &count.to_string()])?;
        Ok(hosts)
    }

    /// Runs any command to its end, within a limit.
    pub fn run(&self, command: Command) -> Result<Output> {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        run(command, self.dir.path(), &format!("run{number}"), LIMIT)
    }

    /// `scripts/testhosts ARGS`, whatever becomes of it.
    pub fn try_verb(&self, args: &[&str]) -> Result<Output> {
        let mut command = script(&self.set);
        command.args(args);
        self.run(command)
    }

    /// `scripts/testhosts ARGS`, which must succeed; what it printed.
    pub fn verb(&self, args: &[&str]) -> Result<String> {
        let output = self.try_verb(args)?;
        if !output.status.success() {
            bail!(
                "testhosts {}: {}: {}",
                args.join(" "),
                ending(output.status),
                both(&output)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A shell command on a host as the test user, which must succeed; what it printed.
    pub fn exec(&self, host: &str, shell: &str) -> Result<String> {
        self.verb(&["exec", host, "bash", "-c", shell])
    }

    /// The same as root.
    pub fn root(&self, host: &str, shell: &str) -> Result<String> {
        self.verb(&["exec", "--root", host, "bash", "-c", shell])
    }

    /// A command that runs a shell command on a host; for tests that end it themselves.
    pub fn command(&self, host: &str, shell: &str) -> Command {
        let mut command = script(&self.set);
        command.args(["exec", host, "bash", "-c", shell]);
        command
    }

    /// A virtual machine of all hosts, with its master pvmd on h0. `environment` is put before
    /// the pvmd's command, as in `A=1 B=2`.
    pub fn start_pvm(&self, environment: &str) -> Result<()> {
        self.exec(
            "h0",
            // pvmd says where it listens by its file; nothing else tells that it is ready.
            &format!(
                "{environment} setsid pvmd -nh0 </dev/null >/tmp/pvmd.out 2>&1 &
                 until [ -s /tmp/pvmd.$(id -u) ]; do
                     kill -0 $! || {{ cat /tmp/pvmd.out; exit 1; }}
                     sleep 0.01
                 done"
            ),
        )?;
        let others: Vec<String> = (1..self.count).map(|i| format!("h{i}")).collect();
        let said = self.console(&format!("add {}\nconf\n", others.join(" ")))?;
        if !said.contains(&format!("{} hosts, 1 data format", self.count)) {
            bail!("pvm did not take all hosts: {said}");
        }
        Ok(())
    }

    /// What PVM's console on h0 says to some lines.
    pub fn console(&self, lines: &str) -> Result<String> {
        self.exec("h0", &format!("pvm <<'END'\n{lines}\nquit\nEND"))
    }

    /// Where the hosts' state is kept while they are up.
    pub fn state(&self) -> PathBuf {
        Path::new("/run/mist-testhosts/sets").join(&self.set)
    }

    /// The pid of a host's init (or of the `switch`), as this machine counts.
    pub fn pid(&self, host: &str) -> Result<u32> {
        let path = self.state().join(host).join("pid");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .with_context(|| format!("{}: no pid in '{text}'", path.display()))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Err(e) = self.verb(&["down"]) {
            eprintln!("error: {e:#}");
        }
    }
}

/// A folder that all hosts see at the same place, which goes with the value.
pub fn shared_folder(mode: u32) -> Result<tempfile::TempDir> {
    // Not /tmp, which is each host's own; not the checkout, which the user may not read.
    let dir = tempfile::tempdir_in("/var/tmp")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode))?;
    Ok(dir)
}

/// Builds the shim as this test was built; where it is.
pub fn shim() -> Result<PathBuf> {
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "-p", "pvm-shim"])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    ensure!(build.status()?.success(), "cargo build -p pvm-shim failed");
    Ok(Path::new(env!("CARGO_BIN_EXE_mistctl")).with_file_name("libmistshim.so"))
}

/// mistctl and the shim where all hosts and their user find them: laid out as scripts/install does, with the file
/// capabilities it gives.
pub struct Installed(tempfile::TempDir);

impl Installed {
    pub fn new() -> Result<Self> {
        let root = shared_folder(0o755)?;
        let library = shim()?;
        let built = Path::new(env!("CARGO_BIN_EXE_mistctl"));
        for (from, dir, name) in [
            (built, "bin", "mistctl"),
            (&library, "lib", "libmistshim.so"),
        ] {
            let dir = root.path().join(dir);
            fs::create_dir(&dir)?;
            fs::copy(from, dir.join(name)).with_context(|| format!("{}", from.display()))?;
        }
        let installed = Self(root);
        installed.set_capabilities()?;
        Ok(installed)
    }

    /// The same once more, in its place, as scripts/install does.
    pub fn again(&self) -> Result<()> {
        for name in ["bin/mistctl", "lib/libmistshim.so"] {
            let path = self.0.path().join(name);
            let fresh = path.with_extension("fresh");
            fs::copy(&path, &fresh).with_context(|| format!("{}", path.display()))?;
            fs::rename(&fresh, &path)?;
        }
        self.set_capabilities()
    }

    /// The program, as every host sees it.
    pub fn path(&self) -> String {
        self.0.path().join("bin/mistctl").display().to_string()
    }

    /// As scripts/install: mistctl knows which capabilities it needs and this machine has.
    fn set_capabilities(&self) -> Result<()> {
        let mut check = Command::new("setpriv");
        check.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        let said = check.arg(self.path()).arg("check").output()?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let words = said.lines().find_map(|line| {
            let rest = line.trim().strip_prefix("sudo setcap ")?;
            rest.split(' ').next().map(str::to_owned)
        });
        let words = words.with_context(|| format!("mistctl check gives no setcap line: {said}"))?;
        let set = Command::new("setcap")
            .arg(words)
            .arg(self.path())
            .output()?;
        if !set.status.success() {
            bail!("setcap does not work here: {}", both(&set));
        }
        Ok(())
    }
}

/// The programs of `examples/`, where all hosts and their user find them.
pub struct Examples(tempfile::TempDir);

impl Examples {
    pub fn build() -> Result<Self> {
        let bin = shared_folder(0o755)?;
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"))
            .arg(format!("OUT={}", bin.path().display()));
        let output = make.output().context("cannot run make")?;
        let said = both(&output);
        ensure!(output.status.success(), "make -C examples failed:\n{said}");
        ensure!(!said.contains("warning"), "make -C examples:\n{said}");
        Ok(Self(bin))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn dir(&self) -> String {
        self.0.path().display().to_string()
    }
}
