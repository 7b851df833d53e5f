//! `mistctl agent`: the helper of a host.

use std::process::ExitCode;

use mistctl::error::Failure;
use mistctl::pvm::agent;

/// Serve this host of the virtual machine: started by mistctl itself, through PVM, when it needs one
///
/// One runs on each host, as a PVM task that programs do not see. It knows which task is where, and starts what
/// moves tasks. It ends with the virtual machine; started beside another, it leaves again.
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    match agent::run() {
        // The other one serves.
        Err(e) if Failure::of(&e) == Failure::Busy => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}
