//! Memory that several mappings or descriptors share: made and filled before the bodies are forked.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::files::memfd;
use crate::image::memory::{SharedKind, SharedMemory};
use crate::image::store::Image;
use crate::kernel::{fds, shm};

/// The objects of an image by index.
#[derive(Default)]
pub struct SharedObjects {
    /// What can be mapped through a descriptor.
    pub fds: BTreeMap<u32, OwnedFd>,
    /// Ids of System V segments, and whether they go with their last user.
    pub segments: BTreeMap<u32, Segment>,
    pub bytes: u64,
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub id: i32,
    pub ephemeral: bool,
    /// Made by us, to be removed when the restore fails.
    made: bool,
}

impl SharedObjects {
    /// Makes every object. Its descriptors have numbers from `floor` on.
    pub fn new(image: &Image, floor: i32) -> Result<Self> {
        let mut me = Self::default();
        for (i, object) in image.manifest.shared_memory.iter().enumerate() {
            let i = i as u32;
            me.one(image, i, object, floor)
                .with_context(|| format!("shared memory object {i}"))?;
        }
        Ok(me)
    }

    fn one(&mut self, image: &Image, i: u32, object: &SharedMemory, floor: i32) -> Result<()> {
        if let SharedKind::SysV { .. } = object.kind {
            return self.segment(image, i, object);
        }
        let fd = match object.kind {
            SharedKind::Anonymous => shm::anonymous(object.size, object.huge_page)?,
            _ => memfd::create(object, &mut self.warnings)?,
        };
        let file = File::from(fds::dup_above(fd.as_fd(), floor)?);
        drop(fd);
        if object.huge_page.is_some() {
            // Its file system reads and maps, and does not write.
            let mut to = shm::Mapped::new(&file, object.size).with_context(|| few(object))?;
            self.fill(image, object, &mut |at, data| to.write(at, data))?;
        } else {
            self.fill(image, object, &mut |at, data| {
                Ok(file.write_all_at(data, at)?)
            })?;
        }
        let fd = OwnedFd::from(file);
        memfd::finish(object, fd.as_fd())?;
        self.fds.insert(i, fd);
        Ok(())
    }

    fn fill(
        &mut self,
        image: &Image,
        object: &SharedMemory,
        write: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0u8; 256 << 10];
        let mut scratch = Vec::new();
        let end = object.size.next_multiple_of(4096);
        for run in image.pages().runs(object.space, 0, end, buffer.len()) {
            let run = run?;
            let out = buffer
                .get_mut(..run.bytes())
                .context("a run of pages is too long")?;
            image.pages().read_run(&run, out, &mut scratch)?;
            let len = object.size.saturating_sub(run.addr()).min(out.len() as u64) as usize;
            write(run.addr(), &out[..len])?;
            self.bytes += len as u64;
        }
        Ok(())
    }

    /// A segment outlives its users: the one that is still there is attached again, and gets its old
    /// content back unless somebody else uses it.
    fn segment(&mut self, image: &Image, i: u32, object: &SharedMemory) -> Result<()> {
        let SharedKind::SysV {
            key,
            shmid,
            mode,
            uid,
            gid,
        } = object.kind
        else {
            return Ok(());
        };
        let ephemeral = mode & shm::SHM_DEST != 0;
        let whole = |size: u64| size.next_multiple_of(object.huge_page.unwrap_or(1).max(1));
        let there = shm::stat(shmid).ok().filter(|s| {
            s.key == key && whole(s.size) == object.size && s.uid == uid && s.gid == gid
        });
        let (id, attached) = match there {
            Some(s) => (shmid, s.attached),
            None => {
                let made = shm::create(key, object.size, object.huge_page, mode, shmid);
                (made.with_context(|| few(object))?, 0)
            }
        };
        self.segments.insert(
            i,
            Segment {
                id,
                ephemeral,
                made: there.is_none(),
            },
        );
        if id != shmid {
            self.warnings
                .push(format!("shared memory segment {shmid} has the id {id} now"));
        }
        if attached > 0 {
            self.warnings.push(format!(
                "shared memory segment {id} is in use by others; its present content was left alone"
            ));
            return Ok(());
        }
        let mut to = shm::Mapped::attach(id, object.size)?;
        self.fill(image, object, &mut |at, data| to.write(at, data))?;
        if there.is_none() {
            shm::set_owner(id, uid, gid, mode)?;
        }
        Ok(())
    }

    /// The segments are mapped by those who use them: those that are to go with them are marked so, and
    /// the others are kept.
    pub fn keep(&mut self) -> Result<()> {
        for s in self.segments.values_mut() {
            s.made = false;
            if s.ephemeral {
                shm::remove(s.id)?;
            }
        }
        Ok(())
    }
}

/// What to do when an object cannot be had.
fn few(object: &SharedMemory) -> String {
    match object.huge_page {
        Some(page) => format!(
            "{} huge pages of {} KiB are needed here (/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages)",
            object.size.div_ceil(page.max(1)),
            page >> 10,
            page >> 10
        ),
        None => format!("{} bytes of memory are needed here", object.size),
    }
}

impl Drop for SharedObjects {
    fn drop(&mut self) {
        for s in self.segments.values().filter(|s| s.made) {
            let _ = shm::remove(s.id);
        }
    }
}
