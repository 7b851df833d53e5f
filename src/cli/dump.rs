//! `mistctl dump`: from running processes to an image.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::ValueEnum;
use mistctl::dump::{After, Carried, Options, Report};
use mistctl::error::Failure;
use mistctl::image::{Compress, dated, remove_partial};
use mistctl::kernel::apart::{self, Ended};
use mistctl::pvm::local;
use mistctl::pvm::tid::Tid;
use nix::sys::stat::{Mode, umask};

use super::{out, stores};

/// Save a running process as an image
///
/// The process is stopped for as long as it takes to read its state and to clone its memory copy-on-write, a few
/// milliseconds; then it runs on, and the image is written from the clone behind its back. It notices nothing.
///
/// The image appears under its name when it is complete and on disk, never before. It holds what the process
/// needs, programs and libraries included, and is readable by its owner only.
///
/// What cannot be carried (a device, an io_uring, a namespace of its own ...) is refused before anything is
/// changed; the message names the descriptor or mapping in the way, and the way out.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The process to save, or the PVM task by its tid, as in t40002 (`mistctl ps` lists them)
    ///
    /// t40002 and 0x40002 are tids. A bare number is the process that has this pid; 40002 is a tid only where no
    /// process 40002 exists.
    #[arg(value_name = "PID|TID")]
    process: Target,

    /// Directory to make for the image [default: NAME-PID-TIME in this directory]
    ///
    /// It must not exist. With --keep, it is the store that holds the images.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Save its children and their children too
    ///
    /// What they share (pipes, sockets, memory, file positions) is shared again after a restore. Without this a
    /// process that has children is saved alone, if nothing of it is shared with them.
    #[arg(long)]
    tree: bool,

    /// End the process once the image is complete
    #[arg(long, conflicts_with = "stop")]
    kill: bool,

    /// With --kill: the PVM task comes back, and its partners are to wait for it
    ///
    /// On all hosts messages to it wait until it is restored, and nobody is told of its end. Without this it ends for its
    /// partners as any task does: what they send before it is restored is lost.
    #[arg(long, requires = "kill")]
    away: bool,

    /// Leave the process stopped (SIGSTOP) once the image is complete
    ///
    /// `kill -CONT PID` lets it go on.
    #[arg(long)]
    stop: bool,

    /// How to store memory
    ///
    /// Compressed images are smaller, and slower to write and to restore; they cannot be filled lazily as fast.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = How::None)]
    compress: How,

    /// Carry TCP connections whose other end is not part of the dump
    ///
    /// The other end must still be there, and see no reset, when the image is restored: on the same address, with
    /// --kill here and a restore before the connection times out. Connections inside a --tree need no option.
    #[arg(long)]
    tcp_established: bool,

    /// Add an image to the store -o DIR, and keep the newest N sound ones
    ///
    /// For cron and timers: silent when all is well, makes DIR/TIME, never removes anything before the new image is
    /// complete, and ends with code 4 at once if another mistctl is at work on the store. `mistctl restore DIR`
    /// takes the newest sound image of a store.
    #[arg(long, value_name = "N", requires = "output", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,

    /// Print one JSON object: pid, image, bytes_memory, bytes_written, pages, pages_zero, blackout_us, total_us ...
    #[arg(long)]
    pub json: bool,
}

/// What the command line names a process by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Tid(Tid),
    /// A pid or, where there is no such process, the tid with these digits.
    Number(i32, Option<Tid>),
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Target> {
        let tid = text.parse::<Tid>().ok().filter(|tid| tid.is_task());
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            match text.parse() {
                Ok(pid) if pid > 0 => return Ok(Target::Number(pid, tid)),
                _ => {}
            }
        }
        tid.map(Target::Tid).ok_or_else(|| {
            Failure::Usage.because(format!(
                "'{text}' is neither a pid nor the tid of a task (t40002)"
            ))
        })
    }
}

/// Another mistctl is at work on the image, or on the process.
const BUSY: u8 = 4;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum How {
    /// As it is: fastest, and can be mapped
    None,
    /// Fast
    Lz4,
    /// Small
    Zstd,
}

const EXAMPLES: &str = "\
EXAMPLES
    Save a process that runs on, and see what came of it:
        mistctl dump 1234 -o work.img && mistctl show work.img

    Save a PVM task by its tid, at a moment at which no message is half sent or half received:
        mistctl dump t40002 -o task.img

    Save a shell with everything it started, then end it all:
        mistctl dump --tree --kill 1234 -o session.img

    Every ten minutes, from root's crontab, keeping the last six:
        */10 * * * * mistctl dump $(cat /run/work.pid) -o /var/lib/mist/work --keep 6";

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pid = find(args.process)?;
    let output = match &args.output {
        // "DIR/" is DIR.
        Some(dir) => dir.components().collect(),
        None => PathBuf::from(default_name(pid)),
    };
    // Modes of images are given where they are made, and nothing is to be taken from those.
    umask(Mode::from_bits_truncate(0o077));
    let before = output.exists();
    let ended = match apart::step_apart()? {
        None => return dump(args, pid, output),
        Some(ended) => ended,
    };
    if let Ended::Exited(code @ (0 | BUSY)) = ended {
        return Ok(ExitCode::from(code));
    }
    // What killed it kept it from cleaning up, or it had no descriptor left for that.
    let cleaned = clean_up(args, &output);
    if !matches!(ended, Ended::Exited(_)) {
        cleaned?;
    }
    match ended {
        Ended::CalledOff(signal) => apart::end_by(signal),
        // It has this name when it is complete.
        Ended::Killed(signal) if args.keep.is_none() && !before && output.exists() => {
            Err(Failure::Failed.because(format!(
                "the process that did the work was ended by {signal} when the image {} was complete: process {pid} runs \
                 on, or has ended already where it was to",
                output.display()
            )))
        }
        Ended::Killed(signal) => Err(Failure::Failed.because(format!(
            "the process that did the work was ended by {signal}; no image was made, and what was to be saved runs on"
        ))),
        Ended::Exited(code) => Ok(ExitCode::from(code)),
    }
}

/// Removes what is left of an image that was not finished.
fn clean_up(args: &Args, output: &Path) -> anyhow::Result<()> {
    if args.keep.is_some() {
        return dated::remove_leftovers(output);
    }
    // The guardian has what its tracer had open, and ends with it.
    for _ in 0..400 {
        if remove_partial(output)? {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn dump(args: &Args, pid: i32, output: PathBuf) -> anyhow::Result<ExitCode> {
    mistctl::kernel::caps::caller()?.may_dump(pid)?;
    match args.keep {
        Some(keep) => {
            let store = stores::Locked::open(&output)?;
            let image = store.next_path()?;
            let report =
                mistctl::pvm::dump::run(&options(args, pid, image, Some(output)), args.away)?;
            store.keep_newest(keep as usize)?;
            // Silent, with warnings too: what they say is the same every time, and `show` says it.
            if args.json {
                out::object(&report).with_context(|| done(args, &report))?;
            }
        }
        None => {
            if output.symlink_metadata().is_ok() {
                return Err(Failure::Failed.because(format!(
                    "{}: exists, and images are never overwritten: choose another name, or add to a store with --keep N",
                    output.display()
                )));
            }
            let report = mistctl::pvm::dump::run(&options(args, pid, output, None), args.away)?;
            let told = match args.json {
                true => out::object(&report),
                false => {
                    warn(&report);
                    out::note(&summary(&report));
                    out::print(&report.image.display().to_string())
                }
            };
            told.with_context(|| done(args, &report))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: &Args, pid: i32, image: PathBuf, store: Option<PathBuf>) -> Options {
    Options {
        pid,
        image,
        store,
        tree: args.tree,
        after: match (args.kill, args.stop) {
            (true, _) => After::Kill,
            (_, true) => After::Stop,
            _ => After::Run,
        },
        compress: match args.compress {
            How::None => Compress::None,
            How::Lz4 => Compress::Lz4,
            How::Zstd => Compress::Zstd,
        },
        tcp_established: args.tcp_established,
        progress: !args.json && args.keep.is_none() && out::progress(),
        carried: Carried::All,
        pvmd: None,
    }
}

/// The process that is meant; says early, and in so many words, if there is none.
fn find(target: Target) -> anyhow::Result<i32> {
    let (pid, tid) = match target {
        Target::Tid(tid) => return local::find(tid),
        Target::Number(pid, tid) => (pid, tid),
    };
    match Path::new(&format!("/proc/{pid}")).symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if let Some(Ok(pid)) = tid.map(local::find) {
                return Ok(pid);
            }
            Err(Failure::NoSuchProcess.because(format!("no process has pid {pid}")))
        }
        Err(e) => Err(e).with_context(|| format!("/proc/{pid}: cannot look at the process")),
        Ok(_) => Ok(pid),
    }
}

/// COMM-PID-TIME, with nothing in it that a shell or a file system could take offence at.
fn default_name(pid: i32) -> String {
    let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let comm: String = String::from_utf8_lossy(&comm)
        .trim_end()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._+".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect();
    let comm = comm.trim_matches(|c| c == '.' || c == '-');
    let comm = if comm.is_empty() { "process" } else { comm };
    format!("{comm}-{pid}-{}", dated::name(SystemTime::now()))
}

/// What has been done, for whoever could not be told otherwise.
fn done(args: &Args, report: &Report) -> String {
    let then = match (args.kill, args.stop) {
        (true, _) => "was killed",
        (_, true) => "is stopped",
        _ => "runs on",
    };
    format!(
        "the image {} is complete, and process {} {then}",
        report.image.display(),
        report.pid
    )
}

fn warn(report: &Report) {
    for w in &report.warnings {
        out::note(&format!("mistctl: {}", out::shown(w)));
    }
}

fn summary(r: &Report) -> String {
    format!(
        "{}, {}: {} of memory, {} written in {}, stopped for {}",
        out::count(r.processes, "process"),
        out::count(r.threads, "thread"),
        out::bytes(r.bytes_memory),
        out::bytes(r.bytes_written),
        out::micros(r.total_us),
        out::micros(r.blackout_us),
    )
}
