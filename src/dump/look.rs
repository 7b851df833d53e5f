//! What is looked at, and asked for, while the processes stand.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::{Arc, Once};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::files::{FileDumper, Order};
use super::hold::HeldProcess;
use super::landlock::Landlock;
use super::queries::{self, Queries};
use super::tables::Tables;
use super::{After, Options, Report, Sink, aio, late, maps, memory, process, threads};
use crate::error::Failure;
use crate::image::memory::Backing;
use crate::image::process::{Process, State};
use crate::image::threads::Thread;
use crate::image::{Description, Origin, Socket, SpaceId};
use crate::kernel::arch::{self, PAGE, TASK_SIZE};
use crate::kernel::batch::{self, Batch, Cloned, Snapshot, Twin};
use crate::kernel::guardian::Guardian;
use crate::kernel::kmem::landlock::Rules;
use crate::kernel::kmem::threads::Threads;
use crate::kernel::proc_file;
use crate::kernel::time_ns::Offsets;
use crate::kernel::{code, numa, pidfd, vdso};
use crate::net::{self, SocketDumper};

/// One process of the dump: what the image says of it, and what we hold of it.
pub struct Subject {
    pub process: Process,
    queries: Queries,
    pub copy: Option<Snapshot>,
    /// Shares its memory.
    pub heir: Option<Snapshot>,
    /// Where the mappings begin that were copied from the process itself, as the copy has them not, or not for sure.
    pub copied: HashSet<u64>,
    /// Its mappings have their flags.
    pub has_flags: bool,
    /// Address and content of its vDSO, which are to go to the image when it runs.
    pub vdso: Option<(u64, Vec<u8>)>,
    /// A thread that seems to have restricted itself.
    restricted: Option<i32>,
}

impl Subject {
    /// Whether it has answered that it has children.
    pub fn has_children(&self) -> bool {
        self.queries.has_children
    }

    /// Whose /proc shows its memory: its copy's, else its own; None for a zombie.
    pub fn shown_by(&self, held: Option<&HeldProcess>) -> Option<i32> {
        let copy = self.copy.as_ref().map(Snapshot::pid);
        copy.or_else(|| held.map(HeldProcess::via))
    }
}

/// What we hold of each process, in the order of the subjects; None for a zombie.
pub type Holds = Vec<Option<HeldProcess>>;

/// What [`look`] found besides the processes.
pub struct Looked {
    pub descriptions: Vec<Description>,
    pub sockets: Vec<Socket>,
    /// Of a dump that kills: holds TCP connections until then.
    pub connections: Option<SocketDumper>,
}

/// Everything that can be seen from outside while the processes stand. `inside`: they have a pid namespace of
/// their own.
pub fn look(
    opts: &Options,
    pids: &[i32],
    holds: &mut Holds,
    tables: &mut Tables,
    guardian: &Arc<Guardian>,
    order: Order,
    inside: bool,
) -> Result<(Vec<Subject>, Looked)> {
    let first = holds.iter().flatten().next().map(HeldProcess::via);
    let mut files = FileDumper::new(pids, order);
    let net = net::Options {
        tcp_established: opts.tcp_established,
        kill: opts.after == After::Kill,
        pvmd: opts.pvmd,
        ..net::Options::default()
    };
    let mut sockets = SocketDumper::new(net, guardian);
    if inside && let Some(tid) = first {
        sockets.ask_inside(tid)?;
    }
    let mut subjects = Vec::new();
    for (pid, hold) in pids.iter().zip(holds) {
        let (mut p, queries, status) =
            process::read(*pid, hold.as_ref().map(HeldProcess::via), tables)?;
        p.space = subjects.len() as SpaceId;
        if let Some(held) = hold {
            let mut status = status;
            for i in 0..held.threads.len() {
                threads::abort_rseq(&mut held.threads[i], &held.mem)?;
                // The first is the one by which it was read.
                let status = status.take().filter(|_| i == 0);
                p.threads
                    .push(threads::read(*pid, &held.threads[i], status)?);
            }
            let leader = held.leader();
            p.pending = threads::pending(leader, true)?;
            if let Some(signal) = leader.stopped_by {
                p.state = State::Stopped { signal };
            }
            p.vmas = maps::read(held.via(), tables)?;
            aio::read(held, &mut p.vmas)?;
            let tid = held.via();
            let fd = pidfd::open_thread(tid)?;
            files.process(*pid, tid, fd.as_fd(), tables, &mut sockets)?;
        }
        subjects.push(Subject {
            process: p,
            queries,
            copy: None,
            heir: None,
            copied: HashSet::new(),
            has_flags: false,
            vdso: None,
            restricted: None,
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
        descriptions: dumped.descriptions,
        sockets: socket_list,
        connections: (opts.after == After::Kill).then_some(sockets),
    };
    Ok((subjects, looked))
}

/// What the processes themselves have to be asked, and their twins. What a copy-on-write clone lacks is copied here,
/// while they stand.
///
/// A clone's parent becomes the nearest subreaper above it. All batches are under way before the first
/// ends, so none of the processes is a subreaper meanwhile.
pub fn ask(
    subjects: &mut [Subject],
    holds: &Holds,
    landlock: &Landlock,
    wanted: Twin,
    sink: &dyn Sink,
    report: &mut Report,
) -> Result<()> {
    let mut batches = Vec::new();
    for (s, hold) in subjects.iter_mut().zip(holds) {
        let Some(held) = hold else { continue };
        let (batch, cloned) = ask_one(s, held, landlock, wanted, sink)?;
        let (copy, heir) = match cloned {
            Cloned::Copy(twin) if wanted == Twin::Heir => (None, Some(twin)),
            Cloned::Copy(copy) => (Some(copy), None),
            Cloned::NotAsked | Cloned::Failed => (None, None),
        };
        s.heir = heir;
        if let Some(copy) = &copy {
            let via = held.via();
            let p = &mut s.process;
            let missing = memory::not_copied(via, copy.pid(), &p.vmas)?;
            report.bytes_memory += memory::copy_stopped(via, p.space, &missing, sink)?;
            s.copied = missing.iter().map(|v| v.start).collect();
            if s.queries.locked {
                maps::add_flags(&mut p.vmas, via, false)?;
                s.has_flags = true;
            }
        } else if wanted == Twin::Copy {
            report.warnings.push(format!(
                "process {} could not be cloned (it is an init, is scheduled by deadlines, or a limit on processes or memory); \
                 its memory was copied while it stood still",
                held.pid
            ));
        }
        s.copy = copy;
        batches.push(batch);
    }
    batches.into_iter().try_for_each(Batch::finish)?;
    for s in subjects {
        let refuse = |what: &str| {
            let (pid, comm) = (s.process.pid, &s.process.comm);
            Err(Failure::Refused.because(format!(
                "process {pid} ({comm}) has {what}, which cannot be carried"
            )))
        };
        if s.queries.has_ldt {
            return refuse(
                "a local descriptor table (modify_ldt(2), as programs for Windows and for 16 bits have)",
            );
        }
        if s.queries.has_keys {
            return refuse("a keyring of its own (keyctl(2), @p or @t)");
        }
        if let Some(tid) = s.restricted {
            landlock.refuse(&s.process, tid)?;
        }
    }
    Ok(())
}

fn ask_one<'a>(
    s: &mut Subject,
    held: &'a HeldProcess,
    landlock: &Landlock,
    wanted: Twin,
    sink: &dyn Sink,
) -> Result<(Batch<'a>, Cloned)> {
    let pid = held.pid;
    let p = &mut s.process;
    let vdso = p
        .vmas
        .iter()
        .find(|v| matches!(&v.backing, Backing::Kernel { which } if which == "vdso"))
        .with_context(|| format!("process {pid} has no vDSO"))?;
    let mut bytes = held.mem.read_vec(vdso.start, vdso.len() as usize)?;
    let elf = match held.vdso_ends() {
        Some(end) if vdso.start < end && end <= vdso.end => end - vdso.start,
        _ => vdso::elf_len(&bytes)?,
    };
    // What stands behind the ELF image may be the code of an earlier batch. What signal handlers return to is carried.
    let mut dead = elf;
    for r in held.returned_to() {
        let offset = |at: u64| at.saturating_sub(vdso.start).clamp(dead, vdso.len());
        let (from, to) = (offset(r.start), offset(r.end));
        bytes[dead as usize..from as usize].fill(0);
        dead = to;
    }
    bytes[dead as usize..].fill(0);
    let vdso = (vdso.start, bytes);
    let tail = held.tail();
    let mappings = p.vmas.iter().filter(|v| !v.is_kernel());
    s.queries.mappings = mappings.map(|v| v.start).collect();
    s.queries.probe = landlock.probe();
    let area = s.queries.area();
    let at = hole(&p.vmas, area.len)
        .with_context(|| format!("process {pid} has no room for {} bytes", area.len))?;
    let ours = held.ours();
    p.vmas
        .retain(|v| !ours.iter().any(|r| r.contains(&v.start)));
    // Who is scheduled by deadlines has no children (sched(7)).
    let by_deadline =
        |t: &Thread| t.tid == held.via() && t.sched.policy == libc::SCHED_DEADLINE as u32;
    let twin = match wanted {
        Twin::Copy if s.queries.is_init => Twin::None,
        _ if p.threads.iter().any(by_deadline) => Twin::None,
        wanted => wanted,
    };
    let begun = Instant::now();
    let (batch, cloned) =
        batch::start(held.leader(), &held.mem, tail, (at, area), twin, &|data| {
            s.queries.calls(data)
        })?;
    match cloned {
        Cloned::Copy(_) if wanted == Twin::Copy => s.vdso = Some(vdso),
        _ => sink.put(p.space, vdso.0, &vdso.1)?,
    }
    let mut leader = s.queries.answers(&batch, p)?;
    queries::restrictions(&mut leader, held.leader(), landlock);
    let mut answers = vec![leader];
    if p.lock_future != 0 {
        // How, our own new mapping tells.
        let via = held.via();
        let flags = maps::Flags::read(via)
            .with_context(|| format!("reading the flags of mappings of process {via}"))?;
        let ours = flags.at(at, at + area.len).unwrap_or_default();
        if ours.iter().any(|code| code == "lf") {
            p.lock_future |= libc::MCL_ONFAULT as u32;
        }
    }
    for t in held.threads.iter().skip(1) {
        let leader = answers.first().context("a batch gave no answer")?;
        answers.push(queries::of_thread(&batch, t, leader, landlock)?);
    }
    for (t, a) in p.threads.iter_mut().zip(&answers) {
        threads::complete(t, a);
        if a.restricted {
            s.restricted.get_or_insert(t.tid);
        }
    }
    late::signals(held, p, begun)?;
    Ok((batch, cloned))
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

/// Asks the machine what is asked once and takes milliseconds: whoever stops a process soon, and has time before, does it
/// then. A dump does, at the latest, right before anybody stands.
pub fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        Offsets::ours();
        numa::mask_words();
        code::load();
        let _ = (Threads::get(), Rules::get());
    });
}

/// Where the dump is made; [`date`] adds when.
pub fn origin() -> Result<Origin> {
    let uts = nix::sys::utsname::uname().context("uname")?;
    let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
    Ok(Origin {
        mistctl: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: text(uts.nodename()),
        kernel: text(uts.release()),
        machine: arch::MACHINE.to_owned(),
        boot_id: proc_file::text("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        realtime_ns: 0,
        monotonic_ns: 0,
        boottime_ns: 0,
        time_offsets_ns: (0, 0),
        xfeatures: arch::xfeatures(),
    })
}

/// `tid` is a thread of the processes, whose clocks may differ from ours.
pub fn date(origin: &mut Origin, tid: i32) -> Result<()> {
    let clock = |id| -> Result<i128> {
        let t = nix::time::clock_gettime(id).context("clock_gettime")?;
        Ok(i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()))
    };
    let realtime = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let (ours, theirs) = (Offsets::ours(), Offsets::of(&tid.to_string()));
    origin.realtime_ns = realtime.as_nanos() as i128;
    origin.monotonic_ns =
        clock(nix::time::ClockId::CLOCK_MONOTONIC)? - ours.monotonic + theirs.monotonic;
    origin.boottime_ns =
        clock(nix::time::ClockId::CLOCK_BOOTTIME)? - ours.boottime + theirs.boottime;
    origin.time_offsets_ns = (theirs.monotonic, theirs.boottime);
    Ok(())
}
