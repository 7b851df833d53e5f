//! Processes: everything threads of one share.

use serde::{Deserialize, Serialize};

use super::files::{Fd, Lock};
use super::memory::{SpaceId, Vma};
use super::signals::{ITimer, PendingSignal, PosixTimer, SigAction};
use super::threads::Thread;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub state: State,
    pub comm: String,
    /// Signal sent to the parent at exit (clone(2)).
    pub exit_signal: i32,
    /// Leader first, unless it has ended. Empty for a zombie.
    pub threads: Vec<Thread>,
    pub space: SpaceId,
    pub vmas: Vec<Vma>,
    pub mm: MmLayout,
    /// Indices in `Manifest::files`.
    pub exe: u32,
    pub cwd: u32,
    pub root: u32,
    pub fds: Vec<Fd>,
    /// fcntl record locks: description the lock's file is open under, and the lock.
    pub locks: Vec<(u32, Lock)>,
    pub sigactions: Vec<SigAction>,
    pub pending: Vec<PendingSignal>,
    pub itimers: Vec<ITimer>,
    pub posix_timers: Vec<PosixTimer>,
    pub limits: Vec<Limit>,
    pub umask: u32,
    pub personality: u64,
    pub oom_score_adj: i32,
    pub dumpable: i32,
    pub child_subreaper: bool,
    pub thp_disable: bool,
    /// PR_THP_DISABLE_EXCEPT_ADVISED: memory that asks for them (MADV_HUGEPAGE) has huge pages all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub thp_advised: bool,
    /// Which memory a core dump has (/proc/PID/coredump_filter); none where it was not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coredump_filter: Option<u32>,
    pub mdwe: u32,
    /// PR_MCE_KILL_GET: what becomes of it when its memory fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mce_kill: Option<u32>,
    /// What it has registered for with membarrier(2): MEMBARRIER_CMD_REGISTER_*.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub membarrier: u32,
    /// PR_GET_MEMORY_MERGE: equal pages of all its mappings may be merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub merge_memory: bool,
    /// How new mappings are locked: MCL_FUTURE, and MCL_ONFAULT, of mlockall(2).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lock_future: u32,
    /// System V semaphores that its end gives back (SEM_UNDO of semop(2)).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub semaphores: Vec<SemaphoreUndo>,
    /// What was left out, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The leader has ended while other threads go on; `threads` holds those, and `comm` is its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_leader: Option<EndedLeader>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Process {
    /// Its main thread; None when that has ended.
    pub fn leader(&self) -> Option<&Thread> {
        self.threads.first().filter(|_| self.ended_leader.is_none())
    }

    /// The threads that are not its main thread.
    pub fn others(&self) -> &[Thread] {
        let first = usize::from(self.leader().is_some());
        self.threads.get(first..).unwrap_or_default()
    }
}

/// What is added to the semaphores of a set when the process ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreUndo {
    pub set: i32,
    /// Of each semaphore.
    pub adjustments: Vec<i16>,
}

/// What remains of a main thread that has ended before its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedLeader {
    /// What it ended with, as in a wait status; /proc/PID/stat shows it.
    pub status: i32,
    /// Whoever signals the process is judged by them (kill(2)).
    pub creds: Creds,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum State {
    Running,
    /// Group-stopped by this signal.
    Stopped {
        signal: i32,
    },
    /// Dead, with this wait status, and not waited for.
    Zombie {
        status: i32,
    },
}

/// struct prctl_mm_map without auxv and exe, and auxv.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MmLayout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub auxv: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// RLIMIT_*.
    pub resource: u32,
    /// u64::MAX is infinity.
    pub soft: u64,
    pub hard: u64,
}

/// Credentials of a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creds {
    /// real, effective, saved, file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub cap_inheritable: u64,
    pub cap_permitted: u64,
    pub cap_effective: u64,
    pub cap_bounding: u64,
    pub cap_ambient: u64,
    pub securebits: u32,
    pub no_new_privs: bool,
}
