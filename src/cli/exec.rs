//! `mistctl exec`: one program with the shim.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::{environment, out, shim};

/// Run one program with the PVM shim
///
/// mistctl becomes the program: same pid, same standard streams, and its exit status is the program's. A PVM task
/// that is started like this can be listed by its virtual tid, and moved later; programs that never call PVM do not
/// notice. Ends with 127 if the program is not found, with 126 if it cannot be run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// When it cannot be run, print one JSON object
    #[arg(long)]
    pub json: bool,

    /// The program, looked up in PATH, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let library = shim::find()?;
    let (program, arguments) = args
        .command
        .split_first()
        .ok_or_else(|| anyhow::anyhow!("no program was given"))?;
    let variables = environment::callers()?;
    let preload = preloaded(&library, environment::value(&variables, "LD_PRELOAD"));
    let e = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(variables)
        .env("LD_PRELOAD", preload)
        .exec();
    let code = if e.kind() == ErrorKind::NotFound {
        127
    } else {
        126
    };
    let message = format!("cannot run {}: {e}", program.to_string_lossy());
    if args.json {
        out::object(&serde_json::json!({ "error": message, "failure": "failed", "exit": code }))?;
    } else {
        out::note(&format!("mistctl: {message}"));
    }
    Ok(ExitCode::from(code))
}

/// LD_PRELOAD with the shim in front of what was there.
pub fn preloaded(library: &Path, before: Option<&OsStr>) -> OsString {
    let mut list = library.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        list.push(":");
        list.push(before);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_comes_first() {
        let shim = Path::new("/lib/libmistshim.so");
        assert_eq!(preloaded(shim, None), "/lib/libmistshim.so");
        assert_eq!(preloaded(shim, Some(OsStr::new(""))), "/lib/libmistshim.so");
        assert_eq!(
            preloaded(shim, Some(OsStr::new("/x.so"))),
            "/lib/libmistshim.so:/x.so"
        );
    }
}
