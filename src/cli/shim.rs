//! `mistctl shim`: where the library is that PVM tasks are started with.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::out;

/// File name of the shim.
const LIBRARY: &str = "libmistshim.so";

/// Print where the PVM shim is
///
/// The library that has to be preloaded into PVM tasks that are to be moved: LD_PRELOAD=$(mistctl shim) in the
/// environment of a pvmd, or of a task that is started by hand. `mistctl pvm start` and `mistctl exec` see to it by
/// themselves.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let path = find()?;
    if args.json {
        out::object(&serde_json::json!({ "path": path }))?;
    } else {
        let mut line = path.into_os_string().into_encoded_bytes();
        line.push(b'\n');
        out::print_bytes(&line)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The library: beside this program (as cargo builds it), or where scripts/install puts it.
///
/// # Errors
/// When it is nowhere, or its path is none that LD_PRELOAD can hold.
pub fn find() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where mistctl is")?;
    find_beside(&program)
}

fn find_beside(program: &Path) -> anyhow::Result<PathBuf> {
    let dir = program.parent().unwrap_or(Path::new("/"));
    let places = [dir.join(LIBRARY), dir.join("../lib").join(LIBRARY)];
    let Some(found) = places.iter().find_map(|place| place.canonicalize().ok()) else {
        let [beside, lib] = &places;
        bail!(
            "the PVM shim is missing: neither {} nor {} is there; build it with `cargo build -p pvm-shim`, or run scripts/install",
            beside.display(),
            lib.display()
        );
    };
    // ld.so(8): the list is split at spaces and colons, and nothing protects them.
    let bytes = found.as_os_str().as_bytes();
    if bytes.iter().any(|b| b" :\t\n\"'$`\\".contains(b)) {
        bail!(
            "{}: LD_PRELOAD cannot hold this path (spaces, colons, quotes); install mistctl elsewhere",
            found.display()
        );
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_beside_the_program_and_in_lib() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let bin = root.join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        let error = find_beside(&bin.join("mistctl")).unwrap_err().to_string();
        assert!(error.contains("scripts/install"), "{error}");
        std::fs::create_dir(root.join("lib")).unwrap();
        std::fs::write(root.join("lib").join(LIBRARY), "").unwrap();
        let found = find_beside(&bin.join("mistctl")).unwrap();
        assert_eq!(found, root.join("lib").join(LIBRARY));
        std::fs::write(bin.join(LIBRARY), "").unwrap();
        let found = find_beside(&bin.join("mistctl")).unwrap();
        assert_eq!(found, bin.join(LIBRARY));
    }

    #[test]
    fn a_path_that_ld_preload_would_split_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a b");
        std::fs::create_dir(&odd).unwrap();
        std::fs::write(odd.join(LIBRARY), "").unwrap();
        let error = find_beside(&odd.join("mistctl")).unwrap_err().to_string();
        assert!(error.contains("LD_PRELOAD cannot hold"), "{error}");
    }
}
