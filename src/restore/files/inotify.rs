//! inotify instances.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::image::files::InotifyWatch;

/// The kernel counts watches up and there is no other way to get a number than to take and give back those before
/// it. An image that wants more than this is not believed.
const SKIP_MAX: i32 = 1 << 20;

/// An instance with these watches under these numbers, and no events.
pub(super) fn instance(watches: &[InotifyWatch]) -> Result<OwnedFd> {
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
    let mut events = File::from(fd.try_clone()?);
    let mut buffer = vec![0; 64 * 1024];
    while events.read(&mut buffer).is_ok_and(|n| n > 0) {}
    Ok(fd)
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
