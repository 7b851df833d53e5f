//! The program's environment: what says where its pvmd is, and which process that has forked.
//!
//! Strings are changed in place where the new value fits. Where it does not, the string goes to a mapping of its
//! own and `environ` points there.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, bail};

use super::reach::Reach;
use crate::elf;
use crate::image::memory::{Backing, FileRef};
use crate::image::process::Process;
use crate::image::store::Image;

/// What libpvm finds its pvmd by.
const NAMES: [&str; 4] = ["PVMSOCK", "PVMEPID", "PVM_TMP", "PVM_VMID"];
/// Strings that are looked at.
const MOST: usize = 1 << 16;
/// Longest string that is looked at.
const LONGEST: usize = 1 << 17;
const PIECE: usize = 4096;

/// The values that this process has been given by its pvmd.
#[must_use]
pub fn own() -> Vec<(&'static str, Option<OsString>)> {
    NAMES
        .iter()
        .map(|name| (*name, std::env::var_os(name)))
        .collect()
}

/// Gives the program these values; without one, the variable is taken away.
///
/// # Errors
/// When the environment is not where the C library has it.
pub fn update(
    mem: &mut Reach<'_>,
    image: &Image,
    p: &Process,
    values: &[(&str, Option<OsString>)],
) -> Result<()> {
    let symbol = symbol(image, p)?.context("the program's C library has no `environ`")?;
    let mut array = mem.read_u64(symbol)?;
    let mut list = pointers(mem, array)?;
    let mut add = Vec::new();
    for (name, value) in values {
        let found = find(mem, &list, name)?;
        match (found, value) {
            (Some((index, old)), Some(value)) => {
                let wanted = string(name, value);
                if old.len() == wanted.len() && old == wanted {
                    continue;
                }
                let at = list.get(index).copied().unwrap_or(0);
                let at = if wanted.len() <= old.len() {
                    at
                } else {
                    room(mem, wanted.len())?
                };
                mem.write(at, &wanted)?;
                mem.write(array.wrapping_add(8 * index as u64), &at.to_le_bytes())?;
                if let Some(entry) = list.get_mut(index) {
                    *entry = at;
                }
            }
            (Some((index, _)), None) => {
                list.remove(index);
                write_list(mem, array, &list)?;
            }
            (None, Some(value)) => add.push(string(name, value)),
            (None, None) => {}
        }
    }
    for wanted in add {
        let at = room(mem, wanted.len())?;
        mem.write(at, &wanted)?;
        list.push(at);
        // There is nothing free behind the old one.
        array = room(mem, 8 * (list.len() + 1))?;
        write_list(mem, array, &list)?;
        mem.write(symbol, &array.to_le_bytes())?;
    }
    Ok(())
}

fn string(name: &str, value: &OsStr) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend(value.as_bytes());
    bytes.push(0);
    bytes
}

fn write_list(mem: &mut Reach<'_>, array: u64, list: &[u64]) -> Result<()> {
    let bytes: Vec<u8> = list
        .iter()
        .chain([&0])
        .flat_map(|at| at.to_le_bytes())
        .collect();
    mem.write(array, &bytes)
}

/// The pointers of `environ`.
fn pointers(mem: &mut Reach<'_>, array: u64) -> Result<Vec<u64>> {
    let mut list = Vec::new();
    while array != 0 && list.len() < MOST {
        let from = array.wrapping_add(8 * list.len() as u64);
        // Up to the end of a page: behind it nothing may be mapped.
        let len = PIECE - from as usize % PIECE;
        for word in mem.read_some(from, len)?.chunks_exact(8) {
            match u64::from_le_bytes(word.try_into().unwrap_or_default()) {
                0 => return Ok(list),
                at => list.push(at),
            }
        }
    }
    if array != 0 {
        bail!("the program's environment has more than {MOST} variables");
    }
    Ok(list)
}

/// The first string of this name, with its NUL, and which one it is.
fn find(mem: &mut Reach<'_>, list: &[u64], name: &str) -> Result<Option<(usize, Vec<u8>)>> {
    let mut page = (0, Vec::new());
    for (index, at) in list.iter().enumerate() {
        let base = at - at % PIECE as u64;
        if page.0 != base || page.1.is_empty() {
            page = (base, mem.read_some(base, PIECE)?);
        }
        let here = page.1.get((at - base) as usize..).unwrap_or_default();
        let begins = |bytes: &[u8]| {
            bytes.starts_with(name.as_bytes()) && bytes.get(name.len()) == Some(&b'=')
        };
        // The name may be cut by the end of the page.
        if here.len() > name.len() && !begins(here) {
            continue;
        }
        let whole = c_string(mem, *at)?;
        if begins(&whole) {
            return Ok(Some((index, whole)));
        }
    }
    Ok(None)
}

fn c_string(mem: &mut Reach<'_>, at: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while bytes.len() < LONGEST {
        let from = at.wrapping_add(bytes.len() as u64);
        let piece = mem.read_some(from, PIECE - from as usize % PIECE)?;
        match piece.iter().position(|byte| *byte == 0) {
            Some(end) => {
                bytes.extend(piece.get(..=end).unwrap_or_default());
                return Ok(bytes);
            }
            None => bytes.extend(piece),
        }
    }
    bail!("a string of the program's environment is longer than {LONGEST} bytes")
}

/// A mapping of its own.
fn room(mem: &mut Reach<'_>, len: usize) -> Result<u64> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let args = [
        0u64.into(),
        (len as u64).into(),
        prot.into(),
        flags.into(),
        (-1i32).into(),
        0u64.into(),
    ];
    let at = mem.body().call(libc::SYS_mmap, &args)?;
    crate::kernel::body::check("making room for the program's environment", at)?;
    Ok(at as u64)
}

/// Address of `environ`: the program's own copy of it, else the C library's.
fn symbol(image: &Image, p: &Process) -> Result<Option<u64>> {
    let mut seen = Vec::new();
    // The program comes first in the order in which symbols are looked up.
    let own = |v: &&crate::image::memory::Vma| v.backing == Backing::File { file: p.exe };
    let others = |v: &&crate::image::memory::Vma| !own(v);
    for v in p
        .vmas
        .iter()
        .filter(own)
        .chain(p.vmas.iter().filter(others))
    {
        let Backing::File { file } = v.backing else {
            continue;
        };
        if v.offset != 0 || seen.contains(&file) {
            continue;
        }
        seen.push(file);
        let Some(f) = image.manifest.files.get(file as usize) else {
            continue;
        };
        let libc =
            f.path.contains("/libc.so") || f.path.contains("/libc-") || f.path.contains("musl");
        if file != p.exe && !libc {
            continue;
        }
        if let Some(place) = environ_in(image, f)? {
            return Ok(Some(place.in_file_at(v.start)));
        }
    }
    Ok(None)
}

/// Where a program or library has `environ`; none when it has none.
fn environ_in(image: &Image, f: &FileRef) -> Result<Option<elf::Place>> {
    let file = match &f.object {
        Some(object) => image.object(object)?,
        None => std::fs::File::open(&f.path).with_context(|| f.path.clone())?,
    };
    elf::symbol(&file, &["environ", "__environ", "_environ"])
        .with_context(|| format!("looking for `environ` in {}", f.path))
}
