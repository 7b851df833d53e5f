//! The receiving side of the socket: many messages come with one read.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;

/// What was read from the socket and not opened yet.
pub struct Input {
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Input {
    /// Room for `len` bytes, which is the most that may be needed at once.
    pub fn new(len: usize) -> Self {
        Self {
            buffer: vec![0; len].into(),
            from: 0,
            to: 0,
        }
    }

    /// Reads until `len` bytes are there; false when the other end closes before the first of them.
    pub fn need(&mut self, tcp: &mut TcpStream, len: usize) -> std::io::Result<bool> {
        if self.buffer.len() - self.from < len {
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        while self.to - self.from < len {
            match tcp.read(self.buffer.get_mut(self.to..).unwrap_or_default()) {
                Ok(0) if self.from == self.to => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.to += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Takes off what is there.
    pub fn take(&mut self, len: usize) -> &[u8] {
        let from = self.from;
        self.from += len;
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
        self.buffer.get(from..from + len).unwrap_or_default()
    }
}
