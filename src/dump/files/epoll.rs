//! epoll instances: /proc tells what is registered under which number, kcmp tells which file that is.

use std::cmp::Ordering;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};

use super::{FdInfo, FileDumper, order};
use crate::dump::tables::Tables;
use crate::image::files::{DescriptionId, EpollEntry, Kind};
use crate::kernel::kcmp;

/// A `tfd:` line of /proc/PID/fdinfo/FD (fs/eventpoll.c, ep_show_fdinfo).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registered {
    fd: i32,
    events: u32,
    data: u64,
    /// Of the file, as stat tells them on most file systems.
    dev: u64,
    ino: u64,
}

pub(super) fn registered(info: &FdInfo) -> Result<Vec<Registered>> {
    let lines = info.lines().filter(|l| l.starts_with("tfd:"));
    lines
        .map(|l| parse(l).with_context(|| format!("line \"{l}\"")))
        .collect()
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:61af sdev:7`
fn parse(line: &str) -> Result<Registered> {
    let words: Vec<&str> = line.split([' ', ':']).filter(|w| !w.is_empty()).collect();
    let value = |name: &str| -> Result<&str> {
        let at = words.iter().position(|w| *w == name);
        match at.and_then(|at| words.get(at + 1)) {
            Some(v) => Ok(v),
            None => bail!("has no {name}"),
        }
    };
    let sdev = u64::from_str_radix(value("sdev")?, 16)?;
    Ok(Registered {
        fd: value("tfd")?.parse()?,
        events: u32::from_str_radix(value("events")?, 16)?,
        data: u64::from_str_radix(value("data")?, 16)?,
        dev: super::user_dev(sdev),
        ino: u64::from_str_radix(value("ino")?, 16)?,
    })
}

impl FileDumper {
    /// Finds the descriptions that epoll instances watch.
    pub(super) fn epolls(&mut self, tables: &mut Tables) -> Result<()> {
        for id in 0..self.open.len() {
            let lines = std::mem::take(&mut self.open[id].registered);
            let mut entries = Vec::with_capacity(lines.len());
            for (n, line) in lines.iter().enumerate() {
                // A number can be there more than once: /proc and kcmp count in the same order.
                let nth = lines[..n].iter().filter(|l| l.fd == line.fd).count() as u32;
                let place = &self.open[id].place;
                match self
                    .epoll_target(id, line, nth)
                    .with_context(|| place.to_string())?
                {
                    Some(description) => entries.push(EpollEntry {
                        fd: line.fd,
                        events: line.events,
                        data: line.data,
                        description,
                    }),
                    None => tables.warn(format!(
                        "{place}: watches a file under number {} that none of the processes has open any more; the entry is left out",
                        line.fd
                    )),
                }
            }
            if let Kind::Epoll { entries: found } = &mut self.open[id].description.kind {
                *found = entries;
            }
        }
        Ok(())
    }

    fn epoll_target(
        &self,
        epoll: usize,
        line: &Registered,
        nth: u32,
    ) -> Result<Option<DescriptionId>> {
        let me = std::process::id() as i32;
        let own = self.open[epoll].own.as_raw_fd();
        let compare = |id: DescriptionId| -> Result<Ordering> {
            let candidate = self.open[id as usize].own.as_raw_fd();
            let found = kcmp::epoll_target(me, candidate, me, own, line.fd, nth)?;
            found.with_context(|| format!("nothing is registered under number {}", line.fd))
        };
        // kcmp compares here as it does among descriptors, so the sorted table can be searched.
        if let Some(known) = self.by_inode.get(&(line.dev, line.ino)) {
            let sorted = &known.sorted;
            let found = order::search(sorted.len(), known.next, |i| compare(sorted[i]))?;
            if let Ok(at) = found {
                return Ok(Some(sorted[at]));
            }
        }
        // File systems with device numbers of their own (overlayfs, btrfs).
        for id in 0..self.open.len() as DescriptionId {
            if compare(id)? == Ordering::Equal {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_with_its_inode() {
        let line =
            "tfd:        5 events: 80000019 data: ffffffffffffffff  pos:0 ino:61af sdev:fe00001";
        let read = parse(line).unwrap();
        assert_eq!(
            (read.fd, read.events, read.data),
            (5, 0x8000_0019, u64::MAX)
        );
        assert_eq!((read.dev, read.ino), (libc::makedev(254, 1), 0x61af));
    }
}
