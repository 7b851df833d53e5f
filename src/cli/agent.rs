//! `mistctl agent`: the helper of a host.

use std::process::ExitCode;

use anyhow::Context;
use mistctl::error::Failure;
use mistctl::pvm::agent;
use mistctl::pvm::agent::control::Outcome;

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

    /// End a move that has lost its mover, and tell everybody what came of it
    #[arg(long, hide = true, conflicts_with = "everywhere")]
    settle: Option<String>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.everywhere {
        let (_, mut client) = ps::enrol()?;
        agent::ensure(&mut client, &|_| {})?;
        client.exit()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(json) = &args.settle {
        let outcome: Outcome = serde_json::from_str(json).context("what came of the move")?;
        let (_, mut client) = ps::enrol()?;
        agent::conclude(&mut client, &outcome)?;
        client.exit()?;
        return Ok(ExitCode::SUCCESS);
    }
    match agent::run() {
        // The other one serves.
        Err(e) if Failure::of(&e) == Failure::Busy => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS),
    }
}
