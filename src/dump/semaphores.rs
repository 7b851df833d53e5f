//! System V semaphores that a process holds by SEM_UNDO: its end gives them back, and a restore takes them again.

use crate::image::process::SemaphoreUndo;
use crate::kernel::kmem::{self, KernelMemory};
use crate::kernel::proc_file;

/// Ids and sizes of all sets.
pub struct Semaphores(Vec<(i32, usize)>);

impl Semaphores {
    /// Makes ready to read them, before anything stands still: to open kernel memory takes milliseconds.
    pub fn prepare() {
        // There are none, nearly always.
        if !Self::look().0.is_empty() {
            let _ = KernelMemory::get();
        }
    }

    /// Which sets there are now.
    pub fn look() -> Self {
        Self(listed(
            &proc_file::text("/proc/sysvipc/sem").unwrap_or_default(),
        ))
    }

    /// Those of a process that stands still, through its thread `tid`. Where kernel memory cannot be read, none are seen.
    pub fn read(&self, tid: i32) -> Vec<SemaphoreUndo> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let Ok(kernel) = KernelMemory::get() else {
            return Vec::new();
        };
        let found = kmem::semaphores::adjustments(kernel, tid, &self.0).unwrap_or_default();
        found
            .into_iter()
            .filter(|(_, adjustments)| adjustments.iter().any(|a| *a != 0))
            .map(|(set, adjustments)| SemaphoreUndo { set, adjustments })
            .collect()
    }
}

/// Ids and sizes of all sets, from /proc/sysvipc/sem (key, id, permissions, number of semaphores ...).
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
