//! In which pieces a stream's bytes are sent again, so that they take the room they took: each send(2) is charged
//! with its bytes and some hundred more, and how large they were nobody but the kernel knows. What all together are
//! charged with says how large they were on average (SIOCOUTQ of the sender).

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};

use crate::kernel::socket::{self, Extra};
use crate::kernel::sockopt::{self, Queue};
use crate::net::options;

/// More than the kernel puts into one buffer.
const LONGEST: usize = 1 << 17;

/// What pieces of some lengths, or messages, are charged with here.
pub(super) struct Pieces {
    kind: i32,
    pair: Option<(OwnedFd, OwnedFd)>,
    known: HashMap<usize, usize>,
    /// The lengths to choose from, longest first.
    lengths: Vec<usize>,
}

impl Pieces {
    /// Of sockets of this kind: SOCK_STREAM ...
    pub fn of(kind: i32) -> Self {
        Self {
            kind,
            pair: None,
            known: HashMap::new(),
            lengths: Vec::new(),
        }
    }

    /// What a piece of so many bytes is charged with.
    pub fn charge(&mut self, len: usize) -> Result<usize> {
        if let Some(charge) = self.known.get(&len) {
            return Ok(*charge);
        }
        let pair = match &mut self.pair {
            Some(pair) => pair,
            none => none.insert(socket::pair(libc::AF_UNIX, self.kind, 0)?),
        };
        options::enlarge_buffers(&pair.0, LONGEST.max(len));
        let mut left =
            socket::send(&pair.0, &vec![0; len], &Extra::default()).context("trying a send")?;
        let charge = sockopt::queued(&pair.0, Queue::Out).context("ioctl(SIOCOUTQ)")? as usize;
        // A message without bytes is taken out too.
        let mut first = self.kind != libc::SOCK_STREAM;
        while std::mem::take(&mut first) || left > 0 {
            let got = socket::receive(&pair.1, &mut vec![0; left], 0).context("trying a send")?;
            left = left.saturating_sub(got.len.max(1));
        }
        self.known.insert(len, charge);
        Ok(charge)
    }

    /// How long the first piece of `len` bytes is to be when all are to be charged with `charge`.
    pub fn next(&mut self, len: usize, charge: usize) -> Result<usize> {
        if self.lengths.is_empty() {
            let steps =
                std::iter::successors(Some(LONGEST), |l| Some(l * 15 / 16).filter(|l| *l > 0));
            let powers = (0..LONGEST.ilog2()).map(|n| 1 << n);
            self.lengths = steps.chain(powers).collect();
            self.lengths.sort_unstable_by(|a, b| b.cmp(a));
            self.lengths.dedup();
        }
        let mut best = (usize::MAX, len);
        for i in 0..self.lengths.len() {
            let Some(l) = self.lengths.get(i).copied().filter(|l| *l <= len) else {
                continue;
            };
            let is = self.charge(l)?.saturating_mul(len) / l;
            let off = is.abs_diff(charge);
            if off < best.0 {
                best = (off, l);
            }
        }
        // All at once, where that is as near.
        let rest = self.charge(len.min(LONGEST))?;
        if len <= LONGEST && rest.abs_diff(charge) <= best.0 {
            best.1 = len;
        }
        Ok(best.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_charged_with_what_the_old_ones_were() {
        let mut pieces = Pieces::of(libc::SOCK_STREAM);
        for old in [1usize, 100, 777, 4096, 5000, 30_000] {
            let count = 200_000 / old.max(1000);
            let charge = count * pieces.charge(old).unwrap();
            let (mut len, mut left, mut spent) = (count * old, charge, 0);
            while len > 0 {
                let n = pieces.next(len, left).unwrap();
                let c = pieces.charge(n).unwrap();
                (len, left, spent) = (len - n, left.saturating_sub(c), spent + c);
            }
            let worst = pieces.charge(old).unwrap();
            assert!(
                spent.abs_diff(charge) < worst,
                "{old}: {spent} for {charge}"
            );
        }
    }
}
