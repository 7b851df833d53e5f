//! The mappings of the kernel.

use std::fs::File;
use std::io;

use super::memory::Memory;
use super::{bad, one, sys};
use crate::kernel::maps::{self, Name};

/// Mappings of the kernel in this process: start, end, name.
fn kernel_mappings() -> io::Result<Vec<(u64, u64, String)>> {
    let kernels = |m: &maps::Map| match m.name() {
        Name::Special(name @ ("vvar" | "vvar_vclock" | "vdso")) => {
            Some((m.start, m.end, name.to_owned()))
        }
        _ => None,
    };
    Ok(maps::ours()?.iter().filter_map(kernels).collect())
}

/// Moves [vvar], [vvar_vclock] and [vdso] elsewhere, together.
pub fn move_vdso() -> io::Result<()> {
    let regions = kernel_mappings()?;
    let (Some(first), Some(last)) = (
        regions.iter().map(|r| r.0).min(),
        regions.iter().map(|r| r.1).max(),
    ) else {
        return Err(bad("this process has none"));
    };
    let room = Memory::new((last - first) as usize)?;
    one(|| {
        for (start, end, _) in &regions {
            let len = end - start;
            let to = room.start + (start - first);
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let r = sys(libc::SYS_mremap, [*start, len, len, flags, to, 0]);
            if r < 0 {
                return r;
            }
        }
        0
    })
    .map(drop)
}

/// Bytes behind the ELF contents of [vdso] that nothing uses, and the size of the mapping.
pub fn vdso_tail() -> io::Result<(u64, u64)> {
    let regions = kernel_mappings()?;
    let Some((start, end, _)) = regions.iter().find(|r| r.2 == "vdso") else {
        return Err(bad("this process has no vDSO"));
    };
    let mut bytes = vec![0u8; (end - start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&File::open("/proc/self/mem")?, &mut bytes, *start)?;
    let used = crate::kernel::vdso::elf_len(&bytes).map_err(|e| bad(&format!("{e:#}")))?;
    Ok(((end - start).saturating_sub(used), end - start))
}
