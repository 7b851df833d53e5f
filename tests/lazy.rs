//! A process that is dumped while a lazy restore still fills its memory.

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
