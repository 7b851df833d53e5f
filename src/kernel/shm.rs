//! Shared memory without a file of its own: MAP_SHARED|MAP_ANONYMOUS, and System V segments (shmget(2)).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};

fn check(r: i64, what: &str) -> Result<i64> {
    if r < 0 {
        Err(io::Error::last_os_error()).with_context(|| what.to_owned())
    } else {
        Ok(r)
    }
}

/// An object as MAP_SHARED|MAP_ANONYMOUS makes it, as a descriptor that can be mapped elsewhere.
pub fn anonymous(size: u64) -> Result<OwnedFd> {
    let len = usize::try_from(size.max(1)).context("size of shared memory")?;
    // SAFETY: a fresh mapping at an address the kernel chooses; nobody else knows it.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("mapping shared memory");
    }
    let start = at as usize;
    let end = start + len.next_multiple_of(4096);
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

/// Makes a segment; with `id` if nobody has it and we may choose (CAP_CHECKPOINT_RESTORE).
pub fn create(key: i32, size: u64, mode: u32, id: i32) -> Result<i32> {
    // Without the right to choose, any id is taken.
    let _ = std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string());
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32;
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

/// A segment attached to us, for writing its content.
pub struct Attached {
    at: *mut u8,
    size: usize,
}

impl Attached {
    pub fn new(id: i32, size: u64) -> Result<Self> {
        // SAFETY: a null address lets the kernel choose a free one.
        let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if at as isize == -1 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("attaching shared memory segment {id}"));
        }
        Ok(Self {
            at: at.cast(),
            size: size as usize,
        })
    }

    /// Writes `data` at `offset`; what lies outside the segment is left out.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let len = data.len().min(self.size.saturating_sub(offset));
        // SAFETY: `offset + len` is at most the segment's size, which stays attached while we live; the
        // source is ours and cannot overlap a mapping made after it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.at.add(offset), len) };
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the address shmat gave; no reference into it is left.
        unsafe { libc::shmdt(self.at.cast()) };
    }
}
