//! The receiving side of the socket: many messages come with one read.

use std::io::{ErrorKind, IoSliceMut, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

/// What was read from the socket and not opened yet.
pub struct Input {
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
    /// Bytes read at once, if no more are needed.
    most: usize,
}

impl Input {
    /// Room for `len` bytes, which is the most that may be needed at once.
    pub fn new(len: usize) -> Self {
        Self {
            buffer: vec![0; len].into(),
            from: 0,
            to: 0,
            most: len,
        }
    }

    /// From now on no more than `most` bytes are read before they are needed.
    pub fn read_ahead(&mut self, most: usize) {
        self.most = most;
    }

    /// Reads until `len` bytes are there; false when the other end closes before the first of them.
    pub fn need(&mut self, tcp: &mut TcpStream, len: usize) -> std::io::Result<bool> {
        if self.buffer.len() - self.from < len {
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        while self.to - self.from < len {
            let end = (self.from + len.max(self.most)).min(self.buffer.len());
            match tcp.read(self.buffer.get_mut(self.to..end).unwrap_or_default()) {
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
    pub fn take(&mut self, len: usize) -> &mut [u8] {
        let from = self.from;
        self.from += len;
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
        self.buffer.get_mut(from..from + len).unwrap_or_default()
    }

    /// Reads just these, one after the other, without a copy of what has not been read yet.
    pub fn scatter(
        &mut self,
        tcp: &TcpStream,
        mut into: &mut [IoSliceMut<'_>],
    ) -> std::io::Result<()> {
        while let Some(first) = into.first_mut() {
            let len = first.len().min(self.to - self.from);
            if len == 0 && !first.is_empty() {
                break;
            }
            if let Some(part) = first.get_mut(..len) {
                part.copy_from_slice(self.take(len));
            }
            IoSliceMut::advance_slices(&mut into, len);
        }
        while !into.is_empty() {
            // All at once, if nothing is in the way.
            let all = MsgFlags::MSG_WAITALL;
            match recvmsg::<()>(tcp.as_raw_fd(), into, None, all).map(|got| got.bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => IoSliceMut::advance_slices(&mut into, n),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}
