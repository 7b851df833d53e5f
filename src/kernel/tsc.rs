//! Who may read the time stamp counter (PR_SET_TSC of prctl(2)).

/// The calling thread may not, as long as this lives: it would get SIGSEGV.
#[derive(Debug)]
pub struct Forbidden(());

/// Where the kernel has no such thing nothing changes.
pub fn forbid() -> Forbidden {
    set(libc::PR_TSC_SIGSEGV);
    Forbidden(())
}

impl Drop for Forbidden {
    fn drop(&mut self) {
        set(libc::PR_TSC_ENABLE);
    }
}

fn set(how: i32) {
    // SAFETY: it changes a flag of the calling thread, and no memory.
    unsafe { libc::prctl(libc::PR_SET_TSC, how) };
}
