//! epoll instances, filled once all that they watch is open.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};

use super::in_body::EpollAdd;
use super::{Builder, Kind};
use crate::image::files::{DescriptionId, EpollEntry};
use crate::kernel::epoll;

pub(super) fn empty() -> Result<OwnedFd> {
    epoll::create().context("epoll_create1")
}

impl Builder<'_> {
    pub(super) fn epolls(&mut self) -> Result<()> {
        let manifest = self.manifest;
        for (id, description) in manifest.descriptions.iter().enumerate() {
            let id = id as DescriptionId;
            if let Kind::Epoll { entries } = &description.kind {
                self.watch(id, entries).with_context(|| self.who(id))?;
            }
        }
        Ok(())
    }

    fn watch(&mut self, id: DescriptionId, entries: &[EpollEntry]) -> Result<()> {
        let mut adds = Vec::new();
        let mut here = Vec::new();
        for entry in entries {
            // A signalfd wakes waiters of the process that added it, so that must be the right one; and what only
            // the body can open only it can add.
            match self.built.fds.get(&entry.description) {
                Some(target) if !self.is_signalfd(entry.description) => here.push(epoll::Entry {
                    target: target.as_fd(),
                    number: entry.fd,
                    events: entry.events,
                    data: entry.data,
                }),
                _ => adds.extend(self.add_in_body(id, entry)),
            }
        }
        if let Some(fd) = self.built.fds.get(&id) {
            epoll::add(fd.as_fd(), &here)?;
        }
        let missing = entries.len() - here.len() - adds.len();
        if missing > 0 {
            self.built.warnings.push(format!(
                "{}: {missing} entries of an epoll instance are for signalfds or pidfds that stand under other numbers now; they are left out",
                self.who(id)
            ));
        }
        self.built.in_body.epoll.extend(adds);
        Ok(())
    }

    fn is_signalfd(&self, id: DescriptionId) -> bool {
        self.manifest
            .descriptions
            .get(id as usize)
            .is_some_and(|d| matches!(d.kind, Kind::SignalFd { .. }))
    }

    /// A process that has both the instance and, under the right number, what it watches.
    fn add_in_body(&self, id: DescriptionId, entry: &EpollEntry) -> Option<EpollAdd> {
        self.manifest.processes.iter().find_map(|p| {
            let epoll = p.fds.iter().find(|f| f.description == id)?;
            p.fds
                .iter()
                .find(|f| f.fd == entry.fd && f.description == entry.description)?;
            Some(EpollAdd {
                pid: p.pid,
                epoll: epoll.fd,
                fd: entry.fd,
                events: entry.events,
                data: entry.data,
            })
        })
    }
}
