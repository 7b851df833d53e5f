//! POSIX timers that are set to a time of day, not for a while: after a restore they are due when they were to be, and
//! at once where that is over. Only kernel memory tells them apart.

use crate::image::signals::PosixTimer;
use crate::kernel::kmem::{self, KernelMemory};
use crate::kernel::proc_file;

/// Reads them. Kernel memory is opened before anything stands still: that takes milliseconds.
#[derive(Default)]
pub struct Appointments(Option<KernelMemory>);

impl Appointments {
    /// Where kernel memory cannot be read, none are seen.
    pub fn prepare(pids: &[i32]) -> Self {
        let timers = |pid| proc_file::text(format!("/proc/{pid}/timers")).unwrap_or_default();
        let tells_time = |text: String| text.lines().any(|l| l.trim_end() == "ClockID: 0");
        if !pids.iter().any(|pid| tells_time(timers(pid))) {
            return Self(None);
        }
        Self(KernelMemory::open().ok())
    }

    /// Marks those among `timers` of a process that stands still, through its thread `tid`.
    pub fn mark(&mut self, tid: i32, timers: &mut [PosixTimer]) {
        if !timers.iter().any(|t| t.clock == libc::CLOCK_REALTIME) {
            return;
        }
        if self.0.is_none() {
            self.0 = KernelMemory::open().ok();
        }
        let Some(kernel) = &self.0 else { return };
        let found = kmem::posix_timers::by_time_of_day(kernel, tid).unwrap_or_default();
        for timer in timers {
            timer.due_ns = found.get(&timer.id).copied();
        }
    }
}
