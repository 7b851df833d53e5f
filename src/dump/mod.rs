//! From running processes to an image.

mod aio;
mod appointments;
mod carry;
pub mod files;
mod hold;
mod landlock;
mod late;
mod look;
mod maps;
mod memory;
mod namespace;
mod process;
mod queries;
mod ready;
mod resume;
mod run;
mod semaphores;
mod session;
mod sharing;
mod survey;
pub mod tables;
mod threads;
mod tracker;

pub use hold::HeldProcess;
pub use look::prepare;
pub use maps::Flags;
pub use process::{ending_or, is_ending, is_over};
pub use run::{finish, run};
pub use session::Session;
pub use survey::{Survey, child, survey};
pub use tracker::{Round, Run, Take, Tracker};

use std::fs::File;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use crate::image::{ImageWriter, RoundsWriter, SpaceId};

/// Where a dump puts what is large. Threads share it.
pub trait Sink: Sync {
    /// Takes whole pages of memory at a page's address. No page is given twice.
    ///
    /// # Errors
    /// When they cannot be kept; the dump fails then.
    fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()>;

    /// The same, for a private mapping of a file: a page of zeros counts there, for the file's would show.
    ///
    /// # Errors
    /// As for [`Sink::put`].
    fn put_over(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.put(space, addr, data)
    }

    /// Takes the content of a regular file; returns its name, which is its BLAKE3 hash.
    ///
    /// # Errors
    /// As for [`Sink::put`].
    fn object(&self, file: &File) -> Result<String>;
}

impl Sink for ImageWriter {
    fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.pages().put(space, addr, data)
    }

    fn put_over(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.pages().put_over(space, addr, data)
    }

    fn object(&self, file: &File) -> Result<String> {
        self.add_object(file)
    }
}

impl Sink for RoundsWriter {
    fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        RoundsWriter::put(self, space, addr, data)
    }

    fn object(&self, file: &File) -> Result<String> {
        self.add_object(file)
    }
}

/// What `mistctl dump` was asked for.
#[derive(Debug, Clone)]
pub struct Options {
    pub pid: i32,
    /// Name of the image to make; it must not exist.
    pub image: PathBuf,
    /// Directory whose images share their carried files (hard links), if the image stands in a store.
    pub store: Option<PathBuf>,
    /// Children too.
    pub tree: bool,
    pub after: After,
    pub compress: crate::image::Compress,
    /// Carry TCP connections whose peer is outside the dump.
    pub tcp_established: bool,
    /// Draw a progress bar on standard error.
    pub progress: bool,
    /// Which of the programs and libraries go along.
    pub carried: Carried,
    /// Inode of the socket that connects the process, a PVM task, to its pvmd.
    pub pvmd: Option<u64>,
}

impl Options {
    /// It makes no image: a task moves, and nobody is there who could be told to take others along.
    fn moves(&self) -> bool {
        self.image.as_os_str().is_empty()
    }
}

/// Which files that a process maps privately go into its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    /// Programs, libraries, and all others that are not large.
    All,
    /// Those that nobody can reach by name any more; the others are where it is restored already.
    Nameless,
}

/// What becomes of the processes once the image is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    Run,
    Stop,
    Kill,
}

/// What a dump did, as --json prints it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub pid: i32,
    pub image: PathBuf,
    pub processes: usize,
    pub threads: usize,
    /// Memory the processes have mapped and populated, bytes.
    pub bytes_memory: u64,
    /// Bytes of the image on disk.
    pub bytes_written: u64,
    /// Pages stored, and pages found to be zero and not stored.
    pub pages: u64,
    pub pages_zero: u64,
    /// From the first thread's stop to the last one's release.
    pub blackout_us: u64,
    pub total_us: u64,
    /// How memory was copied: "snapshot" (copy-on-write clone) or "stopped", and why.
    pub memory: String,
    /// What could not be carried and does not matter much, for people.
    pub warnings: Vec<String>,
}
