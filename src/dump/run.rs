//! The order of a dump: what is looked at while the processes stand, and what is done behind them.

use std::os::fd::AsFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use super::files::{FileDumper, Sockets};
use super::hold::HeldProcess;
use super::queries::{self, Queries, ThreadAnswers};
use super::tables::Tables;
use super::{After, Options, Report, carry, maps, memory, process, threads};
use crate::error::Failure;
use crate::image::process::{Process, State};
use crate::image::store::ImageWriter;
use crate::image::{FORMAT_NAME, FORMAT_VERSION, Manifest, Origin, SpaceId};
use crate::kernel::arch::{self, PAGE, TASK_SIZE};
use crate::kernel::batch::{self, Cloned, Snapshot};
use crate::kernel::{caps, pidfd, vdso};

/// One process of the dump: what the image says of it, and what we hold of it.
struct Subject {
    process: Process,
    queries: Queries,
    /// None for a zombie.
    held: Option<HeldProcess>,
    copy: Option<Snapshot>,
}

/// Dumps a process, or a tree of them, into an image.
///
/// # Errors
/// Classified (see [`Failure`]). The processes run on as before, and nothing is left under the image's
/// name.
pub fn run(opts: &Options) -> Result<Report> {
    let started = Instant::now();
    let pids = process::tree(opts.pid, opts.tree);
    for pid in &pids {
        process::check(*pid, &pids)?;
    }
    let writer = ImageWriter::create(&opts.image, opts.store.as_deref(), opts.compress)?;
    let bar = progress(opts.progress);
    let mut report = Report {
        pid: opts.pid,
        image: opts.image.clone(),
        ..Report::default()
    };

    let stopped = Instant::now();
    let blackout = |report: &mut Report| report.blackout_us = stopped.elapsed().as_micros() as u64;
    let held = stop(opts)?;
    let mut tables = Tables::new(held.len() as SpaceId);
    let (origin, mut subjects, dumped) = look(opts, held, &mut tables)?;
    let wants_copy = opts.after == After::Run;
    for s in &mut subjects {
        ask(s, wants_copy, &writer, &mut report)?;
    }
    report.bytes_memory +=
        memory::copy_contents(&tables.contents, &tables.shared_memory, writer.pages())?;
    let copied = wants_copy
        && subjects
            .iter()
            .all(|s| s.held.is_none() || s.copy.is_some());
    if copied {
        release(&mut subjects)?;
        blackout(&mut report);
    }
    for s in &subjects {
        if let Some(c) = &s.copy {
            c.seclude()?;
        }
    }
    report.memory = if copied { "snapshot" } else { "stopped" }.to_owned();
    report.bytes_memory += copy_memory(&mut subjects, &mut tables, &writer, &bar)?;
    subjects.iter_mut().for_each(|s| drop(s.copy.take()));
    if opts.after == After::Run && !copied {
        release(&mut subjects)?;
        blackout(&mut report);
    }
    let mut held: Vec<HeldProcess> = subjects.iter_mut().filter_map(|s| s.held.take()).collect();
    report.processes = subjects.len();
    report.threads = subjects.iter().map(|s| s.process.threads.len()).sum();
    let manifest = Manifest {
        format: FORMAT_NAME.to_owned(),
        version: FORMAT_VERSION,
        origin,
        processes: subjects.into_iter().map(|s| s.process).collect(),
        descriptions: dumped.descriptions,
        sockets: Vec::new(),
        files: tables.files,
        shared_memory: tables.shared_memory,
        pvm: None,
    };
    let written = writer.finish(&manifest)?;
    report.bytes_written = written.bytes_written;
    report.pages = written.pages;
    report.pages_zero = written.pages_zero;
    report.warnings.extend(tables.warnings);
    // Only now the image is durable.
    for h in held.drain(..) {
        match opts.after {
            After::Kill => h.kill()?,
            After::Stop => h.release_stopped()?,
            After::Run => h.release()?,
        }
        blackout(&mut report);
    }
    bar.finish_and_clear();
    report.total_us = started.elapsed().as_micros() as u64;
    Ok(report)
}

fn progress(wanted: bool) -> ProgressBar {
    if !wanted {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

fn release(subjects: &mut [Subject]) -> Result<()> {
    for s in subjects {
        if let Some(h) = s.held.take() {
            h.release()?;
        }
    }
    Ok(())
}

/// Stops every process, looking again for children that were born meanwhile.
/// None in the place of a zombie.
fn stop(opts: &Options) -> Result<Vec<(i32, Option<HeldProcess>)>> {
    let mut all: Vec<(i32, Option<HeldProcess>)> = Vec::new();
    loop {
        let new: Vec<i32> = process::tree(opts.pid, opts.tree)
            .into_iter()
            .filter(|pid| all.iter().all(|(known, _)| known != pid))
            .collect();
        if new.is_empty() {
            break;
        }
        for pid in new {
            let stat = procfs::process::Process::new(pid).and_then(|p| p.stat());
            let zombie = match stat {
                Ok(s) => s.state == 'Z' && s.num_threads <= 1,
                // A child that came and went.
                Err(_) if pid != opts.pid => continue,
                Err(_) => {
                    return Err(
                        Failure::NoSuchProcess.because(format!("there is no process {pid}"))
                    );
                }
            };
            if zombie {
                all.push((pid, None));
                continue;
            }
            let held = HeldProcess::stop(pid)?;
            // Only now it cannot exec a set-user-ID program any more; nothing of it has been read yet.
            caps::caller()?.may_dump(pid)?;
            all.push((pid, Some(held)));
        }
    }
    Ok(all)
}

/// Everything that can be seen from outside while the processes stand.
fn look(
    opts: &Options,
    all: Vec<(i32, Option<HeldProcess>)>,
    tables: &mut Tables,
) -> Result<(Origin, Vec<Subject>, super::files::Dumped)> {
    let origin = origin()?;
    let pids: Vec<i32> = all.iter().map(|(pid, _)| *pid).collect();
    let mut subjects = Vec::new();
    for (pid, held) in all {
        let (mut process, queries) = process::read(pid, tables)?;
        process.space = subjects.len() as SpaceId;
        subjects.push(Subject {
            process,
            queries,
            held,
            copy: None,
        });
    }
    let mut files = FileDumper::new(&pids);
    let mut sockets = NoSockets;
    let _ = opts.tcp_established;
    for s in &mut subjects {
        let Some(held) = &mut s.held else { continue };
        let pid = held.pid;
        let p = &mut s.process;
        for i in 0..held.threads.len() {
            threads::abort_rseq(&mut held.threads[i], &held.mem)?;
            p.threads.push(threads::read(pid, &held.threads[i])?);
        }
        let leader = held.leader();
        p.pending = threads::pending(leader, true)?;
        if let Some(signal) = leader.stopped_by {
            p.state = State::Stopped { signal };
        }
        p.vmas = maps::read(pid, tables)?;
        let fd = pidfd::open_thread(leader.tracee.tid)?;
        files.process(pid, leader.tracee.tid, fd.as_fd(), tables, &mut sockets)?;
    }
    let mut dumped = files.finish(tables, &mut sockets)?;
    for s in &mut subjects {
        let pid = s.process.pid;
        s.process.fds = dumped.fds.remove(&pid).unwrap_or_default();
        s.process.locks = dumped.locks.remove(&pid).unwrap_or_default();
    }
    Ok((origin, subjects, dumped))
}

struct NoSockets;

impl Sockets for NoSockets {
    fn socket(&mut self, pid: i32, fd: i32, _: std::os::fd::BorrowedFd<'_>) -> Result<u32> {
        Err(Failure::Refused.because(format!("process {pid}: fd {fd} is a socket")))
    }
}

/// What the process itself has to be asked, and its copy-on-write clone. What a clone lacks is copied
/// here, while the process stands.
fn ask(s: &mut Subject, wants_copy: bool, writer: &ImageWriter, report: &mut Report) -> Result<()> {
    let Some(held) = &s.held else { return Ok(()) };
    let pid = held.pid;
    let p = &mut s.process;
    let vdso = p
        .vmas
        .iter()
        .find(|v| {
            v.backing
                == crate::image::memory::Backing::Kernel {
                    which: "vdso".to_owned(),
                }
        })
        .with_context(|| format!("process {pid} has no vDSO"))?;
    let bytes = held.mem.read_vec(vdso.start, vdso.len() as usize)?;
    let elf = vdso::elf_len(&bytes)?;
    let mut clean = bytes;
    clean[elf as usize..].fill(0);
    writer.pages().put(p.space, vdso.start, &clean)?;
    let tail = vdso.start + elf..vdso.end;
    let area = hole(&p.vmas, batch::AREA)
        .with_context(|| format!("process {pid} has no room for {} bytes", batch::AREA))?;
    let clonable = wants_copy && !is_init(pid);
    let (batch, cloned) = batch::start(held.leader(), &held.mem, tail, area, clonable, &|data| {
        s.queries.calls(data)
    })?;
    let mut answers = vec![s.queries.answers(&batch, p)?];
    for t in held.threads.iter().skip(1) {
        let b = batch.in_thread(t, ThreadAnswers::LEN, &queries::thread_calls)?;
        answers.push(ThreadAnswers::read(&b));
    }
    batch.finish()?;
    for (t, a) in p.threads.iter_mut().zip(&answers) {
        threads::complete(t, a);
    }
    if let Cloned::Copy(copy) = cloned {
        let missing = memory::not_copied(pid, copy.pid(), &p.vmas)?;
        report.bytes_memory += memory::copy_stopped(pid, p.space, &missing, writer.pages())?;
        if procfs::process::Process::new(pid)?
            .status()?
            .vmlck
            .unwrap_or(0)
            > 0
        {
            maps::add_flags(&mut p.vmas, pid, false)?;
        }
        s.copy = Some(copy);
    } else if wants_copy {
        report.warnings.push(format!(
            "process {pid} could not be cloned (it is an init, or a limit on processes or memory); \
             its memory was copied while it stood still"
        ));
    }
    Ok(())
}

/// The init of a pid namespace would become the parent of its own copy.
fn is_init(pid: i32) -> bool {
    threads::status(pid, pid).is_ok_and(|s| s.nspid.is_some_and(|ids| ids.last() == Some(&1)))
}

/// A hole of `len` bytes in an address space, away from where stacks and heaps grow.
fn hole(vmas: &[crate::image::Vma], len: u64) -> Option<u64> {
    const MARGIN: u64 = 16 * PAGE;
    let mut at: u64 = 1 << 32;
    for v in vmas {
        if v.start >= at + len + 2 * MARGIN {
            break;
        }
        at = at.max(v.end + MARGIN);
    }
    (at + len < TASK_SIZE).then_some(at)
}

/// Memory of all processes, from their copies where there are some; and what is known of mappings only
/// from a walk over the page tables.
fn copy_memory(
    subjects: &mut [Subject],
    tables: &mut Tables,
    writer: &ImageWriter,
    bar: &ProgressBar,
) -> Result<u64> {
    let mut populated = 0;
    for s in subjects.iter_mut() {
        let (pid, is_copy) = match (&s.copy, &s.held) {
            (Some(c), _) => (c.pid(), true),
            (None, Some(h)) => (h.pid, false),
            (None, None) => continue,
        };
        if s.process.vmas.iter().all(|v| v.flags.is_empty()) {
            maps::add_flags(&mut s.process.vmas, pid, is_copy)?;
        }
        memory::add_guards(pid, &mut s.process.vmas)?;
        carry::files(pid, &s.process, tables, writer)?;
        let status = procfs::process::Process::new(pid).and_then(|p| p.status());
        populated += status.map_or(0, |s| s.rssanon.unwrap_or(0) + s.vmswap.unwrap_or(0)) * 1024;
    }
    bar.set_length(populated);
    let sources: Vec<memory::Source> = subjects
        .iter()
        .filter_map(|s| {
            let pid = match (&s.copy, &s.held) {
                (Some(c), _) => c.pid(),
                (None, Some(h)) => h.pid,
                (None, None) => return None,
            };
            let there = |v: &&crate::image::Vma| s.copy.is_none() || !v.has("dc") && !v.has("ht");
            let vmas = s.process.vmas.iter().filter(there).collect();
            Some(memory::Source {
                pid,
                space: s.process.space,
                vmas,
            })
        })
        .collect();
    memory::copy(&sources, writer.pages(), bar)
}

fn origin() -> Result<Origin> {
    let uts = nix::sys::utsname::uname().context("uname")?;
    let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
    let clock = |id| -> Result<i128> {
        let t = nix::time::clock_gettime(id).context("clock_gettime")?;
        Ok(i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()))
    };
    let realtime = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Origin {
        mistctl: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: text(uts.nodename()),
        kernel: text(uts.release()),
        machine: arch::MACHINE.to_owned(),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        realtime_ns: realtime.as_nanos() as i128,
        monotonic_ns: clock(nix::time::ClockId::CLOCK_MONOTONIC)?,
        boottime_ns: clock(nix::time::ClockId::CLOCK_BOOTTIME)?,
        xfeatures: arch::xfeatures(),
    })
}
