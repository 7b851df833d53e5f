//! Where the task comes from: an image on disk, or one that arrives over a stream.

use std::fs::DirBuilder;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Agent;
use super::protocol::Source;
use crate::pvm::stream::{self, KNOCK, Key, Stream};
use crate::restore::Placed;

/// How long a mover may take until it connects: files are compared meanwhile.
const PATIENCE: Duration = Duration::from_secs(360);

/// An image to restore.
pub enum Arrived {
    /// Somebody's.
    There(PathBuf),
    /// Ours: it goes when this is dropped.
    Received(Folder),
}

impl Arrived {
    pub fn path(&self) -> PathBuf {
        match self {
            Self::There(path) => path.clone(),
            Self::Received(dir) => image_in(&dir.0),
        }
    }
}

fn image_in(dir: &Path) -> PathBuf {
    dir.join("image")
}

/// A folder that goes when it is dropped.
pub struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        let path = beside_our_link().join(format!("mist-land-{}", std::process::id()));
        // Of a process that was killed and had our pid.
        let _ = std::fs::remove_dir_all(&path);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("making a folder for what arrives: {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whoever made the link that we were started by takes away what is left.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where a mover is expected.
pub struct Door {
    listener: TcpListener,
    pub port: u16,
}

impl Door {
    /// # Errors
    /// When no port is free.
    pub fn open() -> Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0").context("listening for the mover")?;
        let port = listener.local_addr().context("getsockname")?.port();
        Ok(Self { listener, port })
    }

    /// Waits for the image; `id` names the move. With the memory that is not in it; what is still to come is read from the
    /// stream.
    ///
    /// # Errors
    /// When nobody comes, or what comes is none; nothing of it is left.
    pub fn receive(
        self,
        source: &Source,
        id: &str,
        agent: &mut Agent,
    ) -> Result<(Arrived, Placed, Option<Stream>)> {
        let key = match source {
            Source::Image { path } => {
                return Ok((Arrived::There(path.clone()), Placed::default(), None));
            }
            Source::Stream { key } => Key::from_hex(key)?,
        };
        let until = Instant::now() + PATIENCE;
        let mut stream = loop {
            self.wait(agent, until)?;
            let soon = until.min(Instant::now() + KNOCK);
            // Who knocked may have died, or be somebody else: the agent is not heard here.
            if let Ok(stream) = Stream::accept(&self.listener, &key, id, soon) {
                break stream;
            }
        };
        let dir = Folder::make()?;
        let placed = stream::receive(&mut stream, &image_in(&dir.0))?;
        Ok((Arrived::Received(dir), placed, Some(stream)))
    }
}

impl Door {
    /// Waits until somebody knocks.
    fn wait(&self, agent: &mut Agent, until: Instant) -> Result<()> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let ms = left.as_millis().min(60_000) as u16;
            let mut fds = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(agent.reader.get_ref().as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::from(ms)) {
                Ok(0) => bail!("no mover came within {} s", PATIENCE.as_secs()),
                Err(Errno::EINTR) => continue,
                other => other.context("poll")?,
            };
            let told = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            let [knocks, says] = fds.each_ref().map(told);
            if says {
                let said = agent.hear()?;
                bail!("the agent has called it off ({said:?})");
            }
            if knocks {
                return Ok(());
            }
        }
    }
}

/// The folder of the link by which we were started: whoever made it takes it away with all that we leave there,
/// should we be killed.
fn beside_our_link() -> PathBuf {
    let link = std::env::args_os().next().map(PathBuf::from);
    link.as_deref()
        .filter(|link| link.is_absolute())
        .and_then(Path::parent)
        .map_or_else(std::env::temp_dir, Path::to_owned)
}
