//! What the kernel is going to do to System V semaphores when a process ends (SEM_UNDO, semop(2)), which no system
//! call tells.

use anyhow::{Context, Result, bail};

use super::KernelMemory;
use super::threads::Threads;

/// More sets than a process has.
const MOST: usize = 65536;

/// By the set's id: what is added to each of its semaphores. `sets`: the sets there are, with how many semaphores.
///
/// # Errors
/// When kernel memory cannot be read, or the kernel keeps this otherwise.
pub fn adjustments(
    kernel: &KernelMemory,
    tid: i32,
    sets: &[(i32, usize)],
) -> Result<Vec<(i32, Vec<i16>)>> {
    let threads = Threads::get().context("kernel memory cannot be read")?;
    let task = threads.find(tid)?;
    // struct sysv_sem holds this one pointer.
    let list = kernel.pointer(task.0, "task_struct", "sysvsem")?;
    if list == 0 {
        return Ok(Vec::new());
    }
    let head = kernel.field(list, "sem_undo_list", "list_proc")?;
    let link = kernel.field(0, "sem_undo", "list_proc")?;
    let values = kernel.field(0, "sem_undo", "semadj")?;
    // They stand behind the structure, or where a pointer at its end says.
    let apart = kernel.size("sem_undo")?.saturating_sub(values) >= 8;
    let mut all = Vec::new();
    let mut at = kernel.u64(head)?;
    while at != head {
        let undo = at.wrapping_sub(link);
        let id = kernel.u32(kernel.field(undo, "sem_undo", "semid")?)? as i32;
        // A set that was removed has id -1 here.
        if let Some((_, len)) = sets.iter().find(|(set, _)| *set == id) {
            let mut from = undo.wrapping_add(values);
            if apart {
                from = kernel.u64(from)?;
            }
            let bytes = kernel.read(from, len * 2)?;
            let values = bytes
                .chunks_exact(2)
                .map(|b| i16::from_ne_bytes([b[0], b[1]]));
            all.push((id, values.collect()));
        }
        at = kernel.u64(at)?;
        if all.len() > MOST {
            bail!("the kernel's list of semaphores of thread {tid} does not end");
        }
    }
    Ok(all)
}
