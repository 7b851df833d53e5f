//! `mistctl man`: the manual, out of the same definition as the help.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;

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

pub fn run(args: &Args, command: &Command) -> anyhow::Result<ExitCode> {
    let command = command.clone().disable_help_subcommand(true);
    let mut built = command.clone();
    built.build();
    let Some(dir) = &args.dir else {
        out::print_bytes(&page(&built)?)?;
        return Ok(ExitCode::SUCCESS);
    };
    fs::create_dir_all(dir)
        .with_context(|| format!("{}: cannot make the directory", dir.display()))?;
    let mut pages = vec![(built.get_name().to_owned(), &built)];
    let mut at = 0;
    while let Some((name, command)) = pages.get(at).cloned() {
        pages.extend(below(command).map(|c| (format!("{name}-{}", c.get_name()), c)));
        at += 1;
    }
    for (name, command) in pages {
        let file = dir.join(format!("{name}.1"));
        // The synopsis says "mistctl dump", the title mistctl-dump.
        let command = command.clone().display_name(&name);
        fs::write(&file, page(&command)?)
            .with_context(|| format!("{}: cannot write", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The commands that people type.
fn below(command: &Command) -> impl Iterator<Item = &Command> {
    let commands = command.get_subcommands();
    commands.filter(|c| c.get_name() != "help" && !c.is_hide_set())
}

/// One page. What the help says behind the options becomes sections: its headings are in capitals.
fn page(command: &Command) -> anyhow::Result<Vec<u8>> {
    let version = format!("mistctl {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).manual("mist").source(version);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        writeln!(page, ".SH COMMANDS")?;
        let own = command.get_display_name().unwrap_or(command.get_name());
        for c in below(command) {
            writeln!(page, ".TP\n.BR {}\\-{} (1)", escaped(own), c.get_name())?;
            writeln!(
                page,
                "{}",
                escaped(&c.get_about().map(ToString::to_string).unwrap_or_default())
            )?;
        }
    }
    let after = command
        .get_after_long_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let mut preformatted = false;
    for line in after.lines() {
        let heading = line.starts_with(|c: char| c.is_ascii_uppercase());
        if heading && preformatted {
            writeln!(page, ".fi")?;
        }
        if heading {
            let name = if line == "EXIT CODES" {
                "EXIT STATUS"
            } else {
                line
            };
            writeln!(page, ".SH {}\n.nf", escaped(name))?;
            preformatted = true;
        } else {
            writeln!(
                page,
                "{}",
                escaped(line.strip_prefix("    ").unwrap_or(line))
            )?;
        }
    }
    if preformatted {
        writeln!(page, ".fi")?;
    }
    writeln!(page, ".SH SEE ALSO")?;
    let others = [
        "mistctl",
        "mistctl-dump",
        "mistctl-restore",
        "mistctl-show",
        "mistctl-verify",
        "mistctl-check",
        "mistctl-pvm",
        "mistctl-ps",
    ];
    let name = command.get_display_name().unwrap_or(command.get_name());
    let others: Vec<String> = others
        .iter()
        .filter(|o| **o != name)
        .map(|o| format!(".BR {} (1)", escaped(o)))
        .collect();
    writeln!(page, "{}", others.join(" ,\n"))?;
    Ok(page)
}

/// Text that roff prints as it stands.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    if line.starts_with(['.', '\'']) {
        format!("\\&{line}")
    } else {
        line
    }
}
