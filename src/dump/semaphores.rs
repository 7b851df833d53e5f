//! System V semaphores that a process holds by SEM_UNDO: its end gives them back, and a restore takes them again.

use crate::image::process::SemaphoreUndo;
use crate::kernel::kmem;
use crate::kernel::proc_file;

/// Those of a process that stands still, through its thread `tid`. None where kernel memory cannot be read.
pub fn read(tid: i32) -> Vec<SemaphoreUndo> {
    let sets = sets(&proc_file::text("/proc/sysvipc/sem").unwrap_or_default());
    // As nearly always.
    if sets.is_empty() {
        return Vec::new();
    }
    let found = kmem::semaphores::adjustments(tid, &sets).unwrap_or_default();
    found
        .into_iter()
        .filter(|(_, adjustments)| adjustments.iter().any(|a| *a != 0))
        .map(|(set, adjustments)| SemaphoreUndo { set, adjustments })
        .collect()
}

/// Ids and sizes of all sets, from /proc/sysvipc/sem (key, id, permissions, number of semaphores ...).
fn sets(text: &str) -> Vec<(i32, usize)> {
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
        assert_eq!(super::sets(text), [(5, 3)]);
    }
}
