//! Where ids of an image are taken, its processes get a pid namespace of their own: as it looks from outside.
//! (Whether the programs notice anything: `tests/programs.rs`, the mode `ids_taken`.)

mod common;
mod image_fixture;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::{
    both, build_c, describe, ending, mistctl, processes, run, sandbox, status_field, wait_for,
};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(30);

type Test = fn(&Scene) -> Result<()>;

const TESTS: [(&str, Test); 8] = [
    ("detached", detached),
    ("foreground", foreground),
    ("a_single_process_with_a_new_pid_is_its_own_peer", own_peer),
    ("a_plain_user_restores_his_own", plain_user),
    ("a_users_image_names_no_root", forged_peer),
    ("same_pid_is_refused", same_pid_is_refused),
    ("without_rights_it_is_refused", without_rights_it_is_refused),
    ("a_killed_restore_leaves_all_or_nothing", killed),
];

fn main() -> ExitCode {
    if sandbox::play_role() {
        return worker();
    }
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(2);
    let trial = |(name, _): &(&str, _)| {
        let name = (*name).to_owned();
        Trial::ignorable_test(format!("namespaces::{name}"), move || outer(&name))
    };
    libtest_mimic::run(&args, TESTS.iter().map(trial).collect()).exit_code()
}

fn outer(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root, to make namespaces");
        return Ok(Completion::ignored_with("needs root, to make namespaces"));
    }
    let dir = tempfile::Builder::new().prefix("mist-ns-").tempdir()?;
    let args = [name.to_owned(), dir.path().to_string_lossy().into_owned()];
    match sandbox::run_self(&args, dir.path(), 10 * LIMIT).map_err(|e| format!("{e:#}"))? {
        sandbox::Verdict::Passed(_) => Ok(Completion::Completed),
        sandbox::Verdict::Skipped(why) => Ok(Completion::ignored_with(why)),
        sandbox::Verdict::Failed(why) => Err(Failed::from(why)),
    }
}

fn worker() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, dir] = args.as_slice() else {
        return ExitCode::FAILURE;
    };
    let outcome = Scene::new(Path::new(dir)).and_then(|scene| {
        let test = TESTS.iter().find(|(n, _)| n == name);
        let (_, test) = test.context("no such test")?;
        test(&scene)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("{e:#}\nprocesses:\n{}", describe(&processes()));
            ExitCode::FAILURE
        }
    }
}

/// A shell with a child (which has sockets) that was saved, and another process that has its pid.
struct Scene {
    dir: PathBuf,
    image: PathBuf,
    pid: u32,
    squatter: std::cell::RefCell<Child>,
}

impl Scene {
    fn new(dir: &Path) -> Result<Self> {
        let mut program = Command::new("/bin/sh")
            .args(["-c", "\"$0\" & trap 'exit 7' TERM; wait"])
            .arg(own_peer_program()?)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = program.id();
        wait_for("the shell's child", LIMIT, || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let child = children.split_whitespace().next().map(str::to_owned);
            Ok(child.filter(|c| waits(c)))
        })?;
        let image = dir.join("image");
        let mut dump = mistctl();
        dump.args(["dump", "--tree", "--kill", "-o"]).arg(&image);
        dump.arg(pid.to_string());
        succeeded(&run(dump, dir, "dump", LIMIT)?)?;
        program.wait()?;
        let last = "/proc/sys/kernel/ns_last_pid";
        fs::write(last, (pid - 1).to_string()).context(last)?;
        let squatter = Command::new("/bin/sleep").arg("1000").spawn()?;
        ensure!(squatter.id() == pid, "the pid {pid} could not be taken");
        Ok(Self {
            dir: dir.to_owned(),
            image,
            pid,
            squatter: squatter.into(),
        })
    }

    fn restore(&self, args: &[&str]) -> Command {
        let mut command = mistctl();
        command.arg("restore").args(args).arg(&self.image);
        command
    }

    /// The processes of this place but for the sandbox's own and the squatter.
    fn others(&self) -> Vec<u32> {
        let known = [1, std::process::id(), self.pid];
        let mut all = processes();
        all.retain(|p| !known.contains(p));
        all
    }

    fn nothing_is_left(&self) -> Result<()> {
        wait_for("the end of the namespace", LIMIT, || {
            Ok(self.others().is_empty().then_some(()))
        })
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let mut squatter = self.squatter.borrow_mut();
        let _ = squatter.kill();
        let _ = squatter.wait();
    }
}

fn succeeded(output: &Output) -> Result<()> {
    if !output.status.success() {
        bail!(
            "mistctl ended with {}: {}",
            ending(output.status),
            both(output)
        );
    }
    Ok(())
}

/// The id of a process in its innermost pid namespace.
fn inside(pid: u32) -> Option<u32> {
    let ids = status_field(pid, "NSpid")?;
    ids.split_whitespace().last()?.parse().ok()
}

fn send(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid as i32), signal).with_context(|| format!("{signal} to {pid}"))
}

fn detached(scene: &Scene) -> Result<()> {
    for args in [
        &["--detach", "--json"][..],
        &["--detach", "--json", "--lazy"],
    ] {
        let output = run(scene.restore(args), &scene.dir, "restore", LIMIT)?;
        succeeded(&output)?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let pid = said["pid"].as_u64().context("no pid")? as u32;
        ensure!(said["pid_namespace"] == true, "{said}");
        ensure!(
            said["warnings"]
                .to_string()
                .contains("pid namespace of their own"),
            "{said}"
        );
        ensure!(pid != scene.pid, "{said}");
        ensure!(inside(pid) == Some(scene.pid), "wanted {}", scene.pid);
        // Its /proc is its own.
        let comm = fs::read_to_string(format!("/proc/{pid}/root/proc/{}/comm", scene.pid))?;
        ensure!(comm == "sh\n", "got {comm:?}");
        let parent = status_field(pid, "TracerPid");
        ensure!(parent.as_deref() == Some("0"), "still traced");
        let all = scene.others();
        let init = all.iter().find(|p| inside(**p) == Some(1));
        let init = *init.context("the namespace has no init")?;
        let open = fs::read_dir(format!("/proc/{init}/fd"))?.count();
        // The line to mistctl, signals, the shell's pidfd.
        ensure!(open <= 3, "its init holds {open} descriptors");
        // Dumped from outside it is the process that it is inside, and runs on.
        let again = scene.dir.join("again");
        let mut dump = mistctl();
        dump.args(["dump", "--tree", &pid.to_string(), "-o"])
            .arg(&again);
        succeeded(&run(dump, &scene.dir, "dump", LIMIT)?)?;
        let mut show = mistctl();
        show.args(["show", "--json"]).arg(&again);
        let output = run(show, &scene.dir, "show", LIMIT)?;
        succeeded(&output)?;
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let first = &shown["processes"][0]["pid"];
        ensure!(*first == scene.pid, "the image says {first}");
        fs::remove_dir_all(&again)?;
        // The shell ends, and its child is the init's.
        send(pid, Signal::SIGTERM)?;
        let sleeper = wait_for("the shell's end", LIMIT, || {
            let left = scene.others();
            Ok(match left.as_slice() {
                [a, b] => [*a, *b].into_iter().find(|p| *p != init),
                _ => None,
            })
        })?;
        let parent = status_field(sleeper, "PPid");
        ensure!(parent == Some(init.to_string()), "its parent is {parent:?}");
        send(sleeper, Signal::SIGKILL)?;
        scene.nothing_is_left()?;
    }
    Ok(())
}

fn foreground(scene: &Scene) -> Result<()> {
    let mut mistctl = scene.restore(&[]).spawn()?;
    wait_for("the shell", LIMIT, || {
        let shell = scene
            .others()
            .into_iter()
            .find(|p| inside(*p) == Some(scene.pid));
        // A body has another name until it is nearly done, and is traced until it runs.
        let runs = shell.filter(|p| {
            status_field(*p, "Name").as_deref() == Some("sh")
                && status_field(*p, "TracerPid").as_deref() == Some("0")
        });
        Ok(runs)
    })?;
    // It passes on what comes as soon as the shell runs.
    send(mistctl.id(), Signal::SIGTERM)?;
    let status = common::wait_child(&mut mistctl, "mistctl restore", LIMIT)?;
    ensure!(status.code() == Some(7), "it ended with {}", ending(status));
    let left = scene.others().into_iter().find(|p| inside(*p) != Some(1));
    send(left.context("the shell's child is gone")?, Signal::SIGKILL)?;
    scene.nothing_is_left()
}

/// Here mistctl gives another pid, and sockets that it makes again name that.
fn own_peer(scene: &Scene) -> Result<()> {
    let status = asks_its_sockets(scene, 0, &|_| Ok(()), &by_root)?;
    ensure!(status.success(), "it ended with {}", ending(status));
    Ok(())
}

/// A user's image that says that root has made its sockets, restored by root.
fn forged_peer(scene: &Scene) -> Result<()> {
    const NOBODY: u32 = 65534;
    let forge = |image: &Path| {
        let path = image.join("manifest.json");
        let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        let sockets = manifest["sockets"].as_array_mut().context("no sockets")?;
        ensure!(sockets.len() == 2, "{} sockets", sockets.len());
        for s in sockets {
            let creds = &mut s["state"]["peer_creds"];
            ensure!(creds["uid"] == NOBODY, "{creds}");
            creds["uid"] = 0.into();
            creds["gid"] = 0.into();
        }
        image_fixture::forge(image, "manifest.json", &serde_json::to_vec(&manifest)?);
        give(image, NOBODY)
    };
    let status = asks_its_sockets(scene, NOBODY, &forge, &by_root)?;
    ensure!(status.success(), "it ended with {}", ending(status));
    Ok(())
}

fn by_root() -> Command {
    let mut command = mistctl();
    command.arg("restore");
    command
}

/// Makes a file or directory, with all that is in it, this user's.
fn give(path: &Path, uid: u32) -> Result<()> {
    chown(path, Some(uid), Some(uid))?;
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), uid)?;
        }
    }
    Ok(())
}

/// Without any capability a program gets another pid and keeps mistctl as /proc/PID/exe; it goes on all the same.
fn plain_user(scene: &Scene) -> Result<()> {
    const NOBODY: u32 = 65534;
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
    open(&scene.dir)?;
    // Where the user finds it.
    let exe = scene.dir.join("mistctl");
    fs::copy(env!("CARGO_BIN_EXE_mistctl"), &exe)?;
    open(&exe)?;
    let restore = || {
        let mut command = Command::new("/usr/bin/setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(&exe).arg("restore").current_dir("/");
        command
    };
    // Its sockets name a process that made them and is gone.
    const ANOTHER_PEER: i32 = 3;
    let status = asks_its_sockets(scene, NOBODY, &|image| give(image, NOBODY), &restore)?;
    ensure!(
        status.code() == Some(ANOTHER_PEER),
        "it ended with {}",
        ending(status)
    );
    Ok(())
}

/// A program with sockets that waits for a signal.
fn own_peer_program() -> Result<PathBuf> {
    build_c(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/namespaces/own_peer.c"),
        &[],
    )
}

/// Whether it does so already.
fn waits(pid: &str) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    call.starts_with(&libc::SYS_rt_sigtimedwait.to_string())
}

/// A program of this user, restored beside itself after `change` has had its image, says by its status whether its
/// sockets name it.
fn asks_its_sockets(
    scene: &Scene,
    uid: u32,
    change: &dyn Fn(&Path) -> Result<()>,
    restore: &dyn Fn() -> Command,
) -> Result<ExitStatus> {
    let mut program = Command::new(own_peer_program()?)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .uid(uid)
        .gid(uid)
        .spawn()?;
    let pid = program.id();
    wait_for("the program to wait", LIMIT, || {
        Ok(waits(&pid.to_string()).then_some(()))
    })?;
    let image = scene.dir.join("single");
    let mut dump = mistctl();
    dump.args(["dump", &pid.to_string(), "-o"]).arg(&image);
    succeeded(&run(dump, &scene.dir, "dump", LIMIT)?)?;
    change(&image)?;
    let mut restored = restore().arg(&image).spawn()?;
    let new = wait_for("the restored program", LIMIT, || {
        // The dump's copy has that name, too, and may not be over yet.
        let is_it = |p: &u32| {
            status_field(*p, "Name").as_deref() == Some("own_peer") && waits(&p.to_string())
        };
        let mut others = scene.others().into_iter().filter(|p| *p != pid);
        let new = others.find(is_it);
        Ok(new.filter(|p| status_field(*p, "TracerPid").as_deref() == Some("0")))
    });
    program.kill()?;
    program.wait()?;
    send(new?, Signal::SIGUSR1)?;
    common::wait_child(&mut restored, "mistctl restore", LIMIT)
}

fn same_pid_is_refused(scene: &Scene) -> Result<()> {
    let output = run(
        scene.restore(&["--same-pid", "--detach"]),
        &scene.dir,
        "restore",
        LIMIT,
    )?;
    ensure!(!output.status.success(), "it was restored");
    let said = both(&output);
    ensure!(
        said.contains("are taken here; end those processes"),
        "{said}"
    );
    scene.nothing_is_left()
}

fn without_rights_it_is_refused(scene: &Scene) -> Result<()> {
    for lacks in ["sys_admin", "sys_chroot"] {
        let mut command = Command::new("/usr/bin/setpriv");
        command.arg(format!("--bounding-set=-{lacks}"));
        command.arg(env!("CARGO_BIN_EXE_mistctl"));
        command.args(["restore", "--detach"]).arg(&scene.image);
        let output = run(command, &scene.dir, "restore", LIMIT)?;
        ensure!(!output.status.success(), "it was restored");
        let said = both(&output);
        ensure!(
            said.contains("cannot have a pid namespace of its own") && said.contains("as root"),
            "{said}"
        );
        scene.nothing_is_left()?;
    }
    Ok(())
}

fn killed(scene: &Scene) -> Result<()> {
    let begun = Instant::now();
    succeeded(&run(
        scene.restore(&["--detach"]),
        &scene.dir,
        "restore",
        LIMIT,
    )?)?;
    let span = begun.elapsed().as_micros() as u64;
    let end = || -> Result<()> {
        for p in scene.others() {
            if inside(p) != Some(1) {
                let _ = kill(Pid::from_raw(p as i32), Signal::SIGKILL);
            }
        }
        scene.nothing_is_left()
    };
    end()?;
    let kills = std::env::var("MIST_KILLS")
        .ok()
        .and_then(|n| n.parse().ok());
    let kills: u64 = kills.unwrap_or(40);
    for i in 0..kills {
        let mut mistctl = scene.restore(&["--detach"]);
        let mut child = mistctl
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_micros(span * i / kills));
        child.kill()?;
        child.wait()?;
        // The init, the shell and its child, or none of them.
        wait_for("everything or nothing", LIMIT, || {
            let all = scene.others();
            let traced = |p: &u32| status_field(*p, "TracerPid").as_deref() != Some("0");
            let whole = all.len() == 3 && !all.iter().any(traced);
            Ok((all.is_empty() || whole).then_some(()))
        })
        .with_context(|| format!("after kill {i}"))?;
        end()?;
    }
    Ok(())
}
