//! `mistctl verify`: is an image whole?

use std::path::PathBuf;
use std::process::ExitCode;

use mistctl::error::{Classify, Failure};

use super::{out, stores};

/// Check every checksum and every reference of an image
///
/// Ends with code 0 only if the image is whole: it would restore, as far as an image can tell. Anything else is
/// code 6, and a message that names the file and the place. Of a store, the newest sound image is looked at.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image
    image: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let image = stores::open(&args.image)?;
    let bar = out::Bar::new("verifying", out::progress());
    image
        .verify(&mut |done, total| bar.at(done, total))
        .or_failure(Failure::Damaged)?;
    drop(bar);
    out::print(&format!("{}: sound", image.path().display()))?;
    Ok(ExitCode::SUCCESS)
}
