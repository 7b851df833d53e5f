//! `mistctl dump` of a PVM task: the dump of a process, at a quiet point, with what PVM knows of it.

use std::cell::RefCell;
use std::time::{Instant, SystemTime};

use anyhow::Result;

use crate::dump::{self, Options, Report, Session, Sink};
use crate::error::Failure;
use crate::image::ImageWriter;
use crate::pvm::away::{Away, Note};
use crate::pvm::capture::Task;
use crate::pvm::client::Client;
use crate::pvm::contexts;
use crate::pvm::mailbox::Entry;
use crate::pvm::quiet;

/// Dumps a process, whatever it is: a PVM task as such, any other as [`dump::run`] does. `away`: the task is killed
/// and comes back, and its partners are to wait for it.
///
/// # Errors
/// Classified; the process runs on as before, and nothing is left under the image's name.
pub fn run(opts: &Options, away: bool) -> Result<Report> {
    match Task::find(opts.pid)? {
        Some(task) => run_task(&task, opts, away),
        None if away => Err(Failure::Refused.because(format!(
            "process {} is no PVM task: it has no partners that could wait for it; leave --away out",
            opts.pid
        ))),
        None => dump::run(opts),
    }
}

fn run_task(task: &Task, opts: &Options, away: bool) -> Result<Report> {
    let started = Instant::now();
    let opts = Options {
        pvmd: Some(task.connection.ino),
        ..opts.clone()
    };
    // While the task runs: enrolling takes its time.
    let mut client = task.client()?;
    let writer = ImageWriter::create(&opts.image, opts.store.as_deref(), opts.compress)?;
    let away = match away {
        true => Some(Away::begin(task, &mut client)?),
        false => None,
    };
    let elsewhere = contexts::counted_elsewhere(&mut client);
    let known = elsewhere.as_deref().unwrap_or_default();
    let done = save(
        task,
        &opts,
        &mut client,
        away.as_ref(),
        known,
        writer,
        started,
    );
    let mut report = match (done, &away) {
        (Err(e), Some(away)) => return Err(away.call_off(&mut client, e)),
        (done, _) => done?,
    };
    if let Err(e) = &elsewhere {
        report.warnings.push(format!(
            "contexts that task {} has from tasks of other hosts may be given out again in a new virtual machine: {e:#}",
            task.v
        ));
    }
    if away.as_ref().is_some_and(Away::collects) {
        report.warnings.push(format!(
            "what others print, which task {} collects, is lost until it is restored",
            task.v
        ));
    }
    if let Some(away) = &away
        && let Err(e) = away.stays(&mut client)
    {
        report.warnings.push(format!(
            "partners wait for task {} for a limited time only: {e:#}",
            task.v
        ));
    }
    client.exit()?;
    Ok(report)
}

fn save(
    task: &Task,
    opts: &Options,
    client: &mut Client,
    away: Option<&Away>,
    elsewhere: &[u32],
    writer: ImageWriter,
    started: Instant,
) -> Result<Report> {
    let session = Session::stop_with(opts, &mut |_| quiet::stop(task, quiet::PATIENCE))?;
    // Its socket's buffers stay large until it has ended.
    let mut raised = None;
    let client = RefCell::new(client);
    let (program, host) = (RefCell::default(), RefCell::default());
    let mut look = |session: &mut Session, sink: &dyn Sink| {
        let client = &mut *client.borrow_mut();
        if let Some(away) = away {
            raised = Some(away.flush(task, session, client)?);
        }
        let mut captured = task
            .capture(session, client, sink, Entry::is_missed_later)?
            .task;
        captured.away = away.is_some();
        program.replace(captured.program.clone());
        host.replace(captured.host.clone());
        // What its own pvmd has given out by now, and nothing later, it may know.
        let own = client.use_up_context()?;
        let all = elsewhere.iter().chain([&own]).chain(&captured.contexts);
        captured.contexts = contexts::highest(all.copied());
        session.set_pvm(captured);
        session.hang_up(task.connection.task_end()?);
        Ok(())
    };
    // Who cannot be told now is told when it has ended.
    let mut complete = || {
        let Some(away) = away else { return };
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let note = Note {
            program: program.take(),
            host: host.take(),
            image: std::path::absolute(&opts.image).unwrap_or_else(|_| opts.image.clone()),
            since: since.unwrap_or_default().as_secs(),
        };
        drop(away.saved(&mut client.borrow_mut(), &note));
    };
    dump::finish(session, writer, opts, started, &mut look, &mut complete)
}
