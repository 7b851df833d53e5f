//! Scheduling of a thread: sched_getattr(2), ioprio_get(2), affinity.

use std::io;

use anyhow::{Context, Result};

use crate::image::threads::Sched;

/// struct sched_attr, first version and uclamp.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

impl SchedAttr {
    /// As sched_setattr(2) wants it in memory.
    pub fn bytes(s: &Sched) -> Vec<u8> {
        let mut b = Vec::with_capacity(48);
        b.extend_from_slice(&(size_of::<Self>() as u32).to_le_bytes());
        b.extend_from_slice(&s.policy.to_le_bytes());
        b.extend_from_slice(&s.flags.to_le_bytes());
        b.extend_from_slice(&s.nice.to_le_bytes());
        b.extend_from_slice(&s.priority.to_le_bytes());
        b.extend_from_slice(&s.runtime.to_le_bytes());
        b.extend_from_slice(&s.deadline.to_le_bytes());
        b.extend_from_slice(&s.period.to_le_bytes());
        b
    }
}

/// Policy, priorities and I/O priority of a thread.
pub fn get(tid: i32) -> Result<Sched> {
    let mut a = SchedAttr::default();
    // SAFETY: `a` is live and of the size that is passed.
    let r = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid,
            &raw mut a,
            size_of::<SchedAttr>(),
            0,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("reading the scheduling of thread {tid}"));
    }
    // SAFETY: plain numbers; 1 is IOPRIO_WHO_PROCESS, which takes a thread id.
    let ioprio = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) };
    Ok(Sched {
        policy: a.policy,
        flags: a.flags,
        nice: a.nice,
        priority: a.priority,
        runtime: a.runtime,
        deadline: a.deadline,
        period: a.period,
        ioprio: ioprio.max(0) as i32,
    })
}

/// The affinity mask as the kernel has it, whole longs.
pub fn affinity(tid: i32) -> Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: `mask` is live and as long as said.
    let n = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid,
            mask.len(),
            mask.as_mut_ptr(),
        )
    };
    if n < 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("reading the affinity of thread {tid}"));
    }
    mask.truncate(n as usize);
    Ok(mask)
}

/// The calling thread comes before all that is not urgent too, as long as this lives: while others stand still
/// for us, nobody else's work may keep them waiting.
#[derive(Debug)]
pub struct Urgent(Option<libc::sched_param>);

impl Urgent {
    /// Without the right to (CAP_SYS_NICE) it changes nothing, nor for a thread with a priority of its own.
    pub fn new() -> Self {
        let mut before = libc::sched_param { sched_priority: 0 };
        // SAFETY: 0 is the calling thread; the structure is live.
        let known = unsafe { libc::sched_getparam(0, &raw mut before) == 0 };
        Self((known && urge(0)).then_some(before))
    }
}

/// Lets a thread come before all that is not urgent too, where we may and it has no priority of its own; what it
/// forks begins as usual.
pub fn urge(tid: i32) -> bool {
    let first = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the structure is live, and read only.
    unsafe {
        libc::sched_getscheduler(tid) == libc::SCHED_OTHER
            && libc::sched_setscheduler(tid, policy, &raw const first) == 0
    }
}

impl Default for Urgent {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: as above.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, before) };
        }
    }
}
