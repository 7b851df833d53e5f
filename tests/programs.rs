//! Runs the self-checking programs of `tests/programs/`: each alone, dumped and left running,
//! killed and restored, twice so, restored lazily, dumped in rounds, and some restored from what was dumped
//! while they ran on. The protocol is in `tests/programs/mist.h`.
//!
//! Each (program, variant, way) is a test, so `cargo test --test programs eventfd` and
//! `cargo test --test programs ::lazy` work. Each runs in namespaces of its own, where the
//! pids that a restore wants are free.

mod common;
#[path = "programs/peer.rs"]
mod peer;
#[path = "programs/spec.rs"]
mod spec;
#[path = "programs/trial.rs"]
mod trial;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Completion, Conclusion, Failed, Trial};

use common::{build_c, sandbox};
use spec::{Mode, Spec};
use trial::{LIMIT, Test};

fn programs_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs")
}

fn main() -> ExitCode {
    if sandbox::play_role() {
        return worker();
    }
    let mut args = Arguments::from_args();
    // Nearly all of a test's time is spent waiting.
    args.test_threads.get_or_insert(4);
    match tests() {
        Ok((trials, skipped)) => {
            let _huge_pages = Setting::keep("/proc/sys/vm/nr_overcommit_hugepages");
            let conclusion = libtest_mimic::run(&args, trials);
            summary(&conclusion, &skipped);
            conclusion.exit_code()
        }
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// A setting of the whole system that programs change: put back at the end.
struct Setting {
    path: &'static str,
    was: String,
}

impl Setting {
    fn keep(path: &'static str) -> Option<Self> {
        let was = fs::read_to_string(path).ok()?;
        Some(Self { path, was })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if fs::read_to_string(self.path).is_ok_and(|now| now != self.was)
            && let Err(e) = fs::write(self.path, &self.was)
        {
            eprintln!("cannot put {} back: {e}", self.path);
        }
    }
}

/// Says again, at the end, what was not tested, by reason.
fn summary(conclusion: &Conclusion, skipped: &Mutex<BTreeMap<String, Vec<String>>>) {
    if conclusion.num_ignored == 0 {
        return;
    }
    println!("{} tests were SKIPPED:", conclusion.num_ignored);
    if let Ok(skipped) = skipped.lock() {
        for (why, names) in skipped.iter() {
            println!("  SKIPPED: {why}\n    {}", names.join(" "));
        }
    }
}

/// The names of skipped tests by reason.
type Skipped = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

fn tests() -> Result<(Vec<Trial>, Skipped)> {
    let skipped = Skipped::default();
    let mut sources: Vec<PathBuf> = fs::read_dir(programs_dir())
        .context("cannot list tests/programs")?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "c"))
        .collect();
    sources.sort();
    let mut trials = Vec::new();
    for source in sources {
        // Not a test: the sandbox runs it.
        if source.ends_with("lo_up.c") {
            continue;
        }
        let spec = Arc::new(Spec::read(&source)?);
        let built: Arc<OnceLock<Result<PathBuf, String>>> = Arc::default();
        for variant in &spec.variants {
            for mode in Mode::ALL {
                // There is no image to restore, or a single process would get other ids.
                let none = spec.refused.is_some() && mode.absences() > 0;
                let other = match mode {
                    Mode::Taken => !spec.tree,
                    Mode::Rounds => spec.tree || spec.without.iter().any(|(w, _)| w == "no-kill"),
                    Mode::Copied => !spec.copied,
                    _ => false,
                };
                if none || other {
                    continue;
                }
                let mut name = format!("programs::{}", spec.name());
                if !variant.is_empty() {
                    name = format!("{name}::{variant}");
                }
                name = format!("{name}::{}", mode.name());
                let without = spec.without.iter().find(|(w, _)| w == mode.without());
                let reason = without.map(|(_, r)| r.clone());
                let (spec, built, skipped, variant) = (
                    Arc::clone(&spec),
                    Arc::clone(&built),
                    Arc::clone(&skipped),
                    variant.clone(),
                );
                let trial_name = name.clone();
                trials.push(Trial::ignorable_test(name, move || {
                    let skip = |why: String| {
                        if let Ok(mut list) = skipped.lock() {
                            let name = trial_name.trim_start_matches("programs::");
                            list.entry(why.clone()).or_default().push(name.to_owned());
                        }
                        Ok(Completion::ignored_with(why))
                    };
                    if let Some(reason) = reason {
                        return skip(reason);
                    }
                    if !nix::unistd::geteuid().is_root() {
                        return skip("needs root, to make namespaces".to_owned());
                    }
                    let binary = built
                        .get_or_init(|| {
                            build_c(&programs_dir().join("lo_up.c"), &[])
                                .and_then(|_| build_c(&spec.source, &spec.cflags))
                                .map_err(|e| format!("{e:#}"))
                        })
                        .clone()?;
                    let dir = tempfile::Builder::new()
                        .prefix("mist-programs-")
                        .tempdir()?;
                    let args = [
                        spec.source.to_string_lossy().into_owned(),
                        binary.to_string_lossy().into_owned(),
                        variant,
                        mode.name().to_owned(),
                        dir.path().to_string_lossy().into_owned(),
                    ];
                    let verdict = sandbox::run_self(&args, dir.path(), 5 * LIMIT)
                        .map_err(|e| format!("{e:#}"))?;
                    match verdict {
                        sandbox::Verdict::Passed(_) => Ok(Completion::Completed),
                        sandbox::Verdict::Skipped(why) => skip(why),
                        sandbox::Verdict::Failed(why) => Err(Failed::from(why)),
                    }
                }));
            }
        }
    }
    Ok((trials, skipped))
}

/// The process that carries one test out, inside of the sandbox.
fn worker() -> ExitCode {
    match Test::from_args().and_then(|mut t| t.carry_out()) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(why)) => {
            println!("{why}");
            ExitCode::from(sandbox::SKIPPED as u8)
        }
        Err(e) => {
            println!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
