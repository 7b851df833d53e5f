//! Signals and timers.

use serde::{Deserialize, Serialize};

use super::Bytes;

/// struct kernel_sigaction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigAction {
    pub signal: i32,
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// A queued signal: siginfo_t, raw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingSignal {
    pub info: Bytes,
}

/// stack_t.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    pub sp: u64,
    pub flags: i32,
    pub size: u64,
}

/// setitimer(2): microseconds to go and interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ITimer {
    pub which: i32,
    pub left_us: i64,
    pub interval_us: i64,
}

/// timer_create(2), from /proc/PID/timers and timer_gettime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    pub signal: i32,
    /// sigval, as 64 bits.
    pub value: u64,
    /// SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID.
    pub notify: i32,
    pub tid: i32,
    pub left_ns: i64,
    pub interval_ns: i64,
    pub overrun: i32,
    /// The time of day that it was set to (TIMER_ABSTIME of CLOCK_REALTIME), nanoseconds: it is due then, however long it was
    /// away. Where it has expired since and goes on by its interval, the time of day then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_ns: Option<i64>,
}
