//! What the shim and libpvm know of the incarnation: in the rebuilt memory, before it runs.

use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, bail};
use pvm_abi::block::{self, Block, Globals, state};

use super::reach::Reach;
use crate::image::pvm::PvmTask;

/// The new incarnation, as its pvmd told.
#[derive(Debug, Clone, Copy)]
pub struct Incarnation<'a> {
    pub r: u32,
    /// The process's pid.
    pub pid: i32,
    /// Bytes of a fragment.
    pub fragment: u32,
    /// The resource manager's tid.
    pub scheduler: u32,
    /// The tid table of this host.
    pub table: &'a Path,
}

/// Makes the program's shim and libpvm take themselves for `new`.
///
/// # Errors
/// When the block is not where the image says, or of another version of the shim.
pub fn take_over(mem: &mut Reach<'_>, task: &PvmTask, new: &Incarnation<'_>) -> Result<()> {
    let at = |offset: usize| task.block.wrapping_add(offset as u64);
    let head: [u8; 16] = mem.read(at(0))?;
    let mut expected = block::MAGIC.to_vec();
    expected.extend(block::VERSION.to_le_bytes());
    expected.extend((size_of::<Block>() as u32).to_le_bytes());
    if head[..] != expected[..] {
        bail!("the shim of this task is of another version than this mistctl");
    }
    if mem.read_u32(at(offset_of!(Block, state)))? != state::ENROLLED {
        bail!("the task is not enrolled, as its shim says");
    }
    if mem.read_u32(at(offset_of!(Block, v)))? != task.v {
        bail!("the shim says that it is another task than t{:x}", task.v);
    }
    let inside = mem.read_u32(at(offset_of!(Block, depth)))? != 0
        && mem.read_u32(at(offset_of!(Block, callbacks)))? == 0;
    libpvm(mem, task, new, inside)?;
    mem.write(at(offset_of!(Block, pid)), &new.pid.to_le_bytes())?;
    let mut path = new.table.as_os_str().as_bytes().to_vec();
    if path.len() >= block::PATH_LEN {
        bail!(
            "the path of the tid table is too long: {}",
            new.table.display()
        );
    }
    path.resize(block::PATH_LEN, 0);
    mem.write(at(offset_of!(Block, table_path)), &path)?;
    // What was asked of the old incarnation is not asked of this one.
    mem.write(at(offset_of!(Block, hold_any)), &0u32.to_le_bytes())?;
    let markers = [0; 8 * block::MARKERS];
    mem.write(at(offset_of!(Block, marker_asked)), &markers)?;
    mem.write(at(offset_of!(Block, r)), &new.r.to_le_bytes())?;
    mem.write(at(offset_of!(Block, seen)), &u64::MAX.to_le_bytes())
}

/// libpvm's own variables. The parent stays who it was: the program knows it under its V.
fn libpvm(mem: &mut Reach<'_>, task: &PvmTask, new: &Incarnation<'_>, inside: bool) -> Result<()> {
    let start = task.block.wrapping_add(offset_of!(Block, globals) as u64);
    let address = |mem: &mut Reach<'_>, offset: usize| -> Result<Option<u64>> {
        let at = mem.read_u64(start.wrapping_add(offset as u64))?;
        Ok((at != 0).then_some(at))
    };
    let me = if inside { new.r } else { task.v };
    let old_fragment = match address(mem, offset_of!(Globals, pvmudpmtu))? {
        Some(at) => mem.read_u32(at)?,
        None => 0,
    };
    for (offset, value) in [
        (offset_of!(Globals, pvmmytid), me),
        (offset_of!(Globals, pvmmyupid), new.pid as u32),
        (offset_of!(Globals, pvmudpmtu), new.fragment),
        (offset_of!(Globals, pvmschedtid), new.scheduler),
    ] {
        if let Some(at) = address(mem, offset)? {
            mem.write(at, &value.to_le_bytes())?;
        }
    }
    // The program may have set it (PvmFragSize).
    if let Some(at) = address(mem, offset_of!(Globals, pvmfrgsiz))?
        && mem.read_u32(at)? == old_fragment
    {
        mem.write(at, &new.fragment.to_le_bytes())?;
    }
    Ok(())
}
