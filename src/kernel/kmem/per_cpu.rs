//! Where each processor has its own copy of a variable. The kernel adds an offset of the processor's to one pointer
//! (per_cpu_ptr in include/linux/percpu-defs.h), and tells those offsets to nobody. A map of ours with a value for each
//! processor gives them away: of its value we know the pointer, and a program is told the addresses.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, ensure};

use crate::kernel::proc_file;

use super::{
    CALL, EXIT, KernelMemory, LD_IMM64, LDX_DW, MAP_CREATE, MOV, MOV_IMM, STX_DW, descriptor, insn,
    load, run, words,
};

const MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const FUNC_MAP_LOOKUP_PERCPU_ELEM: i32 = 195;
/// The immediate is a map's descriptor.
const MAP: u8 = 1;
const ST_W: u8 = 0x62;
const ADD_IMM: u8 = 0x07;

/// In the order of the processors' numbers.
pub fn offsets(kernel: &KernelMemory) -> Result<Vec<u64>> {
    let word = |n: u32| n.to_ne_bytes();
    let map = descriptor(
        MAP_CREATE,
        &mut words(&[
            &MAP_TYPE_PERCPU_ARRAY.to_ne_bytes(),
            &word(4),
            &word(8),
            &word(1),
        ]),
    )
    .context("bpf(BPF_MAP_CREATE)")?;
    // The context: the processor's number; the address.
    let program = load(&[
        insn(MOV, 6, 1, 0, 0),
        insn(ST_W, 10, 0, -4, 0),
        insn(LD_IMM64, 1, MAP, 0, map.as_raw_fd()),
        insn(0, 0, 0, 0, 0),
        insn(MOV, 2, 10, 0, 0),
        insn(ADD_IMM, 2, 0, 0, -4),
        insn(LDX_DW, 3, 6, 0, 0),
        insn(CALL, 0, 0, 0, FUNC_MAP_LOOKUP_PERCPU_ELEM),
        insn(STX_DW, 6, 0, 8, 0),
        insn(MOV_IMM, 0, 0, 0, 0),
        insn(EXIT, 0, 0, 0, 0),
    ])
    .context("bpf(BPF_PROG_LOAD)")?;
    let map = kernel.pointer(kernel.file(map.as_fd())?, "file", "private_data")?;
    let value = kernel.pointer(map, "bpf_array", "pptrs")?;
    let mut all = Vec::new();
    let path = "/sys/devices/system/cpu/possible";
    let cpus = proc_file::numbers(path).with_context(|| path.to_owned())?;
    for cpu in cpus.into_iter().flatten() {
        let mut context = [cpu, 0];
        run(&program, &mut context)?;
        let [_, address] = context;
        if address != 0 {
            all.push(address.wrapping_sub(value));
        }
    }
    ensure!(!all.is_empty(), "there is no processor");
    Ok(all)
}
