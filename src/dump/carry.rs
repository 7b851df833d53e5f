//! Files that the image carries, so that it restores where they are missing or different.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;

use super::maps::open_mapped;
use super::tables::Tables;
use super::{Carried, Sink};
use crate::image::memory::{Backing, FileRef};
use crate::image::process::Process;

/// Privately mapped data files over this size are not carried unless nobody can reach them by name.
const DATA_MAX: u64 = 64 << 20;

/// Carries the executable and every file that the process maps privately, as far as `carried` says. `pid` is the process or its
/// copy, through whose mappings files without a name are reached.
pub fn files(
    pid: i32,
    p: &Process,
    tables: &mut Tables,
    carried: Carried,
    sink: &dyn Sink,
) -> Result<()> {
    for v in &p.vmas {
        let Backing::File { file } = v.backing else {
            continue;
        };
        let Some(f) = tables.files.get(file as usize) else {
            continue;
        };
        let named =
            carried == Carried::All && (f.size <= DATA_MAX || v.prot & libc::PROT_EXEC != 0);
        let wanted = !v.shared && (f.deleted || named);
        if f.object.is_some() || !wanted {
            continue;
        }
        let open = match open_same(f) {
            Some(file) => file,
            None => open_mapped(pid, v.start, v.end)?,
        };
        let object = sink.object(&open)?;
        if let Some(f) = tables.files.get_mut(file as usize) {
            f.object = Some(object);
        }
    }
    let Some(exe) = tables.files.get(p.exe as usize) else {
        return Ok(());
    };
    if exe.object.is_none() && (exe.deleted || carried == Carried::All) {
        let open = match open_same(exe) {
            Some(file) => file,
            None => File::open(format!("/proc/{pid}/exe"))?,
        };
        let object = sink.object(&open)?;
        if let Some(f) = tables.files.get_mut(p.exe as usize) {
            f.object = Some(object);
        }
    }
    Ok(())
}

fn open_same(f: &FileRef) -> Option<File> {
    let file = File::open(&f.path).ok()?;
    let meta = file.metadata().ok()?;
    (meta.dev() == f.dev && meta.ino() == f.ino).then_some(file)
}
