//! Our own code and working memory, there before somebody stands still for us: a page fault costs some microseconds,
//! and milliseconds where the page has to come from a disk.

use std::hint::black_box;

use super::maps::{self, Name};

/// What a dump of a small process uses of the stack, and of the heap.
const STACK: usize = 64 * 1024;
/// Below what malloc(3) maps by itself, and gives back at once.
const HEAP: usize = 96 * 1024;

/// Has the pages of the program and its libraries mapped, as far as the kernel can do that at once (Linux 5.14).
pub fn load() {
    for m in maps::ours().unwrap_or_default() {
        let code = matches!(m.name(), Name::File(_)) && !m.shared;
        if !code || m.prot & libc::PROT_READ == 0 || m.prot & libc::PROT_WRITE != 0 {
            continue;
        }
        let at = m.start as *mut libc::c_void;
        // SAFETY: the advice changes no byte of memory, whatever the range is by now.
        unsafe { libc::madvise(at, (m.end - m.start) as usize, libc::MADV_POPULATE_READ) };
    }
    use_stack();
    drop(black_box(vec![1u8; HEAP]));
}

#[inline(never)]
fn use_stack() {
    black_box(&mut [1u8; STACK]);
}
