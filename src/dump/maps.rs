//! Mappings of a process and what is behind them.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::aio;
use super::process;
use super::tables::{Tables, other_name};
use crate::error::Failure;
use crate::image::aio::IoRing;
use crate::image::memory::{Backing, SharedKind, Vma};
use crate::kernel::arch::TASK_SIZE;
use crate::kernel::maps::{self, Map, Name};
use crate::kernel::mem::HUGE;

/// Reads /proc/PID/maps; flags (which cost a walk over all page tables) are added by [`add_flags`].
pub fn read(pid: i32, tables: &mut Tables) -> Result<Vec<Vma>> {
    let maps = maps::read(pid).with_context(|| format!("reading mappings of process {pid}"))?;
    let (mut vmas, mut files) = (Vec::new(), Files::default());
    for m in &maps {
        if m.start < TASK_SIZE {
            vmas.push(vma(pid, m, &mut files, tables)?);
        }
    }
    Ok(vmas)
}

/// The file that was looked for last, and the mapping that is of it: those of one program stand side by side.
#[derive(Default)]
struct Files<'a>(Option<(&'a Map, Option<(PathBuf, Metadata)>)>);

impl<'a> Files<'a> {
    /// [`Map::file`] of a mapping.
    fn of(&mut self, m: &'a Map) -> Option<(PathBuf, Metadata)> {
        let known = self.0.take().filter(|(of, _)| m.is_of_same_file(of));
        let (_, file) = self.0.insert(known.unwrap_or_else(|| (m, m.file())));
        file.clone()
    }
}

fn vma<'a>(pid: i32, m: &'a Map, files: &mut Files<'a>, tables: &mut Tables) -> Result<Vma> {
    let mut v = Vma {
        start: m.start,
        end: m.end,
        prot: m.prot,
        shared: m.shared,
        offset: m.offset,
        backing: Backing::Anonymous,
        flags: Vec::new(),
        name: None,
        guards: Vec::new(),
        policy: None,
    };
    let refuse = |what: &str, way_out: &str| {
        Failure::Refused.because(format!(
            "process {pid} maps {what} at {:#x}-{:#x}, which cannot be carried; {way_out}",
            m.start, m.end
        ))
    };
    match m.name() {
        Name::Nameless | Name::Special("heap" | "stack") => {}
        Name::Special(n) if n.starts_with("stack:") => {}
        Name::Special(n @ ("vdso" | "vvar" | "vvar_vclock")) => v.backing = kernel(n),
        Name::Special(n) => {
            if let Some(name) = n.strip_prefix("anon:") {
                v.name = Some(name.to_owned());
            } else if let Some(name) = n.strip_prefix("anon_shmem:") {
                v.name = Some(name.to_owned());
                v.backing = behind(pid, m, "/dev/zero (deleted)", files, tables)?.0;
            } else {
                return Err(refuse(n, "it is of a kind mistctl does not know"));
            }
        }
        Name::File(shown) => {
            let path = String::from_utf8_lossy(shown);
            if let Some(key) = sysv_key(&path) {
                v.backing = sysv(pid, m, key, tables)?;
                return Ok(v);
            }
            if path.starts_with("anon_inode:") {
                return Err(refuse(&path, "let the program close it first"));
            }
            if aio::is_ring(shown) {
                // What is in it is read when the process stands.
                v.backing = Backing::Aio {
                    ring: IoRing::default(),
                };
                return Ok(v);
            }
            if path.starts_with("/secretmem") {
                return Err(refuse(
                    "secret memory (memfd_secret), which nobody else can read",
                    "let the program unmap it first",
                ));
            }
            let mut huge = path == "/anon_hugepage (deleted)";
            if !huge || m.shared {
                (v.backing, huge) = behind(pid, m, &path, files, tables)?;
            }
            if huge && !m.shared {
                // Known long before the other flags, and needed then.
                v.flags.push("ht".to_owned());
            }
        }
    }
    Ok(v)
}

fn kernel(which: &str) -> Backing {
    Backing::Kernel {
        which: which.to_owned(),
    }
}

/// The mapped file itself, whatever its path names by now (proc(5), map_files).
pub fn open_mapped(pid: i32, start: u64, end: u64) -> Result<File> {
    let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    File::open(&path).with_context(|| {
        format!("opening {path} (CAP_CHECKPOINT_RESTORE lets mistctl see mapped files)")
    })
}

/// What is behind a mapping of `path`, and whether that gives huge TLB pages.
fn behind<'a>(
    pid: i32,
    m: &'a Map,
    path: &str,
    files: &mut Files<'a>,
    tables: &mut Tables,
) -> Result<(Backing, bool)> {
    // What hugetlbfs tells of its files. Elsewhere such a size is rare, and taken for that until the flags are read.
    let huge = |meta: &Metadata| meta.blksize() >= HUGE;
    let (start, end, shared) = (m.start, m.end, m.shared);
    // The common case costs one stat: the path still names the mapped inode.
    if let Some((path, meta)) = files.of(m) {
        let name = path.to_str();
        if meta.file_type().is_file() {
            if name.is_none() && shared {
                return Err(Failure::Refused.because(format!(
                    "process {pid} maps {} at {start:#x}-{end:#x} shared, and its name is not UTF-8; \
                     rename it before the dump",
                    path.display()
                )));
            }
            // Of one that an image cannot name the content is carried, as of one that has no name any more.
            let shown = path.to_string_lossy();
            let file = tables.file(&shown, &meta, name.is_none());
            return Ok((Backing::File { file }, huge(&meta)));
        }
        if name == Some("/dev/zero") && !shared {
            return Ok((Backing::Anonymous, false));
        }
        return Err(Failure::Refused.because(format!(
            "process {pid} maps the device {} at {start:#x}-{end:#x}, which cannot be carried; \
             let the program close it first",
            path.display()
        )));
    }
    let file = open_mapped(pid, start, end)?;
    let meta = file.metadata()?;
    let bare = path.strip_suffix(" (deleted)").unwrap_or(path);
    if bare == "/dev/zero" {
        let (memory, new) = tables.shared(meta.dev(), meta.ino(), || {
            Ok((meta.size(), SharedKind::Anonymous))
        })?;
        if new {
            tables.content(memory, file);
        }
        return Ok((Backing::Shared { memory }, false));
    }
    if let Some(name) = other_name(path, &meta) {
        let file = tables.file(&name, &meta, false);
        return Ok((Backing::File { file }, huge(&meta)));
    }
    if meta.nlink() > 0 && shared {
        return Err(Failure::Refused.because(format!(
            "process {pid} maps {path} at {start:#x}-{end:#x} shared; that name is gone, and it has another that is not in the same directory (or its mount is hidden); \
             put it back in its place (ln) before the dump"
        )));
    }
    if meta.nlink() == 0 && shared || bare.starts_with("/memfd:") {
        let memory = tables.shared_file(file.as_fd(), path)?;
        return Ok((Backing::Shared { memory }, huge(&meta)));
    }
    // A file without this name any more, mapped privately: the image carries it like any library.
    let file = tables.file(bare, &meta, true);
    Ok((Backing::File { file }, huge(&meta)))
}

/// The key of a System V segment (ipc/shm.c).
fn sysv_key(path: &str) -> Option<i32> {
    let key = path.strip_prefix("/SYSV")?.strip_suffix(" (deleted)")?;
    u32::from_str_radix(key, 16).ok().map(|key| key as i32)
}

fn sysv(pid: i32, m: &Map, key: i32, tables: &mut Tables) -> Result<Backing> {
    let file = open_mapped(pid, m.start, m.end)?;
    let meta = file.metadata()?;
    // ipc/shm.c names the segment's inode after its shmid.
    let shmid = m.inode as i32;
    let (memory, new) = tables.shared(meta.dev(), meta.ino(), || {
        let s = crate::kernel::shm::stat(shmid)?;
        let (mode, uid, gid) = (s.mode, s.uid, s.gid);
        Ok((
            meta.size(),
            SharedKind::SysV {
                key,
                shmid,
                mode,
                uid,
                gid,
            },
        ))
    })?;
    if new {
        tables.content(memory, file);
    }
    Ok(Backing::Shared { memory })
}

/// The flags that an image has (proc(5), VmFlags of /proc/PID/smaps).
const CODES: [&str; 19] = [
    "mw", "gd", "lo", "sr", "rr", "dc", "de", "nr", "ac", "ht", "wf", "dd", "hg", "nh", "mg", "sf",
    "lf", "sl", "dp",
];

/// What /proc/PID/smaps alone tells of mappings. It costs a walk over all page tables.
#[derive(Debug, Default)]
pub struct Flags {
    /// By where they begin and end.
    all: HashMap<(u64, u64), Vec<String>>,
    /// Missing pages of some are given by a userfaultfd.
    pub by_uffd: bool,
    /// The vDSO is among them.
    pub vdso: bool,
    /// So is a ring of asynchronous I/O.
    pub aio: bool,
}

impl Flags {
    /// Reads those of process `pid`.
    ///
    /// # Errors
    /// Those of the file; of a process that ends meanwhile there are none.
    pub fn read(pid: i32) -> io::Result<Self> {
        // What does not fit behind the mappings that the kernel has in its 4 KiB it throws away, and walks over again
        // for the next read: it must have as much as is asked for before that.
        let gone = |e: &io::Error| e.raw_os_error() == Some(libc::ESRCH);
        let mut flags = Self::default();
        let smaps = match File::open(format!("/proc/{pid}/smaps")) {
            Err(e) if gone(&e) => return Ok(flags),
            other => other?,
        };
        let mut lines = BufReader::with_capacity(2048, smaps);
        let (mut line, mut at) = (Vec::new(), None);
        loop {
            line.clear();
            match lines.read_until(b'\n', &mut line) {
                Ok(0) => return Ok(flags),
                Ok(_) => {}
                Err(e) if gone(&e) => return Ok(flags),
                Err(e) => return Err(e),
            }
            if let Some(codes) = line.strip_prefix(b"VmFlags:") {
                let codes = std::str::from_utf8(codes).unwrap_or_default();
                flags.by_uffd |= codes.split_whitespace().any(|code| code == "um");
                let kept = CODES
                    .iter()
                    .filter(|code| codes.split_whitespace().any(|c| c == **code));
                if let Some(at) = at.take() {
                    flags
                        .all
                        .insert(at, kept.map(|code| (*code).to_owned()).collect());
                }
            } else if let Some(range) = range(&line) {
                at = Some(range);
                flags.vdso |= line.ends_with(b" [vdso]\n");
                flags.aio |= line.ends_with(b" /[aio] (deleted)\n");
            }
        }
    }

    /// None: the process was ending.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Those of a mapping; none when it is not known.
    pub fn of(&self, v: &Vma) -> Option<&[String]> {
        self.at(v.start, v.end)
    }

    /// The mappings that process `pid` has now, with the flags of what began there when they were read; those that are new
    /// since are left out.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn of_mappings(&self, pid: i32) -> Result<Vec<Vma>> {
        let began = self.all.iter().map(|((start, _), flags)| (start, flags));
        let began: HashMap<_, _> = began.collect();
        let mut vmas = read(process::living_thread(pid), &mut Tables::new(1))?;
        vmas.retain_mut(|v| match began.get(&v.start) {
            Some(flags) => {
                v.flags = (*flags).clone();
                true
            }
            None => false,
        });
        Ok(vmas)
    }

    /// Those of the mapping that begins and ends there.
    pub fn at(&self, start: u64, end: u64) -> Option<&[String]> {
        self.all.get(&(start, end)).map(Vec::as_slice)
    }
}

/// Where a mapping begins and ends, from the first line that /proc has of it.
fn range(line: &[u8]) -> Option<(u64, u64)> {
    let first = line.split(|b| *b == b' ').next()?;
    let (from, to) = std::str::from_utf8(first).ok()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(from)?, number(to)?))
}

/// Adds VmFlags as /proc/`of`/smaps shows them: `of` is the process, or a copy of it that has all its
/// mappings but those marked DONTFORK, which are all a copy lacks.
pub fn add_flags(vmas: &mut [Vma], of: i32, is_copy: bool) -> Result<()> {
    let flags = Flags::read(of)
        .with_context(|| format!("reading the flags of mappings of process {of}"))?;
    for v in vmas {
        v.flags = match flags.of(v) {
            Some(codes) => codes.to_vec(),
            None if is_copy => vec!["dc".to_owned()],
            None => Vec::new(),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use procfs::process::{Process, VmFlags};

    use super::*;

    #[test]
    fn flags_are_those_of_the_kernel() {
        let pid = std::process::id() as i32;
        let flags = Flags::read(pid).unwrap();
        let smaps = Process::new(pid).and_then(|p| p.smaps()).unwrap();
        let mut compared = 0;
        for m in &smaps {
            // Threads of other tests map and unmap meanwhile.
            let Some(ours) = flags.all.get(&m.address) else {
                continue;
            };
            compared += 1;
            let has = |code: &str| ours.iter().any(|c| c == code);
            for (flag, code) in [
                (VmFlags::MW, "mw"),
                (VmFlags::GD, "gd"),
                (VmFlags::AC, "ac"),
                (VmFlags::DE, "de"),
            ] {
                assert_eq!(
                    has(code),
                    m.extension.vm_flags.contains(flag),
                    "{code} {m:?}"
                );
            }
        }
        assert!(compared > 5, "{compared} of {}", smaps.0.len());
        assert!(!flags.by_uffd);
    }
}
