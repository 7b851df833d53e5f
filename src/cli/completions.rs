//! `mistctl completions`: what the shell needs to complete our commands and options.

use std::process::ExitCode;

use clap_complete::Shell;

use super::out;

/// Print completions for a shell
///
/// Bash, for everybody: mistctl completions bash > /usr/share/bash-completion/completions/mistctl. scripts/install
/// does it for bash, zsh and fish.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell to write for
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: &Args, command: &mut clap::Command) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, command, "mistctl", &mut text);
    out::print_bytes(&text)?;
    Ok(ExitCode::SUCCESS)
}
