//! Which state of a file it was that was read.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Device, inode, length, and when it was last changed (s, ns): whatever is written to a file by write(2), or done to its
/// times, changes the last one, on file systems that keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version(u64, u64, u64, i64, i64);

impl Version {
    /// Of a file that has just been opened: NFS asks the server then, and not for a path.
    #[must_use]
    pub fn of(file: &Metadata) -> Version {
        Version(
            file.dev(),
            file.ino(),
            file.len(),
            file.ctime(),
            file.ctime_nsec(),
        )
    }

    /// Whether it is older than the steps in which file systems tell the time: what comes now is another one.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        const STEP: i64 = 3;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.is_ok_and(|now| self.3.saturating_add(STEP) < now.as_secs() as i64)
    }
}
