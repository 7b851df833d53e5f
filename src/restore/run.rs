//! The order of a restore. Everything half-built dies with us until the last line.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;

use super::files::{self, Built, Surroundings};
use super::open::Opened;
use super::{Options, Outcome, Report, creds, layout, memory, process, signals, threads};
use crate::image::Manifest;
use crate::image::process::{Process, State};
use crate::image::store::Image;
use crate::kernel::body;
use crate::kernel::remote::{AREA, Remote};

/// Restores an image. `started` is the start of mistctl.
///
/// # Errors
/// Classified (see [`crate::error`]); nothing half-restored is left.
pub fn run(opts: &Options, started: Instant) -> Result<Outcome> {
    let image = Image::open(&opts.image)?;
    let manifest = &image.manifest;
    let ours = creds::ours()?;
    for p in &manifest.processes {
        creds::check(p, &ours)?;
    }
    let [root] = manifest.processes.as_slice() else {
        bail!("images of several processes cannot be restored yet")
    };
    let mut report = Report {
        mode: "eager",
        processes: 1,
        ..Report::default()
    };

    let floor = floor(manifest);
    let shared = shared_memory(&image, &mut report)?;
    let built = descriptors(manifest, opts, floor, &shared)?;
    let opened = Opened::new(&image, raise(shared, floor)?, floor)?;
    report.warnings.extend(opened.warnings.iter().cloned());
    report.warnings.extend(built.warnings.iter().cloned());

    let area = layout::area(&manifest.processes)?;
    let same_ids = ids_are_free(root);
    if !same_ids {
        let taken = "its ids are taken here; it gets new ones (a program that keeps its own pid in memory \
                     will be confused)";
        if opts.same_pid {
            bail!("process {}: {taken}", root.pid);
        }
        report
            .warnings
            .push(format!("process {}: {taken}", root.pid));
    }
    let pid = match body::fork_idle(same_ids.then_some(root.pid)) {
        Ok(pid) => pid,
        Err(e) if opts.same_pid => return Err(body::explain_set_tid(root.pid, e)),
        Err(_) => body::fork_idle(None).context("clone3")?,
    };
    report.pid = pid;
    let mut body = Remote::attach(pid, area)?;
    let mut all = rebuild(
        &mut body,
        root,
        &image,
        &opened,
        &built,
        same_ids,
        &ours,
        &mut report,
    )?;
    built.release()?;
    release(&body, &mut all, root, opts)?;
    report.resume_us = started.elapsed().as_micros() as u64;
    report.total_us = report.resume_us;
    Ok(Outcome {
        report,
        child: Some(pid),
    })
}

/// One body becomes one process, standing before its next instruction; its other threads are returned.
#[expect(
    clippy::too_many_arguments,
    reason = "the one place where everything meets"
)]
fn rebuild(
    body: &mut Remote,
    p: &Process,
    image: &Image,
    opened: &Opened,
    built: &Built,
    same_ids: bool,
    ours: &crate::image::process::Creds,
    report: &mut Report,
) -> Result<Vec<Remote>> {
    process::surroundings(body, p, &image.manifest)?;
    let stripped = layout::strip(body, p, image.pages())?;
    layout::map(body, p, opened, !stripped.redirect.is_empty())?;
    let uffd = memory::attach(body)?;
    report.bytes_memory +=
        memory::fill(&uffd, body.mem(), p, image.pages(), &ProgressBar::hidden())?;
    drop(uffd);
    layout::poke(body.mem(), &stripped.redirect)?;
    layout::set_mm(body, p, opened.executable(p.exe), stripped.vdso.0)?;
    process::descriptors(body, p, built)?;
    signals::actions(body, p)?;
    let mut others = threads::make(body, p, same_ids)?;
    let tids: BTreeMap<i32, i32> = p
        .threads
        .iter()
        .map(|t| t.tid)
        .zip(std::iter::once(body.tracee.tid).chain(others.iter().map(|r| r.tracee.tid)))
        .collect();
    let id_of = |old: i32| tids.get(&old).copied().unwrap_or(old);
    process::in_body(body, p, built, &id_of)?;
    signals::pending(body, &p.pending, None)?;
    process::limits(body, p)?;
    layout::advise(body, p)?;
    for (r, t) in others.iter_mut().zip(p.threads.iter().skip(1)) {
        threads::furnish(r, t, ours)?;
    }
    let Some(leader) = p.threads.first() else {
        bail!("process {} has no threads", p.pid)
    };
    threads::furnish(body, leader, ours)?;
    process::marks(body, p)?;
    signals::timers(body, p, &id_of)?;
    let unmapped = body.by_step(stripped.vdso.0, libc::SYS_munmap, &[body.area(), AREA])?;
    body::check("unmapping the restorer", unmapped)?;
    for (r, t) in std::iter::once(&*body).chain(&others).zip(&p.threads) {
        threads::set_registers(r, t)?;
    }
    report.warnings.append(&mut body.warnings);
    for r in &mut others {
        report.warnings.append(&mut r.warnings);
    }
    Ok(others)
}

/// Lets a process go.
fn release(body: &Remote, others: &mut [Remote], p: &Process, opts: &Options) -> Result<()> {
    if opts.stopped || matches!(p.state, State::Stopped { .. }) {
        let pid = nix::unistd::Pid::from_raw(body.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    }
    for r in others.iter().chain(std::iter::once(body)) {
        r.tracee
            .detach(0)
            .with_context(|| format!("releasing thread {}", r.tracee.tid))?;
    }
    Ok(())
}

/// Where our own descriptors go: above every number of the programs.
fn floor(m: &Manifest) -> i32 {
    let top = m
        .processes
        .iter()
        .flat_map(|p| &p.fds)
        .map(|f| f.fd)
        .max()
        .unwrap_or(2);
    top.saturating_add(1).max(64)
}

fn ids_are_free(p: &Process) -> bool {
    body::is_free(p.pid) && p.threads.iter().all(|t| body::is_free(t.tid))
}

fn shared_memory(image: &Image, report: &mut Report) -> Result<BTreeMap<u32, OwnedFd>> {
    let mut all = BTreeMap::new();
    for (i, object) in image.manifest.shared_memory.iter().enumerate() {
        let fd = files::memfd::create(object, &mut report.warnings)?;
        let mut buffer = vec![0u8; 256 << 10];
        let mut scratch = Vec::new();
        let file = std::fs::File::from(fd.try_clone()?);
        for run in image.pages().runs(
            object.space,
            0,
            object.size.next_multiple_of(4096),
            buffer.len(),
        ) {
            use std::os::unix::fs::FileExt;
            let run = run?;
            let len = run.bytes();
            let out = buffer.get_mut(..len).context("a run is too long")?;
            image.pages().read_run(&run, out, &mut scratch)?;
            let end = (object.size - run.addr()).min(len as u64) as usize;
            file.write_all_at(&out[..end], run.addr())
                .with_context(|| format!("filling shared memory object {i}"))?;
            report.bytes_memory += end as u64;
        }
        files::memfd::finish(object, fd.as_fd())?;
        all.insert(i as u32, fd);
    }
    Ok(all)
}

fn raise(all: BTreeMap<u32, OwnedFd>, floor: i32) -> Result<BTreeMap<u32, OwnedFd>> {
    all.into_iter()
        .map(|(i, fd)| Ok((i, crate::kernel::fds::dup_above(fd.as_fd(), floor)?)))
        .collect()
}

fn descriptors(
    m: &Manifest,
    opts: &Options,
    floor: i32,
    shared: &BTreeMap<u32, OwnedFd>,
) -> Result<Built> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let surroundings = Surroundings {
        floor,
        detached: opts.detach,
        same_clocks: boot.trim() == m.origin.boot_id,
    };
    let mut socket = |_| bail!("sockets cannot be restored yet");
    let mut memory = |i: u32| -> Result<BorrowedFd<'_>> {
        shared
            .get(&i)
            .map(OwnedFd::as_fd)
            .with_context(|| format!("there is no shared memory {i}"))
    };
    files::build(m, surroundings, &mut socket, &mut memory)
}
