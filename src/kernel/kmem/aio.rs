//! Contexts of asynchronous I/O (io_setup(2)), and whether requests of theirs are under way, which no system call tells.

use anyhow::{Context as _, Result, bail};

use super::KernelMemory;
use super::threads::Threads;

/// More contexts than a process has.
const MOST: u32 = 1 << 20;

/// One context (struct kioctx of fs/aio.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoContext {
    /// Its id: where its ring is mapped.
    pub id: u64,
    /// Bytes of the ring.
    pub len: u64,
    /// What io_setup(2) was asked for.
    pub requests: u32,
    /// Events that its ring has room for.
    pub events: u32,
    /// Where the next event goes.
    pub tail: u32,
    /// Requests that were submitted and have no event yet.
    pub under_way: u64,
    /// Among them is one that waits for a descriptor to be ready (IOCB_CMD_POLL).
    pub polls: bool,
}

/// Those of the process of thread `tid`.
///
/// # Errors
/// When kernel memory cannot be read, or the kernel keeps this otherwise.
pub fn contexts(kernel: &KernelMemory, tid: i32) -> Result<Vec<IoContext>> {
    let threads = Threads::get().context("kernel memory cannot be read")?;
    let space = kernel.pointer(threads.find(tid)?.0, "task_struct", "mm")?;
    if space == 0 {
        return Ok(Vec::new());
    }
    let table = kernel.pointer(space, "mm_struct", "ioctx_table")?;
    if table == 0 {
        return Ok(Vec::new());
    }
    let entries = kernel.u32(kernel.field(table, "kioctx_table", "nr")?)?;
    if entries > MOST {
        bail!("{entries} contexts of asynchronous I/O are too many");
    }
    let first = kernel.field(table, "kioctx_table", "table")?;
    let mut all = Vec::new();
    for i in 0..u64::from(entries) {
        let context = kernel.u64(first.wrapping_add(8 * i))?;
        if context != 0 {
            all.push(look(kernel, context)?);
        }
    }
    Ok(all)
}

fn look(kernel: &KernelMemory, at: u64) -> Result<IoContext> {
    let field = |name| kernel.field(at, "kioctx", name);
    let active = field("active_reqs")?;
    Ok(IoContext {
        id: kernel.u64(field("user_id")?)?,
        len: kernel.u64(field("mmap_size")?)?,
        requests: kernel.u32(field("max_reqs")?)?,
        events: kernel.u32(field("nr_events")?)?,
        tail: kernel.u32(field("tail")?)?,
        under_way: under_way(kernel, field("reqs")?)?,
        // A list of those that can be cancelled.
        polls: kernel.u64(active)? != active,
    })
}

/// A struct percpu_ref that every request holds once; the context itself does so once, and once by its beginning, which
/// is not counted per processor.
fn under_way(kernel: &KernelMemory, reqs: u64) -> Result<u64> {
    /// __PERCPU_REF_ATOMIC, __PERCPU_REF_DEAD: it is counted in one place, for the context is being destroyed.
    const FLAGS: u64 = 3;
    let counters = kernel.pointer(reqs, "percpu_ref", "percpu_count_ptr")?;
    if counters & FLAGS != 0 {
        return Ok(1);
    }
    let counted = kernel.per_cpu(counters)?;
    let sum = counted.iter().try_fold(0u64, |sum, at| {
        Ok::<_, anyhow::Error>(sum.wrapping_add(kernel.u64(*at)?))
    })?;
    Ok(sum.wrapping_sub(1))
}

#[cfg(test)]
mod tests {
    use super::{KernelMemory, contexts};

    #[test]
    fn requests_that_are_under_way_are_counted() {
        if !caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_BPF).unwrap() {
            return eprintln!("SKIPPED: needs CAP_BPF");
        }
        let mut id = 0u64;
        // SAFETY: the kernel writes the id, and maps a ring where nothing is.
        if unsafe { libc::syscall(libc::SYS_io_setup, 9, &raw mut id) } < 0 {
            return eprintln!("SKIPPED: this kernel has no asynchronous I/O");
        }
        let kernel = KernelMemory::get().unwrap();
        let own = || {
            let all = contexts(kernel, std::process::id() as i32).unwrap();
            *all.iter().find(|c| c.id == id).unwrap()
        };
        let idle = own();
        assert_eq!(
            (idle.requests, idle.tail, idle.under_way, idle.polls),
            (9, 0, 0, false)
        );
        assert_eq!(u64::from(idle.events) * 32 + 32, idle.len);
        let (read, write) = nix::unistd::pipe().unwrap();
        // struct iocb; IOCB_CMD_POLL for POLLIN.
        let mut request = [0u64; 8];
        request[2] = 5 | (std::os::fd::AsRawFd::as_raw_fd(&read) as u64) << 32;
        request[3] = libc::POLLIN as u64;
        let list = [&raw const request; 3];
        // SAFETY: three times one request, which points nowhere.
        let taken = unsafe { libc::syscall(libc::SYS_io_submit, id, 3, list.as_ptr()) };
        assert_eq!(taken, 3);
        assert_eq!((own().under_way, own().polls), (3, true));
        nix::unistd::write(&write, b"x").unwrap();
        assert_eq!((own().under_way, own().polls, own().tail), (0, false, 3));
        // SAFETY: nobody uses it any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, id) };
    }
}
