//! What depends on the processor: registers, machine code for remote system calls, the vDSO.

#[cfg(target_arch = "x86_64")]
pub mod trampoline;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "mistctl knows x86-64 only so far; another processor needs its own src/kernel/arch/ file"
);
