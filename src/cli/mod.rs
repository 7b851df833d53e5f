//! The command line: one file per command. What it prints, and with which code it ends, is decided here;
//! the library below knows nothing of it.

mod agent;
mod check;
mod completions;
mod dump;
mod environment;
mod exec;
mod foreground;
mod land;
mod man;
mod migrate;
mod mover;
mod out;
mod ps;
mod pvm;
mod restore;
mod shim;
mod show;
mod stores;
mod verify;

use std::process::ExitCode;
use std::time::Instant;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use mistctl::error::Failure;

/// Command line of mistctl.
#[derive(Debug, Parser)]
#[command(
    name = "mistctl",
    version,
    max_term_width = 100,
    about = "Checkpoint and restore any Linux process, from outside",
    long_about = LONG_ABOUT,
    after_long_help = AFTER_HELP,
    after_help = "`mistctl help COMMAND` explains a command, `mistctl --help` also the exit codes.",
    propagate_version = true,
    disable_help_subcommand = false,
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Dump(dump::Args),
    Restore(restore::Args),
    Show(show::Args),
    Verify(verify::Args),
    Check(check::Args),
    Pvm(pvm::Args),
    Ps(ps::Args),
    Migrate(migrate::Args),
    Agent(agent::Args),
    #[command(hide = true)]
    Mover(mover::Args),
    Exec(exec::Args),
    Shim(shim::Args),
    #[command(hide = true)]
    Land(land::Args),
    Completions(completions::Args),
    Man(man::Args),
}

const LONG_ABOUT: &str = "\
mistctl saves a running program, with its memory, threads, files, sockets and timers, as an image: a \
directory. It restores it from there later: on this boot or the next, under this pid or another, on this \
machine or on one with other libraries. The program needs no change and does not notice.

    mistctl dump 1234 -o work.img        save process 1234, which runs on
    mistctl dump 1234 -o work.img --kill save it and end it
    mistctl restore work.img             let it go on from there";

const AFTER_HELP: &str = "\
EXIT CODES
    0    done
    1    failed; programs that were running before are unharmed
    2    the command line makes no sense
    3    no process has this pid, or it ended before it was saved
    4    busy: another mistctl holds the store's lock, or a debugger
         holds the process; try again later
    5    refused: this process cannot be carried, or is not yours
         (the message names what is in the way, and the way out)
    6    the image is damaged, of another version, or no image at all
    125  a restore failed, and left nothing behind

    `mistctl restore` in the foreground otherwise ends as the restored
    program does: with its status, or 128 + N when signal N ended it.

    With --json a command prints exactly one object on standard output;
    when it fails: {\"error\": MESSAGE, \"failure\": NAME, \"exit\": CODE}.

PRIVILEGES
    mistctl runs as root, or for an ordinary user through file
    capabilities: it then serves only this user's processes and images.
    `mistctl check` tells what is missing, and how to add it.";

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let started = Instant::now();
    mistctl::kernel::stack::with_room(|| parse_and_run(started)).unwrap_or_else(|e| fail(&e, false))
}

/// Apart from where room is made for it: not even its variables are on the stack before.
#[inline(never)]
fn parse_and_run(started: Instant) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let json = cli.command.json();
    // First of all: what mistctl may do is settled before it looks at anything the caller names.
    match mistctl::kernel::caps::start().and_then(|_| cli.command.run(started)) {
        Ok(code) => code,
        Err(e) => fail(&e, json),
    }
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Command::Dump(a) => a.json,
            Command::Restore(a) => a.json,
            Command::Show(a) => a.json,
            Command::Check(a) => a.json,
            Command::Pvm(a) => a.json(),
            Command::Ps(a) => a.json,
            Command::Migrate(a) => a.json,
            Command::Exec(a) => a.json,
            Command::Shim(a) => a.json,
            Command::Agent(_)
            | Command::Mover(_)
            | Command::Land(_)
            | Command::Verify(_)
            | Command::Completions(_)
            | Command::Man(_) => false,
        }
    }

    fn run(self, started: Instant) -> anyhow::Result<ExitCode> {
        match self {
            Command::Dump(a) => dump::run(&a),
            Command::Restore(a) => restore::run(&a, started),
            Command::Show(a) => show::run(&a),
            Command::Verify(a) => verify::run(&a),
            Command::Check(a) => check::run(&a),
            Command::Pvm(a) => pvm::run(&a),
            Command::Ps(a) => ps::run(&a),
            Command::Migrate(a) => migrate::run(&a),
            Command::Agent(a) => agent::run(&a),
            Command::Mover(a) => mover::run(&a),
            Command::Exec(a) => exec::run(&a),
            Command::Shim(a) => shim::run(&a),
            Command::Land(a) => land::run(&a, started),
            Command::Completions(a) => completions::run(&a, &mut Cli::command()),
            Command::Man(a) => man::run(&a, &Cli::command()),
        }
    }
}

/// Prints what clap has to say: help and version on standard output, errors on standard error.
fn usage(e: &clap::Error) -> ExitCode {
    match e.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = e.print(); // a closed standard output is the reader's choice
            ExitCode::SUCCESS
        }
        kind => {
            if std::env::args_os().any(|a| a == "--json") {
                let text = e.to_string();
                let line = text.lines().next().unwrap_or_default();
                let message = line.strip_prefix("error: ").unwrap_or(line).to_owned();
                return fail(&Failure::Usage.because(message), true);
            }
            let _ = e.print();
            debug_assert!(kind != ErrorKind::DisplayHelp);
            ExitCode::from(Failure::Usage.code())
        }
    }
}

/// Tells why it failed, and gives the code that says of which kind the failure is.
fn fail(error: &anyhow::Error, json: bool) -> ExitCode {
    let failure = Failure::of(error);
    let hint = match mistctl::error::too_many_files(error) {
        true => {
            "; mistctl needs as many descriptors as what it works on, and more: raise the limit (ulimit -Hn)"
        }
        false => "",
    };
    let object = || {
        out::object(&serde_json::json!({
            "error": format!("{error:#}{hint}"),
            "failure": failure.name(),
            "exit": failure.code(),
        }))
    };
    if !json || object().is_err() {
        out::note(&format!("mistctl: {error:#}{hint}"));
    }
    ExitCode::from(failure.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
