//! Buffers for what the kernel copies by the page.

use std::ops::{Deref, DerefMut};

use super::arch;

/// Bytes of which the first is a page's first, as it is of what is copied to them. Large buffers of malloc begin 16 bytes
/// behind a page's beginning: there each load waits for the store 4096 bytes before it that has the same low bits, and
/// copies take three times as long (REP MOVSB on an AMD EPYC).
#[derive(Debug, Default)]
pub struct Buffer {
    space: Vec<u8>,
    begin: usize,
    len: usize,
}

const PAGE: usize = arch::PAGE as usize;

impl Buffer {
    /// Of that many zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let mut buffer = Self::default();
        buffer.resize(len);
        buffer
    }

    /// What it held is anything then, unless that was as long.
    pub fn resize(&mut self, len: usize) {
        if self.space.len() < len + PAGE {
            self.space = vec![0; len + PAGE];
            // Which it may not tell, by its word.
            let begin = self.space.as_ptr().align_offset(PAGE);
            self.begin = if begin < PAGE { begin } else { 0 };
        }
        self.len = len;
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let end = self.begin + self.len;
        self.space.get(self.begin..end).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let end = self.begin + self.len;
        self.space.get_mut(self.begin..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_page_however_long_it_becomes() {
        let mut buffer = Buffer::new(1);
        for len in [1, 100, 4096, 5000, 1 << 20, 10, 0] {
            buffer.resize(len);
            assert_eq!(buffer.len(), len);
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
            assert!((buffer.as_ptr() as usize).is_multiple_of(PAGE) || len == 0);
        }
        assert!(Buffer::default().is_empty());
    }
}
