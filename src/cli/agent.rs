//! `mistctl agent`: the helper of a host.

use std::process::ExitCode;

use mistctl::error::Failure;
use mistctl::pvm::agent;

use super::ps;

/// Serve this host of the virtual machine: started by mistctl itself, through PVM, when it needs one
///
/// One runs on each host, as a PVM task that programs do not see. It knows which task is where, and starts what
/// moves tasks. It ends with the virtual machine; started beside another, it leaves again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only see to it that every host has one
    #[arg(long, hide = true)]
    everywhere: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.everywhere {
        let (_, mut client) = ps::enrol()?;
        agent::ensure(&mut client)?;
        client.exit()?;
        return Ok(ExitCode::SUCCESS);
    }
    match agent::run() {
        // The other one serves.
        Err(e) if Failure::of(&e) == Failure::Busy => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}
