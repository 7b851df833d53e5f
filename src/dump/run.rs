//! A dump from the beginning to the end.

use std::time::Instant;

use anyhow::Result;

use super::session::Session;
use super::{After, Options, Report, Sink};
use crate::image::store::ImageWriter;
use crate::progress;

/// Dumps a process, or a tree of them, into an image.
///
/// # Errors
/// Classified (see [`crate::error::Failure`]). The processes run on as before, and nothing is left under the
/// image's name.
pub fn run(opts: &Options) -> Result<Report> {
    let started = Instant::now();
    let writer = ImageWriter::create(&opts.image, opts.store.as_deref(), opts.compress)?;
    let session = Session::stop(opts)?;
    finish(
        session,
        writer,
        opts,
        started,
        &mut |_, _| Ok(()),
        &mut || {},
    )
}

/// From processes that stand to an image; `started` is when the whole began. `looked` is called while they still
/// stand, when everything but their memory has been read; `complete` when the image is, and they have not been ended yet.
///
/// # Errors
/// As for [`run`].
pub fn finish(
    mut session: Session,
    writer: ImageWriter,
    opts: &Options,
    started: Instant,
    looked: &mut dyn FnMut(&mut Session, &dyn Sink) -> Result<()>,
    complete: &mut dyn FnMut(),
) -> Result<Report> {
    let bar = progress::bar(opts.progress, 0);
    session.look(&writer)?;
    looked(&mut session, &writer)?;
    if session.has_copies() {
        session.release()?;
    }
    session.memory(&writer, &bar)?;
    if opts.after == After::Run {
        session.release()?;
    }
    let manifest = session.manifest()?;
    let written = writer.finish(&manifest)?;
    // Only now the image is durable.
    complete();
    let mut report = session.end(opts.after)?;
    report.bytes_written = written.bytes_written;
    report.pages = written.pages;
    report.pages_zero = written.pages_zero;
    bar.finish_and_clear();
    report.total_us = started.elapsed().as_micros() as u64;
    Ok(report)
}
