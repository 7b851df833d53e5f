//! System V semaphores that a process holds by SEM_UNDO: its end gives them back, and a restore takes them again.

use crate::image::process::SemaphoreUndo;
use crate::kernel::kmem::{self, KernelMemory};
use crate::kernel::proc_file;

/// Reads them. Kernel memory is opened before anything stands still: that takes milliseconds.
#[derive(Default)]
pub struct Semaphores(Option<KernelMemory>);

impl Semaphores {
    /// Where kernel memory cannot be read, none are seen.
    pub fn prepare() -> Self {
        // As nearly always.
        if sets().is_empty() {
            return Self(None);
        }
        Self(KernelMemory::open().ok())
    }

    /// Those of a process that stands still, through its thread `tid`.
    pub fn read(&mut self, tid: i32) -> Vec<SemaphoreUndo> {
        let sets = sets();
        if sets.is_empty() {
            return Vec::new();
        }
        if self.0.is_none() {
            self.0 = KernelMemory::open().ok();
        }
        let Some(kernel) = &self.0 else {
            return Vec::new();
        };
        let found = kmem::semaphores::adjustments(kernel, tid, &sets).unwrap_or_default();
        found
            .into_iter()
            .filter(|(_, adjustments)| adjustments.iter().any(|a| *a != 0))
            .map(|(set, adjustments)| SemaphoreUndo { set, adjustments })
            .collect()
    }
}

/// Ids and sizes of all sets.
fn sets() -> Vec<(i32, usize)> {
    listed(&proc_file::text("/proc/sysvipc/sem").unwrap_or_default())
}

/// The same, from /proc/sysvipc/sem (key, id, permissions, number of semaphores ...).
fn listed(text: &str) -> Vec<(i32, usize)> {
    let set = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let id = words.next()?.parse().ok()?;
        Some((id, words.nth(1)?.parse().ok()?))
    };
    text.lines().skip(1).filter_map(set).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sets_are_read() {
        let text = "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n\
                    \t 0          5   600          3     0     0     0     0 1792 1792\n";
        assert_eq!(super::listed(text), [(5, 3)]);
    }
}
