//! Room for our own stack, whatever the caller's limit (ulimit -s) is.

use std::any::Any;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
use nix::sys::resource::{Resource, getrlimit, rlim_t};

use super::arch;

/// What mistctl is sure to do with.
const ENOUGH: rlim_t = 1024 * 1024;
const SIZE: NonZeroUsize = NonZeroUsize::new(8 * 1024 * 1024).unwrap();

struct Work<F, T> {
    todo: Option<F>,
    done: Option<Result<T, Box<dyn Any + Send>>>,
}

extern "C" fn carry_out<F: FnOnce() -> T, T>(work: *mut c_void) {
    // SAFETY: `with_room` passes a `Work` that lives until we return, and does not touch it meanwhile.
    let work = unsafe { &mut *work.cast::<Work<F, T>>() };
    if let Some(todo) = work.todo.take() {
        work.done = Some(catch_unwind(AssertUnwindSafe(todo)));
    }
}

/// Does it, on another stack where the limit leaves little room on ours. It is our only thread all the same.
///
/// # Errors
/// There is no memory for one.
pub fn with_room<F: FnOnce() -> T, T>(todo: F) -> Result<T> {
    let limit = getrlimit(Resource::RLIMIT_STACK);
    if limit.is_ok_and(|(soft, _)| soft >= ENOUGH) {
        return Ok(todo());
    }
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_STACK | MapFlags::MAP_NORESERVE;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: new memory, which nothing else refers to; it is never unmapped.
    let bottom = unsafe { mmap_anonymous(None, SIZE, access, flags) }
        .context("mapping memory for a stack")?;
    // SAFETY: the lowest page of that, which is to stop a stack that grows too far.
    unsafe { mprotect(bottom, arch::PAGE as usize, ProtFlags::PROT_NONE) }
        .context("protecting the end of a stack")?;
    // Who looks for callers finds no address above that, and stops.
    let top = bottom.as_ptr() as usize + SIZE.get() - arch::PAGE as usize;
    let mut work = Work {
        todo: Some(todo),
        done: None,
    };
    // SAFETY: the stack is mapped, unused and large; `carry_out` gets the `Work` it is made for, and does not unwind.
    unsafe { arch::call_on(top, carry_out::<F, T>, (&raw mut work).cast()) };
    match work.done {
        Some(Ok(done)) => Ok(done),
        Some(Err(panic)) => resume_unwind(panic),
        None => anyhow::bail!("nothing was done"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_runs_on_a_stack_of_its_own_and_returns() {
        let here = 0u8;
        let far =
            |there: &u8| (&raw const here as usize).abs_diff(std::ptr::from_ref(there) as usize);
        let mut stack = vec![0u128; 16 * 1024];
        let end = stack.as_mut_ptr_range().end as usize - arch::PAGE as usize;
        let mut work = Work {
            todo: Some(|| {
                let there = 0u8;
                let walked = std::backtrace::Backtrace::force_capture().to_string();
                (!walked.is_empty(), far(&there))
            }),
            done: None,
        };
        fn fit<F: FnOnce() -> T, T>(_: &Work<F, T>) -> extern "C" fn(*mut c_void) {
            carry_out::<F, T>
        }
        let call = fit(&work);
        // SAFETY: as in `with_room`.
        unsafe { arch::call_on(end, call, (&raw mut work).cast()) };
        let (walked, distance) = work.done.unwrap().unwrap();
        assert!(walked);
        assert!(distance > 64 * 1024, "{distance}");
    }
}
