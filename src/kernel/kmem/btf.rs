//! The kernel's own description of its types (Documentation/bpf/btf.rst): where a field of a structure stands.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Deref;

use memmap2::{Mmap, MmapOptions};

/// Sections of /sys/kernel/btf/vmlinux, and where each type begins.
#[derive(Debug)]
pub struct Btf {
    bytes: Bytes,
    strings: usize,
    /// Offset in `bytes` of type number i + 1.
    types: Vec<usize>,
    /// Those of structures.
    structures: Vec<usize>,
}

/// Mapped where the kernel lets it be (6.16 and later): a read(2) brings 4 KiB of some megabytes.
#[derive(Debug)]
pub enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Bytes {
    /// What a file of the kernel's holds, which does not change.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(path: &str) -> io::Result<Self> {
        let mut file = File::open(path)?;
        // Shared it may not be mapped, for whoever does that may get the right to write.
        // SAFETY: the kernel's file is read-only memory, for as long as it runs.
        if let Ok(mapped) = unsafe { MmapOptions::new().populate().map_copy_read_only(&file) } {
            return Ok(Self::Mapped(mapped));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Self::Read(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(m) => m,
            Self::Read(v) => v,
        }
    }
}

const MAGIC: u16 = 0xeb9f;
/// struct btf_type: u32 name, info, size or type.
const TYPE: usize = 12;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// Anonymous structures in each other.
const DEEPEST: u32 = 16;

impl Btf {
    /// None for what is no BTF.
    pub fn parse(bytes: Bytes) -> Option<Self> {
        let word = |at: usize| read_u32(&bytes, at);
        if bytes.get(..2)? != MAGIC.to_ne_bytes() {
            return None;
        }
        let header = word(4)? as usize;
        let begin = header.checked_add(word(8)? as usize)?;
        let end = begin.checked_add(word(12)? as usize)?;
        let strings = header.checked_add(word(16)? as usize)?;
        // A type with its members is some forty bytes.
        let mut types = Vec::with_capacity(end.min(bytes.len()) / 32);
        let mut structures = Vec::new();
        let mut at = begin;
        while at < end {
            types.push(at);
            let info = word(at + 4)?;
            if info >> 24 & 0x1f == STRUCT {
                structures.push(at);
            }
            at += TYPE + behind(info)?;
        }
        Some(Self {
            bytes,
            strings,
            types,
            structures,
        })
    }

    fn word(&self, at: usize) -> Option<u32> {
        read_u32(&self.bytes, at)
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let at = self.strings.saturating_add(name as usize);
        let end = at.saturating_add(wanted.len());
        self.bytes.get(at..end) == Some(wanted.as_bytes()) && self.bytes.get(end) == Some(&0)
    }

    /// Offset in `bytes` of the structure with this name.
    fn structure(&self, name: &str) -> Option<usize> {
        let mut all = self.structures.iter().copied();
        all.find(|&at| self.word(at).is_some_and(|n| self.is_named(n, name)))
    }

    /// Bytes of a structure.
    pub fn size(&self, structure: &str) -> Option<u64> {
        self.structure(structure)
            .and_then(|at| self.word(at + 8))
            .map(u64::from)
    }

    /// Bytes from the beginning of a structure to one of its fields; those of its anonymous parts count. "a.b" is
    /// field b of the structure that is field a.
    pub fn offset(&self, structure: &str, field: &str) -> Option<u64> {
        Some(self.bit(structure, field)? / 8)
    }

    /// As [`Btf::offset`], in bits: for a bit field.
    pub fn bit(&self, structure: &str, field: &str) -> Option<u64> {
        let (mut at, mut sum) = (self.structure(structure)?, 0);
        for part in field.split('.') {
            let (offset, of_type) = self.find(at, part, DEEPEST)?;
            sum += offset;
            at = (of_type as usize)
                .checked_sub(1)
                .and_then(|i| self.types.get(i))
                .copied()?;
        }
        Some(sum)
    }

    /// Offset of a field in bits, and the number of its type.
    fn find(&self, at: usize, field: &str, depth: u32) -> Option<(u64, u32)> {
        let info = self.word(at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) {
            return None;
        }
        // With kind_flag the upper eight bits are a bit field's size.
        let mask = if info >> 31 == 1 { 0xff_ffff } else { u32::MAX };
        for i in 0..(info & 0xffff) as usize {
            let member = at + TYPE + i * TYPE;
            let bits = self.word(member + 8)? & mask;
            let offset = u64::from(bits);
            let name = self.word(member)?;
            if self.is_named(name, field) {
                return Some((offset, self.word(member + 4)?));
            }
            if name == 0 && depth > 0 {
                let inner = (self.word(member + 4)? as usize).checked_sub(1)?;
                let inner = *self.types.get(inner)?;
                if let Some((more, of_type)) = self.find(inner, field, depth - 1) {
                    return Some((offset + more, of_type));
                }
            }
        }
        None
    }
}

/// Bytes that follow a type of this kind.
fn behind(info: u32) -> Option<usize> {
    let n = (info & 0xffff) as usize;
    Some(match info >> 24 & 0x1f {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, 64-bit enumerations.
        STRUCT | UNION | 15 | 19 => n * 12,
        // Enumerations, prototypes.
        6 | 13 => n * 8,
        _ => return None,
    })
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    four.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::{Btf, Bytes};

    #[test]
    fn finds_fields_in_anonymous_parts() {
        let Ok(bytes) = Bytes::of("/sys/kernel/btf/vmlinux") else {
            eprintln!("SKIPPED: this kernel has no BTF");
            return;
        };
        let btf = Btf::parse(bytes).unwrap();
        // Its first field, in a structure in a union.
        assert_eq!(btf.offset("sk_buff", "next"), Some(0));
        assert!(btf.offset("sk_buff", "len").is_some_and(|o| o > 16));
        assert_eq!(btf.offset("sk_buff", "no such field"), None);
        // The one behind two single bits and one of two.
        let bit = |field| btf.bit("sk_buff", field).unwrap();
        assert_eq!(bit("peeked"), bit("cloned") + 4);
        let sleeper = |field| btf.offset("hrtimer_sleeper", field).unwrap();
        assert!(sleeper("timer.node.expires") < sleeper("timer.base"));
        assert_eq!(btf.offset("hrtimer_sleeper", "timer.node.nothing"), None);
        assert_eq!(btf.offset("no such structure", "next"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(0u8.., 0..400)) {
            if let Some(magic) = bytes.get_mut(..2) {
                magic.copy_from_slice(&super::MAGIC.to_ne_bytes());
            }
            if let Some(btf) = Btf::parse(Bytes::Read(bytes)) {
                let _ = btf.offset("a", "b");
            }
        }
    }
}
