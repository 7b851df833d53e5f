//! What goes to standard output and standard error. Nothing here panics when a reader went away.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;

/// Writes text to standard output in one piece, with a newline at its end. A reader that closed the pipe is
/// no error: it has seen enough.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut bytes = text.as_bytes().to_vec();
    if bytes.last() != Some(&b'\n') {
        bytes.push(b'\n');
    }
    print_bytes(&bytes)
}

/// Like [`print`], exactly as given.
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    // Not through std's line buffer: one write, so that a restored program's output does not get in between.
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(e).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Prints one JSON object, on one line.
pub fn object(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string(value).context("cannot write JSON")?)
}

/// A line for people, on standard error. There is nobody to tell when that fails.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says what is waited for: nobody should have to guess why nothing happens.
pub fn waits(what: &str) {
    note(&format!("mistctl: {what}"));
}

/// Whether progress can be shown: standard error is a terminal.
pub fn progress() -> bool {
    std::io::stderr().is_terminal()
}

/// A progress bar over bytes, on standard error; it appears when something takes longer than a moment, and
/// leaves no trace.
pub struct Bar {
    bar: indicatif::ProgressBar,
    shown: bool,
    since: Instant,
}

impl Bar {
    pub fn new(what: &'static str, shown: bool) -> Bar {
        let bar = indicatif::ProgressBar::hidden();
        let style = "{msg} {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}";
        bar.set_style(
            indicatif::ProgressStyle::with_template(style)
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
        );
        bar.set_message(what);
        Bar {
            bar,
            shown,
            since: Instant::now(),
        }
    }

    /// So many bytes are done, of so many.
    pub fn at(&self, done: u64, total: u64) {
        const MOMENT: Duration = Duration::from_millis(300);
        if !self.shown || self.since.elapsed() < MOMENT {
            return;
        }
        if self.bar.is_hidden() {
            self.bar
                .set_draw_target(indicatif::ProgressDrawTarget::stderr());
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// "8.4 MiB", three digits.
pub fn bytes(n: u64) -> String {
    scaled(
        n as f64,
        1024.0,
        &["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"],
    )
}

/// "12.3 ms", three digits, from microseconds.
pub fn micros(us: u64) -> String {
    if us >= 60_000_000 {
        let s = us / 1_000_000;
        return format!("{} min {} s", s / 60, s % 60);
    }
    scaled(us as f64, 1000.0, &["us", "ms", "s"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units.get(unit).unwrap_or(&""))
}

/// "1 thread", "3 threads", "2 processes".
pub fn count(n: usize, noun: &str) -> String {
    let ending = match (n, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{n} {noun}{ending}")
}

/// Text out of an image or from another process, safe to show on a terminal.
pub fn shown(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(bytes(1023), "1023 bytes");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(10 * 1024 * 1024 + 400 * 1024), "10.4 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn times_have_three_digits() {
        assert_eq!(micros(999), "999 us");
        assert_eq!(micros(17_900), "17.9 ms");
        assert_eq!(micros(61_000_000), "1 min 1 s");
    }

    #[test]
    fn nouns_count() {
        assert_eq!(count(1, "process"), "1 process");
        assert_eq!(count(2, "process"), "2 processes");
        assert_eq!(count(0, "thread"), "0 threads");
    }
}
