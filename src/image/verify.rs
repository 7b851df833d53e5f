//! What a manifest must fulfil before anything is done with it. Images are hostile input.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::{Manifest, SpaceId};

/// Ranges of addresses that may have pages, by space.
pub(super) type Allowed = BTreeMap<SpaceId, Vec<(u64, u64)>>;

/// Checks everything a manifest says that can be checked without the kernel, and returns where pages may be.
pub(super) fn check(manifest: &Manifest) -> Result<Allowed> {
    let mut allowed = Allowed::new();
    ensure!(!manifest.processes.is_empty(), "it has no process");
    for process in &manifest.processes {
        let ranges = allowed.entry(process.space).or_default();
        for vma in &process.vmas {
            match ranges.last_mut() {
                Some(last) if last.1 == vma.start => last.1 = vma.end,
                _ => ranges.push((vma.start, vma.end)),
            }
        }
    }
    for memory in &manifest.shared_memory {
        allowed.insert(memory.space, vec![(0, memory.size.next_multiple_of(4096))]);
    }
    Ok(allowed)
}
