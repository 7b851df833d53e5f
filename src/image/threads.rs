//! Threads: registers and everything the kernel keeps a thread.

use serde::{Deserialize, Serialize};

use super::Bytes;
use super::memory::MemPolicy;
use super::signals::{AltStack, PendingSignal};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Thread {
    pub tid: i32,
    /// struct user_regs_struct as the thread is to go on with, raw (see `resume` for calls it was in).
    pub regs: Bytes,
    /// NT_X86_XSTATE regset, raw.
    pub xstate: Bytes,
    pub resume: Resume,
    pub comm: String,
    /// Its bytes, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub comm_raw: Bytes,
    /// Blocked signals.
    pub sigmask: u64,
    pub pending: Vec<PendingSignal>,
    pub altstack: AltStack,
    pub rseq: Option<Rseq>,
    pub robust_list: u64,
    pub robust_list_len: u64,
    pub clear_child_tid: u64,
    pub sched: Sched,
    pub cpus_allowed: Bytes,
    pub timer_slack_ns: u64,
    pub pdeathsig: i32,
    /// It may not read the time stamp counter (PR_TSC_SIGSEGV of PR_SET_TSC).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_tsc: bool,
    /// set_mempolicy(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mempolicy: Option<MemPolicy>,
    pub creds: super::process::Creds,
}

fn no_bytes(bytes: &Bytes) -> bool {
    bytes.is_empty()
}

/// How a thread goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "how")]
pub enum Resume {
    /// At its registers, as they are.
    #[default]
    Run,
    /// It was in system call `nr`, which is issued again as it was.
    Again { nr: u64 },
    /// It was in system call `nr` with a time-out of which `left_ns` are left. `again`: a connect on a TCP socket that
    /// had been connecting before, which ends otherwise.
    Timed {
        nr: u64,
        left_ns: i64,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        again: bool,
    },
    /// It had transferred `done` bytes of a call that goes on with the rest. Of its socket's time-out, where it has
    /// one, `left_ns` are left.
    Partial {
        nr: u64,
        done: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        left_ns: Option<i64>,
    },
}

impl Resume {
    /// In a call with a time-out of which is not known yet how much is left.
    pub fn timed(nr: u64) -> Self {
        Self::Timed {
            nr,
            left_ns: 0,
            again: false,
        }
    }

    /// Whether it is a connect that goes on with an earlier one.
    pub fn connects_again(&self) -> bool {
        matches!(self, Self::Timed { again: true, .. })
    }
}

/// PTRACE_GET_RSEQ_CONFIGURATION.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
}

/// struct sched_attr and ioprio.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sched {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    pub ioprio: i32,
}
