//! Processes that are dumped, fork, or lose who fills their memory while a lazy restore is at it.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_dump_of_memory_that_is_being_filled_has_all_of_it() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: dumping a child of a test needs root");
        return Ok(());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lazy/large.c");
    let program = common::build_c(&source, &[])?;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let mut child = Command::new(&program)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = child.id().to_string();
    common::wait_for("the program", LIMIT, || {
        Ok(at("ready").exists().then_some(()))
    })?;
    let dump = |image: &str| -> Result<()> {
        let mut dump = common::mistctl();
        dump.args(["dump", "--kill", &pid, "-o"]).arg(at(image));
        let dumped = common::run(dump, dir.path(), image, LIMIT)?;
        ensure!(dumped.status.success(), "{}", common::both(&dumped));
        Ok(())
    };
    dump("one")?;
    child.wait()?;
    let mut restored = common::mistctl()
        .args(["restore", "--lazy", "--same-pid"])
        .arg(at("one"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // As soon as it is there: most of its memory is not.
    common::wait_for("the restored program", LIMIT, || {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
        Ok(exe.is_ok_and(|exe| exe == program).then_some(()))
    })?;
    dump("two")?;
    common::wait_child(&mut restored, "restore --lazy", LIMIT)?;
    std::fs::write(at("go"), "")?;
    let mut restore = common::mistctl();
    restore.arg("restore").arg(at("two"));
    let ended = common::run(restore, dir.path(), "restore", LIMIT)?;
    ensure!(ended.status.success(), "{}", common::both(&ended));
    Ok(())
}

/// tests/lazy/forks.c in an image, in a folder of its own.
fn forks() -> Result<tempfile::TempDir> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lazy/forks.c");
    let program = common::build_c(&source, &[])?;
    let dir = tempfile::tempdir()?;
    let mut program = Command::new(&program);
    program
        .current_dir(dir.path())
        .env("MIST_LONG", "x".repeat(100_000));
    let mut child = quietly(&mut program).spawn()?;
    common::wait_for("the program", LIMIT, || {
        Ok(dir.path().join("ready").exists().then_some(()))
    })?;
    let mut dump = common::mistctl();
    dump.args(["dump", "--kill", &child.id().to_string(), "-o"]);
    dump.arg(dir.path().join("image"));
    let dumped = common::run(dump, dir.path(), "dump", LIMIT)?;
    child.wait()?;
    ensure!(dumped.status.success(), "{}", common::both(&dumped));
    Ok(dir)
}

fn quietly(command: &mut Command) -> &mut Command {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
}

#[test]
fn a_child_that_is_born_meanwhile_has_what_it_should() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: dumping a child of a test needs root");
        return Ok(());
    }
    let dir = forks()?;
    std::fs::write(dir.path().join("go"), "")?;
    let mut restore = common::mistctl();
    restore
        .args(["restore", "--lazy"])
        .arg(dir.path().join("image"));
    let ended = common::run(restore, dir.path(), "restore", LIMIT)?;
    ensure!(ended.status.success(), "{}", common::both(&ended));
    let wrong = std::fs::read_to_string(dir.path().join("child"))?;
    ensure!(wrong == "0", "{wrong} pages of the child are wrong");
    Ok(())
}

#[test]
fn a_child_that_is_born_meanwhile_ends_with_who_fills_it() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: dumping a child of a test needs root");
        return Ok(());
    }
    let dir = forks()?;
    let mut restore = common::mistctl();
    restore
        .args(["restore", "--lazy"])
        .arg(dir.path().join("image"));
    let mut restored = quietly(&mut restore).spawn()?;
    std::fs::write(dir.path().join("go"), "")?;
    common::wait_for("a child of the program", LIMIT, || {
        Ok(dir.path().join("forked").exists().then_some(()))
    })?;
    restored.kill()?;
    restored.wait()?;
    // Its folder tells the program's processes from others.
    common::wait_for("the end of the program and its child", LIMIT, || {
        let here = |pid: &std::path::PathBuf| {
            std::fs::read_link(pid.join("cwd")).is_ok_and(|cwd| cwd == dir.path())
        };
        let mut all = std::fs::read_dir("/proc")?.flatten().map(|e| e.path());
        Ok((!all.any(|pid| here(&pid))).then_some(()))
    })?;
    // It may have been quicker.
    if let Ok(wrong) = std::fs::read_to_string(dir.path().join("child")) {
        ensure!(wrong == "0", "{wrong} pages of the child are wrong");
    }
    Ok(())
}
