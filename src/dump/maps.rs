//! Mappings of a process and what is behind them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use super::tables::Tables;
use crate::error::Failure;
use crate::image::memory::{Backing, SharedKind, Vma};
use crate::kernel::arch::TASK_SIZE;

/// Reads /proc/PID/maps; flags (which cost a walk over all page tables) are added by [`add_flags`].
pub fn read(pid: i32, tables: &mut Tables) -> Result<Vec<Vma>> {
    let maps = Process::new(pid)
        .and_then(|p| p.maps())
        .with_context(|| format!("reading mappings of process {pid}"))?;
    let mut vmas = Vec::new();
    for m in &maps {
        if m.address.0 < TASK_SIZE {
            vmas.push(vma(pid, m, tables)?);
        }
    }
    Ok(vmas)
}

fn vma(pid: i32, m: &MemoryMap, tables: &mut Tables) -> Result<Vma> {
    let shared = m.perms.contains(MMPermissions::SHARED);
    let mut v = Vma {
        start: m.address.0,
        end: m.address.1,
        prot: prot(m.perms),
        shared,
        offset: m.offset,
        backing: Backing::Anonymous,
        flags: Vec::new(),
        name: None,
        guards: Vec::new(),
    };
    let refuse = |what: &str, way_out: &str| {
        Failure::Refused.because(format!(
            "process {pid} maps {what} at {:#x}-{:#x}, which cannot be carried; {way_out}",
            m.address.0, m.address.1
        ))
    };
    match &m.pathname {
        MMapPath::Heap | MMapPath::Stack | MMapPath::TStack(_) | MMapPath::Anonymous => {}
        MMapPath::Vdso => v.backing = kernel("vdso"),
        MMapPath::Vvar => v.backing = kernel("vvar"),
        MMapPath::Other(n) if n == "vvar_vclock" => v.backing = kernel("vvar_vclock"),
        MMapPath::Other(n) if n.starts_with("anon:") => {
            v.name = Some(n["anon:".len()..].to_owned())
        }
        MMapPath::Other(n) if n.starts_with("anon_shmem:") => {
            v.name = Some(n["anon_shmem:".len()..].to_owned());
            v.backing = behind(pid, m, "/dev/zero (deleted)", tables)?;
        }
        MMapPath::Vsys(_) => v.backing = sysv(pid, m, tables)?,
        MMapPath::Path(p) => {
            let path = p.to_string_lossy().into_owned();
            if path.starts_with("anon_inode:") {
                return Err(refuse(&path, "let the program close it first"));
            }
            if path.starts_with("/[aio]") {
                return Err(refuse(
                    "an asynchronous I/O context (io_setup)",
                    "let the program destroy it first",
                ));
            }
            if path == "/anon_hugepage (deleted)" && !shared {
                return Ok(v);
            }
            v.backing = behind(pid, m, &path, tables)?;
        }
        other => {
            return Err(refuse(
                &format!("{other:?}"),
                "it is of a kind mistctl does not know",
            ));
        }
    }
    Ok(v)
}

fn kernel(which: &str) -> Backing {
    Backing::Kernel {
        which: which.to_owned(),
    }
}

fn prot(p: MMPermissions) -> i32 {
    let bit = |has, bit| if p.contains(has) { bit } else { 0 };
    bit(MMPermissions::READ, libc::PROT_READ)
        | bit(MMPermissions::WRITE, libc::PROT_WRITE)
        | bit(MMPermissions::EXECUTE, libc::PROT_EXEC)
}

/// The mapped file itself, whatever its path names by now (proc(5), map_files).
pub fn open_mapped(pid: i32, start: u64, end: u64) -> Result<File> {
    let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    File::open(&path).with_context(|| {
        format!("opening {path} (CAP_CHECKPOINT_RESTORE lets mistctl see mapped files)")
    })
}

fn behind(pid: i32, m: &MemoryMap, path: &str, tables: &mut Tables) -> Result<Backing> {
    let (start, end) = m.address;
    let shared = m.perms.contains(MMPermissions::SHARED);
    // The common case costs one stat: the path still names the mapped inode.
    if let Ok(meta) = std::fs::metadata(path)
        && meta.ino() == m.inode
        && same_device(meta.dev(), m.dev)
    {
        if meta.file_type().is_file() {
            return Ok(Backing::File {
                file: tables.file(path, &meta, false),
            });
        }
        if path == "/dev/zero" && !shared {
            return Ok(Backing::Anonymous);
        }
        return Err(Failure::Refused.because(format!(
            "process {pid} maps the device {path} at {start:#x}-{end:#x}, which cannot be carried; \
             let the program close it first"
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
        return Ok(Backing::Shared { memory });
    }
    if meta.nlink() == 0 && shared || bare.starts_with("/memfd:") {
        let memory = tables.shared_file(file.as_fd(), path)?;
        return Ok(Backing::Shared { memory });
    }
    // A file without this name any more, mapped privately: the image carries it like any library.
    Ok(Backing::File {
        file: tables.file(bare, &meta, true),
    })
}

/// Some file systems show another device number in maps than in stat; the inode number decides then.
fn same_device(stat: u64, maps: (i32, i32)) -> bool {
    let (major, minor) = (nix::sys::stat::major(stat), nix::sys::stat::minor(stat));
    (major, minor) == (maps.0 as u64, maps.1 as u64) || maps.0 == 0
}

fn sysv(pid: i32, m: &MemoryMap, tables: &mut Tables) -> Result<Backing> {
    let MMapPath::Vsys(key) = m.pathname else {
        return Ok(Backing::Anonymous);
    };
    let file = open_mapped(pid, m.address.0, m.address.1)?;
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
const CODES: [&str; 16] = [
    "mw", "gd", "lo", "sr", "rr", "dc", "de", "nr", "ac", "ht", "wf", "dd", "hg", "nh", "mg", "sf",
];

/// What /proc/PID/smaps alone tells of mappings. It costs a walk over all page tables.
#[derive(Debug, Default)]
pub struct Flags {
    /// By where they begin and end.
    all: HashMap<(u64, u64), Vec<String>>,
    /// Missing pages of some are given by a userfaultfd.
    pub by_uffd: bool,
}

impl Flags {
    /// Reads those of process `pid`.
    ///
    /// # Errors
    /// Those of the file; of a process that ends meanwhile there are none.
    pub fn read(pid: i32) -> io::Result<Self> {
        // Large enough for one mapping: each read ends where a mapping does.
        let mut lines =
            BufReader::with_capacity(1 << 16, File::open(format!("/proc/{pid}/smaps"))?);
        let mut flags = Self::default();
        let (mut line, mut at) = (String::new(), None);
        loop {
            line.clear();
            match lines.read_line(&mut line) {
                Ok(0) => return Ok(flags),
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(flags),
                Err(e) => return Err(e),
            }
            if let Some(codes) = line.strip_prefix("VmFlags:") {
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
            }
        }
    }

    /// Those of a mapping; none when it is not known.
    pub fn of(&self, v: &Vma) -> Option<&[String]> {
        self.all.get(&(v.start, v.end)).map(Vec::as_slice)
    }
}

/// Where a mapping begins and ends, from the first line that /proc has of it.
fn range(line: &str) -> Option<(u64, u64)> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
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
    use procfs::process::VmFlags;

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
