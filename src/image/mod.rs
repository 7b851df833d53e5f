//! What a checkpoint contains, as plain data that knows nothing of how it is read or rebuilt.
//!
//! ```text
//! NAME/                directory, mode 0700, written as NAME.partial and renamed
//!   manifest.json      [`Manifest`]: everything but bytes of memory
//!   checksums          BLAKE3 hashes of manifest.json and pagemap, as b3sum(1) writes them
//!   pagemap            which pages of which space are where in `pages`, with checksums
//!   pages              the bytes, in blocks of at most 64 KiB, page-aligned when not compressed
//!   objects/HASH       files the image carries (programs, libraries), named by their BLAKE3 hash
//! ```

pub mod aio;
pub mod dated;
pub mod files;
pub mod memory;
pub mod objects;
mod pagemap;
pub mod pages;
pub mod process;
pub mod pvm;
pub mod rounds;
pub mod signals;
pub mod sockets;
pub mod store;
pub mod threads;
mod verify;

use serde::{Deserialize, Serialize};

pub use files::{Description, DescriptionId, Fd};
pub use memory::{ChangedFlags, FileRef, SharedMemory, SpaceId, Vma};
pub use process::Process;
pub use rounds::RoundsWriter;
pub use sockets::Socket;
pub use store::{Image, ImageWriter, Written, remove_partial};
pub use threads::Thread;

/// Version of the schema that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Value of [`Manifest::format`].
pub const FORMAT_NAME: &str = "mist-checkpoint";

/// The whole checkpoint but the bytes of its memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Always [`FORMAT_NAME`].
    pub format: String,
    /// See [`FORMAT_VERSION`].
    pub version: u32,
    /// Where and when it was made.
    pub origin: Origin,
    /// Parents before their children; the first is the one that was asked for.
    pub processes: Vec<Process>,
    /// Open file descriptions of all processes, each once however many descriptors share it.
    pub descriptions: Vec<Description>,
    /// State of the sockets that descriptions of kind `Socket` refer to by index.
    pub sockets: Vec<Socket>,
    /// Files that mappings, executables and working directories refer to by index.
    pub files: Vec<FileRef>,
    /// Memory that several mappings or descriptors share.
    pub shared_memory: Vec<SharedMemory>,
    /// What a PVM task needs besides; absent for other processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pvm: Option<pvm::PvmTask>,
}

impl Manifest {
    /// The lowest number that is above those of all descriptors.
    pub fn above_descriptors(&self) -> i32 {
        let numbers = self.processes.iter().flat_map(|p| &p.fds).map(|f| f.fd);
        numbers.max().unwrap_or(2).saturating_add(1).max(64)
    }

    /// How many descriptors a restore has at a time, at most.
    pub fn descriptors_to_restore(&self) -> u64 {
        self.built_descriptors()
            .max(self.above_descriptors() as u64)
    }

    /// From which number on a restore that may have so many descriptors builds them: out of the way of those of the
    /// programs where there is room for that.
    pub fn first_to_build(&self, allowed: u64) -> i32 {
        let above = self.above_descriptors();
        let room = allowed.saturating_sub(self.built_descriptors());
        i32::try_from(room).map_or(above, |room| room.min(above))
    }

    fn built_descriptors(&self) -> u64 {
        const OTHERS: usize = 64;
        let entries = |d: &Description| match &d.kind {
            files::Kind::Epoll { entries } => entries.len(),
            _ => 0,
        };
        let all = [
            self.descriptions.len(),
            self.sockets.len(),
            self.shared_memory.len(),
            // What one epoll instance watches stands under its own numbers for a moment, too.
            self.descriptions.iter().map(entries).max().unwrap_or(0),
            OTHERS,
        ];
        all.into_iter().sum::<usize>() as u64
    }
}

/// The host, kernel and moment a checkpoint was made at.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Origin {
    /// Version of mistctl.
    pub mistctl: String,
    pub hostname: String,
    /// uname -r.
    pub kernel: String,
    /// uname -m; a restore elsewhere is refused.
    pub machine: String,
    /// /proc/sys/kernel/random/boot_id: CLOCK_MONOTONIC of two boots cannot be compared.
    pub boot_id: String,
    /// Clocks as the processes saw them when they stood still, in nanoseconds.
    pub realtime_ns: i128,
    pub monotonic_ns: i128,
    pub boottime_ns: i128,
    /// How far CLOCK_MONOTONIC and CLOCK_BOOTTIME were ahead of the host's (a time namespace).
    #[serde(default)]
    pub time_offsets_ns: (i128, i128),
    /// User-space xstate components in use by the kernel (XCR0).
    pub xfeatures: u64,
}

/// Bytes, written as base64 in manifest.json.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Self {
        Self(v)
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use base64::Engine;
        s.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use base64::Engine;
        let text = String::deserialize(d)?;
        base64::engine::general_purpose::STANDARD
            .decode(text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// How page blocks are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    #[default]
    None,
    Lz4,
    Zstd,
}
