//! `mistctl show`: what an image holds.

mod describe;
mod here;
mod summary;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;

use super::{out, stores};

/// Show what an image holds
///
/// Processes and threads, memory by kind, descriptors, sockets, the files that are carried, and what is different
/// on this host: programs and libraries that changed, files that are gone, ids that are taken.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image, or a store: its newest sound image
    image: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let image = stores::open(&args.image)?;
    let summary = summary::Summary::of(&image)?;
    if args.json {
        out::object(&summary)?;
    } else {
        out::print(&text::text(&summary))?;
    }
    Ok(ExitCode::SUCCESS)
}
