//! What is left to be filled in an address space, as the program changes its mappings.

use std::collections::{BTreeMap, BTreeSet};

use super::lazily;
use crate::image::memory::{SpaceId, Vma};
use crate::image::process::Process;
use crate::kernel::uffd::{Event, Uffd};

/// Memory from the map's key on that is still to be looked at; its content stands at `from` in the image.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    pub len: u64,
    pub from: u64,
}

pub struct Space {
    pub uffd: Uffd,
    pub space: SpaceId,
    pub left: BTreeMap<u64, Extent>,
    /// Pages that threads wait for.
    pub waiting: BTreeSet<u64>,
}

impl Space {
    /// All that is to be filled in a process.
    pub fn of(uffd: Uffd, p: &Process) -> Self {
        let extent = |v: &Vma| {
            let (len, from) = (v.len(), v.start);
            (v.start, Extent { len, from })
        };
        Self {
            uffd,
            space: p.space,
            left: p.vmas.iter().filter(|v| lazily(v)).map(extent).collect(),
            waiting: BTreeSet::new(),
        }
    }

    /// Takes `start..end` out of what is left, and gives the pieces.
    pub fn take(&mut self, start: u64, end: u64) -> Vec<(u64, Extent)> {
        let touched: Vec<(u64, Extent)> = self
            .left
            .range(..end)
            .rev()
            .take_while(|(at, e)| *at + e.len > start)
            .map(|(at, e)| (*at, *e))
            .collect();
        let mut taken = Vec::new();
        for (at, e) in touched {
            self.left.remove(&at);
            let (s, t) = (at.max(start), (at + e.len).min(end));
            if at < s {
                self.left.insert(
                    at,
                    Extent {
                        len: s - at,
                        from: e.from,
                    },
                );
            }
            if t < at + e.len {
                self.left.insert(
                    t,
                    Extent {
                        len: at + e.len - t,
                        from: e.from + (t - at),
                    },
                );
            }
            taken.push((
                s,
                Extent {
                    len: t - s,
                    from: e.from + (s - at),
                },
            ));
        }
        taken
    }

    /// Where the content of the page at `addr` stands in the image, and how much there is left around it.
    pub fn find(&self, addr: u64) -> Option<(u64, Extent)> {
        let (at, e) = self.left.range(..=addr).next_back()?;
        (addr < at + e.len).then_some((*at, *e))
    }

    /// Obeys what the program did to its mappings. A child comes back as a space of its own.
    pub fn obey(&mut self, event: Event) -> Option<Space> {
        match event {
            Event::Fault(_) => None,
            Event::Gone { start, end } => {
                self.take(start, end);
                None
            }
            Event::Remap { from, to, len } => {
                for (at, e) in self.take(from, from + len) {
                    self.left.insert(at - from + to, e);
                }
                None
            }
            Event::Fork(uffd) => Some(Space {
                uffd,
                space: self.space,
                left: self.left.clone(),
                waiting: BTreeSet::new(),
            }),
        }
    }
}
