//! Threads that restrict themselves (landlock(7)): by which rules nobody tells, so they are refused.

use crate::error::Failure;
use crate::image::process::Process;
use crate::kernel::kmem::landlock::Rules;
use crate::kernel::kmem::threads::Threads;
use crate::kernel::landlock::Probe;

/// How it is found out whether a thread does.
#[derive(Debug)]
pub enum Landlock {
    /// In kernel memory.
    Seen(&'static Rules),
    /// By what it may not do.
    Tried(Probe),
    /// Not at all: the kernel has no such thing, or hides it from us.
    Unknown,
}

impl Landlock {
    /// Makes ready for that, before anything stands still.
    pub fn prepare() -> Self {
        match (Threads::get(), Rules::get()) {
            (Some(_), Some(rules)) => Self::Seen(rules),
            _ => Probe::start().map_or(Self::Unknown, Self::Tried),
        }
    }

    /// What threads are told to look at; 0: themselves.
    pub fn probe(&self) -> i32 {
        match self {
            Self::Tried(probe) => probe.pid(),
            Self::Seen(_) | Self::Unknown => 0,
        }
    }

    /// Whether the credentials at this address, in kernel memory, have rules.
    pub fn of(&self, cred: u64) -> bool {
        match self {
            Self::Seen(rules) => rules.restrict(cred).unwrap_or(false),
            Self::Tried(_) | Self::Unknown => false,
        }
    }

    /// Refuses a process whose thread `tid` seems to be restricted, and is.
    pub fn refuse(&self, process: &Process, tid: i32) -> anyhow::Result<()> {
        let is_so = match self {
            Self::Seen(_) => true,
            Self::Tried(probe) => probe.proves(tid),
            Self::Unknown => false,
        };
        if !is_so {
            return Ok(());
        }
        let Process { pid, comm, .. } = process;
        Err(Failure::Refused.because(format!(
            "process {pid} ({comm}): its thread {tid} has restricted itself (landlock_restrict_self(2)); nobody tells by which rules, \
             and after a restore it would have none; run the program without its sandbox"
        )))
    }
}
