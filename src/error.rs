//! Which class an error belongs to, for the exit code and for scripts.
//!
//! Library code says it where it knows it; everybody else passes the error on with `?` and `.context(..)`
//! as usual. An error nobody classified counts as [`Failure::Failed`].
//!
//! ```
//! use mistctl::error::{Classify, Failure};
//! fn io_uring(pid: i32, fd: i32) -> anyhow::Result<()> {
//!     Err(Failure::Refused.because(format!("process {pid}: fd {fd} is an io_uring, which cannot be carried")))
//! }
//! fn open(pid: i32) -> anyhow::Result<std::fs::File> {
//!     std::fs::File::open(format!("/proc/{pid}/maps")).or_failure(Failure::NoSuchProcess)
//! }
//! assert_eq!(Failure::of(&io_uring(7, 3).unwrap_err()), Failure::Refused);
//! assert_eq!(Failure::of(&open(-1).unwrap_err()), Failure::NoSuchProcess);
//! ```

use std::fmt;

use nix::errno::Errno;

/// Class of an error; its exit code is documented in `mistctl --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It did not work; processes that were there before are unharmed.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// No process has that pid, or it ended meanwhile.
    NoSuchProcess,
    /// Another mistctl holds the lock, or another tracer holds the process: try again later.
    Busy,
    /// This process cannot be carried, or is none of the caller's: trying again does not help.
    Refused,
    /// The image is damaged, of another version, or no image at all.
    Damaged,
    /// A restore failed; nothing of it is left. Apart from the status of a restored program, hence so high.
    Restore,
}

impl Failure {
    /// Exit code of a mistctl that ends with this failure.
    pub fn code(self) -> u8 {
        match self {
            Failure::Failed => 1,
            Failure::Usage => 2,
            Failure::NoSuchProcess => 3,
            Failure::Busy => 4,
            Failure::Refused => 5,
            Failure::Damaged => 6,
            Failure::Restore => 125,
        }
    }

    /// Name for scripts, as --json prints it.
    pub fn name(self) -> &'static str {
        match self {
            Failure::Failed => "failed",
            Failure::Usage => "usage",
            Failure::NoSuchProcess => "no_such_process",
            Failure::Busy => "busy",
            Failure::Refused => "refused",
            Failure::Damaged => "damaged",
            Failure::Restore => "restore_failed",
        }
    }

    /// The class of this name; [`Failure::Failed`] for an unknown one.
    pub fn named(name: &str) -> Failure {
        let all = [
            Failure::Usage,
            Failure::NoSuchProcess,
            Failure::Busy,
            Failure::Refused,
            Failure::Damaged,
            Failure::Restore,
        ];
        let found = all.into_iter().find(|failure| failure.name() == name);
        found.unwrap_or(Failure::Failed)
    }

    /// An error of this class with this message.
    pub fn because(
        self,
        message: impl fmt::Display + fmt::Debug + Send + Sync + 'static,
    ) -> anyhow::Error {
        self.with(anyhow::Error::msg(message))
    }

    /// Puts an error into this class. What it says stays as it was.
    pub fn with(self, error: impl Into<anyhow::Error>) -> anyhow::Error {
        anyhow::Error::new(Classified {
            failure: self,
            error: error.into(),
        })
    }

    /// Class of an error: the outermost one given to it or to any of its causes, else [`Failure::Failed`].
    pub fn of(error: &anyhow::Error) -> Failure {
        // anyhow looks below the contexts it added itself; the chain covers errors wrapped by other types.
        error
            .downcast_ref::<Classified>()
            .or_else(|| error.chain().find_map(|e| e.downcast_ref::<Classified>()))
            .map_or(Failure::Failed, |c| c.failure)
    }
}

/// Says of which class the error of a `Result` is.
pub trait Classify<T> {
    fn or_failure(self, failure: Failure) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Classify<T> for Result<T, E> {
    fn or_failure(self, failure: Failure) -> anyhow::Result<T> {
        self.map_err(|e| failure.with(e))
    }
}

/// An error and its class; reads as the error alone.
struct Classified {
    failure: Failure,
    error: anyhow::Error,
}

impl fmt::Display for Classified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl fmt::Debug for Classified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {:?}", self.failure, self.error)
    }
}

impl std::error::Error for Classified {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Whether mistctl has run out of descriptors.
#[must_use]
pub fn too_many_files(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let procfs = match cause.downcast_ref() {
            Some(procfs::ProcError::Io(e, _)) => e.raw_os_error(),
            _ => None,
        };
        procfs == Some(Errno::EMFILE as i32)
            || cause.downcast_ref() == Some(&Errno::EMFILE)
            || cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.raw_os_error() == Some(Errno::EMFILE as i32))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_nobody_classified_is_a_plain_failure() {
        assert_eq!(Failure::of(&anyhow::anyhow!("no")), Failure::Failed);
    }

    #[test]
    fn a_class_survives_contexts_added_on_top_of_it() {
        let e: anyhow::Error = Err::<(), _>(Failure::Busy.because("held by gdb"))
            .context("process 7")
            .unwrap_err();
        let e = e.context("dump");
        assert_eq!(Failure::of(&e), Failure::Busy);
        assert_eq!(format!("{e:#}"), "dump: process 7: held by gdb");
    }

    #[test]
    fn the_outermost_class_counts() {
        let e = Failure::Restore.with(Failure::Damaged.because("bad checksum").context("image x"));
        assert_eq!(Failure::of(&e), Failure::Restore);
        assert_eq!(format!("{e:#}"), "image x: bad checksum");
    }
}
