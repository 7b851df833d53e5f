//! JSON objects, one a line, over a Unix socket that never makes its reader or writer wait.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::control::LONGEST;

/// One end.
pub struct Lines {
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    ended: bool,
}

impl Lines {
    /// # Errors
    /// Those of fcntl.
    pub fn new(stream: UnixStream) -> Result<Lines> {
        stream.set_nonblocking(true).context("O_NONBLOCK")?;
        Ok(Lines {
            stream,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            ended: false,
        })
    }

    /// Whether something waits to be written.
    pub fn is_full(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether the other end has closed. What it said before can still be had.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Hears nothing more.
    pub fn end(&mut self) {
        self.ended = true;
        self.incoming.clear();
    }

    /// Says something, now or when there is room.
    ///
    /// # Errors
    /// When the other end is gone or takes nothing any more.
    pub fn say<T: Serialize>(&mut self, message: &T) -> Result<()> {
        serde_json::to_writer(&mut self.outgoing, message).context("JSON")?;
        self.outgoing.push(b'\n');
        if self.outgoing.len() > 2 * LONGEST {
            bail!("the other end does not listen");
        }
        self.flush()
    }

    /// Writes what there is room for.
    ///
    /// # Errors
    /// When the other end is gone.
    pub fn flush(&mut self) -> Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(count) => drop(self.outgoing.drain(..count.min(self.outgoing.len()))),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("the other end is gone"),
            }
        }
        Ok(())
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// When the connection breaks, or a line is too long.
    pub fn fill(&mut self) -> Result<()> {
        let mut bytes = [0; 65536];
        while !self.ended {
            match self.stream.read(&mut bytes) {
                Ok(0) => self.ended = true,
                Ok(count) => self
                    .incoming
                    .extend_from_slice(bytes.get(..count).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => self.ended = true,
                Err(e) => return Err(e).context("reading what the other end says"),
            }
            if self.incoming.len() > 2 * LONGEST {
                bail!("the other end says too much at once");
            }
        }
        Ok(())
    }

    /// The next line, if one is there.
    ///
    /// # Errors
    /// When it is none of the messages that are expected.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.incoming.drain(..=end).collect();
        serde_json::from_slice(&line)
            .map(Some)
            .context("the other end says what makes no sense")
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
