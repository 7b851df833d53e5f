//! The files by which a task and its pvmd prove to each other whose they are.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow};

/// An empty file of ours: who writes to it is this user, or root.
pub(super) struct Proof {
    pub(super) path: PathBuf,
    file: File,
}

impl Proof {
    pub(super) fn new(tmp: &Path) -> Result<Proof> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mut tries = 0;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = tmp.join(format!("pvmtmp.mist.{}.{number}", std::process::id()));
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
            {
                Ok(file) => return Ok(Proof { path, file }),
                Err(e) if e.kind() == ErrorKind::AlreadyExists && tries < 1000 => tries += 1,
                Err(e) => {
                    return Err(e).with_context(|| {
                        format!(
                            "cannot make {}, by which the pvmd shows whose it is",
                            path.display()
                        )
                    });
                }
            }
        }
    }

    /// Whether the pvmd has written to it.
    ///
    /// # Errors
    /// When nobody could: there is no room.
    pub(super) fn given(&self) -> Result<bool> {
        let meta = self
            .file
            .metadata()
            .with_context(|| format!("{}: fstat", self.path.display()))?;
        if meta.len() == 0 {
            (&self.file).write_all(b"m").with_context(|| {
                format!(
                    "the pvmd cannot write to {}, nor can we",
                    self.path.display()
                )
            })?;
        }
        Ok(meta.len() > 0)
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        // The pvmd does not remove it; when it cannot be removed it is an empty file in /tmp.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Writes to the pvmd's own file, if it is one that the pvmd may have made.
pub(super) fn give_proof(path: &Path) -> Result<()> {
    let failed = || {
        format!(
            "cannot write to {}, by which we show whose we are",
            path.display()
        )
    };
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY)
        .open(path)
        .with_context(failed)?;
    let meta = file.metadata().with_context(failed)?;
    if !meta.is_file() || meta.len() > 1 || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(anyhow!("it is no empty file of this user's")).with_context(failed);
    }
    file.write_all(b"m").with_context(failed)
}
