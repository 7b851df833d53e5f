//! Programs as Debian packages them, unmodified, saved and restored the way a user would: each
//! dumped while it goes on, killed and restored, restored lazily, and twice so.
//!
//! A program works in steps until the file `go` is there, then writes how many it made to
//! `count`. An undisturbed run of as many steps (`$STEPS`) has to give the same result. While it
//! works, its file `progress` grows.
//!
//! Each (program, way) is a test: `cargo test --test real redis`, `cargo test --test real ::lazy`.
//! `MIST_TEST_DUMPS=100 cargo test --test real ::go_on` dumps that often while it goes on.

mod common;
#[path = "real/redis.rs"]
mod redis;
#[path = "real/steps.rs"]
mod steps;
#[path = "real/terminal.rs"]
mod terminal;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use common::{build_c, build_dir, sandbox};
use steps::Test;

/// How long any one step may take before it counts as hung; test machines are shared.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The ways in which a program is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Dumped three times while it goes on.
    GoOn,
    /// Dumped and killed, restored.
    Kill,
    /// Dumped and killed, restored, dumped and killed, restored.
    Twice,
    /// Dumped and killed, restored with its memory to follow, dumped while it goes on.
    Lazy,
}

impl Mode {
    const ALL: [Mode; 4] = [Self::GoOn, Self::Kill, Self::Twice, Self::Lazy];

    fn name(self) -> &'static str {
        match self {
            Self::GoOn => "go_on",
            Self::Kill => "kill_restore",
            Self::Twice => "twice",
            Self::Lazy => "lazy",
        }
    }
}

/// A program to save.
pub struct Case {
    pub name: &'static str,
    /// What it needs, as (path, package).
    needs: &'static [(&'static str, &'static str)],
    /// Its arguments; words that begin with `@` are files of `tests/real/`.
    pub command: &'static [&'static str],
    pub env: &'static [(&'static str, &'static str)],
    /// What a user has to say to `mistctl dump`.
    pub flags: &'static [&'static str],
    /// Whether its result is in the SQLite database `db`, not in the file `out`.
    pub database: bool,
}

const PYTHON: &[(&str, &str)] = &[("/usr/bin/python3", "python3")];
const SQLITE: &[(&str, &str)] = &[
    ("/usr/bin/sqlite3", "sqlite3"),
    ("/usr/bin/python3", "python3"),
];
const JAVA: &[(&str, &str)] = &[
    ("/usr/bin/java", "default-jdk-headless"),
    ("/usr/bin/javac", "default-jdk-headless"),
];
const JEMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";

const PLAIN: Case = Case {
    name: "",
    needs: &[],
    command: &[],
    env: &[],
    flags: &[],
    database: false,
};

const CASES: &[Case] = &[
    Case {
        name: "python",
        needs: PYTHON,
        command: &["/usr/bin/python3", "@loop.py"],
        ..PLAIN
    },
    Case {
        name: "python_threads",
        needs: PYTHON,
        command: &["/usr/bin/python3", "@threads.py"],
        ..PLAIN
    },
    Case {
        name: "python_jemalloc",
        needs: &[("/usr/bin/python3", "python3"), (JEMALLOC, "libjemalloc2")],
        command: &["/usr/bin/python3", "@loop.py"],
        env: &[("LD_PRELOAD", JEMALLOC), ("PYTHONMALLOC", "malloc")],
        ..PLAIN
    },
    Case {
        name: "bash_pipeline",
        needs: &[("/bin/bash", "bash"), ("/bin/gzip", "gzip")],
        command: &["/bin/bash", "@pipeline.sh"],
        flags: &["--tree"],
        ..PLAIN
    },
    Case {
        name: "sqlite_shell",
        needs: SQLITE,
        command: &["/bin/bash", "@sqlite.sh"],
        flags: &["--tree"],
        database: true,
        ..PLAIN
    },
    Case {
        name: "sqlite_wal",
        needs: SQLITE,
        command: &["/usr/bin/python3", "@wal.py"],
        database: true,
        ..PLAIN
    },
    Case {
        name: "perl",
        needs: &[("/usr/bin/perl", "perl")],
        command: &["/usr/bin/perl", "@loop.pl"],
        ..PLAIN
    },
    Case {
        name: "awk",
        needs: &[("/usr/bin/mawk", "mawk")],
        command: &["/usr/bin/mawk", "-f", "@loop.awk"],
        flags: &["--tree"],
        ..PLAIN
    },
    Case {
        name: "jemalloc",
        needs: &[(JEMALLOC, "libjemalloc2")],
        command: &["@allocator.c"],
        env: &[("LD_PRELOAD", JEMALLOC)],
        ..PLAIN
    },
    Case {
        // Gives memory back at once, from a thread of its own.
        name: "jemalloc_decay",
        needs: &[(JEMALLOC, "libjemalloc2")],
        command: &["@allocator.c"],
        env: &[
            ("LD_PRELOAD", JEMALLOC),
            (
                "MALLOC_CONF",
                "background_thread:true,dirty_decay_ms:1,muzzy_decay_ms:1,retain:false",
            ),
        ],
        ..PLAIN
    },
    Case {
        name: "java",
        needs: JAVA,
        command: &[
            "/usr/bin/java",
            "-Xmx96m",
            "-cp",
            "@Collect.java",
            "Collect",
        ],
        ..PLAIN
    },
    Case {
        name: "java_parallel_gc",
        needs: JAVA,
        command: &[
            "/usr/bin/java",
            "-Xmx96m",
            "-XX:+UseParallelGC",
            "-cp",
            "@Collect.java",
            "Collect",
        ],
        ..PLAIN
    },
    Case {
        name: "java_zgc",
        needs: JAVA,
        command: &[
            "/usr/bin/java",
            "-Xmx96m",
            "-XX:+UseZGC",
            "-cp",
            "@Collect.java",
            "Collect",
        ],
        ..PLAIN
    },
    Case {
        name: "go_fzf",
        needs: &[("/usr/bin/fzf", "fzf")],
        command: &["/bin/bash", "@fzf.sh"],
        flags: &["--tree"],
        ..PLAIN
    },
    Case {
        name: redis::NAME,
        needs: &[("/usr/bin/redis-server", "redis-server")],
        command: redis::COMMAND,
        flags: &["--tcp-established"],
        ..PLAIN
    },
    Case {
        name: terminal::NAME,
        needs: &[("/usr/bin/vi", "vim-tiny")],
        command: terminal::COMMAND,
        ..PLAIN
    },
];

fn main() -> ExitCode {
    if sandbox::play_role() {
        return worker();
    }
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(2);
    let skipped = Skipped::default();
    let mut trials = Vec::new();
    for case in CASES {
        for mode in Mode::ALL {
            // Restored as the leader of a session of its own, it has no controlling terminal any more.
            if case.name == terminal::NAME && mode == Mode::Twice {
                continue;
            }
            let name = format!("real::{}::{}", case.name, mode.name());
            let skipped = Arc::clone(&skipped);
            trials.push(Trial::ignorable_test(name.clone(), move || {
                let why = match attempt(case, mode) {
                    Ok(None) => return Ok(Completion::Completed),
                    Ok(Some(why)) => why,
                    Err(e) => return Err(Failed::from(format!("{e:#}"))),
                };
                if let Ok(mut list) = skipped.lock() {
                    list.entry(why.clone()).or_default().push(name.clone());
                }
                Ok(Completion::ignored_with(why))
            }));
        }
    }
    let conclusion = libtest_mimic::run(&args, trials);
    // Said again at the end, by reason.
    if let Ok(skipped) = skipped.lock() {
        for (why, names) in skipped.iter() {
            println!("  SKIPPED: {why}\n    {}", names.join(" "));
        }
    }
    conclusion.exit_code()
}

/// The names of skipped tests by reason.
type Skipped = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

/// Runs one test in namespaces of its own; gives why it could not run.
fn attempt(case: &Case, mode: Mode) -> Result<Option<String>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Some("needs root, to make namespaces".to_owned()));
    }
    if let Some((path, package)) = case.needs.iter().find(|(p, _)| !Path::new(p).exists()) {
        return Ok(Some(format!("no {path}: install {package}")));
    }
    build_c(&source("../programs/lo_up.c"), &[])?;
    for word in case.command {
        build(word)?;
    }
    // Not in /tmp, of which a test may hide parts.
    let dir = tempfile::Builder::new()
        .prefix("mist-real-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let args = [
        case.name.to_owned(),
        mode.name().to_owned(),
        dir.path().to_string_lossy().into_owned(),
    ];
    match sandbox::run_self(
        &args,
        dir.path(),
        6 * LIMIT + LIMIT * steps::go_on_dumps() / 10,
    )? {
        sandbox::Verdict::Passed(_) => Ok(None),
        sandbox::Verdict::Skipped(why) => Ok(Some(why)),
        sandbox::Verdict::Failed(why) => bail!(why),
    }
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/real")
        .join(name)
}

/// What a word of a command stands for.
pub fn word(word: &str) -> PathBuf {
    match word.strip_prefix('@') {
        None => PathBuf::from(word),
        Some(name) => match name.rsplit_once('.') {
            Some((stem, "c")) => build_dir().join("real").join(stem),
            Some((_, "java")) => build_dir(),
            _ => source(name),
        },
    }
}

/// Compiles what has to be.
fn build(word: &str) -> Result<()> {
    static BUILDING: Mutex<()> = Mutex::new(());
    let Some(name) = word.strip_prefix('@') else {
        return Ok(());
    };
    if name.ends_with(".c") {
        let flags = ["-O2", "-pthread", "-ldl"].map(str::to_owned);
        build_c(&source(name), &flags)?;
    }
    if let Some(stem) = name.strip_suffix(".java") {
        let _one = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
        let class = build_dir().join(format!("{stem}.class"));
        let age = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        if age(&class) <= age(&source(name)) {
            let output = Command::new("/usr/bin/javac")
                .arg("-d")
                .arg(build_dir())
                .arg(source(name))
                .output()
                .context("cannot run javac")?;
            if !output.status.success() {
                bail!("javac {name} failed:\n{}", common::both(&output));
            }
        }
    }
    Ok(())
}

/// The process that carries one test out, inside of the sandbox.
fn worker() -> ExitCode {
    match Test::from_args(CASES, &Mode::ALL).and_then(|mut t| t.carry_out()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("{e:#}");
            ExitCode::FAILURE
        }
    }
}
