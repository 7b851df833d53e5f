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
