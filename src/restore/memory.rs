//! Filling memory: anonymous pages through userfaultfd, modified copies of file pages by writing.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;

use super::bulk::Bulk;
use crate::image::memory::{Backing, Vma};
use crate::image::pages::{PagesReader, Run};
use crate::image::process::Process;
use crate::kernel::buffer::Buffer;
use crate::kernel::mem::Mem;
use crate::kernel::pidfd;
use crate::kernel::remote::Remote;
use crate::kernel::uffd::{Copied, Uffd};

/// Bytes given at once: they stay in a second-level cache between being read, checked and copied.
const PIECE: usize = 256 << 10;
/// Bytes of memory that one thread fills before it takes the next.
const WINDOW: u64 = 2 << 20;
const WORKERS: usize = 2;

/// A userfaultfd of the body, with us and with it. `lazy`: faults of the kernel are to be answered too, which takes
/// privilege.
pub fn attach(body: &mut Remote, lazy: bool) -> Result<Uffd> {
    const UFFD_USER_MODE_ONLY: i32 = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let mut fd = body.call(libc::SYS_userfaultfd, &[flags.into()])?;
    if fd == -i64::from(libc::EPERM) && !lazy {
        let flags = flags | UFFD_USER_MODE_ONLY;
        fd = body.call(libc::SYS_userfaultfd, &[flags.into()])?;
    }
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd as i32))
            .context("userfaultfd (needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd)");
    }
    let pidfd = pidfd::open(body.pid())?;
    let ours = pidfd::get_fd(pidfd.as_fd(), fd as i32).context("taking the body's userfaultfd")?;
    body.must(
        "closing the userfaultfd",
        libc::SYS_close,
        &[(fd as u64).into()],
    )?;
    Ok(Uffd(ours))
}

/// True for memory that the kernel may empty when it likes (MAP_DROPPABLE), as getrandom(2) in the vDSO keeps its state in:
/// restored twice, that would give the same random numbers twice. So it comes back empty.
pub fn is_droppable(v: &Vma) -> bool {
    v.has("dp")
}

/// True for mappings that userfaultfd fills.
pub fn by_uffd(v: &Vma) -> bool {
    v.backing == Backing::Anonymous && !v.shared && !v.has("ht") && !is_droppable(v)
}

/// True for mappings that may be made of one that can be written to: they have been such, or do not count as memory, as
/// what is only reserved would then.
pub fn was_writable(v: &Vma) -> bool {
    let is_used = v.has("ac") || v.has("nr") && v.prot != libc::PROT_NONE;
    by_uffd(v) && !v.has("gd") && is_used
}

/// Whether the kernel made these, which lie side by side, of what was one mapping, as far as can be seen: it shares what it
/// has of their pages (struct anon_vma), and makes them one again when the program makes them alike, by which mremap(2)
/// goes.
pub fn joins(a: &Vma, b: &Vma) -> bool {
    let kind = |v: &Vma| ["nr", "ac"].map(|code| v.has(code));
    a.end == b.start && was_writable(a) && was_writable(b) && kind(a) == kind(b)
}

/// Those of them that may be filled when the program runs. A child that it forks meanwhile gets what is missing in
/// it as it is in the parent, so not those that are to be empty there.
pub fn lazily(v: &Vma) -> bool {
    by_uffd(v) && !v.has("wf")
}

/// True for mappings with pages in the process's own part of the image.
fn has_pages(v: &Vma) -> bool {
    !v.shared && !v.is_kernel() && !is_droppable(v)
}

/// Fills all memory of a process but what is in `bulk` already, verifying every block. Bytes filled.
pub fn fill(
    uffd: &Uffd,
    mem: &Mem,
    p: &Process,
    pages: &PagesReader,
    bulk: &Bulk,
    bar: &ProgressBar,
) -> Result<u64> {
    uffd.api(0)?;
    let by_uffd = |v: &Vma| by_uffd(v) && !bulk.has(p, v);
    for v in p.vmas.iter().filter(|v| by_uffd(v)) {
        uffd.register_missing(v.start, v.len())?;
    }
    let total = AtomicU64::new(write_copies(mem, p, pages, self::by_uffd)?);
    let private = p.vmas.iter().filter(|v| by_uffd(v));
    let windows = private.flat_map(|v| windows(v.start, v.end));
    share(windows, &|next| {
        let mut buffer = Buffer::new(PIECE);
        let mut scratch = Vec::new();
        while let Some((start, end)) = next()? {
            for run in pages.runs(p.space, start, end, PIECE) {
                let run: Run = run?;
                let out = buffer
                    .get_mut(..run.bytes())
                    .with_context(|| format!("a run of {} bytes", run.bytes()))?;
                pages.read_run(&run, out, &mut scratch)?;
                put(uffd, run.addr(), out)?;
                total.fetch_add(out.len() as u64, Ordering::Relaxed);
                bar.inc(out.len() as u64);
            }
        }
        Ok(())
    })?;
    for v in p.vmas.iter().filter(|v| by_uffd(v)) {
        uffd.unregister(v.start, v.len())?;
    }
    Ok(total.into_inner())
}

/// A range, cut into what one page of page tables maps, and so what one thread's lock covers.
pub fn windows(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    (start - start % WINDOW..end)
        .step_by(WINDOW as usize)
        .map(move |at| (at.max(start), (at + WINDOW).min(end)))
}

/// Hands out the next window; none when all are taken.
pub type NextWindow<'a> = dyn Fn() -> Result<Option<(u64, u64)>> + 'a;

/// Lets threads work through windows: `work` is called in each.
pub fn share(
    windows: impl Iterator<Item = (u64, u64)> + Send,
    work: &(dyn Fn(&NextWindow) -> Result<()> + Sync),
) -> Result<()> {
    let panicked = || anyhow!("a filling thread panicked");
    let windows = Mutex::new(windows);
    let next = || Ok(windows.lock().map_err(|_| panicked())?.next());
    let each = || work(&next);
    thread::scope(|scope| {
        // As many as there may be.
        let other = |_| thread::Builder::new().spawn_scoped(scope, each).ok();
        let others: Vec<_> = (1..WORKERS).filter_map(other).collect();
        let mut result = each();
        for other in others {
            result = result.and(other.join().unwrap_or_else(|_| Err(panicked())));
        }
        result
    })
}

/// Modified copies of file pages, and huge TLB pages: written over what the mapping shows, whatever its
/// protection is, which only the tracer may (CONFIG_PROC_MEM_FORCE_PTRACE). All but what is `filled` otherwise. Bytes
/// written.
pub fn write_copies(
    mem: &Mem,
    p: &Process,
    pages: &PagesReader,
    filled: fn(&Vma) -> bool,
) -> Result<u64> {
    let mut buffer = Buffer::new(PIECE);
    let mut scratch = Vec::new();
    let mut total = 0;
    for v in p.vmas.iter().filter(|v| has_pages(v) && !filled(v)) {
        for run in pages.runs(p.space, v.start, v.end, PIECE) {
            let run = run?;
            let out = buffer
                .get_mut(..run.bytes())
                .context("a run of pages is too long")?;
            pages.read_run(&run, out, &mut scratch)?;
            mem.write(run.addr(), out)?;
            total += out.len() as u64;
        }
    }
    Ok(total)
}

/// Fills missing pages.
pub fn put(uffd: &Uffd, addr: u64, data: &[u8]) -> Result<()> {
    let mut done = 0;
    loop {
        match uffd.copy(addr + done as u64, &data[done..])? {
            Copied::Done => return Ok(()),
            Copied::Again(n) => done += n as usize,
            other => bail!("filling {} bytes at {addr:#x}: {other:?}", data.len()),
        }
    }
}
