//! Progress bars for people.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes on standard error; hidden unless it is wanted.
pub fn bar(wanted: bool, bytes: u64) -> ProgressBar {
    if !wanted {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style)
}
