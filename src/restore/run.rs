//! The order of a restore. Everything half-built dies with us until the last line.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;

use super::bulk::Bulk;
use super::files::{self, Built, Surroundings};
use super::ids::Ids;
use super::lazy::Filler;
use super::open::Opened;
use super::shared::SharedObjects;
use super::tree::{Bodies, Root};
use super::understudy::Understudy;
use super::{
    Guest, Options, Outcome, Placed, Replaced, Report, creds, group_stop, layout, memory, park,
    process, resume, signals, threads,
};
use crate::image::memory::ChangedFlags;
use crate::image::process::{Creds, Process, State};
use crate::image::store::Image;
use crate::image::{DescriptionId, Manifest, Origin};
use crate::kernel::remote::{AREA, Remote};
use crate::kernel::time_ns::{self, Offsets};
use crate::kernel::undertaker::Undertaker;
use crate::kernel::{body, caps, fds};
use crate::net::Restorer;
use crate::net::makers::Makers;

/// What all processes of an image are rebuilt from.
struct Site<'a> {
    image: &'a Image,
    opened: &'a Opened,
    built: &'a Built,
    bulk: &'a Bulk,
    shared: &'a SharedObjects,
    ids: &'a Ids,
    /// Of all processes, as they see them, by the one in the image.
    pids: &'a BTreeMap<i32, i32>,
    filler: Option<&'a Filler>,
    ours: Creds,
    /// Whose parent is us, who leave.
    orphan: Option<i32>,
}

/// A process that stands before its next instruction, and its threads but the leader (which may have ended).
struct Ready<'a> {
    process: &'a Process,
    leader: Remote,
    others: Vec<Remote>,
    /// Of memory that it has got.
    bytes: u64,
    /// The vDSO that works here.
    vdso: (u64, u64),
}

impl Ready<'_> {
    /// In the order of the image.
    fn living(&self) -> Vec<&Remote> {
        let leader = self.process.leader().map(|_| &self.leader);
        leader.into_iter().chain(&self.others).collect()
    }
}

/// Restores an image. `started` is the start of mistctl.
///
/// # Errors
/// Classified (see [`crate::error`]); nothing half-restored is left.
pub fn run(opts: &Options, started: Instant) -> Result<Outcome> {
    let image = Arc::new(Image::open(&opts.image)?);
    restore(opts, image, None, Placed::default(), started)
}

/// Restores an image, opened from `opts.image`, into this very process, which keeps its pid, its parent, its session and
/// group, and the memory that is `placed`. What returns is its tracer, another process: it has to live on until memory is filled ([`Outcome::filling`]), and
/// then to end.
///
/// # Errors
/// As for [`run`]. Where it has stepped aside already, the process ends.
pub fn here(
    opts: &Options,
    image: Arc<Image>,
    placed: Placed,
    guest: &mut dyn Guest,
    started: Instant,
) -> Result<Outcome> {
    restore(opts, image, Some(guest), placed, started)
}

fn restore(
    opts: &Options,
    image: Arc<Image>,
    mut guest: Option<&mut dyn Guest>,
    placed: Placed,
    started: Instant,
) -> Result<Outcome> {
    let manifest = &image.manifest;
    let processes = &manifest.processes;
    let lazy = opts.lazy;
    let ours = creds::ours()?;
    let caller = caps::caller()?;
    caller.may_restore(manifest, image.owner()?)?;
    let mut report = Report {
        mode: if lazy { "lazy" } else { "eager" },
        processes: processes.len(),
        ..Report::default()
    };
    let mut ids = Ids::choose(processes, opts, guest.is_some(), &mut report)?;
    let same_clocks = set_clocks(&manifest.origin, guest.is_some(), &mut report)?;
    let mut replaced = match &mut guest {
        Some(guest) => guest.replaced()?,
        None => Replaced::default(),
    };
    // Of what is built here each body keeps what the image says.
    let floor = manifest.first_to_build(fds::allow_all());
    let mut shared = SharedObjects::new(&image, floor)?;
    let mut makers = match &guest {
        // What we make names us, who are the program.
        Some(_) => Makers::default(),
        None => {
            let only = caller.only(image.owner()?);
            Makers::new(manifest, ids.are_same(), ids.namespace(), only)
        }
    };
    let mut sockets = Restorer::build(&manifest.sockets, &mut makers)?;
    let surroundings = Surroundings {
        floor,
        detached: opts.detach,
        same_clocks,
        namespace: ids.namespace(),
    };
    let instead = std::mem::take(&mut replaced.descriptions);
    let mut built = descriptors(manifest, surroundings, instead, &shared, &sockets)?;
    let fd_of = |id| {
        let fd = built.fds.get(&id);
        let fd = fd.with_context(|| format!("description {id} is not there"))?;
        Ok(fd.as_fd())
    };
    sockets.fill(&fd_of, &mut makers)?;
    let chosen = processes.first().and_then(|p| makers.chosen(p.pid));
    report.warnings.append(&mut makers.warnings);
    // Their ids are wanted now.
    drop(makers);
    ids.choose_first(chosen);
    let opened = Opened::new(&image, std::mem::take(&mut replaced.files), floor)?;
    let area = layout::area(processes)?;
    let mut bulk = Bulk::new(Arc::clone(&image), !lazy, placed);
    let mut undertaker = None;
    let root = match guest {
        Some(_) => Root::Here,
        None => Root::Fork {
            detach: opts.detach,
        },
    };
    // From the first body on.
    let mut born = |pid| -> Result<()> {
        let known = match &mut undertaker {
            Some(u) => u,
            none => none.insert(Undertaker::start()?),
        };
        known.know(pid)
    };
    let mut bodies = Bodies::create(processes, area, &ids, root, &mut born, &mut bulk)?;
    let mut undertaker = undertaker.context("the image holds no process")?;
    let mut standing_by = None;
    if let Some(guest) = &mut guest {
        guest.stepped_aside()?;
        if lazy {
            match Understudy::start(&image, &undertaker) {
                Ok(it) => standing_by = Some(it),
                Err(e) => report.warnings.push(format!(
                    "until its memory is filled the task depends on this process alone: {e:#}"
                )),
            }
        }
    }
    let (understudy, journal) = standing_by.unzip();
    report.bytes_memory += bulk.bytes();
    bodies.bury(processes)?;
    // Threads only from here on: what is forked has one.
    let filler = lazy
        .then(|| Filler::start(Arc::clone(&image), journal))
        .transpose()?;
    report.bytes_memory += shared.bytes;
    let mut remotes = std::mem::take(&mut bodies.remotes);
    let site = Site {
        image: &image,
        opened: &opened,
        built: &built,
        bulk: &bulk,
        shared: &shared,
        ids: &ids,
        pids: &bodies.ids,
        filler: filler.as_ref(),
        ours,
        orphan: (processes.first().map(|p| p.pid)).filter(|_| opts.detach && guest.is_none()),
    };
    let mut ready = Vec::new();
    for p in processes {
        let Some(body) = remotes.remove(&p.pid) else {
            continue;
        };
        let mut r = match &mut guest {
            Some(guest) if ready.is_empty() => {
                site.rebuild(body, p, Some(&mut **guest), &mut undertaker)?
            }
            _ => site.rebuild(body, p, None, &mut undertaker)?,
        };
        report.bytes_memory += r.bytes;
        for r in std::iter::once(&mut r.leader).chain(&mut r.others) {
            report.warnings.append(&mut r.warnings);
        }
        ready.push(r);
    }
    shared.keep()?;
    built.release()?;
    report.warnings.extend(sockets.activate());
    for w in [
        &opened.warnings,
        &built.warnings,
        &bodies.warnings,
        &shared.warnings,
    ] {
        report.warnings.extend(w.iter().cloned());
    }
    drop(opened);
    undertaker.await_clean()?;
    // Last of all: sleeps that have begun go on from here.
    let mut after = resume::Afterwards::default();
    for r in &ready {
        let mem = r.leader.mem();
        resume::set(mem, &r.living(), r.process, r.vdso, &mut after)?;
    }
    let mut undertaker = Some(undertaker);
    let mut parked = false;
    if let Some(guest) = &mut guest {
        parked = (filler.is_none() || understudy.is_some())
            && park::possible(processes)
            && park(&ready, *guest)?;
        match &filler {
            Some(filler) if parked => filler.carry_on()?,
            // What is still to be filled dies with who fills it.
            Some(_) => {}
            None => {
                if let Some(undertaker) = undertaker.take_if(|_| parked) {
                    undertaker.dismiss();
                }
            }
        }
        if let Err(e) = guest.may_run(&report.warnings) {
            kill_parked(ready.iter().filter(|_| parked));
            return Err(e);
        }
    }
    if let Some(f) = opts.before_release {
        f();
    }
    for r in &ready {
        release(r, parked, opts)?;
    }
    if let Some(guest) = guest {
        guest.runs()?;
    }
    ids.released()?;
    let filling = match (filler, undertaker) {
        (Some(f), Some(undertaker)) => Some(f.released(undertaker, understudy)?),
        (_, Some(undertaker)) => {
            undertaker.dismiss();
            None
        }
        (_, None) => None,
    };
    after.finish()?;
    report.warnings.append(&mut after.warnings);
    report.resume_us = started.elapsed().as_micros() as u64;
    report.total_us = report.resume_us;
    report.pid = ready.first().map_or(0, |r| r.leader.pid());
    Ok(Outcome {
        child: Some(report.pid),
        filling,
        report,
    })
}

impl Site<'_> {
    /// One body becomes one process.
    fn rebuild<'p>(
        &self,
        mut body: Remote,
        p: &'p Process,
        mut guest: Option<&mut dyn Guest>,
        undertaker: &mut Undertaker,
    ) -> Result<Ready<'p>> {
        process::surroundings(&mut body, p, &self.image.manifest)?;
        let stripped = layout::strip(&mut body, p, self.image.pages(), self.bulk)?;
        layout::map(
            &mut body,
            p,
            self.opened,
            self.shared,
            self.bulk,
            stripped.redirected,
        )?;
        let bytes = self.fill(&mut body, p, undertaker)?;
        layout::poke(body.mem(), &stripped.bytes)?;
        let exe = self.opened.executable(p.exe);
        layout::set_mm(&mut body, p, exe, stripped.vdso.0)?;
        if let Some(guest) = &mut guest {
            guest.furnish(&mut body, p)?;
        }
        process::descriptors(&mut body, p, self.built)?;
        signals::actions(&mut body, p)?;
        let changed = guest.map_or_else(|| Ok(ChangedFlags::new()), Guest::changed_flags)?;
        let others = self.furnish(&mut body, p, &changed)?;
        let unmapped = body.by_step(stripped.vdso.0, libc::SYS_munmap, &[body.area(), AREA])?;
        body::check("unmapping the restorer", unmapped)?;
        if let Some(ended) = &p.ended_leader {
            // Here, before its children are told of what to die by: a parent's thread that ends sends it.
            threads::end(&body, ended, stripped.vdso.0)?;
        }
        Ok(Ready {
            process: p,
            leader: body,
            others,
            bytes,
            vdso: stripped.vdso,
        })
    }

    /// Memory, or the promise of it. Bytes that are there now.
    fn fill(&self, body: &mut Remote, p: &Process, undertaker: &mut Undertaker) -> Result<u64> {
        let pages = self.image.pages();
        let uffd = memory::attach(body, self.filler.is_some())?;
        let Some(filler) = self.filler else {
            let bar = ProgressBar::hidden();
            return memory::fill(&uffd, body.mem(), p, pages, self.bulk, &bar);
        };
        let bytes = memory::write_copies(body.mem(), p, pages, memory::lazily)?;
        undertaker.keep_open(&uffd.0)?;
        filler.serve(uffd, p, self.bulk, body.mem())?;
        Ok(bytes)
    }

    /// Threads but the leader, which are returned, and what threads and process have besides memory and
    /// descriptors.
    fn furnish(
        &self,
        body: &mut Remote,
        p: &Process,
        changed: &ChangedFlags,
    ) -> Result<Vec<Remote>> {
        let mut others = threads::make(body, p, self.ids)?;
        let mut ids = self.pids.clone();
        let tids = p.others().iter().zip(&others);
        ids.extend(tids.map(|(t, r)| (t.tid, r.inside)));
        let id_of = |old: i32| ids.get(&old).copied().unwrap_or(old);
        process::in_body(body, p, self.built, &id_of)?;
        signals::pending(body, &p.pending, None)?;
        process::semaphores(body, p)?;
        layout::advise(body, p, changed)?;
        process::limits(body, p)?;
        let orphaned = self.orphan == Some(p.pid);
        for (r, t) in others.iter_mut().zip(p.others()) {
            threads::furnish(r, t, &self.ours, orphaned)?;
        }
        match (&p.ended_leader, p.leader()) {
            (Some(ended), _) => threads::furnish_ended(body, p, ended, &self.ours)?,
            (None, Some(leader)) => threads::furnish(body, leader, &self.ours, orphaned)?,
            (None, None) => bail!("process {} has no threads", p.pid),
        }
        process::marks(body, p)?;
        layout::seal(body, p, changed)?;
        signals::timers(body, p, self.image.manifest.origin.realtime_ns, &id_of)?;
        Ok(others)
    }
}

/// Leaves all processes to whoever decides for us, should we die.
fn park(ready: &[Ready], guest: &mut dyn Guest) -> Result<bool> {
    let pids: Vec<i32> = ready.iter().map(|r| r.leader.pid()).collect();
    if !guest.entrust(&pids)? {
        return Ok(false);
    }
    for r in ready {
        for t in r.living() {
            park::park(r.leader.pid(), t.tracee)?;
        }
    }
    Ok(true)
}

/// Ends processes that would not end with us.
fn kill_parked<'a>(ready: impl Iterator<Item = &'a Ready<'a>>) {
    for r in ready {
        let pid = nix::unistd::Pid::from_raw(r.leader.pid());
        // It has ended already, or does now.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

/// Lets a process go.
fn release(r: &Ready, parked: bool, opts: &Options) -> Result<()> {
    if parked {
        for t in r.living() {
            if !park::unpark(r.leader.pid(), t.tracee)? {
                return Ok(());
            }
        }
    }
    let signal = match r.process.state {
        // A parked thread stands where it would take a signal.
        State::Stopped { signal } if !parked => Some(signal),
        State::Stopped { .. } => Some(libc::SIGSTOP),
        _ => opts.stopped.then_some(libc::SIGSTOP),
    };
    if let (Some(signal), Some(first)) = (signal, r.living().first()) {
        group_stop::stop(r.leader.pid(), first.tracee, r.process, signal)?;
    }
    // The leader last.
    for t in r.living().iter().rev() {
        t.tracee
            .detach(0)
            .with_context(|| format!("releasing thread {}", t.tracee.tid))?;
    }
    Ok(())
}

/// Lets the processes see their clocks go on from where they stood: deadlines in their memory count on it.
/// False if they do not. `here`: we are one of them.
fn set_clocks(origin: &Origin, here: bool, report: &mut Report) -> Result<bool> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let ours = Offsets::of("self");
    let wanted = if boot.trim() == origin.boot_id {
        let (monotonic, boottime) = origin.time_offsets_ns;
        Offsets {
            monotonic,
            boottime,
        }
    } else {
        let host = |id, offset| -> Result<i128> {
            let t = nix::time::clock_gettime(id).context("clock_gettime")?;
            Ok(i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec()) - offset)
        };
        let monotonic = host(nix::time::ClockId::CLOCK_MONOTONIC, ours.monotonic)?;
        let boottime = host(nix::time::ClockId::CLOCK_BOOTTIME, ours.boottime)?;
        Offsets {
            monotonic: origin.monotonic_ns - monotonic,
            boottime: origin.boottime_ns - boottime,
        }
    };
    if wanted == ours {
        return Ok(true);
    }
    let done = wanted
        .for_children()
        .and_then(|()| if here { time_ns::join() } else { Ok(()) });
    if let Err(e) = done {
        report.warnings.push(format!(
            "the program sees this host's clocks, not those it had (a deadline in its memory may be \
             far off): {e:#}"
        ));
        return Ok(false);
    }
    Ok(true)
}

fn descriptors(
    m: &Manifest,
    surroundings: Surroundings<'_>,
    instead: BTreeMap<DescriptionId, OwnedFd>,
    shared: &SharedObjects,
    sockets: &Restorer,
) -> Result<Built> {
    let mut socket = |i: u32| -> Result<OwnedFd> {
        let fd = sockets
            .fd(i)
            .with_context(|| format!("there is no socket {i}"))?;
        fd.try_clone_to_owned().context("dup")
    };
    let mut memory = |i: u32| -> Result<BorrowedFd<'_>> {
        shared
            .fds
            .get(&i)
            .map(OwnedFd::as_fd)
            .with_context(|| format!("there is no shared memory {i}"))
    };
    files::build(m, surroundings, instead, &mut socket, &mut memory)
}
