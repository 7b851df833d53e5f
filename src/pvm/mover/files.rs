//! The files that a task has open must be there where it goes: compared before anything is stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::link::Link;
use super::protocol::{FromMover, Job};
use crate::dump::Carried;
use crate::dump::files::FdInfo;
use crate::error::Failure;
use crate::kernel::maps;
use crate::pvm::agent::control::{Answer, Request};

/// Most time that comparing may take: files are read on both hosts.
const LIMIT: Duration = Duration::from_secs(300);
/// How often a file is compared that the task may be writing to.
const LOOKS: usize = 4;

/// Refuses when files that the task has open are missing on the target, or different, with the list. Tells whether
/// the programs and libraries that it maps have to go along.
///
/// # Errors
/// `Refused`.
pub fn compare(job: &Job, table: &Path, link: &mut Link) -> Result<Carried> {
    let open = open_files(job.pid)?;
    let mapped = mapped_files(job.pid, table)?;
    let written = |path: &PathBuf| open.get(path).copied().unwrap_or(false);
    let mut paths: BTreeSet<&PathBuf> = open.keys().chain(&mapped).collect();
    let mut different: Vec<(PathBuf, String)> = Vec::new();
    let mut hashes = job.hashes.clone();
    for _ in 0..LOOKS {
        let mut files = Vec::new();
        for path in &paths {
            files.push(hashes.look(path, written(path))?);
        }
        let answer = link.ask(&job.to, Request::Compare { files }, LIMIT)?;
        let Answer::Compared { different: found } = answer else {
            bail!("the agent of {} answers {answer:?}", job.to.name);
        };
        // What was written to between the two looks is looked at again.
        paths.retain(|path| written(path) && found.iter().any(|(differs, _)| differs == *path));
        different.retain(|(path, _)| !written(path));
        different.extend(found);
        if paths.is_empty() {
            break;
        }
    }
    if hashes != job.hashes {
        link.say(&FromMover::Hashed { hashes })?;
    }
    let list: Vec<String> = different
        .iter()
        .filter(|(path, _)| open.contains_key(path))
        .map(|(path, why)| format!("{} ({why})", path.display()))
        .collect();
    if !list.is_empty() {
        return Err(Failure::Refused.because(format!(
            "files that the task has open are not the same on {}: {}; copy them there, or keep them where both hosts see them",
            job.to.name,
            list.join(", ")
        )));
    }
    Ok(match different.is_empty() {
        true => Carried::Nameless,
        false => Carried::All,
    })
}

/// Files by name that process `pid` maps, but the tid table, of which every host has its own.
fn mapped_files(pid: i32, table: &Path) -> Result<BTreeSet<PathBuf>> {
    let maps = maps::read(pid).with_context(|| format!("reading mappings of process {pid}"))?;
    let files = maps.iter().filter_map(|map| Some(map.file()?.0));
    Ok(files.filter(|path| path != table).collect())
}

/// Files by name that process `pid` has open, with whether it can write to them; and its directory. What has no name
/// (any more) travels with it.
fn open_files(pid: i32) -> Result<BTreeMap<PathBuf, bool>> {
    let dir = format!("/proc/{pid}/fd");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {dir}"))? {
        let entry = entry.with_context(|| format!("cannot read {dir}"))?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (Some(path), Some(fd)) = (named(&entry.path()), number) else {
            continue;
        };
        // What is closed meanwhile does not matter.
        let flags = FdInfo::read(&pid.to_string(), fd).map_or(0, |info| info.flags);
        *found.entry(path).or_insert(false) |= flags & libc::O_ACCMODE != libc::O_RDONLY;
    }
    if let Some(cwd) = named(Path::new(&format!("/proc/{pid}/cwd"))) {
        found.entry(cwd).or_insert(false);
    }
    Ok(found)
}

/// The file behind a link of /proc, if it has a name and that is still its.
fn named(link: &Path) -> Option<PathBuf> {
    // What is closed meanwhile does not matter.
    let (path, open) = (fs::read_link(link).ok()?, fs::metadata(link).ok()?);
    // Terminals stay behind in any case.
    if !path.is_absolute() || path.starts_with("/dev/pts") {
        return None;
    }
    let there = fs::metadata(&path).ok()?;
    ((there.dev(), there.ino()) == (open.dev(), open.ino())).then_some(path)
}
