//! Shared memory without a file of its own: MAP_SHARED|MAP_ANONYMOUS, and System V segments (shmget(2)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};

fn check(r: i64, what: &str) -> Result<i64> {
    if r < 0 {
        Err(io::Error::last_os_error()).with_context(|| what.to_owned())
    } else {
        Ok(r)
    }
}

/// How mmap(2), memfd_create(2) and shmget(2) are told the size of huge pages: its logarithm, in the same bits.
pub fn huge_flag(page: Option<u64>) -> i32 {
    page.map_or(0, |p| (p.max(1).ilog2() << libc::MAP_HUGE_SHIFT) as i32)
}

/// An object as MAP_SHARED|MAP_ANONYMOUS makes it, as a descriptor that can be mapped elsewhere; of huge pages of
/// this size where one is given.
pub fn anonymous(size: u64, huge_page: Option<u64>) -> Result<OwnedFd> {
    let page = huge_page.unwrap_or(4096).max(1);
    let len = size.max(1).checked_next_multiple_of(page);
    let len = usize::try_from(len.context("size of shared memory")?)?;
    let huge = huge_page.map_or(0, |_| libc::MAP_HUGETLB) | huge_flag(huge_page);
    // SAFETY: a fresh mapping at an address the kernel chooses; nobody else knows it.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("mapping shared memory");
    }
    let start = at as usize;
    let end = start + len;
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let file = OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: the mapping made above, which nothing refers to.
    unsafe { libc::munmap(at, len) };
    let file = file.with_context(|| format!("opening {path} (needs CAP_CHECKPOINT_RESTORE)"))?;
    Ok(file.into())
}

/// What shmctl(IPC_STAT) tells of a segment.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub key: i32,
    /// Permissions, and SHM_DEST (0o1000) when it goes with its last user.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// How many mappings there are.
    pub attached: u64,
}

/// Flag in [`Segment::mode`]: removed, and gone when nobody maps it any more.
pub const SHM_DEST: u32 = 0o1000;

pub fn stat(id: i32) -> Result<Segment> {
    // SAFETY: all-zero bytes are a valid shmid_ds, plain data.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `ds` is live and of the type IPC_STAT fills.
    let r = unsafe { libc::shmctl(id, libc::IPC_STAT, &mut ds) };
    check(r.into(), &format!("asking for shared memory segment {id}"))?;
    Ok(Segment {
        key: ds.shm_perm.__key,
        mode: u32::from(ds.shm_perm.mode),
        uid: ds.shm_perm.uid,
        gid: ds.shm_perm.gid,
        size: ds.shm_segsz as u64,
        attached: ds.shm_nattch,
    })
}

/// Makes a segment, of huge pages of this size where one is given; with `id` if nobody has it and we may choose
/// (CAP_CHECKPOINT_RESTORE).
pub fn create(key: i32, size: u64, huge_page: Option<u64>, mode: u32, id: i32) -> Result<i32> {
    // Without the right to choose, any id is taken.
    let _ = std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string());
    let huge = huge_page.map_or(0, |_| libc::SHM_HUGETLB) | huge_flag(huge_page);
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32 | huge;
    // SAFETY: plain numbers.
    let r = unsafe { libc::shmget(key, size as usize, flags) };
    Ok(check(
        r.into(),
        &format!("making a shared memory segment with key {key:#x}"),
    )? as i32)
}

/// Gives a segment to its owner.
pub fn set_owner(id: i32, uid: u32, gid: u32, mode: u32) -> Result<()> {
    // SAFETY: as in `stat`.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    ds.shm_perm.uid = uid;
    ds.shm_perm.gid = gid;
    ds.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: `ds` is live; IPC_SET reads owner, group and mode of it.
    let r = unsafe { libc::shmctl(id, libc::IPC_SET, &mut ds) };
    check(
        r.into(),
        &format!("setting the owner of shared memory segment {id}"),
    )
    .map(drop)
}

/// Removes a segment; its mappings stay.
pub fn remove(id: i32) -> Result<()> {
    // SAFETY: IPC_RMID takes no structure.
    let r = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    check(r.into(), &format!("removing shared memory segment {id}")).map(drop)
}

/// Shared memory mapped to us, for writing its content.
pub struct Mapped {
    at: *mut u8,
    size: usize,
    attached: bool,
}

impl Mapped {
    /// A file, from its beginning.
    pub fn new(file: &File, size: u64) -> Result<Self> {
        let size = usize::try_from(size)?;
        // SAFETY: a fresh mapping at an address the kernel chooses; nobody else knows it.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mapping shared memory");
        }
        Ok(Self {
            at: at.cast(),
            size,
            attached: false,
        })
    }

    /// A segment.
    pub fn attach(id: i32, size: u64) -> Result<Self> {
        // SAFETY: a null address lets the kernel choose a free one.
        let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if at as isize == -1 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("attaching shared memory segment {id}"));
        }
        Ok(Self {
            at: at.cast(),
            size: size as usize,
            attached: true,
        })
    }

    /// Writes `data` at `offset`, of whole pages; what lies outside the object is left out.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let offset = usize::try_from(offset)?;
        let len = data.len().min(self.size.saturating_sub(offset));
        if len == 0 {
            return Ok(());
        }
        // SAFETY: `offset + len` is at most the object's size, which stays mapped while we live; the source is
        // ours and cannot overlap a mapping made after it. Pages that cannot be had are an error first, not a
        // signal.
        unsafe {
            let to = self.at.add(offset);
            if libc::madvise(to.cast(), len, libc::MADV_POPULATE_WRITE) < 0 {
                let e = io::Error::last_os_error();
                // Linux before 5.14 has no such advice.
                if e.raw_os_error() != Some(libc::EINVAL) {
                    return Err(e).context("getting pages of shared memory");
                }
            }
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, len);
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: what mmap or shmat gave; no reference into it is left.
        unsafe {
            if self.attached {
                libc::shmdt(self.at.cast());
            } else {
                libc::munmap(self.at.cast(), self.size);
            }
        }
    }
}
