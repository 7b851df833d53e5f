//! What a process has mapped: /proc/PID/maps (proc(5)).
//!
//! Names of files are bytes. Of these the kernel writes a newline as `\012` and all others as they are, so a name that
//! has these four characters looks the same; the inode tells which of the two it is.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::proc_file;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    pub start: u64,
    pub end: u64,
    /// PROT_READ and so on.
    pub prot: i32,
    pub shared: bool,
    pub offset: u64,
    /// Major and minor number.
    pub dev: (u64, u64),
    /// 0 where no file is behind it.
    pub inode: u64,
    shown: Vec<u8>,
}

/// What a mapping is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name<'a> {
    Nameless,
    /// In brackets: the kernel's own, the heap and stacks, memory that the program has named.
    Special(&'a str),
    /// A file, as the kernel shows it.
    File(&'a [u8]),
}

/// Those of a process, or of the one that a thread is of, from low to high.
///
/// # Errors
/// As open(2) and read(2); InvalidData for a line that is none.
pub fn read(pid: i32) -> io::Result<Vec<Map>> {
    of(&pid.to_string())
}

/// Our own.
///
/// # Errors
/// As [`read`].
pub fn ours() -> io::Result<Vec<Map>> {
    of("self")
}

fn of(who: &str) -> io::Result<Vec<Map>> {
    let text = proc_file::read(format!("/proc/{who}/maps"))?;
    parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(text: &[u8]) -> Option<Vec<Map>> {
    let lines = text.split(|b| *b == b'\n');
    lines.filter(|l| !l.is_empty()).map(Map::parse).collect()
}

impl Map {
    /// 7f5e0a000000-7f5e0a021000 rw-p 00000000 00:00 0    name
    fn parse(line: &[u8]) -> Option<Self> {
        const WORDS: usize = 5;
        let mut words = line.splitn(WORDS + 1, |b| *b == b' ');
        let mut word = || std::str::from_utf8(words.next()?).ok();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = word()?.split_once('-')?;
        let perms = word()?.as_bytes();
        let offset = hex(word()?)?;
        let (major, minor) = word()?.split_once(':')?;
        let inode = word()?.parse().ok()?;
        let bit = |i: usize, c, bit| if perms.get(i) == Some(&c) { bit } else { 0 };
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            prot: bit(0, b'r', libc::PROT_READ)
                | bit(1, b'w', libc::PROT_WRITE)
                | bit(2, b'x', libc::PROT_EXEC),
            shared: *perms.get(3)? == b's',
            offset,
            dev: (hex(major)?, hex(minor)?),
            inode,
            shown: words.next().unwrap_or_default().trim_ascii_start().to_vec(),
        })
    }

    pub fn name(&self) -> Name<'_> {
        let special = match self.shown.as_slice() {
            [] => return Name::Nameless,
            [b'[', name @ .., b']'] => std::str::from_utf8(name).ok(),
            _ => None,
        };
        special.map_or(Name::File(&self.shown), Name::Special)
    }

    /// The path of the mapped file as the kernel shows it.
    pub fn shown(&self) -> Option<&Path> {
        match self.name() {
            Name::File(shown) => Some(Path::new(OsStr::from_bytes(shown))),
            _ => None,
        }
    }

    /// Whether it is of the same file as another mapping, and that is shown by the same name.
    pub fn is_of_same_file(&self, other: &Self) -> bool {
        let what = |m: &Self| (m.dev, m.inode);
        what(self) == what(other) && self.shown == other.shown
    }

    /// The mapped file, if it has the name that is shown still.
    pub fn file(&self) -> Option<(PathBuf, Metadata)> {
        let Name::File(shown) = self.name() else {
            return None;
        };
        let found = |bytes: Vec<u8>| {
            let path = PathBuf::from(OsString::from_vec(bytes));
            let meta = path.metadata().ok()?;
            self.is(&meta).then_some((path, meta))
        };
        found(shown.to_vec()).or_else(|| found(with_newlines(shown)?))
    }

    /// Some file systems show another device number in maps than in stat; the inode number decides then.
    fn is(&self, meta: &Metadata) -> bool {
        let dev = (major(meta.dev()), minor(meta.dev()));
        meta.ino() == self.inode && (dev == self.dev || self.dev.0 == 0)
    }
}

/// The other name that is shown so; None when there is no other.
fn with_newlines(shown: &[u8]) -> Option<Vec<u8>> {
    const NEWLINE: &[u8] = b"\\012";
    let mut name = Vec::new();
    let mut rest = shown;
    while let Some((first, behind)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(NEWLINE) {
            name.push(b'\n');
            rest = behind;
        } else {
            name.push(*first);
            rest = behind;
        }
    }
    (name.len() < shown.len()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn our_own_mappings_are_read() {
        let text = "5581-5582 r-xp 00001000 fe:01 1234      /usr/bin/with  two spaces\n\
            7f00-7f10 rw-s 00000000 00:01 77   /dev/zero (deleted)\n\
            7f10-7f20 rw-p 00000000 00:00 0 \n\
            7f20-7f30 ---p 00000000 00:00 0    [anon:a name]\n";
        let all = parse(text.as_bytes()).unwrap();
        let [file, zero, none, named] = &all[..] else {
            panic!("{all:?}")
        };
        assert_eq!(
            (file.start, file.end, file.offset),
            (0x5581, 0x5582, 0x1000)
        );
        assert_eq!(file.prot, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!((file.dev, file.inode), ((0xfe, 1), 1234));
        assert_eq!(file.name(), Name::File(b"/usr/bin/with  two spaces"));
        assert!(zero.shared && !file.shared);
        assert_eq!(none.name(), Name::Nameless);
        assert_eq!(
            (named.name(), named.prot),
            (Name::Special("anon:a name"), 0)
        );
        let ours = ours().unwrap();
        assert!(ours.iter().any(|m| m.name() == Name::Special("vdso")));
        let exe = std::env::current_exe().unwrap();
        assert!(
            ours.iter()
                .filter_map(Map::file)
                .any(|(path, _)| path == exe)
        );
    }

    #[test]
    fn a_file_is_found_by_either_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in [&b"a\nb"[..], b"a\\012c", b"\xff\xfe"] {
            let path = dir.path().join(OsStr::from_bytes(name));
            std::fs::write(&path, "x").unwrap();
            let meta = path.metadata().unwrap();
            let text = path.as_os_str().as_bytes();
            let at = text.iter().position(|b| *b == b'\n');
            let shown = at.map_or(text.to_vec(), |i| {
                [&text[..i], b"\\012", &text[i + 1..]].concat()
            });
            let (dev, ino) = (meta.dev(), meta.ino());
            let mut line =
                format!("0-1000 r--p 0 {:x}:{:x} {ino} ", major(dev), minor(dev)).into_bytes();
            line.extend(&shown);
            let found = Map::parse(&line).unwrap().file().map(|f| f.0);
            assert_eq!(found, Some(path));
        }
    }

    proptest! {
        #[test]
        fn what_the_kernel_writes_is_read(start in 0..1u64 << 47, len in 1..1u64 << 40, prot in 0..8, shared: bool, offset in 0..1u64 << 40,
            major in 0..4096u64, minor in 0..1u64 << 20, inode: u64, name in "/[^\n]{0,40}") {
            let bit = |i: i32, c| if prot & i != 0 { c } else { '-' };
            // As fs/proc/task_mmu.c.
            let mut line = format!("{start:08x}-{:08x} {}{}{}{} {offset:08x} {major:02x}:{minor:02x} {inode} ", start + len,
                bit(1, 'r'), bit(2, 'w'), bit(4, 'x'), if shared { 's' } else { 'p' });
            while line.len() < 73 {
                line.push(' ');
            }
            line += &name;
            let map = Map::parse(line.as_bytes()).unwrap();
            prop_assert_eq!((map.start, map.end, map.prot, map.shared), (start, start + len, prot, shared));
            prop_assert_eq!((map.offset, map.dev, map.inode), (offset, (major, minor), inode));
            prop_assert_eq!(map.name(), Name::File(name.as_bytes()));
        }

        #[test]
        fn any_bytes_are_read_or_refused(text in proptest::collection::vec(0u8.., 0..300)) {
            for map in parse(&text).unwrap_or_default() {
                let _ = map.file();
            }
        }
    }
}
