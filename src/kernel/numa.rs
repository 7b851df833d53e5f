//! On which nodes memory is to be (numa(7)).

use std::sync::OnceLock;

use super::proc_file;

/// Words of a mask that has a bit for each node there may be; None where the kernel knows no nodes.
pub fn mask_words() -> Option<usize> {
    static WORDS: OnceLock<Option<usize>> = OnceLock::new();
    *WORDS.get_or_init(|| {
        let nodes = proc_file::numbers("/sys/devices/system/node/possible").ok()?;
        let last = nodes.iter().map(|range| *range.end()).max()?;
        Some(usize::try_from(last).ok()? / 64 + 1)
    })
}
