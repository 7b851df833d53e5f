//! What several test binaries need: C programs built once, directories that go away, commands
//! with a deadline, and pid namespaces in which nothing outlives a test.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Pause between two looks at something that has no event to wait for (the state of a process
/// that is not a child, a file in a directory that may not exist yet).
const TICK: Duration = Duration::from_millis(3);

/// The built `mistctl`.
pub fn mistctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mistctl"));
    command.stdin(Stdio::null());
    command
}

/// Changes what an image says, checksums and all.
pub fn change_manifest(
    image: &Path,
    change: impl FnOnce(&mut serde_json::Value) -> Result<()>,
) -> Result<()> {
    let path = image.join("manifest.json");
    let mut manifest = serde_json::from_slice(&fs::read(&path)?)?;
    change(&mut manifest)?;
    let text = serde_json::to_vec(&manifest)?;
    fs::write(&path, &text)?;
    let hash = blake3::hash(&text).to_hex();
    let sums = image.join("checksums");
    let line = |l: &str| match l.split_once("  ") {
        Some((_, "manifest.json")) => format!("{hash}  manifest.json\n"),
        _ => format!("{l}\n"),
    };
    let lines: String = fs::read_to_string(&sums)?.lines().map(line).collect();
    fs::write(&sums, lines)?;
    Ok(())
}

/// The folder in which everything built for tests is kept between runs.
pub fn build_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs")
}

/// Builds the C program `source` with `cc`, unless the built one is newer than the source and
/// every header beside it. `flags` go after the source, so they may name libraries.
pub fn build_c(source: &Path, flags: &[String]) -> Result<PathBuf> {
    let stem = source
        .file_stem()
        .and_then(OsStr::to_str)
        .with_context(|| format!("{}: no file name", source.display()))?;
    // One at a time: threads may want the same program.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    // Sources in different folders may have one name.
    let folder = source.parent().unwrap_or(Path::new("."));
    let dir = match folder.file_name() {
        Some(name) if name != "programs" => build_dir().join(name),
        _ => build_dir(),
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let built = dir.join(stem);
    let mut newest = fs::metadata(source)
        .and_then(|m| m.modified())
        .with_context(|| format!("cannot read {}", source.display()))?;
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.path().extension() == Some(OsStr::new("h")) {
            newest = newest.max(entry.metadata()?.modified()?);
        }
    }
    if fs::metadata(&built)
        .and_then(|m| m.modified())
        .is_ok_and(|t| t > newest)
    {
        return Ok(built);
    }
    // Elsewhere first: two test runs may build the same program at once, in pid namespaces with the same pids.
    let place = tempfile::tempdir_in(&dir)?;
    let fresh = place.path().join(stem);
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-o"])
        .arg(&fresh)
        .arg(source)
        .args(flags)
        .output()
        .context("cannot run cc, the C compiler; install gcc")?;
    if !output.status.success() {
        bail!(
            "cc {} failed:\n{}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    fs::rename(&fresh, &built).with_context(|| format!("cannot create {}", built.display()))?;
    Ok(built)
}

/// Looks every few milliseconds until `found` gives something; an error names `what` after
/// `limit`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut found: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = found()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: nothing after {} s", limit.as_secs());
        }
        thread::sleep(TICK);
    }
}

/// Waits for a child of ours; kills it when `limit` is over.
pub fn wait_child(child: &mut Child, what: &str, limit: Duration) -> Result<ExitStatus> {
    let outcome = wait_for(what, limit, || Ok(child.try_wait()?));
    if outcome.is_err() {
        // Gone in between is as good; the error tells the story already.
        let _ = child.kill();
        let _ = child.wait();
    }
    outcome
}

/// Runs a command to its end with its output in files of `dir`, so that nobody who inherits a
/// descriptor can keep us waiting for the end of a pipe.
pub fn run(mut command: Command, dir: &Path, name: &str, limit: Duration) -> Result<Output> {
    let (out, err) = (
        dir.join(format!("{name}.out")),
        dir.join(format!("{name}.err")),
    );
    let mut child = command
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?)
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let status =
        wait_child(&mut child, name, limit).map_err(|e| anyhow!("{e:#}\n{}", tail(&err, 4000)))?;
    Ok(Output {
        status,
        stdout: fs::read(&out)?,
        stderr: fs::read(&err)?,
    })
}

/// What a command wrote, errors first.
pub fn both(output: &Output) -> String {
    let text = [&output.stderr[..], &output.stdout[..]].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// How a process ended, for people.
pub fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => format!("{status:?}"),
    }
}

/// The last `max` bytes of a file as text; empty where there is none.
pub fn tail(path: &Path, max: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let from = bytes.len().saturating_sub(max);
    String::from_utf8_lossy(&bytes[from..]).into_owned()
}

/// What `/proc/PID/status` says after `key:`.
pub fn status_field(pid: u32, key: &str) -> Option<String> {
    // Its name may be any bytes.
    let text = fs::read(format!("/proc/{pid}/status")).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
        .map(|v| v.trim().to_owned())
}

/// Every process of this pid namespace, as `/proc` lists them.
pub fn processes() -> Vec<u32> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// One line per process: what it is, and what it waits for.
pub fn describe(pids: &[u32]) -> String {
    let mut text = String::new();
    for &pid in pids {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
        let cmd = read("cmdline").unwrap_or_default().replace('\0', " ");
        let field = |key| status_field(pid, key).unwrap_or_default();
        let _ = writeln!(
            text,
            "  pid {pid} ppid {} {} tracer {} sigpnd {}/{} in {} wchan {} [{}] {cmd}",
            field("PPid"),
            field("State"),
            field("TracerPid"),
            field("SigPnd"),
            field("ShdPnd"),
            read("syscall").unwrap_or_default().trim(),
            read("wchan").unwrap_or_default(),
            field("Name"),
        );
    }
    text
}

/// Namespaces of our own for the tests: pids, mounts, network, System V IPC.
pub mod sandbox {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::prctl;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, wait};
    use nix::unistd::{Pid, setsid};

    /// Environment variable under which the sandbox's processes find their part.
    const ROLE: &str = "MIST_TEST_ROLE";

    /// Exit code with which a worker says "could not run here"; the reason is the last line of
    /// its standard output.
    pub const SKIPPED: i32 = 77;

    /// How a worker in a sandbox ended.
    #[derive(Debug)]
    pub enum Verdict {
        /// Exit code 0, with what it wrote to standard output.
        Passed(String),
        /// Exit code [`SKIPPED`], with the last line of its standard output.
        Skipped(String),
        /// Anything else, with everything that it wrote.
        Failed(String),
    }

    /// Runs this very executable again with `args` in namespaces of its own: new pids (so every
    /// pid but 1 and the worker's is free), a /proc that fits, a network with only a loopback
    /// device, no System V IPC, no pseudo terminals. Whatever is left in it after the worker or after `limit` is
    /// killed. The executable has to call [`play_role`] first thing in `main`.
    pub fn run_self(args: &[String], dir: &Path, limit: Duration) -> Result<Verdict> {
        let exe = std::env::current_exe().context("cannot find this executable")?;
        let mut command = Command::new(exe);
        command.args(args).env(ROLE, "outside").stdin(Stdio::null());
        let output = run(command, dir, "test", limit)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(match output.status.code() {
            Some(0) => Verdict::Passed(stdout),
            Some(SKIPPED) => Verdict::Skipped(stdout.lines().last().unwrap_or_default().to_owned()),
            _ => Verdict::Failed(format!(
                "{stdout}{}({})",
                String::from_utf8_lossy(&output.stderr),
                ending(output.status)
            )),
        })
    }

    /// Takes part in a sandbox if this process was started as such. Gives true in the worker,
    /// false in an ordinary process; the roles between the two end here.
    pub fn play_role() -> bool {
        let outcome = match std::env::var(ROLE).as_deref() {
            Ok("outside") => outside(),
            Ok("init") => init(),
            Ok(_) => return true,
            Err(_) => return false,
        };
        match outcome {
            Ok(code) => std::process::exit(code),
            Err(e) => {
                eprintln!("the test's namespaces: {e:#}");
                std::process::exit(1)
            }
        }
    }

    fn again(role: &str) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).env(ROLE, role);
        Ok(command)
    }

    /// The process outside: makes the namespaces, waits for their init.
    fn outside() -> Result<i32> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        unshare(
            CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC,
        )
        .context("unshare (are you root?)")?;
        let status = again("init")?.status()?;
        Ok(status.code().unwrap_or(1))
    }

    /// Pid 1 inside: sets the place up, reaps whatever ends, follows the worker. Its end makes
    /// the kernel kill everything that is left.
    fn init() -> Result<i32> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        setsid().context("setsid")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context("cannot make / private")?;
        mount(
            Some("proc"),
            "/proc",
            Some("proc"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            none,
        )
        .context("cannot mount /proc")?;
        // Which numbers of terminals are free is a matter of this test alone.
        mount(
            Some("devpts"),
            "/dev/pts",
            Some("devpts"),
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("newinstance,ptmxmode=0666,mode=0620"),
        )
        .context("cannot mount /dev/pts")?;
        let lo = build_dir().join("lo_up");
        if lo.exists() && !Command::new(&lo).status()?.success() {
            bail!("cannot bring the loopback device up");
        }
        let worker = Pid::from_raw(i32::try_from(again("worker")?.spawn()?.id())?);
        let code = loop {
            match wait().context("wait")? {
                WaitStatus::Exited(pid, code) if pid == worker => break code,
                WaitStatus::Signaled(pid, signal, _) if pid == worker => {
                    eprintln!("the test itself was ended by {signal}");
                    break 1;
                }
                _ => {}
            }
        };
        if code != 0 {
            return Ok(code);
        }
        // The test is over: nothing of what it started may be left.
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            while let Ok(status) = nix::sys::wait::waitpid(
                Pid::from_raw(-1),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            ) {
                if status == WaitStatus::StillAlive {
                    break;
                }
            }
            let left: Vec<u32> = processes().into_iter().filter(|&p| p != 1).collect();
            if left.is_empty() {
                return Ok(0);
            }
            if Instant::now() > deadline {
                eprintln!("left behind after the test:\n{}", describe(&left));
                return Ok(1);
            }
            thread::sleep(TICK);
        }
    }
}
