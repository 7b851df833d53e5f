//! Asynchronous I/O (io_setup(2)).

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::Bytes;

/// Bytes of a struct io_event, and of what precedes the events of a ring.
pub const EVENT: u64 = 32;

/// A context, which is its ring of events. No request is under way in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoRing {
    /// What io_setup was asked for.
    pub requests: u32,
    /// Events that the ring has room for; one place is always free.
    pub events: u32,
    /// Where the first event is that was not read.
    pub head: u32,
    /// Those events, struct io_event each.
    #[serde(default, skip_serializing_if = "none")]
    pub unread: Bytes,
}

fn none(bytes: &Bytes) -> bool {
    bytes.is_empty()
}

impl IoRing {
    /// How many events were not read.
    #[must_use]
    pub fn count(&self) -> u32 {
        (self.unread.len() as u64 / EVENT) as u32
    }

    /// Whether it is possible in a mapping of so many bytes.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self, len: u64) -> Result<()> {
        ensure!(
            u64::from(self.events).checked_add(1) == Some(len / EVENT) && self.requests > 0,
            "a ring of {} events, for {} requests, in {len} bytes is impossible",
            self.events,
            self.requests
        );
        ensure!(
            self.head < self.events
                && (self.unread.len() as u64).is_multiple_of(EVENT)
                && self.unread.len() as u64 / EVENT < u64::from(self.events),
            "{} bytes of events that were not read, from number {} of {}, are impossible",
            self.unread.len(),
            self.head,
            self.events
        );
        Ok(())
    }
}
