//! What the head of a program's source asks for, and the ways of saving it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The ways in which a program is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Not at all: the program itself has to be right.
    Alone,
    /// Dumped three times while it goes on.
    GoOn,
    /// Dumped and killed, restored.
    Kill,
    /// Dumped and killed, restored, dumped and killed, restored.
    Twice,
    /// Dumped and killed, restored with its memory to follow.
    Lazy,
    /// Dumped and killed, restored where its pid is taken: in a pid namespace of its own; dumped from outside that
    /// and killed, restored once more. Trees only.
    Taken,
    /// Its memory copied in rounds while it runs, the rest dumped; killed, restored. Single processes only.
    Rounds,
    /// Dumped while it goes on, killed later, restored: its memory is that of its copy. Where that is asked for:
    /// nothing outside of the program may remember it.
    Copied,
}

impl Mode {
    pub const ALL: [Mode; 8] = [
        Self::Alone,
        Self::GoOn,
        Self::Kill,
        Self::Twice,
        Self::Lazy,
        Self::Taken,
        Self::Rounds,
        Self::Copied,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::GoOn => "go_on",
            Self::Kill => "kill_restore",
            Self::Twice => "twice",
            Self::Lazy => "lazy",
            Self::Taken => "ids_taken",
            Self::Rounds => "rounds",
            Self::Copied => "copied",
        }
    }

    /// The directive that leaves it out.
    pub fn without(self) -> &'static str {
        match self {
            Self::Alone => "no-alone",
            Self::GoOn => "no-go-on",
            Self::Kill => "no-kill",
            Self::Twice => "no-twice",
            Self::Lazy => "no-lazy",
            Self::Taken => "no-ids-taken",
            Self::Rounds => "no-rounds",
            Self::Copied => "no-copied",
        }
    }

    /// How often the program is away between its start and its end.
    pub fn absences(self) -> usize {
        match self {
            Self::Alone | Self::GoOn => 0,
            Self::Kill | Self::Lazy | Self::Rounds | Self::Copied => 1,
            Self::Twice | Self::Taken => 2,
        }
    }
}

/// What the head of a program's source asks for.
#[derive(Default, Debug)]
pub struct Spec {
    pub source: PathBuf,
    pub cflags: Vec<String>,
    pub variants: Vec<String>,
    /// Modes left out, as (directive, reason).
    pub without: Vec<(String, String)>,
    pub tree: bool,
    pub tcp_established: bool,
    pub peer: bool,
    pub stdout: bool,
    pub user: bool,
    pub setsid: bool,
    pub stopped: bool,
    /// [`Mode::Copied`] too.
    pub copied: bool,
    /// How often it is dumped while it goes on, if not three times.
    pub dumps: Option<u32>,
    /// Files of the program's directory that are gone when it is restored.
    pub removed: Vec<String>,
    /// Files that are others then.
    pub replaced: Vec<String>,
    /// A word of the error with which a dump may refuse this program.
    pub may_refuse: Option<String>,
    /// A word of an error with which a dump refuses it at some moments; then it is asked again.
    pub moments: Option<String>,
    /// A word of the error with which a dump has to refuse it.
    pub refused: Option<String>,
}

impl Spec {
    pub fn read(source: &Path) -> Result<Self> {
        let text = fs::read_to_string(source)
            .with_context(|| format!("cannot read {}", source.display()))?;
        let mut spec = Self {
            source: source.to_owned(),
            ..Self::default()
        };
        for line in text.lines() {
            let Some(directive) = line.strip_prefix("// mist: ") else {
                continue;
            };
            let mut words = directive.split_whitespace().map(str::to_owned);
            match words.next().unwrap_or_default().as_str() {
                "cflags" => spec.cflags.extend(words),
                "variants" => spec.variants.extend(words),
                "tree" => spec.tree = true,
                "tcp-established" => (spec.tcp_established, spec.peer) = (true, true),
                "peer" => spec.peer = true,
                "stdout" => spec.stdout = true,
                "user" => spec.user = true,
                "setsid" => spec.setsid = true,
                "dumps" => spec.dumps = words.next().and_then(|n| n.parse().ok()),
                "removed" => spec.removed.extend(words),
                "replaced" => spec.replaced.extend(words),
                "stopped" => spec.stopped = true,
                "copied" => spec.copied = true,
                "may-refuse" => spec.may_refuse = Some(words.collect::<Vec<_>>().join(" ")),
                "moments" => spec.moments = Some(words.collect::<Vec<_>>().join(" ")),
                "refused" => spec.refused = Some(words.collect::<Vec<_>>().join(" ")),
                word if Mode::ALL.iter().any(|m| m.without() == word) => {
                    let reason = words.collect::<Vec<_>>().join(" ");
                    spec.without.push((word.to_owned(), reason));
                }
                word => bail!("{}: unknown directive `{word}`", source.display()),
            }
        }
        if spec.variants.is_empty() {
            spec.variants.push(String::new());
        }
        Ok(spec)
    }

    pub fn name(&self) -> String {
        self.source
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default()
    }
}
