//! Files of /proc, read while somebody stands still for it: std::fs::read asks for a size first, which is 0, and then
//! gropes with 32 bytes, 64 and so on, ten calls for a line of text.

use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use procfs::process::{Stat, Status};
use procfs::{FromRead, ProcError, ProcResult};

/// All of a file.
///
/// # Errors
/// As open(2) and read(2).
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    const STEP: usize = 4096;
    let mut file = File::open(path)?;
    let mut all = vec![0; STEP];
    let mut len = 0;
    loop {
        match file.read(all.get_mut(len..).unwrap_or_default()) {
            Ok(0) => {
                all.truncate(len);
                return Ok(all);
            }
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if all.len() - len < STEP / 2 {
            all.resize(len + STEP, 0);
        }
    }
}

/// The same, of text.
///
/// # Errors
/// As [`read`]; InvalidData for what is not UTF-8.
pub fn text(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The numbers of processors, of nodes and the like that a file of /sys lists, as ranges: "0-3,8" (cpumap_print_to_pagebuf
/// in include/linux/cpumask.h). None of them is above 65535.
///
/// # Errors
/// As [`text`]; InvalidData for anything else.
pub fn numbers(path: impl AsRef<Path>) -> io::Result<Vec<RangeInclusive<u64>>> {
    let text = text(path)?;
    ranges(text.trim()).ok_or_else(|| {
        let what = format!("{text:?} is no list of numbers");
        io::Error::new(io::ErrorKind::InvalidData, what)
    })
}

fn ranges(text: &str) -> Option<Vec<RangeInclusive<u64>>> {
    let range = |range: &str| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to): (u16, u16) = (from.parse().ok()?, to.parse().ok()?);
        Some(from.into()..=to.into())
    };
    text.split(',').map(range).collect()
}

/// /proc/loadavg, to be read over and over.
#[derive(Debug)]
pub struct LastId(Option<File>);

impl LastId {
    /// Where it cannot be opened no id is known.
    pub fn open() -> Self {
        Self(File::open("/proc/loadavg").ok())
    }

    /// The id that the kernel gave away last, of a process or a thread, in our pid namespace.
    pub fn read(&self) -> Option<i32> {
        let mut line = [0; 128];
        let len = self.0.as_ref()?.read_at(&mut line, 0).ok()?;
        let line = std::str::from_utf8(line.get(..len)?).ok()?;
        line.trim_end().rsplit(' ').next()?.parse().ok()
    }
}

/// What /proc/TID/stat tells, whatever bytes the name in it has: the kernel cuts names at 15 bytes, within a letter too.
///
/// # Errors
/// NotFound where there is no such thread.
pub fn stat(tid: i32) -> ProcResult<Stat> {
    parsed(format!("/proc/{tid}/stat"))
}

/// /proc/TID/status, likewise.
///
/// # Errors
/// NotFound where there is no such thread.
pub fn status(tid: i32) -> ProcResult<Status> {
    parsed(format!("/proc/{tid}/status"))
}

/// A file that has names of processes in it.
///
/// # Errors
/// NotFound where there is none.
pub fn parsed<T: FromRead>(path: String) -> ProcResult<T> {
    let bytes = match read(&path) {
        Ok(bytes) => bytes,
        Err(e) => {
            let path = Some(path.into());
            return Err(match e.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => ProcError::NotFound(path),
                Some(libc::EACCES | libc::EPERM) => ProcError::PermissionDenied(path),
                _ => ProcError::Io(e, path),
            });
        }
    };
    T::from_read(String::from_utf8_lossy(&bytes).as_bytes())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_it_reads_is_what_is_there() {
        // The last is long, and changes with what the kernel loads.
        for path in ["/proc/self/auxv", "/proc/self/limits", "/proc/kallsyms"] {
            let right = (0..1000).any(|_| {
                let before = std::fs::read(path).unwrap();
                let read = super::read(path).unwrap();
                let unchanged = before == std::fs::read(path).unwrap();
                assert!(!unchanged || read == before, "{path}");
                unchanged
            });
            assert!(right, "{path} never stays the same");
        }
        assert!(super::read("/proc/nothing").is_err());
    }

    #[test]
    fn a_new_thread_has_another_id_than_the_last() {
        let ids = super::LastId::open();
        let before = ids.read();
        assert!(before.is_some());
        std::thread::spawn(|| {}).join().unwrap();
        assert_ne!(ids.read(), before);
    }

    #[test]
    fn lists_of_the_kernel_are_ranges() {
        assert_eq!(super::ranges("0-3,8"), Some(vec![0..=3, 8..=8]));
        assert_eq!(super::ranges("0"), Some(vec![0..=0]));
        for none in ["", "none", "3-", "-", "1,", "65536"] {
            assert_eq!(super::ranges(none), None, "{none}");
        }
    }
}
