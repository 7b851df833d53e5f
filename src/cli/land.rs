//! `mistctl land`: what pvmd starts where a PVM task comes to.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use mistctl::pvm::land::{self, Orders};

/// Become a PVM task that was saved or moves here: started by pvmd, not by people
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Restore this image, at once
    #[arg(long, required_unless_present = "agent", conflicts_with = "agent")]
    image: Option<PathBuf>,

    /// With --image: run at once, fill memory behind
    #[arg(long)]
    lazy: bool,

    /// Socket of the agent that gives the order
    #[arg(long, requires = "id")]
    agent: Option<PathBuf>,

    /// Which move this is
    #[arg(long = "move")]
    id: Option<String>,
}

pub fn run(args: &Args, started: Instant) -> anyhow::Result<ExitCode> {
    let orders = match (&args.image, &args.agent, &args.id) {
        (Some(path), _, _) => Orders::Image {
            path: path.clone(),
            lazy: args.lazy,
        },
        (None, Some(socket), Some(id)) => Orders::Agent {
            socket: socket.clone(),
            id: id.clone(),
        },
        _ => anyhow::bail!("neither an image nor an agent is named"),
    };
    let outcome = land::run(&orders, started)?;
    if let Some(filling) = outcome.filling {
        filling.wait()?;
    }
    Ok(ExitCode::SUCCESS)
}
