//! Where programs and libraries have their dynamic symbols. Debuggers' tables, often most of a file, are not read.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use goblin::container::{Container, Ctx, Endian};
use goblin::elf::header::{ET_EXEC, Header};
use goblin::elf::program_header::PT_LOAD;
use goblin::elf::section_header::SHT_DYNSYM;
use goblin::elf::{Elf, ProgramHeader, SectionHeader, Sym, Symtab};

/// What is read at once is not longer, bytes: no program without a debugger's tables is.
const LARGEST: u64 = 256 << 20;
/// An ELF header, bytes.
const HEADER: u64 = 64;
/// Of this machine's files.
const CTX: Ctx = Ctx {
    container: Container::Big,
    le: Endian::Little,
};

/// The address of a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Of a program that stands where it was linked for.
    Absolute(u64),
    /// From where the beginning of the file is mapped.
    Relative(u64),
}

impl Place {
    /// The address, when the beginning of the file is mapped at `start`.
    #[must_use]
    pub fn in_file_at(self, start: u64) -> u64 {
        match self {
            Self::Absolute(at) => at,
            Self::Relative(at) => start.wrapping_add(at),
        }
    }
}

/// The first dynamic symbol of `file` that has one of these names, and is defined there; none in what is no ELF file.
///
/// # Errors
/// When it cannot be read.
pub fn symbol(file: &File, names: &[&str]) -> Result<Option<Place>> {
    let len = file.metadata().context("stat")?.len();
    let Some(head) = part(file, 0, HEADER.min(len))? else {
        return Ok(None);
    };
    let Ok(elf) = Elf::parse_header(&head).and_then(Elf::lazy_parse) else {
        return Ok(None);
    };
    let ours = elf.is_64 && elf.little_endian && elf.header.e_shnum != 0;
    if let Some(found) = ours
        .then(|| by_sections(file, &elf.header, names))
        .flatten()
    {
        return Ok(found);
    }
    // Who runs it does not look at its sections: they may be missing (sstrip(1)), or senseless.
    let Some(all) = part(file, 0, len)? else {
        return Ok(None);
    };
    let Ok(elf) = Elf::parse(&all) else {
        return Ok(None);
    };
    let name = |s: &Sym| elf.dynstrtab.get_at(s.st_name).unwrap_or_default();
    let mut defined = elf.dynsyms.iter().filter(|s| s.st_shndx != 0);
    let found = defined.find(|s| names.contains(&name(s)));
    Ok(found.map(|s| place(&elf.header, &elf.program_headers, &s)))
}

/// So many bytes of the file; none where it has not as many, or they are too many.
fn part(file: &File, at: u64, size: u64) -> Result<Option<Vec<u8>>> {
    let len = file.metadata().context("stat")?.len();
    if size > LARGEST || at.checked_add(size).is_none_or(|end| end > len) {
        return Ok(None);
    }
    let mut bytes = vec![0; size as usize];
    match file.read_exact_at(&mut bytes, at) {
        // It has just become shorter.
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(None),
        read => read.map(|()| Some(bytes)).context("reading it"),
    }
}

/// What the list of its sections leads to; None: it has none, or none that makes sense.
fn by_sections(file: &File, header: &Header, names: &[&str]) -> Option<Option<Place>> {
    let read = |at: u64, size: u64| part(file, at, size).ok().flatten();
    let list = |at: u64, size: usize, count: u16| read(at, size as u64 * u64::from(count));
    let count = header.e_shnum;
    let sections = list(header.e_shoff, SectionHeader::size(CTX), count)?;
    let sections = SectionHeader::parse_from(&sections, 0, count.into(), CTX).ok()?;
    let symbols = sections.iter().find(|s| s.sh_type == SHT_DYNSYM)?;
    let strings = sections.get(symbols.sh_link as usize)?;
    let strings = read(strings.sh_offset, strings.sh_size)?;
    let bytes = read(symbols.sh_offset, symbols.sh_size)?;
    let count = bytes.len() / Sym::size(Container::Big);
    let symbols = Symtab::parse(&bytes, 0, count, CTX).ok()?;
    let is_it = |s: &Sym| {
        let name = strings.get(s.st_name..).unwrap_or_default();
        let is = |wanted: &&str| {
            let rest = name.strip_prefix(wanted.as_bytes());
            rest.is_some_and(|rest| rest.first() == Some(&0))
        };
        s.st_shndx != 0 && names.iter().any(is)
    };
    let Some(found) = symbols.iter().find(is_it) else {
        return Some(None);
    };
    let count = header.e_phnum;
    let segments = list(header.e_phoff, ProgramHeader::size(CTX), count)?;
    let segments = ProgramHeader::parse(&segments, 0, count.into(), CTX).ok()?;
    Some(Some(place(header, &segments, &found)))
}

fn place(header: &Header, segments: &[ProgramHeader], symbol: &Sym) -> Place {
    if header.e_type == ET_EXEC {
        return Place::Absolute(symbol.st_value);
    }
    let first = segments.iter().find(|s| s.p_type == PT_LOAD);
    let start = first.map_or(0, |s| s.p_vaddr.wrapping_sub(s.p_offset));
    Place::Relative(symbol.st_value.wrapping_sub(start))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn own() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The C library that we are linked with.
    fn library() -> Vec<u8> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains("/libc.so") || path.contains("musl"));
        std::fs::read(path.unwrap()).unwrap()
    }

    #[test]
    fn is_where_the_whole_file_says() {
        let library = library();
        let elf = Elf::parse(&library).unwrap();
        let named = |s: &Sym| elf.dynstrtab.get_at(s.st_name) == Some("environ");
        let expected = elf.dynsyms.iter().find(named).unwrap().st_value;
        let expected = Some(Place::Relative(expected));
        let names = ["no such symbol", "environ"];
        assert_eq!(symbol(&file(&library), &names).unwrap(), expected);
        // Without sections.
        let mut stripped = library.clone();
        stripped[0x28..0x30].fill(0);
        stripped[0x3c..0x40].fill(0);
        assert_eq!(symbol(&file(&stripped), &names).unwrap(), expected);
        // With some that nobody looks at who runs it.
        let mut odd = library.clone();
        odd[0x28..0x30].fill(0xff);
        let found = symbol(&file(&odd), &names);
        assert!(
            matches!(found, Ok(at) if at == expected || at.is_none()),
            "{found:?}"
        );
        assert_eq!(symbol(&file(&library), &["no such symbol"]).unwrap(), None);
        // A part of a name is none, and what others define is not here.
        assert_eq!(symbol(&file(&library), &["enviro", "viron"]).unwrap(), None);
        assert_eq!(symbol(&file(&own()), &["malloc"]).unwrap(), None);
    }

    #[test]
    fn what_is_no_such_file_has_none() {
        for bytes in [&b""[..], b"\x7fELF", b"#!/bin/sh\nexit 0\n", &[0; 4096]] {
            assert_eq!(symbol(&file(bytes), &["environ"]).unwrap(), None);
        }
        let cut = file(library().get(..5000).unwrap());
        assert_eq!(symbol(&cut, &["environ"]).unwrap(), None);
    }

    proptest::proptest! {
        #[test]
        fn damaged_files_do_no_harm(
            holes in proptest::collection::vec((0usize..1 << 16, 0u8..), 1..20),
            heads in proptest::collection::vec((0usize..64, 0u8..), 0..4),
            len in 0usize..1 << 22,
        ) {
            let mut bytes = library();
            bytes.truncate(len.max(64));
            for (at, byte) in holes.into_iter().chain(heads) {
                if let Some(there) = bytes.get_mut(at) {
                    *there = byte;
                }
            }
            symbol(&file(&bytes), &["environ"]).unwrap();
        }
    }
}
