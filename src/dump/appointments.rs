//! POSIX timers that are set to a time of day, not for a while: after a restore they are due when they were to be, and
//! at once where that is over. Only kernel memory tells them apart.

use crate::image::signals::PosixTimer;
use crate::kernel::kmem::{self, KernelMemory};
use crate::kernel::proc_file;

/// Makes ready to read those of these processes, before they stand still: to open kernel memory takes milliseconds.
pub fn prepare(pids: &[i32]) {
    let timers = |pid| proc_file::text(format!("/proc/{pid}/timers")).unwrap_or_default();
    let tells_time = |text: String| text.lines().any(|l| l.trim_end() == "ClockID: 0");
    if pids.iter().any(|pid| tells_time(timers(pid))) {
        let _ = KernelMemory::get();
    }
}

/// Marks those among `timers` of a process that stands still, through its thread `tid`. Where kernel memory cannot be
/// read, none are seen.
pub fn mark(tid: i32, timers: &mut [PosixTimer]) {
    if !timers.iter().any(|t| t.clock == libc::CLOCK_REALTIME) {
        return;
    }
    let Ok(kernel) = KernelMemory::get() else {
        return;
    };
    let found = kmem::posix_timers::by_time_of_day(kernel, tid).unwrap_or_default();
    for timer in timers {
        timer.due_ns = found.get(&timer.id).copied();
    }
}
