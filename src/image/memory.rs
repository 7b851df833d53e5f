//! Mappings, the files behind them, and memory that is shared.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::aio::IoRing;

/// Which address space (or file-like run of bytes) pages belong to: processes first, then shared memory
/// and contents of deleted files, numbered as they are met.
pub type SpaceId = u32;

/// One virtual memory area, as /proc/PID/smaps shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    /// PROT_READ | PROT_WRITE | PROT_EXEC.
    pub prot: i32,
    pub shared: bool,
    /// Offset in the backing object, bytes.
    pub offset: u64,
    pub backing: Backing,
    /// Two-letter codes of VmFlags that a restore sets again ("gd", "nr", "lo", "dc", "wf", "dd", "hg" ...).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// PR_SET_VMA_ANON_NAME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Ranges with guard pages (MADV_GUARD_INSTALL).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<(u64, u64)>,
    /// mbind(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MemPolicy>,
}

/// On which nodes memory is to be, as set_mempolicy(2) and mbind(2) take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemPolicy {
    /// MPOL_BIND and so on, and mode flags.
    pub mode: u32,
    /// A bit for each node.
    pub nodes: Vec<u64>,
}

impl MemPolicy {
    /// MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES.
    pub const NODES_AS_ASKED: u32 = 1 << 15 | 1 << 14;

    /// The mask in memory.
    pub fn mask(&self) -> Vec<u8> {
        self.nodes.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// How many bits it has for the kernel, which ignores the last one.
    pub fn bits(&self) -> u64 {
        self.nodes.len() as u64 * 64 + 1
    }
}

/// What gives a mapping its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Backing {
    /// Nothing but memory.
    Anonymous,
    /// A file, by index in `Manifest::files`.
    File { file: u32 },
    /// Memory others map too, by index in `Manifest::shared_memory`.
    Shared { memory: u32 },
    /// [vdso], [vvar], [vvar_vclock]: the kernel's own; content of the vdso is in the pages.
    Kernel { which: String },
    /// A context of asynchronous I/O: what it gives is in `ring`, and no page of it in the pages.
    Aio { ring: IoRing },
}

/// A file that the image needs by path, and carries where it can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Path as the process saw it.
    pub path: String,
    pub size: u64,
    pub mode: u32,
    pub dev: u64,
    pub ino: u64,
    pub mtime_ns: i128,
    pub ctime_ns: i128,
    /// Name of the carried copy in objects/, the BLAKE3 hash of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// It had no name any more when the checkpoint was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// An object of memory: memfd, MAP_SHARED|MAP_ANONYMOUS, SysV segment, or a deleted file that is mapped or open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SharedMemory {
    /// Where its bytes are in `pages` (addresses are offsets in the object).
    pub space: SpaceId,
    pub size: u64,
    /// Bytes of a page, where that is one of hugetlbfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_page: Option<u64>,
    pub kind: SharedKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SharedKind {
    Anonymous,
    /// `seals` as F_GET_SEALS gives them.
    Memfd {
        name: String,
        seals: i32,
        hugetlb: bool,
    },
    SysV {
        key: i32,
        shmid: i32,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    /// The path it had, and its mode.
    DeletedFile {
        path: String,
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

/// Flags of mappings that are others than those in the manifest, by where the mappings begin.
pub type ChangedFlags = BTreeMap<u64, Vec<String>>;

impl Vma {
    pub fn has(&self, code: &str) -> bool {
        self.flags.iter().any(|f| f == code)
    }

    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A shared mapping of a file that was opened for writing.
    pub fn may_be_written(&self) -> bool {
        self.shared && (self.prot & libc::PROT_WRITE != 0 || self.has("mw"))
    }

    pub fn is_kernel(&self) -> bool {
        matches!(self.backing, Backing::Kernel { .. })
    }
}
