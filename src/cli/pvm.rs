//! `mistctl pvm`: virtual machines whose tasks all get the shim.

use std::path::PathBuf;
use std::process::ExitCode;

use mistctl::error::Failure;
use mistctl::pvm::daemon::{self, Start};

use super::{environment, exec, out, shim};

/// Start and stop PVM virtual machines whose tasks can be moved
///
/// `mistctl pvm start` is what starting pvmd or the pvm console is otherwise: it starts the master pvmd of this user
/// on this host. Every task that PVM starts in it, on this host and on those that are added later, runs under the
/// shim. The console (`pvm`), pvm_spawn and programs started by hand are used as ever.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Start(StartArgs),
    Stop(StopArgs),
}

/// Start a virtual machine whose tasks all get the shim
///
/// Returns when the master pvmd answers and the hosts of HOSTFILE are in it; a host that cannot be added is named, and
/// the code is 1, but the others run. mist has to be installed on every host, at the same path. Environment variables
/// that pvmd heeds (PVM_RSH, PVM_PATH, PVM_TMP, PVM_VMID, PVM_DPATH ...) are heeded. A host's own dx= in HOSTFILE needs
/// a Bourne shell as login shell there; so=pw and so=ms ask at a terminal, which this pvmd has not: such hosts are not
/// added.
///
/// Programs started by hand, outside PVM, get no shim from this: use `mistctl exec`.
#[derive(Debug, clap::Args)]
struct StartArgs {
    /// Hosts, in the format of pvmd's own hostfile
    hostfile: Option<PathBuf>,

    /// Name or address of this host for the others; needed where its hostname means 127.0.1.1
    #[arg(long, value_name = "HOST")]
    name: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// End the virtual machine: all its tasks, on all its hosts
///
/// Any virtual machine of this user, however it was started. What it leaves on this host is removed. Ends with code 3
/// if none is running.
#[derive(Debug, clap::Args)]
struct StopArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    pub fn json(&self) -> bool {
        match &self.verb {
            Verb::Start(a) => a.json,
            Verb::Stop(a) => a.json,
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Verb::Start(a) => start(a),
        Verb::Stop(a) => stop(a),
    }
}

fn start(args: &StartArgs) -> anyhow::Result<ExitCode> {
    let library = shim::find()?;
    let variables = environment::callers()?;
    let preload = exec::preloaded(&library, environment::value(&variables, "LD_PRELOAD"));
    let started = daemon::start(&Start {
        library: &library,
        preload: &preload,
        environment: &variables,
        hostfile: args.hostfile.as_deref(),
        name: args.name.as_deref(),
    })?;
    if args.json {
        let failed: Vec<_> = started
            .failed
            .iter()
            .map(|(host, why)| serde_json::json!({ "host": host, "error": why }))
            .collect();
        out::object(&serde_json::json!({
            "pid": started.pid,
            "hosts": started.hosts,
            "failed": failed,
            "table": started.table,
            "shim": library,
        }))?;
    } else {
        let names: Vec<&str> = started.hosts.iter().map(|h| h.name.as_str()).collect();
        out::print(&format!("pvmd {}: {}", started.pid, names.join(" ")))?;
        for (host, why) in &started.failed {
            out::note(&format!("mistctl: {host} was not added: {why}"));
        }
    }
    Ok(if started.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(Failure::Failed.code())
    })
}

fn stop(args: &StopArgs) -> anyhow::Result<ExitCode> {
    let stopped = daemon::stop()?;
    if args.json {
        out::object(&serde_json::json!({ "pid": stopped.pid, "hosts": stopped.hosts }))?;
    } else if stopped.hosts.is_empty() {
        out::note("mistctl: the pvmd had died before; removed what it had left");
    }
    Ok(ExitCode::SUCCESS)
}
