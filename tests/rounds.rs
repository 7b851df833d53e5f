//! Following what a program writes while it runs.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use mistctl::dump::Tracker;
use mistctl::error::Failure;

#[test]
fn a_write_that_has_its_page_before_it_has_what_it_writes_is_not_missed() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: following a child of a test needs root");
        return Ok(());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rounds/pinned.c");
    let program = common::build_c(&source, &["-pthread".to_owned()])?;
    let mut child = Command::new(&program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut tell = child.stdin.take().context("stdin")?;
    let mut said = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let mut next = || {
        said.next()
            .context("the program has ended")?
            .map_err(anyhow::Error::from)
    };
    let page = u64::from_str_radix(&next()?, 16)?;
    let mut tracker = Tracker::start(child.id() as i32)?;
    ensure!(tracker.why_not().is_none(), "{:?}", tracker.why_not());
    // What the rounds have made of the page.
    let mut there = 0;
    let mut round = |tracker: &mut Tracker| {
        tracker.round(&mut |at, data| {
            if let Some(i) = page.checked_sub(at).filter(|i| *i < data.len() as u64) {
                there = data[i as usize];
            }
            Ok(())
        })?;
        anyhow::Ok(there)
    };
    ensure!(round(&mut tracker)? == b'a');
    writeln!(tell)?;
    ensure!(next()? == "waits");
    // It may as well say that it cannot be known now. What it has stopped is let go with its thread.
    let told = std::thread::scope(|scope| scope.spawn(|| round(&mut tracker)).join());
    if let Ok(Err(e)) = &told {
        ensure!(Failure::of(e) == Failure::Busy, "{e:#}");
    }
    writeln!(tell)?;
    ensure!(next()? == "written");
    ensure!(round(&mut tracker)? == b'b', "the write was missed");
    drop(tell);
    child.wait()?;
    Ok(())
}
