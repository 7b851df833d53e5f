//! `mistctl mover`: what an agent starts to move one task.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::Context;
use mistctl::pvm::mover;

/// Move the task that the agent at the other end of standard input names: started by agents, not by people
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    let line = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input")?;
    mover::run(UnixStream::from(line))?;
    Ok(ExitCode::SUCCESS)
}
