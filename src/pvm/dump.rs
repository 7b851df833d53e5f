//! `mistctl dump` of a PVM task: the dump of a process, at a quiet point, with what PVM knows of it.

use std::time::Instant;

use anyhow::Result;

use crate::dump::{self, Options, Report, Session};
use crate::image::ImageWriter;
use crate::pvm::capture::Task;
use crate::pvm::quiet;

/// Dumps a process, whatever it is: a PVM task as such, any other as [`dump::run`] does.
///
/// # Errors
/// Classified; the process runs on as before, and nothing is left under the image's name.
pub fn run(opts: &Options) -> Result<Report> {
    match Task::find(opts.pid)? {
        Some(task) => run_task(&task, opts),
        None => dump::run(opts),
    }
}

fn run_task(task: &Task, opts: &Options) -> Result<Report> {
    let started = Instant::now();
    let opts = Options {
        pvmd: Some(task.connection.ino),
        ..opts.clone()
    };
    // While the task runs: enrolling takes its time.
    let mut client = task.client()?;
    let writer = ImageWriter::create(&opts.image, opts.store.as_deref(), opts.compress)?;
    let session = Session::stop_with(&opts, &mut |_| quiet::stop(task, quiet::PATIENCE))?;
    let report = dump::finish(session, writer, &opts, started, &mut |session, sink| {
        let captured = task.capture(session, &mut client, sink)?;
        session.set_pvm(captured);
        Ok(())
    })?;
    client.exit()?;
    Ok(report)
}
