//! How a thread that was stopped in a system call goes on: here, and in a restored process.

use crate::image::threads::Resume;
use crate::kernel::arch::{ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTNOINTR, ERESTARTSYS};
use crate::kernel::batch::Held;

/// For the image: a restored process has no restart block and no call under way.
pub fn of(held: &Held) -> Resume {
    let Some(nr) = held.regs.syscall() else {
        return Resume::Run;
    };
    match -(held.regs.rax as i64) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK => {
            Resume::Again { nr }
        }
        _ => Resume::Run,
    }
}
