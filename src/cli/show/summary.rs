//! An image in numbers and words; --json prints it as it is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use mistctl::image::dated;
use mistctl::image::memory::Backing;
use mistctl::image::process::State;
use mistctl::image::{Image, Process, SpaceId, Vma};
use mistctl::pvm::tid::Tid;
use serde::Serialize;

use super::{describe, here};

#[derive(Debug, Serialize)]
pub struct Summary {
    pub image: PathBuf,
    pub made: String,
    pub origin: mistctl::image::Origin,
    /// Bytes of all files of the image.
    pub bytes_on_disk: u64,
    /// Bytes of memory that are stored (before compression), pages of zeros left out.
    pub bytes_memory: u64,
    pub processes: Vec<ProcessSummary>,
    pub shared_memory: Vec<SharedSummary>,
    pub sockets: usize,
    pub carried: Vec<here::Carried>,
    /// What is different on this host, and what it means for a restore.
    pub here: Vec<here::Difference>,
    pub pvm: bool,
    /// Of a PVM task: the tid that it has for itself and its partners.
    pub virtual_tid: Option<Tid>,
}

#[derive(Debug, Serialize)]
pub struct ProcessSummary {
    pub pid: i32,
    pub ppid: i32,
    pub comm: String,
    pub exe: String,
    pub command: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub state: State,
    pub main_thread_ended: bool,
    pub threads: Vec<ThreadSummary>,
    pub memory: Vec<Kind>,
    pub descriptors: Vec<Descriptor>,
    /// What is not carried.
    pub notes: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct ThreadSummary {
    pub tid: i32,
    pub comm: String,
    pub doing: String,
}

/// Memory of one kind in one process.
#[derive(Debug, Serialize)]
pub struct Kind {
    pub kind: &'static str,
    pub mappings: usize,
    pub bytes_mapped: u64,
    pub bytes_stored: u64,
}

#[derive(Debug, Serialize)]
pub struct Descriptor {
    pub fd: i32,
    pub what: String,
}

#[derive(Debug, Serialize)]
pub struct SharedSummary {
    pub what: String,
    pub bytes: u64,
    pub bytes_stored: u64,
}

impl Summary {
    pub fn of(image: &Image) -> anyhow::Result<Summary> {
        let m = &image.manifest;
        let mut processes = Vec::new();
        for p in &m.processes {
            processes.push(ProcessSummary {
                pid: p.pid,
                ppid: p.ppid,
                comm: p.comm.clone(),
                exe: describe::path(m, p.exe),
                command: command(image, p).unwrap_or_default(),
                cwd: describe::path(m, p.cwd),
                uid: p.threads.first().map_or(0, |t| t.creds.uids[1]),
                state: p.state,
                main_thread_ended: p.ended_leader.is_some(),
                threads: p
                    .threads
                    .iter()
                    .map(|t| ThreadSummary {
                        tid: t.tid,
                        comm: t.comm.clone(),
                        doing: describe::doing(t),
                    })
                    .collect(),
                memory: memory(image, p)?,
                descriptors: p
                    .fds
                    .iter()
                    .map(|f| Descriptor {
                        fd: f.fd,
                        what: describe::descriptor(m, f),
                    })
                    .collect(),
                notes: p.notes.clone(),
            });
        }
        let mut shared_memory = Vec::new();
        for s in &m.shared_memory {
            shared_memory.push(SharedSummary {
                what: describe::shared(&s.kind),
                bytes: s.size,
                bytes_stored: stored(image, s.space, 0, u64::MAX)?,
            });
        }
        let mut bytes_memory = 0;
        for space in image.pages().spaces() {
            bytes_memory += stored(image, space, 0, u64::MAX)?;
        }
        let carried = here::carried(m);
        Ok(Summary {
            image: image.path().to_owned(),
            made: made(m.origin.realtime_ns),
            origin: m.origin.clone(),
            bytes_on_disk: bytes_on_disk(image.path())?,
            bytes_memory,
            here: here::differences(m, &carried),
            processes,
            shared_memory,
            sockets: m.sockets.len(),
            carried,
            pvm: m.pvm.is_some(),
            virtual_tid: m.pvm.as_ref().map(|task| Tid(task.v)),
        })
    }
}

/// "2026-11-21 22:30:00 UTC".
fn made(realtime_ns: i128) -> String {
    let since = Duration::from_nanos(u64::try_from(realtime_ns).unwrap_or(0));
    let name = dated::name(UNIX_EPOCH + since);
    let part = |from: usize, to: usize| name.get(from..to).unwrap_or("?");
    let (date, time) = (
        [part(0, 4), part(4, 6), part(6, 8)],
        [part(9, 11), part(11, 13), part(13, 15)],
    );
    format!("{} {} UTC", date.join("-"), time.join(":"))
}

/// Bytes stored of start..end of a space, zero pages left out.
fn stored(image: &Image, space: SpaceId, start: u64, end: u64) -> anyhow::Result<u64> {
    let mut sum = 0;
    for block in image.pages().blocks_in(space, start, end) {
        let block = block?;
        if block.stored > 0 {
            sum += block.end().min(end).saturating_sub(block.addr.max(start));
        }
    }
    Ok(sum)
}

fn memory(image: &Image, p: &Process) -> anyhow::Result<Vec<Kind>> {
    let mut kinds: Vec<Kind> = Vec::new();
    for v in &p.vmas {
        let kind = kind(p, v);
        let bytes_stored = if v.shared {
            0
        } else {
            stored(image, p.space, v.start, v.end)?
        };
        let bytes_mapped = v.end.saturating_sub(v.start);
        match kinds.iter_mut().find(|k| k.kind == kind) {
            Some(k) => {
                k.mappings += 1;
                k.bytes_mapped = k.bytes_mapped.saturating_add(bytes_mapped);
                k.bytes_stored += bytes_stored;
            }
            None => kinds.push(Kind {
                kind,
                mappings: 1,
                bytes_mapped,
                bytes_stored,
            }),
        }
    }
    kinds.sort_by_key(|k| {
        (
            std::cmp::Reverse(k.bytes_stored),
            std::cmp::Reverse(k.bytes_mapped),
        )
    });
    Ok(kinds)
}

fn kind(p: &Process, v: &Vma) -> &'static str {
    let holds = |a: u64| v.start <= a && a < v.end;
    match &v.backing {
        Backing::Kernel { .. } => "vDSO",
        Backing::Shared { .. } => "shared",
        Backing::Aio { .. } => "asynchronous I/O",
        Backing::File { .. } if v.shared => "files, shared",
        Backing::File { .. } if v.prot & libc::PROT_EXEC != 0 => "programs and libraries",
        Backing::File { .. } => "files, private",
        Backing::Anonymous if holds(p.mm.start_stack) => "stack",
        Backing::Anonymous if v.start < p.mm.brk && v.end > p.mm.start_brk => "heap",
        Backing::Anonymous if v.prot == libc::PROT_NONE => "reserved",
        Backing::Anonymous => "anonymous",
    }
}

/// The command line, out of the stored memory; the error does not matter, for programs may put anything there.
fn command(image: &Image, p: &Process) -> anyhow::Result<Vec<String>> {
    const MOST: u64 = 4096;
    let (start, end) = (
        p.mm.arg_start,
        p.mm.arg_end.min(p.mm.arg_start.saturating_add(MOST)),
    );
    let mut bytes = Vec::new();
    for block in image.pages().blocks_in(p.space, start, end) {
        let block = block?;
        let mut content = vec![0; block.bytes()];
        image.pages().read(&block, &mut content)?;
        let from = start.saturating_sub(block.addr) as usize;
        let to = (end.saturating_sub(block.addr) as usize).min(content.len());
        bytes.extend_from_slice(content.get(from..to).context("out of range")?);
    }
    let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text
        .split(|&b| b == 0)
        .map(|w| String::from_utf8_lossy(w).into_owned())
        .collect())
}

fn bytes_on_disk(dir: &Path) -> anyhow::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("{}: cannot list", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        sum += if meta.is_dir() {
            bytes_on_disk(&entry.path())?
        } else {
            meta.blocks() * 512
        };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_as_people_write_them() {
        assert_eq!(made(951_827_696_000_000_000), "2000-02-29 12:34:56 UTC");
        assert_eq!(made(-1), "1970-01-01 00:00:00 UTC");
    }
}
