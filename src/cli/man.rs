//! `mistctl man`: the manual, out of the same definition as the help.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::out;

/// Print the manual page, or write all pages into a directory
///
/// One page for mistctl and one for each command, named like git's: mistctl.1, mistctl-dump.1 ... To read one
/// without installing it: mistctl man | man -l -
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory to write every page to; without it mistctl(1) goes to standard output
    dir: Option<PathBuf>,
}

pub fn run(args: &Args, command: &mut clap::Command) -> anyhow::Result<ExitCode> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command.clone())
            .render(&mut page)
            .context("cannot write the page")?;
        out::print_bytes(&page)?;
        return Ok(ExitCode::SUCCESS);
    };
    std::fs::create_dir_all(dir)
        .with_context(|| format!("{}: cannot make the directory", dir.display()))?;
    clap_mangen::generate_to(command.clone().disable_help_subcommand(true), dir)
        .with_context(|| format!("{}: cannot write manual pages", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}
