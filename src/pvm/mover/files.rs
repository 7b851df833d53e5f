//! The files that a task has open must be there where it goes: compared before anything is stopped.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::link::Link;
use super::protocol::Job;
use crate::error::Failure;
use crate::pvm::agent::control::{Answer, Request};
use crate::pvm::agent::look;

/// Refuses when files are missing on the target, or different, with the list.
///
/// # Errors
/// `Refused`.
pub fn compare(job: &Job, link: &mut Link) -> Result<()> {
    let mut files = Vec::new();
    for path in open_files(job.pid)? {
        files.push(look(&path)?);
    }
    let limit = std::time::Duration::from_secs(300);
    let answer = link.ask(&job.to, Request::Compare { files }, limit)?;
    let Answer::Compared { different } = answer else {
        bail!("the agent of {} answers {answer:?}", job.to.name);
    };
    if different.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = different
        .iter()
        .map(|(path, why)| format!("{} ({why})", path.display()))
        .collect();
    Err(Failure::Refused.because(format!(
        "files that the task has open are not the same on {}: {}; copy them there, or keep them where both hosts see them",
        job.to.name,
        list.join(", ")
    )))
}

/// Files by name that process `pid` has open, and its directory. What has no name (any more) travels with it.
fn open_files(pid: i32) -> Result<BTreeSet<PathBuf>> {
    let dir = format!("/proc/{pid}/fd");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {dir}"))? {
        let link = entry.with_context(|| format!("cannot read {dir}"))?.path();
        found.extend(named(&link));
    }
    found.extend(named(Path::new(&format!("/proc/{pid}/cwd"))));
    Ok(found)
}

/// The file behind a link of /proc, if it has a name and that is still its.
fn named(link: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    // What is closed meanwhile does not matter.
    let (path, open) = (fs::read_link(link).ok()?, fs::metadata(link).ok()?);
    // Terminals stay behind in any case.
    if !path.is_absolute() || path.starts_with("/dev/pts") {
        return None;
    }
    let there = fs::metadata(&path).ok()?;
    ((there.dev(), there.ino()) == (open.dev(), open.ino())).then_some(path)
}
