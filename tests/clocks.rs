//! A program sees its clocks go on where they stood, also on another boot.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// Makes an image look as if another boot had made it, whose clocks were `ahead` seconds before ours.
fn pretend_another_boot(image: &Path, ahead: i128) -> Result<()> {
    common::change_manifest(image, |manifest| {
        let origin = manifest.get_mut("origin").context("no origin")?;
        origin["boot_id"] = "00000000-0000-4000-8000-000000000000".into();
        for clock in ["monotonic_ns", "boottime_ns"] {
            let now = origin[clock].as_i64().context("no clock")?;
            origin[clock] = (now + (ahead * 1_000_000_000) as i64).into();
        }
        Ok(())
    })
}

#[test]
fn clocks_of_another_boot_go_on() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: making a time namespace needs root");
        return Ok(());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clocks/clock.c");
    let program = common::build_c(&source, &[])?;
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("image");
    let mut child = Command::new(&program)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let there = |name: &str| dir.path().join(name).exists().then_some(());
    common::wait_for("the program", LIMIT, || Ok(there("ready")))?;
    let mut dump = common::mistctl();
    dump.args(["dump", "--kill", &child.id().to_string(), "-o"])
        .arg(&image);
    let dumped = common::run(dump, dir.path(), "dump", LIMIT)?;
    let _ = child.kill();
    child.wait()?;
    ensure!(dumped.status.success(), "{}", common::both(&dumped));

    const AHEAD: i128 = 1_000_000;
    pretend_another_boot(&image, AHEAD)?;
    std::fs::write(dir.path().join("go"), "")?;
    let mut restore = common::mistctl();
    restore.arg("restore").arg(&image);
    let restored = common::run(restore, dir.path(), "restore", LIMIT)?;
    ensure!(restored.status.success(), "{}", common::both(&restored));
    let text = std::fs::read_to_string(dir.path().join("result"))?;
    let times: Vec<f64> = text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [before, vdso, call] = times[..] else {
        anyhow::bail!("three times, got {text:?}")
    };
    ensure!(
        vdso - before >= AHEAD as f64,
        "the vDSO's clock stood at {before} and shows {vdso}"
    );
    ensure!(
        (call - vdso).abs() < 60.0,
        "the vDSO tells {vdso}, the kernel {call}"
    );
    Ok(())
}
