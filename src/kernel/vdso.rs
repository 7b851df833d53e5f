//! The vDSO of a process: its ELF contents, and the dead bytes behind them.

use anyhow::{Result, bail};
use goblin::elf::Elf;

use super::arch::PAGE;

/// Bytes of the ELF image at the start of a vDSO mapping; what follows up to the page's end is dead,
/// but executable.
pub fn elf_len(bytes: &[u8]) -> Result<u64> {
    let elf = match Elf::parse(bytes) {
        Ok(e) => e,
        Err(e) => bail!("the vDSO is not an ELF image: {e}"),
    };
    let sections =
        elf.header.e_shoff + u64::from(elf.header.e_shnum) * u64::from(elf.header.e_shentsize);
    let segments = elf
        .program_headers
        .iter()
        .map(|p| p.p_offset.saturating_add(p.p_filesz))
        .max()
        .unwrap_or(0);
    let contents = elf
        .section_headers
        .iter()
        .filter(|s| s.sh_type != goblin::elf::section_header::SHT_NOBITS)
        .map(|s| s.sh_offset.saturating_add(s.sh_size))
        .max()
        .unwrap_or(0);
    let end = sections.max(segments).max(contents).next_multiple_of(16);
    if end > bytes.len() as u64 || end < 64 {
        bail!("the vDSO's ELF image claims {end} bytes of {}", bytes.len());
    }
    Ok(end)
}

/// Offsets of the functions a vDSO exports, by name.
pub fn symbols(bytes: &[u8]) -> Result<Vec<(String, u64)>> {
    let elf = match Elf::parse(bytes) {
        Ok(e) => e,
        Err(e) => bail!("the vDSO is not an ELF image: {e}"),
    };
    Ok(elf
        .dynsyms
        .iter()
        .filter(|s| s.is_function() && s.st_value != 0)
        .filter_map(|s| Some((elf.dynstrtab.get_at(s.st_name)?.to_owned(), s.st_value)))
        .collect())
}

/// Whole pages of `len` bytes.
pub fn pages(len: u64) -> u64 {
    len.next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_vdso_has_a_clock_and_room() {
        use crate::kernel::maps::{self, Name};
        let me = std::process::id() as i32;
        let all = maps::ours().unwrap();
        let vdso = |m: &&maps::Map| m.name() == Name::Special("vdso");
        let map = all.iter().find(vdso).unwrap();
        let mem = crate::kernel::mem::Mem::open(me).unwrap();
        let bytes = mem
            .read_vec(map.start, (map.end - map.start) as usize)
            .unwrap();
        assert!(elf_len(&bytes).unwrap() < bytes.len() as u64);
        assert!(
            symbols(&bytes)
                .unwrap()
                .iter()
                .any(|(n, _)| n == "__vdso_clock_gettime")
        );
    }
}
