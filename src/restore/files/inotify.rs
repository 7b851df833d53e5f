//! inotify instances.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::image::files::InotifyWatch;
use crate::kernel::fds;

/// The kernel counts watches up and there is no other way to get a number than to take and give back those before
/// it. An image that wants more than this is not believed.
const SKIP_MAX: i32 = 1 << 20;

/// A queue that may be longer than this is not filled to its end.
const QUEUE_MAX: usize = 1 << 20;
/// sizeof(struct inotify_event), without a name.
const EVENT: usize = 16;

/// An instance with these watches under these numbers. Where events are `lost`, it says so as the kernel does when it
/// had to drop some: with IN_Q_OVERFLOW, for which programs look again at what they watch.
pub(super) fn instance(watches: &[InotifyWatch], lost: bool) -> Result<OwnedFd> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .context("inotify_init1 (see /proc/sys/fs/inotify)")?;
    let mut sorted: Vec<&InotifyWatch> = watches.iter().collect();
    sorted.sort_by_key(|w| w.wd);
    let mut last = 0;
    for watch in sorted {
        if watch.wd - last > SKIP_MAX {
            bail!("a watch has number {}, which is out of reach", watch.wd);
        }
        add(&inotify, watch).with_context(|| format!("watch {} of {}", watch.wd, watch.path))?;
        last = watch.wd;
    }
    let fd = inotify.as_fd().try_clone_to_owned()?;
    // Each number that was given back left an event.
    take(&fd, usize::MAX)?;
    if lost {
        overflow(&inotify, &fd).context("a queue that has overflown")?;
    }
    Ok(fd)
}

/// Reads up to `bytes` of events, of which none has a name.
fn take(fd: &OwnedFd, mut bytes: usize) -> Result<()> {
    let mut events = File::from(fd.try_clone()?);
    let mut buffer = vec![0; 64 * 1024];
    while bytes > 0 {
        let most = bytes.min(buffer.len());
        match events.read(buffer.get_mut(..most).unwrap_or_default()) {
            Ok(n) if n > 0 => bytes = bytes.saturating_sub(n),
            _ => break,
        }
    }
    Ok(())
}

/// Leaves IN_Q_OVERFLOW as the only event. The kernel queues it behind the last that fits, and nobody else can.
fn overflow(inotify: &Inotify, fd: &OwnedFd) -> Result<()> {
    let most = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .context("/proc/sys/fs/inotify/max_queued_events")?;
    let most: usize = most.trim().parse()?;
    if most > QUEUE_MAX {
        bail!("the queue takes {most} events");
    }
    let scratch = memfd_create(c"mist-events", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let wd = inotify.add_watch(
        format!("/proc/self/fd/{}", scratch.as_raw_fd()).as_str(),
        AddWatchFlags::IN_ACCESS | AddWatchFlags::IN_MODIFY,
    )?;
    // What memfd_create itself has opened makes no events.
    let scratch = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", scratch.as_raw_fd()))?;
    // Two of the same in a row would become one.
    for _ in 0..most / 2 + 1 {
        scratch.write_all_at(&[0], 0)?;
        scratch.read_exact_at(&mut [0], 0)?;
    }
    inotify.rm_watch(wd)?;
    let queued = fds::readable(fd.as_fd())?;
    take(fd, queued.saturating_sub(EVENT))?;
    if fds::readable(fd.as_fd())? != EVENT {
        bail!("{queued} bytes of events were not enough");
    }
    Ok(())
}

fn add(inotify: &Inotify, watch: &InotifyWatch) -> Result<()> {
    // Other bits are the kernel's own and are not taken back.
    let known = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;
    let mask = AddWatchFlags::from_bits_retain(watch.mask & known);
    loop {
        let wd = inotify
            .add_watch(watch.path.as_str(), mask)
            .context("inotify_add_watch")?;
        let number = wd.as_raw();
        if number == watch.wd {
            return Ok(());
        }
        if number > watch.wd {
            bail!("it got number {number}");
        }
        inotify.rm_watch(wd).context("inotify_rm_watch")?;
    }
}
