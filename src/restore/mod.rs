//! From an image to running processes.

mod aio;
mod bulk;
mod creds;
pub mod files;
mod group_stop;
mod guest;
mod ids;
mod layout;
mod lazy;
mod memory;
mod numbers;
mod open;
mod park;
mod placed;
mod process;
mod resume;
mod run;
mod shared;
mod signals;
mod threads;
mod tree;
mod understudy;

pub use guest::{Guest, Replaced};
pub use lazy::Filling;
use open::Opened;
pub use placed::{Announced, Placed, Placing};
pub use run::{here, run};

use std::path::PathBuf;

use serde::Serialize;

/// What `mistctl restore` was asked for.
#[derive(Debug, Clone)]
pub struct Options {
    pub image: PathBuf,
    /// Leave the processes to themselves once they run.
    pub detach: bool,
    /// Fail rather than give new ids.
    pub same_pid: bool,
    /// Run at once, fill memory behind.
    pub lazy: bool,
    /// Leave the processes group-stopped (SIGSTOP).
    pub stopped: bool,
    /// Draw a progress bar on standard error.
    pub progress: bool,
    /// Called right before the first process runs.
    pub before_release: Option<fn()>,
}

/// What a restore did, as --json prints it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Pid of the first process of the image.
    pub pid: i32,
    /// From the start of mistctl to the release of the restored program.
    pub resume_us: u64,
    /// Until all memory was filled.
    pub total_us: u64,
    /// "eager" or "lazy".
    pub mode: &'static str,
    pub processes: usize,
    pub bytes_memory: u64,
    /// The processes run in a pid namespace of their own; `pid` is the one seen from outside.
    pub pid_namespace: bool,
    pub warnings: Vec<String>,
}

/// A restore that succeeded.
#[derive(Debug)]
pub struct Outcome {
    pub report: Report,
    /// Pid, for us, of the first process when it is our child: the one to wait for.
    pub child: Option<i32>,
    /// Memory is still being filled (--lazy): this process must not end before that.
    pub filling: Option<Filling>,
}
