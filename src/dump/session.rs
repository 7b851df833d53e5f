//! A dump in steps, for whoever has something to do in between.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::files::Order;
use super::hold::HeldProcess;
use super::landlock::Landlock;
use super::look::{self, Holds, Looked, Subject};
use super::maps::Flags;
use super::semaphores::Semaphores;
use super::tables::Tables;
use super::{
    After, Carried, Options, Report, Round, Run, Sink, Tracker, appointments, carry, maps, memory,
    namespace, process, sharing, survey,
};
use crate::error::Failure;
use crate::image::memory::Backing;
use crate::image::pvm::PvmTask;
use crate::image::{ChangedFlags, FORMAT_NAME, FORMAT_VERSION, Fd, Manifest, Origin, SpaceId, Vma};
use crate::kernel::batch::{Snapshot, Twin};
use crate::kernel::guardian::Guardian;
use crate::kernel::proc_file;
use crate::kernel::sched::Urgent;
use crate::kernel::{caps, fds, pidfd, socket};

/// Processes that stand still, and what is known of them. Dropped, it lets them go on as if nothing had happened.
///
/// Order: [`Session::stop`], [`Session::look`], [`Session::memory`], [`Session::manifest`]; the processes may be
/// let go ([`Session::release`]) behind `look` where [`Session::has_copies`], else behind `memory`. At the end
/// [`Session::end`].
pub struct Session {
    // Dropped in this order: connections speak again, copies and heirs die, processes go on.
    looked: Option<Looked>,
    subjects: Vec<Subject>,
    heirs: Vec<Snapshot>,
    holds: Holds,
    pids: Vec<i32>,
    tables: Tables,
    opts: Options,
    /// Of their descriptors, before they stood.
    order: Order,
    /// How many we, and so a restore here, may have.
    descriptors_allowed: u64,
    /// But for the time.
    origin: Origin,
    /// The processes have a pid namespace of their own.
    inside: bool,
    guardian: Arc<Guardian>,
    landlock: Landlock,
    stopped: Instant,
    /// As long as the processes stand, and are not written meanwhile.
    urgent: Option<Urgent>,
    pvm: Option<PvmTask>,
    hang_up: Option<OwnedFd>,
    wants_heirs: bool,
    /// Of the first process's mappings, read while it still ran.
    flags: Flags,
    late_flags: Option<LateFlags>,
    report: Report,
}

impl Session {
    /// Refuses what cannot be carried, and stops every process.
    ///
    /// # Errors
    /// Classified (see [`Failure`]); all processes run on.
    pub fn stop(opts: &Options) -> Result<Self> {
        let mut urgent = None;
        let mut session = Self::stop_with(opts, &mut |pid| {
            // As long as it stands, without a gap in which others could come first.
            urgent = Some(Urgent::new());
            HeldProcess::stop(pid)
        })?;
        session.urgent = urgent;
        Ok(session)
    }

    /// The same, where `stop_first` stops the process that was asked for: at a moment of its own choice.
    ///
    /// # Errors
    /// As for [`Session::stop`], and those of `stop_first`.
    pub fn stop_with(
        opts: &Options,
        stop_first: &mut dyn FnMut(i32) -> Result<HeldProcess>,
    ) -> Result<Self> {
        let pids = process::tree(opts.pid, opts.tree);
        let mut flags = Flags::default();
        if opts.moves()
            && let child @ Some(_) = survey::child(opts.pid)
        {
            return Err(stays_behind(opts.pid, child));
        }
        for pid in &pids {
            let found = process::check(*pid, &pids, opts.tree || opts.moves())?;
            if *pid == opts.pid {
                flags = found;
            }
        }
        sharing::check(&pids)?;
        // Nobody changes his own.
        let inside = namespace::is_inside(process::living_thread(opts.pid));
        let order = Order::look(&pids);
        let origin = look::origin()?;
        look::prepare();
        Semaphores::prepare();
        let descriptors_allowed = fds::allow_all();
        appointments::prepare(&pids);
        let guardian = Guardian::start().context("starting the guardian process")?;
        let landlock = Landlock::prepare();
        let (pids, holds, stopped) = stop_all(opts, stop_first)?;
        Ok(Self {
            looked: None,
            subjects: Vec::new(),
            heirs: Vec::new(),
            wants_heirs: false,
            flags,
            late_flags: None,
            tables: Tables::new(pids.len() as SpaceId),
            holds,
            pids,
            opts: opts.clone(),
            order,
            descriptors_allowed,
            origin,
            inside,
            guardian: Arc::new(guardian),
            landlock,
            stopped,
            urgent: Some(Urgent::new()),
            pvm: None,
            hang_up: None,
            report: Report {
                pid: opts.pid,
                image: opts.image.clone(),
                ..Report::default()
            },
        })
    }

    /// The process that was asked for.
    ///
    /// # Errors
    /// When it was let go.
    pub fn first(&self) -> Result<&HeldProcess> {
        let first = self.holds.first().and_then(Option::as_ref);
        first.with_context(|| format!("process {} does not stand still", self.opts.pid))
    }

    /// Undoes what is done to the processes' sockets, should we die.
    pub fn guardian(&self) -> &Arc<Guardian> {
        &self.guardian
    }

    /// Since when the processes stand.
    pub fn stopped(&self) -> Instant {
        self.stopped
    }

    /// Reads everything but private memory: from outside, and by asking each process. With
    /// [`After::Run`] each is cloned copy-on-write. Shared memory, and what a clone lacks, goes to `sink`.
    ///
    /// # Errors
    /// Classified; what cannot be carried is named.
    pub fn look(&mut self, sink: &dyn Sink) -> Result<()> {
        let first = self.holds.iter().flatten().next();
        look::date(&mut self.origin, first.map_or(0, HeldProcess::via))?;
        let (mut subjects, mut looked) = look::look(
            &self.opts,
            &self.pids,
            &mut self.holds,
            &mut self.tables,
            &self.guardian,
            std::mem::take(&mut self.order),
            self.inside,
        )?;
        let semaphores = Semaphores::look();
        for (s, hold) in subjects.iter_mut().zip(&self.holds) {
            if let Some(held) = hold {
                s.process.semaphores = semaphores.read(held.via());
                appointments::mark(held.via(), &mut s.process.posix_timers);
            }
        }
        let twin = match self.opts.after {
            After::Run => Twin::Copy,
            After::Kill if self.wants_heirs => Twin::Heir,
            After::Kill | After::Stop => Twin::None,
        };
        look::ask(
            &mut subjects,
            &self.holds,
            &self.landlock,
            twin,
            sink,
            &mut self.report,
        )?;
        let heirs = subjects.iter_mut().filter_map(|s| s.heir.take());
        self.heirs = heirs.collect();
        let is_missing = |s: &&Subject| {
            let is_child = |other: &Subject| other.process.ppid == s.process.pid;
            s.has_children() && !subjects.iter().any(is_child)
        };
        if let Some(s) = subjects.iter().find(is_missing) {
            // Born after it was looked at first, or no child but traced.
            let (pid, comm) = (s.process.pid, &s.process.comm);
            return Err(match survey::child(pid) {
                child if self.opts.moves() => stays_behind(pid, child),
                None => process::traces(pid, comm, survey::tracee(pid)),
                child => process::has_children(pid, comm, child),
            });
        }
        self.report.bytes_memory +=
            memory::copy_contents(&self.tables.contents, &self.tables.shared_memory, sink)?;
        if self.inside {
            namespace::translate(&mut subjects, &mut looked);
        }
        self.subjects = subjects;
        self.looked = Some(looked);
        if !self.has_copies() {
            self.urgent = None;
        }
        Ok(())
    }

    /// Whether memory can be read behind the processes' backs.
    pub fn has_copies(&self) -> bool {
        let mut alive = (self.subjects.iter().zip(&self.holds)).filter(|(_, h)| h.is_some());
        self.opts.after == After::Run && alive.all(|(s, _)| s.copy.is_some())
    }

    /// Lets the processes go on.
    ///
    /// # Errors
    /// When one could not be put back as it was; the others are.
    pub fn release(&mut self) -> Result<()> {
        let mut first = Ok(());
        self.heirs.clear();
        for held in self.holds.iter_mut().filter_map(Option::take) {
            first = first.and(held.release());
        }
        self.note_blackout();
        self.urgent = None;
        first
    }

    /// Gives all private memory to `sink`, from the copies where there are some, and the files that the image
    /// carries.
    ///
    /// # Errors
    /// When memory cannot be read, or `sink` takes none.
    pub fn memory(&mut self, sink: &dyn Sink, bar: &ProgressBar) -> Result<()> {
        for s in &mut self.subjects {
            if let Some(c) = &s.copy {
                c.seclude()?;
            }
            if let Some((at, bytes)) = s.vdso.take() {
                sink.put(s.process.space, at, &bytes)?;
            }
        }
        let how = if self.has_copies() {
            "snapshot"
        } else {
            "stopped"
        };
        self.report.memory = how.to_owned();
        let copied = copy_memory(
            &mut self.subjects,
            &self.holds,
            &mut self.tables,
            self.opts.carried,
            sink,
            bar,
        )?;
        self.report.bytes_memory += copied;
        // Nobody has to wait until they have given their memory back.
        let copies = self.subjects.iter_mut().filter_map(|s| s.copy.take());
        copies.for_each(Snapshot::abandon);
        Ok(())
    }

    /// Instead of [`Session::memory`], for one process whose memory `tracker` has followed: gives `sink` what has
    /// changed since the last round, and the files that the image carries. Returns all runs of pages of its space
    /// that hold something.
    ///
    /// # Errors
    /// As for [`Session::memory`]; when the process was let go.
    pub fn changes(&mut self, tracker: &mut Tracker, sink: &dyn Sink) -> Result<(Vec<Run>, Round)> {
        let via = self.first()?.via();
        let Some(subject) = self.subjects.first_mut() else {
            bail!("process {} has not been looked at", self.opts.pid);
        };
        let process = &mut subject.process;
        let space = process.space;
        // Both walk over all page tables: at the same time.
        let late = LateFlags::read(via)?;
        let last = tracker.last(&mut process.vmas, &mut |at, data| sink.put(space, at, data));
        let known = |v: &Vma| self.flags.of(v).map(<[String]>::to_vec);
        let as_before: Option<Vec<_>> = process.vmas.iter().map(known).collect();
        match as_before {
            Some(flags) => {
                process
                    .vmas
                    .iter_mut()
                    .zip(flags)
                    .for_each(|(v, flags)| v.flags = flags);
                self.late_flags = Some(late);
            }
            // What is new since may have flags that it has to be mapped with.
            None => {
                let flags = late.wait()?;
                for v in &mut process.vmas {
                    v.flags = flags.of(v).unwrap_or_default().to_vec();
                }
            }
        }
        let (mut runs, round) = last?;
        carry::files(via, process, &mut self.tables, self.opts.carried, sink)?;
        // It came with `look`.
        let is_vdso = |v: &&Vma| matches!(&v.backing, Backing::Kernel { which } if which == "vdso");
        runs.extend(
            process
                .vmas
                .iter()
                .filter(is_vdso)
                .map(|v| (v.start, v.end)),
        );
        runs.sort_unstable();
        self.report.memory = "rounds".to_owned();
        self.report.bytes_memory += round.bytes;
        Ok((runs, round))
    }

    /// Flags of mappings of the first process, by where they begin, that are others than those in its manifest: advice
    /// and locks of the last moment before it stood still. To be asked for behind [`Session::manifest`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn changed_flags(&mut self, manifest: &Manifest) -> Result<ChangedFlags> {
        let Some(late) = self.late_flags.take() else {
            return Ok(ChangedFlags::new());
        };
        let flags = late.wait()?;
        let vmas = manifest.processes.first().map_or(&[][..], |p| &p.vmas);
        let changed = vmas.iter().filter_map(|v| {
            let now = flags.of(v).unwrap_or_default();
            (now != v.flags).then(|| (v.start, now.to_vec()))
        });
        Ok(changed.collect())
    }

    /// Which description each of the first process's descriptors has; nothing before [`Session::look`].
    pub fn descriptors(&self) -> &[Fd] {
        self.subjects.first().map_or(&[], |s| &s.process.fds)
    }

    /// Has the next [`Session::look`] of processes that are to be killed make an heir of each: it shares the memory, so
    /// that the end of a large process is a matter of no time.
    pub fn want_heirs(&mut self) {
        self.wants_heirs = true;
    }

    /// The heirs, to be kept until nobody waits for memory to be given back; then [`Snapshot::abandon`]. Before the
    /// processes go on they have to be dropped.
    pub fn heirs(&mut self) -> Vec<Snapshot> {
        std::mem::take(&mut self.heirs)
    }

    /// What the image says of the PVM task that the first process is.
    pub fn set_pvm(&mut self, task: PvmTask) {
        self.pvm = Some(task);
    }

    /// A socket of the first process whose other end is to see at once that the process has been killed, however long
    /// its end takes.
    pub fn hang_up(&mut self, socket: OwnedFd) {
        self.hang_up = Some(socket);
    }

    /// Everything but memory; what is not in it yet is taken from here.
    ///
    /// # Errors
    /// When [`Session::look`] has not been there.
    pub fn manifest(&mut self) -> Result<Manifest> {
        let subjects = std::mem::take(&mut self.subjects);
        self.report.processes = subjects.len();
        self.report.threads = subjects.iter().map(|s| s.process.threads.len()).sum();
        let looked = self
            .looked
            .as_mut()
            .context("the processes have not been looked at")?;
        let manifest = Manifest {
            format: FORMAT_NAME.to_owned(),
            version: FORMAT_VERSION,
            origin: self.origin.clone(),
            processes: subjects.into_iter().map(|s| s.process).collect(),
            descriptions: std::mem::take(&mut looked.descriptions),
            sockets: std::mem::take(&mut looked.sockets),
            files: std::mem::take(&mut self.tables.files),
            shared_memory: std::mem::take(&mut self.tables.shared_memory),
            pvm: self.pvm.take(),
        };
        let (needed, allowed) = (manifest.descriptors_to_restore(), self.descriptors_allowed);
        if needed > allowed {
            self.tables.warnings.push(format!(
                "a restore needs up to {needed} descriptors, and only {allowed} are allowed here: raise the limit before it (ulimit -Hn)"
            ));
        }
        Ok(manifest)
    }

    /// Ends it: `after` says what becomes of the processes that still stand. To be called when what was dumped is
    /// safe.
    ///
    /// # Errors
    /// When a process cannot be killed or let go; those not reached yet are let go.
    pub fn end(mut self, after: After) -> Result<Report> {
        if after == After::Kill
            && let Some(mut connections) = self.looked.take().and_then(|l| l.connections)
        {
            let pidfds = self.holds.iter().flatten().map(|h| pidfd::open(h.pid));
            let pidfds = pidfds.collect::<Result<Vec<_>>>()?;
            connections.finish_kill(&pidfds.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
            self.tables.warnings.append(&mut connections.warnings);
        }
        self.looked = None;
        if after == After::Kill
            && let Some(connection) = self.hang_up.take()
        {
            for held in self.holds.iter().flatten() {
                kill(Pid::from_raw(held.pid), Signal::SIGKILL)
                    .with_context(|| format!("killing process {}", held.pid))?;
            }
            // A process gives its memory back before it closes anything.
            let _ = socket::shutdown(&connection, 3);
        }
        if after != After::Kill {
            self.heirs.clear();
        }
        for held in self.holds.iter_mut().filter_map(Option::take) {
            match after {
                After::Kill => held.kill()?,
                After::Stop => held.release_stopped()?,
                After::Run => held.release()?,
            }
        }
        self.note_blackout();
        let mut report = std::mem::take(&mut self.report);
        report.warnings.append(&mut self.tables.warnings);
        Ok(report)
    }

    fn note_blackout(&mut self) {
        if self.report.blackout_us == 0 {
            self.report.blackout_us = self.stopped.elapsed().as_micros() as u64;
        }
    }
}

/// Flags of the mappings of a process that stands still, being read by another thread.
struct LateFlags(JoinHandle<std::io::Result<Flags>>);

impl LateFlags {
    fn read(pid: i32) -> Result<Self> {
        let thread = std::thread::Builder::new().name("mist-flags".to_owned());
        let thread = thread.spawn(move || Flags::read(pid));
        Ok(Self(thread.context("starting a thread")?))
    }

    fn wait(self) -> Result<Flags> {
        let read = self.0.join();
        read.unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
            .context("reading the flags of mappings")
    }
}

type Stopped = (Vec<i32>, Holds, Instant);

/// Stops every process, looking again for children that were born meanwhile. None in the place of a zombie. The
/// time is that of the first stop.
fn stop_all(
    opts: &Options,
    stop_first: &mut dyn FnMut(i32) -> Result<HeldProcess>,
) -> Result<Stopped> {
    let (mut pids, mut holds) = (Vec::new(), Holds::new());
    loop {
        let new: Vec<i32> = process::tree(opts.pid, opts.tree)
            .into_iter()
            .filter(|pid| !pids.contains(pid))
            .collect();
        if new.is_empty() {
            let begun = holds.iter().flatten().map(|h| h.since).min();
            return Ok((pids, holds, begun.unwrap_or_else(Instant::now)));
        }
        for pid in new {
            let stat = proc_file::stat(pid);
            let zombie = match stat {
                Ok(s) => s.state == 'Z' && s.num_threads <= 1,
                Err(procfs::ProcError::NotFound(_)) if pid != opts.pid => {
                    process::came_and_went(pid)?;
                    continue;
                }
                Err(procfs::ProcError::NotFound(_)) => {
                    return Err(
                        Failure::NoSuchProcess.because(format!("there is no process {pid}"))
                    );
                }
                Err(e) => {
                    return Err(e).with_context(|| format!("reading the state of process {pid}"));
                }
            };
            if zombie {
                pids.push(pid);
                holds.push(None);
                continue;
            }
            let held = match pid == opts.pid {
                true => stop_first(pid),
                false => HeldProcess::stop(pid),
            };
            let held = match held {
                Err(e) if pid != opts.pid && Failure::of(&e) == Failure::NoSuchProcess => continue,
                held => held?,
            };
            // Only now it cannot exec a set-user-ID program any more; nothing of it has been read yet.
            caps::caller()?.may_dump(pid)?;
            pids.push(pid);
            holds.push(Some(held));
        }
    }
}

/// Memory of all processes, from their copies where there are some; and what is known of mappings only
/// from a walk over the page tables.
fn copy_memory(
    subjects: &mut [Subject],
    holds: &Holds,
    tables: &mut Tables,
    carried: Carried,
    sink: &dyn Sink,
    bar: &ProgressBar,
) -> Result<u64> {
    let (mut populated, mut sources) = (0, Vec::new());
    for (s, hold) in subjects.iter().zip(holds) {
        let Some(pid) = s.shown_by(hold.as_ref()) else {
            continue;
        };
        let status = proc_file::status(pid);
        populated += status.map_or(0, |s| s.rssanon.unwrap_or(0) + s.vmswap.unwrap_or(0)) * 1024;
        let left = |v: &&Vma| !s.copied.contains(&v.start);
        let vmas = s.process.vmas.iter().filter(left);
        sources.push(memory::Source::new(pid, s.process.space, vmas));
    }
    bar.set_length(populated);
    // The rest, too, is worth a processor's time.
    memory::copy(sources, sink, bar, &mut || {
        let mut all = subjects.iter_mut().zip(holds);
        all.try_for_each(|(s, hold)| match s.shown_by(hold.as_ref()) {
            Some(pid) => details(s, pid, tables, carried, sink),
            None => Ok(()),
        })
    })
}

/// What is known of mappings only from a walk over the page tables of `pid`, which is the process or its copy; and
/// the files that the image carries.
fn details(
    s: &mut Subject,
    pid: i32,
    tables: &mut Tables,
    carried: Carried,
    sink: &dyn Sink,
) -> Result<()> {
    if !s.has_flags {
        maps::add_flags(&mut s.process.vmas, pid, s.copy.is_some())?;
    }
    memory::add_guards(pid, &mut s.process.vmas)?;
    carry::files(pid, &s.process, tables, carried, sink)
}

/// The error for a process that moves and was found to have a child when it had been looked at.
fn stays_behind(pid: i32, child: Option<i32>) -> anyhow::Error {
    let child = child.map(|c| format!(" (process {c})")).unwrap_or_default();
    Failure::Busy.because(format!(
        "process {pid} has got a child meanwhile{child}, which does not move with it; try again when that has ended"
    ))
}
