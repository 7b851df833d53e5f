//! Starting to write a file to its disk before fsync(2) waits for it.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Starts writing out len bytes of `file` from `offset` on, and does not wait (sync_file_range(2)).
/// A hint: file systems without a disk refuse it, which is no error.
pub fn start(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
        return;
    };
    // SAFETY: no memory is passed; the descriptor is open as long as `file` lives.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE);
    }
}
