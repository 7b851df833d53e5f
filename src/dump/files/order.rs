//! In which order the kernel has the descriptions behind many descriptors of one inode (thousands of eventfds, of
//! connections to /dev/null): found out while the processes run, so that it has only to be checked while they stand.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;

use crate::dump::process;
use crate::kernel::kcmp;

/// Fewer of one inode are told apart in no time.
const MANY: usize = 16;

/// A descriptor: pid, a living thread of it, number.
type Place = (i32, i32, i32);

/// What the order was a moment ago. The program may have changed everything since: a hint.
#[derive(Debug, Default)]
pub struct Order {
    /// By pid and number.
    ranks: HashMap<(i32, i32), usize>,
}

impl Order {
    /// Looks at the descriptors of these processes. Nothing is held open: what they close meanwhile is closed.
    pub fn look(pids: &[i32]) -> Self {
        let mut by_inode: HashMap<(u64, u64), Vec<Place>> = HashMap::new();
        for &pid in pids {
            let via = process::living_thread(pid);
            // What is gone, or may not be seen, is met again by whoever reads it.
            let numbers = super::numbers(via).unwrap_or_default();
            if numbers.len() < MANY {
                continue;
            }
            for fd in numbers {
                if let Ok(meta) = std::fs::metadata(format!("/proc/{via}/fd/{fd}")) {
                    let key = (meta.dev(), meta.ino());
                    by_inode.entry(key).or_default().push((pid, via, fd));
                }
            }
        }
        let mut ranks = HashMap::new();
        for of_one in by_inode.into_values().filter(|list| list.len() >= MANY) {
            let mut sorted: Vec<Place> = Vec::with_capacity(of_one.len());
            for (pid, via, fd) in of_one {
                let compare = |i: usize| kcmp::files(sorted[i].1, sorted[i].2, via, fd);
                if let Ok(Ok(at) | Err(at)) = search(sorted.len(), sorted.len(), compare) {
                    sorted.insert(at, (pid, via, fd));
                }
            }
            let ranked = sorted.into_iter().enumerate();
            ranks.extend(ranked.map(|(rank, (pid, _, fd))| ((pid, fd), rank)));
        }
        Self { ranks }
    }

    /// What to sort the descriptors of process `pid` by: those without a rank come first, as they are.
    pub fn rank(&self, pid: i32, fd: i32) -> Option<usize> {
        self.ranks.get(&(pid, fd)).copied()
    }
}

/// Where in a sorted list of `len` items something is, or belongs. `compare` compares an item with it; it is looked
/// for at `guess`, and before that, first.
pub fn search(
    len: usize,
    guess: usize,
    mut compare: impl FnMut(usize) -> Result<Ordering>,
) -> Result<Result<usize, usize>> {
    let (mut low, mut high) = (0, len);
    for at in [Some(guess), guess.checked_sub(1)].into_iter().flatten() {
        if (low..high).contains(&at) {
            match compare(at)? {
                Ordering::Equal => return Ok(Ok(at)),
                Ordering::Less => low = at + 1,
                Ordering::Greater => high = at,
            }
        }
    }
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(middle)? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_saves_comparisons_and_changes_no_answer() {
        let list = [1, 3, 5, 7, 9, 11];
        for wanted in 0..13 {
            for guess in 0..9 {
                let got = search(list.len(), guess, |i| Ok(list[i].cmp(&wanted))).unwrap();
                assert_eq!(got, list.binary_search(&wanted), "{wanted} at {guess}");
            }
        }
        let mut compared = 0;
        let at_the_end = search(list.len(), list.len(), |i| {
            compared += 1;
            Ok(list[i].cmp(&12))
        });
        assert_eq!((at_the_end.unwrap(), compared), (Err(6), 1));
    }
}
