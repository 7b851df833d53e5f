//! `mistctl restore`: from an image to running processes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use mistctl::error::Failure;
use mistctl::image::pvm::PvmTask;
use mistctl::image::store::Image;
use mistctl::restore::{Options, Outcome, Report};

use super::{foreground, out, stores};

/// Let a saved program go on
///
/// The program continues exactly where it was saved. mistctl stays with it like a shell would: passes on signals
/// and the terminal, and ends with its status (128 + N when signal N ended it). With --detach it leaves at once.
///
/// Standard streams that were a terminal, or a pipe to somebody who was not saved, become those mistctl has here;
/// with --detach, /dev/null. Files are opened again under their names. Programs and libraries that are missing
/// or different here are taken out of the image.
///
/// An image of a PVM task is restored into the virtual machine that runs here: the task has the tid it had, and its
/// partners go on talking to it. mistctl prints tid and host and leaves.
///
/// A restore works as a whole or not at all: until the program is let go, everything half-built dies with mistctl.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The image, or a store that `dump --keep` filled: its newest sound image
    image: PathBuf,

    /// Print the pid once the program runs, and leave
    #[arg(short, long)]
    detach: bool,

    /// Fail rather than let a process have another pid than it had
    ///
    /// Without this, where an id is taken, a single process gets another one, and several get a pid namespace of
    /// their own, in which their ids are free.
    #[arg(long)]
    same_pid: bool,

    /// Run at once, and fill memory behind the program's back
    ///
    /// It then runs within milliseconds whatever its size. A page it touches before it was filled is fetched first.
    #[arg(long)]
    lazy: bool,

    /// Of a PVM task: restore it on this host of the virtual machine
    ///
    /// Without it, on the host it was on, or here if that is not in the virtual machine. The image must be readable
    /// there under the same name.
    #[arg(long, value_name = "HOST")]
    host: Option<String>,

    /// Leave the program stopped (SIGSTOP); `kill -CONT PID` lets it go on
    #[arg(long)]
    stopped: bool,

    /// Print one JSON object when the program is let go: pid, resume_us, total_us, mode ...
    ///
    /// In the foreground the program's own output follows it.
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
EXAMPLES
    In the foreground, as if it had been started here:
        mistctl restore work.img

    In the background, from the newest image that cron made:
        pid=$(mistctl restore --detach /var/lib/mist/work)";

pub fn run(args: &Args, started: Instant) -> anyhow::Result<ExitCode> {
    if let Some((path, task)) = pvm_task(args)? {
        return restore_task(args, &path, &task);
    }
    if args.host.is_some() {
        return Err(Failure::Usage.because(format!(
            "{} is no image of a PVM task: --host makes no sense",
            args.image.display()
        )));
    }
    let terminal = foreground::Terminal::open().filter(|_| !args.detach);
    let mut outcome = newest_sound(args, started).inspect_err(|_| {
        if let Some(terminal) = &terminal {
            terminal.put_back();
        }
    })?;
    // The program runs: from here on signals are the program's, and no error of ours may hide its status.
    let child = outcome.child.filter(|_| !args.detach);
    let signals = child.map(|_| foreground::Signals::hold());
    let mut filling = outcome.filling.take();
    if let (None, Some(filling)) = (child, filling.take_if(|_| child.is_none())) {
        outcome.report.bytes_memory += filling.wait().map_err(own_failure)?;
        outcome.report.total_us = started.elapsed().as_micros() as u64;
    }
    let told = match args.json {
        true => out::object(&outcome.report),
        false => tell(&outcome.report, args),
    };
    let told = told.with_context(|| format!("the program runs, as process {}", outcome.report.pid));
    let (Some(pid), Some(signals)) = (child, signals) else {
        return told.map(|()| ExitCode::SUCCESS);
    };
    if let Err(e) = told {
        out::note(&format!("mistctl: {e:#}"));
    }
    let followed = signals.and_then(|s| s.follow(pid, terminal));
    if let Some(filling) = filling {
        filling.wait().map_err(own_failure)?;
    }
    match followed {
        Ok(status) => Ok(ExitCode::from(status)),
        Err(e) => {
            out::note(&format!(
                "mistctl: process {pid} runs, but its status is lost: {e}"
            ));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The newest sound image, if it is one of a PVM task.
fn pvm_task(args: &Args) -> anyhow::Result<Option<(PathBuf, PvmTask)>> {
    let mut wrong = None;
    for path in stores::candidates(&args.image)? {
        match Image::open(&path) {
            Ok(image) => {
                let path = path
                    .canonicalize()
                    .with_context(|| path.display().to_string())?;
                return Ok(image.manifest.pvm.clone().map(|task| (path, task)));
            }
            Err(e) => wrong = wrong.or(Some(e)),
        }
    }
    match wrong {
        Some(e) if args.host.is_some() => Err(e),
        // What is wrong with it is told by whoever restores it.
        _ => Ok(None),
    }
}

fn restore_task(args: &Args, path: &Path, task: &PvmTask) -> anyhow::Result<ExitCode> {
    if args.stopped || args.same_pid {
        return Err(Failure::Usage.because(format!(
            "{} is an image of a PVM task, whose process PVM starts: --stopped and --same-pid make no sense",
            path.display()
        )));
    }
    let done =
        mistctl::pvm::restore::run(path, task, args.host.as_deref(), args.lazy, &out::waits)?;
    let state = format!("{} is on {} as {}", done.virtual_tid, done.host, done.tid);
    let told = match args.json {
        true => out::object(&done),
        false => {
            for w in &done.warnings {
                out::note(&format!("mistctl: {}", out::shown(w)));
            }
            out::print(&state)
        }
    };
    told.context(state)?;
    Ok(ExitCode::SUCCESS)
}

/// Restores the image, or of a store the newest that is sound: that one is damaged may show only when its memory
/// is read, and then nothing of it is left and the one before is as good.
fn newest_sound(args: &Args, started: Instant) -> anyhow::Result<Outcome> {
    let mut images = stores::candidates(&args.image)?.into_iter().peekable();
    let mut first = None;
    while let Some(image) = images.next() {
        let options = Options {
            image,
            detach: args.detach,
            same_pid: args.same_pid,
            lazy: args.lazy,
            stopped: args.stopped,
            progress: !args.json && out::progress(),
            before_release: (!args.detach).then_some(foreground::hold_back),
        };
        match mistctl::restore::run(&options, started) {
            Ok(outcome) => return Ok(outcome),
            Err(e) if Failure::of(&e) == Failure::Damaged && images.peek().is_some() => {
                out::note(&format!("mistctl: {e:#}; trying the image before it"));
                first = first.or(Some(e));
            }
            Err(e) => return Err(own_failure(first.unwrap_or(e))),
        }
    }
    Err(first.unwrap_or_else(|| {
        Failure::Damaged.because(format!("{}: holds no image", args.image.display()))
    }))
}

/// A failure that has no code of its own is told apart from a restored program that ended with status 1.
fn own_failure(e: anyhow::Error) -> anyhow::Error {
    match Failure::of(&e) {
        Failure::Failed => Failure::Restore.with(e),
        _ => e,
    }
}

fn tell(report: &Report, args: &Args) -> anyhow::Result<()> {
    for w in &report.warnings {
        out::note(&format!("mistctl: {}", out::shown(w)));
    }
    match args.detach {
        true => out::print(&report.pid.to_string()),
        false => Ok(()),
    }
}
