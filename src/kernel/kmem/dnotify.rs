//! Directories of which a program is told when they change (F_NOTIFY of fcntl(2)). Nobody else can ask for that.

use std::os::fd::BorrowedFd;

use anyhow::{Result, bail};

use super::KernelMemory;

/// More watches of one directory than there are.
const MOST: usize = 1 << 16;

/// Whether a watch was set with the description behind `fd`, a directory.
///
/// # Errors
/// When kernel memory cannot be read, or the kernel keeps this otherwise.
pub fn is_watched(kernel: &KernelMemory, fd: BorrowedFd<'_>) -> Result<bool> {
    let file = kernel.file(fd)?;
    let inode = kernel.pointer(file, "file", "f_inode")?;
    let marks = kernel.pointer(inode, "inode", "i_fsnotify_marks")?;
    if marks == 0 {
        return Ok(false);
    }
    let link = kernel.field(0, "fsnotify_mark", "obj_list")?;
    let (watches, next, of) = (
        kernel.field(0, "dnotify_mark", "dn")?,
        kernel.field(0, "dnotify_struct", "dn_next")?,
        kernel.field(0, "dnotify_struct", "dn_filp")?,
    );
    let mut at = kernel.pointer(marks, "fsnotify_mark_connector", "list")?;
    for _ in 0..MOST {
        if at == 0 {
            return Ok(false);
        }
        // Other kinds of marks have a number there, or what leads nowhere.
        let mut watch = kernel.u64(at.wrapping_sub(link).wrapping_add(watches))?;
        for _ in 0..MOST {
            match (watch as i64) < 0 {
                true if kernel.u64(watch.wrapping_add(of)).is_ok_and(|f| f == file) => {
                    return Ok(true);
                }
                true => watch = kernel.u64(watch.wrapping_add(next)).unwrap_or(0),
                false => break,
            }
        }
        at = kernel.u64(at)?;
    }
    bail!("a list of watches without an end")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd};

    use super::{KernelMemory, is_watched};

    #[test]
    fn the_description_that_watches_is_known() {
        let Ok(kernel) = KernelMemory::get() else {
            return eprintln!("SKIPPED: needs CAP_BPF");
        };
        let dir = tempfile::tempdir().unwrap();
        const DN_DELETE: i32 = 8;
        let [watching, other] = [(); 2].map(|()| File::open(dir.path()).unwrap());
        assert!(!is_watched(kernel, watching.as_fd()).unwrap());
        // Nothing is deleted in it before it is closed: no signal comes.
        // SAFETY: F_NOTIFY takes a number.
        let r = unsafe { libc::fcntl(watching.as_raw_fd(), libc::F_NOTIFY, DN_DELETE) };
        assert_eq!(r, 0);
        assert!(is_watched(kernel, watching.as_fd()).unwrap());
        assert!(!is_watched(kernel, other.as_fd()).unwrap());
    }
}
