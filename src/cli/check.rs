//! `mistctl check`: what this host allows.

use std::fmt::Write;
use std::process::ExitCode;

use mistctl::error::Failure;
use mistctl::kernel::probe::{self, Host, State};

use super::out;

/// Tell what this kernel, these privileges and this CPU allow
///
/// Feature by feature, each tried, not looked up: whether it is there, and what its lack costs. For an ordinary
/// user it prints the setcap line that is missing. Ends with code 0 if processes can be dumped and restored here.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let host = probe::host();
    if args.json {
        out::object(&host)?;
    } else {
        out::print(&text(&host))?;
    }
    Ok(if host.works {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(Failure::Failed.code())
    })
}

fn text(host: &Host) -> String {
    let mut t = format!("Linux {}, {}\n", host.kernel, host.machine);
    let width = host
        .features
        .iter()
        .map(|f| f.name.len())
        .max()
        .unwrap_or(0);
    let mut group = "";
    for f in &host.features {
        if f.group != group {
            group = f.group;
            let _ = writeln!(t, "\n{group}");
        }
        let state = match f.state {
            State::Yes => "yes",
            State::Limited => "part",
            State::No => "no",
        };
        let _ = writeln!(t, "  {:width$}  {state:4}  {}", f.name, f.found);
        if !f.cost.is_empty() {
            let _ = writeln!(t, "  {:width$}        -> {}", "", f.cost);
        }
    }
    let trimmed: Vec<&str> = t.lines().map(str::trim_end).collect();
    let mut t = trimmed.join("\n");
    t.push_str("\n\n");
    t.push_str(if host.works {
        "Processes can be dumped and restored here."
    } else {
        "Processes cannot be dumped and restored here: see what says \"nothing can be\" above."
    });
    if let Some(line) = &host.setcap {
        let _ = write!(
            t,
            "\nCapabilities are missing. To serve your own processes in full:\n    {line}"
        );
    }
    t
}
