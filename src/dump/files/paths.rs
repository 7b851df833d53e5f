//! What was opened by a name: regular files, directories, devices, and O_PATH of anything.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::sys::stat::{major, minor};

use super::Seen;
use crate::dump::tables::{Tables, other_name};
use crate::image::files::{Kind, MessageQueue};
use crate::kernel::fds;
use crate::kernel::kmem::{KernelMemory, dnotify};
use crate::kernel::proc_file;

/// Character devices that are the same on every machine (linux/major.h, admin-guide/devices.txt):
/// null, zero, full, random, urandom.
const MEMORY_DEVICES: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];
const MQUEUE_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x19800202);

/// A file that is found by its path again, or whose content has to be carried because it is not.
pub(super) fn kind(seen: &Seen<'_>, pids: &BTreeSet<i32>, tables: &mut Tables) -> Result<Kind> {
    let link = &seen.place.link;
    let file_type = seen.meta.mode() & libc::S_IFMT;
    no_watch(seen)?;
    let same = std::fs::symlink_metadata(link)
        .is_ok_and(|m| (m.dev(), m.ino()) == (seen.meta.dev(), seen.meta.ino()));
    if same {
        return Ok(Kind::Path {
            file: tables.file(link, seen.meta, false),
            file_type,
            rdev: seen.meta.rdev(),
        });
    }
    if link.starts_with("/secretmem") {
        return Err(seen.place.refuse(
            "it is secret memory (memfd_secret), which nobody else may read",
            "close it first",
        ));
    }
    if file_type != libc::S_IFREG {
        return Err(seen.place.refuse(
            "its name is gone, or names something else now, and only regular files are carried",
            "close it, or put it back in its place",
        ));
    }
    let fs = nix::sys::statfs::fstatfs(seen.own.as_fd())
        .with_context(|| format!("{}: fstatfs", seen.place))?;
    if fs.filesystem_type() == MQUEUE_MAGIC {
        return message_queue(seen, pids);
    }
    if let Some(name) = other_name(link, seen.meta) {
        return Ok(Kind::Path {
            file: tables.file(&name, seen.meta, false),
            file_type,
            rdev: 0,
        });
    }
    if seen.meta.nlink() > 0 {
        if seen.info.flags & libc::O_ACCMODE != libc::O_RDONLY {
            return Err(seen.place.refuse(
                "its name is gone, and it has another that is not in the same directory (or its mount is hidden): what is written after a restore would not be there",
                "put it back in its place (ln), or close it",
            ));
        }
        tables.warn(format!(
            "{}: has another name than it was opened by (or its mount is hidden); its content is carried, its identity is not",
            seen.place
        ));
    }
    let memory = tables
        .shared_file(seen.own.as_fd(), link)
        .with_context(|| seen.place.to_string())?;
    Ok(Kind::Memory { memory })
}

/// Refuses a directory that was given an owner to be told of changes (F_NOTIFY gives it one), which only kernel memory
/// knows.
fn no_watch(seen: &Seen<'_>) -> Result<()> {
    let is_directory = seen.meta.mode() & libc::S_IFMT == libc::S_IFDIR;
    if !is_directory || seen.info.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    let owner =
        fds::owner(seen.own.as_fd()).with_context(|| format!("{}: F_GETOWN_EX", seen.place))?;
    if owner.pid == 0 {
        return Ok(());
    }
    let kernel = KernelMemory::get();
    match kernel.and_then(|k| dnotify::is_watched(k, seen.own.as_fd())) {
        Ok(false) => Ok(()),
        Ok(true) => Err(seen.place.refuse(
            "the program is told when this directory changes (F_NOTIFY), which cannot be carried",
            "close it first",
        )),
        Err(_) => Err(seen.place.refuse(
            "this directory has an owner, as those have of whose changes a program is told (F_NOTIFY), which cannot be carried",
            "close it first, or run mistctl as root, who can see whether it is so",
        )),
    }
}

/// A character device that is no terminal.
pub(super) fn device(seen: &Seen<'_>, pids: &BTreeSet<i32>, tables: &mut Tables) -> Result<Kind> {
    let rdev = seen.meta.rdev();
    if MEMORY_DEVICES.contains(&(major(rdev), minor(rdev))) {
        return kind(seen, pids, tables);
    }
    Err(seen.place.refuse(
        "devices other than null, zero, full, random, urandom and terminals hold state that nobody can carry",
        "close it before the dump",
    ))
}

/// Who is told of the queue's next message, as reading its file tells (mq_overview(7)).
fn notified(seen: &Seen<'_>) -> Option<i32> {
    let text = proc_file::text(format!("/proc/self/fd/{}", seen.own.as_raw_fd())).ok()?;
    let (_, pid) = text.trim_end().rsplit_once("NOTIFY_PID:")?;
    pid.trim().parse().ok()
}

/// Files of the mqueue file system are queues that mq_open(3) finds under their name.
fn message_queue(seen: &Seen<'_>, pids: &BTreeSet<i32>) -> Result<Kind> {
    let what = || format!("{}: mq_getattr", seen.place);
    if seen.meta.nlink() == 0 {
        return Err(seen.place.refuse(
            "it is a message queue whose name was removed (mq_unlink)",
            "close it first",
        ));
    }
    if notified(seen).is_some_and(|pid| pids.contains(&pid)) {
        return Err(seen.place.refuse(
            "it is a message queue that is to tell the program of its next message (mq_notify), which cannot be carried",
            "let the program take that back first (mq_notify(queue, NULL))",
        ));
    }
    let queue = fds::message_queue(seen.own.as_fd()).with_context(what)?;
    Ok(Kind::MessageQueue(MessageQueue {
        name: seen.place.link.clone(),
        mode: seen.meta.mode() & 0o7777,
        max_messages: queue.max_messages,
        message_size: queue.message_size,
        messages: queue.messages,
    }))
}
