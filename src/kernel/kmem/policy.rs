//! On which nodes a thread wants its memory (set_mempolicy(2)), which only itself can ask.

use anyhow::Result;

use super::KernelMemory;
use crate::image::memory::MemPolicy;
use crate::kernel::numa;

/// What the struct mempolicy at `address` says, as get_mempolicy(2) would.
///
/// # Errors
/// When kernel memory cannot be read, or the kernel keeps this otherwise.
pub fn read(kernel: &KernelMemory, address: u64) -> Result<MemPolicy> {
    let half = |field| -> Result<u32> {
        let at = kernel.field(address, "mempolicy", field)?;
        Ok(kernel.u32(at)? & 0xffff)
    };
    let (mode, flags) = (half("mode")?, half("flags")?);
    let mask = match flags & MemPolicy::NODES_AS_ASKED {
        0 => "nodes",
        _ => "w.user_nodemask",
    };
    let at = kernel.field(address, "mempolicy", mask)?;
    let bytes = kernel.read(at, 8 * numa::mask_words().unwrap_or(1))?;
    let word = |b: &[u8]| b.try_into().map_or(0, u64::from_ne_bytes);
    Ok(MemPolicy {
        mode: mode | flags & MemPolicy::NODES_AS_ASKED,
        nodes: bytes.chunks_exact(8).map(word).collect(),
    })
}
