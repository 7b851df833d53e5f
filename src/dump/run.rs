//! The order of a dump: what is looked at while the processes stand, and what is done behind them.

use std::os::fd::AsFd;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use super::files::FileDumper;
use super::hold::HeldProcess;
use super::queries::{self, Queries, ThreadAnswers};
use super::tables::Tables;
use super::{After, Options, Report, carry, maps, memory, process, threads};
use crate::error::Failure;
use crate::image::memory::Backing;
use crate::image::process::{Process, State};
use crate::image::store::ImageWriter;
use crate::image::{Description, FORMAT_NAME, FORMAT_VERSION, Manifest, Origin, Socket, SpaceId};
use crate::kernel::arch::{self, PAGE, TASK_SIZE};
use crate::kernel::batch::{self, Batch, Cloned, Snapshot};
use crate::kernel::guardian::Guardian;
use crate::kernel::time_ns::Offsets;
use crate::kernel::{caps, pidfd, vdso};
use crate::net::{self, SocketDumper};
use crate::progress;

/// One process of the dump: what the image says of it, and what we hold of it.
struct Subject {
    process: Process,
    queries: Queries,
    copy: Option<Snapshot>,
}

/// What we hold of each process, in the order of the subjects; None for a zombie.
type Holds = Vec<Option<HeldProcess>>;

/// Dumps a process, or a tree of them, into an image.
///
/// # Errors
/// Classified (see [`Failure`]). The processes run on as before, and nothing is left under the image's
/// name.
pub fn run(opts: &Options) -> Result<Report> {
    let started = Instant::now();
    let pids = process::tree(opts.pid, opts.tree);
    for pid in &pids {
        process::check(*pid, &pids, opts.tree)?;
    }
    let writer = ImageWriter::create(&opts.image, opts.store.as_deref(), opts.compress)?;
    let bar = progress::bar(opts.progress, 0);
    let mut report = Report {
        pid: opts.pid,
        image: opts.image.clone(),
        ..Report::default()
    };

    let guardian = Guardian::start().context("starting the guardian process")?;
    let stopped = Instant::now();
    let blackout = |report: &mut Report| report.blackout_us = stopped.elapsed().as_micros() as u64;
    let (pids, mut holds): (Vec<i32>, Holds) = stop(opts)?.into_iter().unzip();
    let mut tables = Tables::new(pids.len() as SpaceId);
    let (mut subjects, mut looked) = look(opts, &pids, &mut holds, &mut tables, &guardian)?;
    let wants_copy = opts.after == After::Run;
    ask(&mut subjects, &holds, wants_copy, &writer, &mut report)?;
    report.bytes_memory +=
        memory::copy_contents(&tables.contents, &tables.shared_memory, writer.pages())?;
    let alive = subjects.iter().zip(&holds).filter(|(_, h)| h.is_some());
    let copied = wants_copy && alive.clone().all(|(s, _)| s.copy.is_some());
    if copied {
        release(&mut holds)?;
        blackout(&mut report);
    }
    for s in &subjects {
        if let Some(c) = &s.copy {
            c.seclude()?;
        }
    }
    report.memory = if copied { "snapshot" } else { "stopped" }.to_owned();
    report.bytes_memory += copy_memory(&mut subjects, &holds, &mut tables, &writer, &bar)?;
    subjects.iter_mut().for_each(|s| drop(s.copy.take()));
    if opts.after == After::Run && !copied {
        release(&mut holds)?;
        blackout(&mut report);
    }
    report.processes = subjects.len();
    report.threads = subjects.iter().map(|s| s.process.threads.len()).sum();
    let manifest = Manifest {
        format: FORMAT_NAME.to_owned(),
        version: FORMAT_VERSION,
        origin: looked.origin,
        processes: subjects.into_iter().map(|s| s.process).collect(),
        descriptions: looked.descriptions,
        sockets: looked.sockets,
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
    if let Some(mut connections) = looked.connections.take() {
        let pidfds = holds
            .iter()
            .flatten()
            .map(|h| pidfd::open(h.pid))
            .collect::<Result<Vec<_>>>()?;
        connections.finish_kill(&pidfds.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    }
    for h in holds.into_iter().flatten() {
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

fn release(holds: &mut Holds) -> Result<()> {
    holds
        .iter_mut()
        .filter_map(Option::take)
        .try_for_each(HeldProcess::release)
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
            let held = match HeldProcess::stop(pid) {
                Err(e) if pid != opts.pid && Failure::of(&e) == Failure::NoSuchProcess => continue,
                held => held?,
            };
            // Only now it cannot exec a set-user-ID program any more; nothing of it has been read yet.
            caps::caller()?.may_dump(pid)?;
            all.push((pid, Some(held)));
        }
    }
    Ok(all)
}

/// What [`look`] found besides the processes.
struct Looked<'g> {
    origin: Origin,
    descriptions: Vec<Description>,
    sockets: Vec<Socket>,
    /// Of a dump that kills: holds TCP connections until then.
    connections: Option<SocketDumper<'g>>,
}

/// Everything that can be seen from outside while the processes stand.
fn look<'g>(
    opts: &Options,
    pids: &[i32],
    holds: &mut Holds,
    tables: &mut Tables,
    guardian: &'g Guardian,
) -> Result<(Vec<Subject>, Looked<'g>)> {
    let first = holds.iter().flatten().next();
    let origin = origin(first.map_or(0, HeldProcess::via))?;
    let mut files = FileDumper::new(pids);
    let net = net::Options {
        tcp_established: opts.tcp_established,
        kill: opts.after == After::Kill,
        ..net::Options::default()
    };
    let mut sockets = SocketDumper::new(net, guardian);
    let mut subjects = Vec::new();
    for (pid, hold) in pids.iter().zip(holds) {
        let (mut p, queries) = process::read(*pid, hold.as_ref().map(HeldProcess::via), tables)?;
        p.space = subjects.len() as SpaceId;
        if let Some(held) = hold {
            for i in 0..held.threads.len() {
                threads::abort_rseq(&mut held.threads[i], &held.mem)?;
                p.threads.push(threads::read(*pid, &held.threads[i])?);
            }
            let leader = held.leader();
            p.pending = threads::pending(leader, true)?;
            if let Some(signal) = leader.stopped_by {
                p.state = State::Stopped { signal };
            }
            p.vmas = maps::read(held.via(), tables)?;
            let tid = held.via();
            let fd = pidfd::open_thread(tid)?;
            files.process(*pid, tid, fd.as_fd(), tables, &mut sockets)?;
        }
        subjects.push(Subject {
            process: p,
            queries,
            copy: None,
        });
    }
    let socket_list = sockets.finish(&mut |sockets, fd| files.adopt(fd, tables, sockets))?;
    let mut dumped = files.finish(tables, &mut sockets)?;
    sockets.warnings.drain(..).for_each(|w| tables.warn(w));
    for Subject { process: p, .. } in &mut subjects {
        p.fds = dumped.fds.remove(&p.pid).unwrap_or_default();
        p.locks = dumped.locks.remove(&p.pid).unwrap_or_default();
    }
    let looked = Looked {
        origin,
        descriptions: dumped.descriptions,
        sockets: socket_list,
        connections: (opts.after == After::Kill).then_some(sockets),
    };
    Ok((subjects, looked))
}

/// What the processes themselves have to be asked, and their copy-on-write clones. What a clone lacks is
/// copied here, while they stand.
///
/// A clone's parent becomes the nearest subreaper above it. All batches are under way before the first
/// ends, so none of the processes is a subreaper meanwhile.
fn ask(
    subjects: &mut [Subject],
    holds: &Holds,
    wants_copy: bool,
    writer: &ImageWriter,
    report: &mut Report,
) -> Result<()> {
    let mut batches = Vec::new();
    for (s, hold) in subjects.iter_mut().zip(holds) {
        let Some(held) = hold else { continue };
        let (batch, copy) = ask_one(s, held, wants_copy, writer)?;
        if let Some(copy) = &copy {
            let via = held.via();
            let p = &mut s.process;
            let missing = memory::not_copied(via, copy.pid(), &p.vmas)?;
            report.bytes_memory += memory::copy_stopped(via, p.space, &missing, writer.pages())?;
            if threads::status(held.pid, via)?.vmlck.unwrap_or(0) > 0 {
                maps::add_flags(&mut p.vmas, via, false)?;
            }
        } else if wants_copy {
            report.warnings.push(format!(
                "process {} could not be cloned (it is an init, or a limit on processes or memory); \
                 its memory was copied while it stood still",
                held.pid
            ));
        }
        s.copy = copy;
        batches.push(batch);
    }
    batches.into_iter().try_for_each(Batch::finish)
}

fn ask_one<'a>(
    s: &mut Subject,
    held: &'a HeldProcess,
    wants_copy: bool,
    writer: &ImageWriter,
) -> Result<(Batch<'a>, Option<Snapshot>)> {
    let pid = held.pid;
    let p = &mut s.process;
    let vdso = p
        .vmas
        .iter()
        .find(|v| matches!(&v.backing, Backing::Kernel { which } if which == "vdso"))
        .with_context(|| format!("process {pid} has no vDSO"))?;
    let mut bytes = held.mem.read_vec(vdso.start, vdso.len() as usize)?;
    let elf = vdso::elf_len(&bytes)?;
    // What stands behind the ELF image may be the code of an earlier batch.
    bytes[elf as usize..].fill(0);
    writer.pages().put(p.space, vdso.start, &bytes)?;
    let tail = held.tail();
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
    for (t, a) in p.threads.iter_mut().zip(&answers) {
        threads::complete(t, a);
    }
    let copy = match cloned {
        Cloned::Copy(copy) => Some(copy),
        Cloned::NotAsked | Cloned::Failed => None,
    };
    Ok((batch, copy))
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
    holds: &Holds,
    tables: &mut Tables,
    writer: &ImageWriter,
    bar: &ProgressBar,
) -> Result<u64> {
    let mut populated = 0;
    for (s, hold) in subjects.iter_mut().zip(holds) {
        let (pid, is_copy) = match (&s.copy, hold) {
            (Some(c), _) => (c.pid(), true),
            (None, Some(h)) => (h.via(), false),
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
        .zip(holds)
        .filter_map(|(s, hold)| {
            let pid = match (&s.copy, hold) {
                (Some(c), _) => c.pid(),
                (None, Some(h)) => h.via(),
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

fn origin(tid: i32) -> Result<Origin> {
    let uts = nix::sys::utsname::uname().context("uname")?;
    let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
    let clock = |id| -> Result<i128> {
        let t = nix::time::clock_gettime(id).context("clock_gettime")?;
        Ok(i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()))
    };
    let realtime = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let (ours, theirs) = (Offsets::of("self"), Offsets::of(&tid.to_string()));
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
        monotonic_ns: clock(nix::time::ClockId::CLOCK_MONOTONIC)? - ours.monotonic
            + theirs.monotonic,
        boottime_ns: clock(nix::time::ClockId::CLOCK_BOOTTIME)? - ours.boottime + theirs.boottime,
        time_offsets_ns: (theirs.monotonic, theirs.boottime),
        xfeatures: arch::xfeatures(),
    })
}
