//! inotify instances: what they watch, by name.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use anyhow::{Context, Result, bail};

use super::Seen;
use crate::dump::tables::Tables;
use crate::image::files::{InotifyWatch, Kind};
use crate::kernel::fds;

/// An `inotify` line of /proc/PID/fdinfo/FD (fs/notify/fdinfo.c).
struct Watch {
    wd: i32,
    ino: u64,
    dev: u64,
    mask: u32,
    handle_type: i32,
    handle: Vec<u8>,
}

pub(super) fn kind(seen: &Seen<'_>, tables: &mut Tables) -> Result<Kind> {
    let mut mounts = HashMap::new();
    let mut watches = Vec::new();
    for line in seen.info.lines().filter(|l| l.starts_with("inotify ")) {
        let watch = parse(line).with_context(|| format!("line \"{line}\""))?;
        let path = match path(&watch, &mut mounts) {
            Ok(path) => path,
            Err(e) => {
                return Err(seen.place.refuse(
                    &format!(
                        "the file that watch {} is for cannot be found by name: {e:#}",
                        watch.wd
                    ),
                    "remove the watch, or run as root",
                ));
            }
        };
        watches.push(InotifyWatch {
            wd: watch.wd,
            path,
            mask: watch.mask,
        });
    }
    watches.sort_by_key(|w| w.wd);
    let queued = fds::readable(seen.own.as_fd()).context("FIONREAD")?;
    if queued > 0 {
        tables.warn(format!(
            "{}: {queued} bytes of events that have not been read stay behind, for they cannot be read without being taken; \
             a restored program finds IN_Q_OVERFLOW in their place",
            seen.place
        ));
    }
    Ok(Kind::Inotify { watches, queued })
}

/// `inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e..`
fn parse(line: &str) -> Result<Watch> {
    let value = |name: &str| -> Result<&str> {
        let found = line
            .split_whitespace()
            .filter_map(|w| w.split_once(':'))
            .find(|(n, _)| *n == name);
        match found {
            Some((_, v)) => Ok(v),
            None => bail!("has no {name}"),
        }
    };
    let hex = |name: &str| -> Result<u64> { Ok(u64::from_str_radix(value(name)?, 16)?) };
    let digits = value("f_handle")?;
    let handle = (0..digits.len() / 2)
        .map(|i| u8::from_str_radix(digits.get(2 * i..2 * i + 2).unwrap_or(""), 16))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Watch {
        wd: value("wd")?.parse()?,
        ino: hex("ino")?,
        dev: super::user_dev(hex("sdev")?),
        mask: hex("mask")? as u32,
        handle_type: hex("fhandle-type")? as i32,
        handle,
    })
}

/// The name of what is watched: its file handle, opened on a mount of its file system.
fn path(watch: &Watch, mounts: &mut HashMap<u64, Option<File>>) -> Result<String> {
    let mount = mounts
        .entry(watch.dev)
        .or_insert_with(|| mount(watch.dev).ok())
        .as_ref()
        .with_context(|| {
            let (major, minor) = (libc::major(watch.dev), libc::minor(watch.dev));
            format!("no mount of device {major}:{minor} can be opened")
        })?;
    let file: OwnedFd = fds::open_by_handle(mount.as_fd(), watch.handle_type, &watch.handle)
        .context("open_by_handle_at (needs CAP_DAC_READ_SEARCH)")?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let meta = std::fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
    if meta.ino() != watch.ino {
        bail!("{} is another file now", path.display());
    }
    match path.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(path) => bail!("{path:?} is not UTF-8"),
    }
}

/// Something open on the file system with this device number.
fn mount(dev: u64) -> Result<File> {
    let wanted = format!("{}:{}", libc::major(dev), libc::minor(dev));
    let text = std::fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    for line in text.lines() {
        let mut words = line.split(' ');
        if words.nth(2) != Some(&wanted) {
            continue;
        }
        let Some(point) = words.nth(1) else { continue };
        let open = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(unescape(point));
        // A mount can be hidden below another.
        if let Ok(file) = open
            && file.metadata().is_ok_and(|m| m.dev() == dev)
        {
            return Ok(file);
        }
    }
    bail!("not mounted")
}

/// Blanks and the like stand as \040 in mountinfo (proc_pid_mountinfo(5)).
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        match part.get(..3).and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(part.get(3..).unwrap_or(""));
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape("/"), "/");
    }
}
