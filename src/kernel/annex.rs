//! Room for trampolines in a process whose vDSO has no more of it: memory of ours that stays there while it is used.
//!
//! Where it lies is noted in the last bytes of the vDSO's dead end, and in each annex where the one before it lies, so
//! that the next stop finds them all:
//!
//! ```text
//! note    magic | address of the last annex that was made
//! annex   magic | bytes of it | address of the one before | name | trampolines
//! ```

use std::io;
use std::ops::Range;

use anyhow::{Context, Result, bail};

use super::arch::{Asm, PAGE, TASK_SIZE};
use super::batch::{Held, enter, leader_mask, park, set_mask, step_calls};
use super::maps;
use super::mem::Mem;
use super::remote::Remote;

const MAGIC: [u8; 8] = *b"\x0f\x0bmistan";
/// What /proc/PID/maps shows.
const NAME: &[u8; 16] = b"mist-calls\0\0\0\0\0\0";
/// Bytes of a note.
pub const NOTE: u64 = 16;
const HEADER: u64 = 40;
const AT_NAME: u64 = 24;
/// As many as one follows: more are no list of ours.
const MOST: usize = 64;

/// What of an annex trampolines may occupy.
pub fn room(annex: &Range<u64>) -> Range<u64> {
    annex.start + HEADER..annex.end
}

/// Those that a note at `note` leads to.
pub fn find(mem: &Mem, note: u64) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    let first = linked(mem, note, NOTE);
    let mut next = first.and_then(|w| w.first().copied());
    while let Some(at) = next.filter(|at| *at != 0 && all.len() < MOST) {
        let words = linked(mem, at, AT_NAME).unwrap_or_default();
        let [len, before] = words[..] else {
            break;
        };
        let Some(end) = at.checked_add(len) else {
            break;
        };
        all.push(at..end);
        next = Some(before);
    }
    all
}

/// The words behind the magic at `at`.
fn linked(mem: &Mem, at: u64, len: u64) -> Option<Vec<u64>> {
    let bytes = mem.read_vec(at, len as usize).ok()?;
    let words = bytes.strip_prefix(&MAGIC)?.chunks_exact(8);
    Some(
        words
            .map(|w| w.try_into().map_or(0, u64::from_le_bytes))
            .collect(),
    )
}

/// Makes the process of `leader` map one with room for so many `bytes`. `tail` is dead executable memory, `note` where the
/// note is, and `known` are those that are there.
///
/// # Errors
/// When the process may not have it; it is held as before.
pub fn add(
    leader: &Held,
    mem: &Mem,
    tail: &Range<u64>,
    note: u64,
    known: &mut Vec<Range<u64>>,
    bytes: u64,
) -> Result<()> {
    let annex = make(
        leader.tracee.tid,
        mem,
        known.first(),
        bytes,
        &mut |nr, args| call(leader, mem, tail, nr, args),
    )?;
    write_note(mem, note, annex.start)?;
    known.insert(0, annex);
    Ok(())
}

/// The same in a process that is rebuilt, through two bytes at `place`.
///
/// # Errors
/// When the process may not have it.
pub fn add_to_rebuilt(body: &Remote, place: u64, note: u64, bytes: u64) -> Result<Range<u64>> {
    let annex = make(body.pid(), body.mem(), None, bytes, &mut |nr, args| {
        body.by_step(place, nr, args)
    })?;
    write_note(body.mem(), note, annex.start)?;
    Ok(annex)
}

/// Unmaps all but those that are to be kept, which stay in `known`.
///
/// # Errors
/// When the process cannot be made to; what is not unmapped is found by nobody any more.
pub fn remove(
    leader: &Held,
    mem: &Mem,
    tail: &Range<u64>,
    note: u64,
    known: &mut Vec<Range<u64>>,
    keep: impl Fn(&Range<u64>) -> bool,
) -> Result<()> {
    let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(known).into_iter().partition(|a| keep(a));
    *known = kept;
    if gone.is_empty() {
        return Ok(());
    }
    write_note(mem, note, known.first().map_or(0, |a| a.start))?;
    for (i, annex) in known.iter().enumerate() {
        mem.write(annex.start, &header(annex, known.get(i + 1)))?;
    }
    for annex in gone {
        let args = [annex.start, annex.end - annex.start];
        call(leader, mem, tail, libc::SYS_munmap, &args)?;
    }
    Ok(())
}

fn write_note(mem: &Mem, note: u64, first: u64) -> Result<()> {
    let mut bytes = [0; NOTE as usize];
    if first != 0 {
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..].copy_from_slice(&first.to_le_bytes());
    }
    mem.write(note, &bytes)
}

fn header(annex: &Range<u64>, before: Option<&Range<u64>>) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend((annex.end - annex.start).to_le_bytes());
    bytes.extend(before.map_or(0, |a| a.start).to_le_bytes());
    bytes.extend(NAME);
    bytes
}

/// One that nobody knows of yet; `call` makes the process call.
fn make(
    pid: i32,
    mem: &Mem,
    before: Option<&Range<u64>>,
    bytes: u64,
    call: &mut dyn FnMut(i64, &[u64]) -> Result<i64>,
) -> Result<Range<u64>> {
    const PR_SET_VMA: u64 = 0x5356_4d41;
    const PR_SET_VMA_ANON_NAME: u64 = 0;
    let len = (bytes + HEADER).next_multiple_of(PAGE);
    let start = hole(pid, len)?;
    let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let got = call(libc::SYS_mmap, &[start, len, prot, flags, u64::MAX, 0])?;
    if got != start as i64 {
        let e = io::Error::from_raw_os_error(-got as i32);
        bail!("process {pid} may not map {len} bytes for what is left of its system calls: {e}");
    }
    let annex = start..start + len;
    mem.write(start, &header(&annex, before))?;
    // For people only, and not known to every kernel.
    let named = [
        PR_SET_VMA,
        PR_SET_VMA_ANON_NAME,
        start,
        len,
        start + AT_NAME,
    ];
    call(libc::SYS_prctl, &named)?;
    Ok(annex)
}

/// Away from where stacks and heaps grow.
fn hole(pid: i32, len: u64) -> Result<u64> {
    const MARGIN: u64 = 16 * PAGE;
    let mut at: u64 = 1 << 32;
    for m in maps::read(pid).with_context(|| format!("reading mappings of process {pid}"))? {
        if m.start >= at + len + MARGIN {
            break;
        }
        at = at.max(m.end.saturating_add(MARGIN));
    }
    if at + len > TASK_SIZE {
        bail!("the address space of process {pid} has no free {len} bytes");
    }
    Ok(at)
}

/// One call in a process that stands still, which comes to no harm if we vanish (see [`super::batch`]).
fn call(leader: &Held, mem: &Mem, tail: &Range<u64>, nr: i64, args: &[u64]) -> Result<i64> {
    let t = leader.tracee;
    let mut a = Asm::new();
    a.syscall(nr, args);
    set_mask(&mut a, leader_mask(tail));
    let (rax, rip) = leader.regs.resume_point();
    a.jump_to_program(&leader.regs, rax, rip);
    let room = (tail.end - tail.start) as usize;
    if a.len() + 16 > room {
        bail!(
            "process {}: {room} bytes of dead space in its vDSO are too few",
            t.tid
        );
    }
    mem.write(leader_mask(tail), &leader.sigmask.to_le_bytes())?;
    mem.write(tail.start, a.bytes())?;
    enter(leader, tail.start)?;
    t.set_options(libc::PTRACE_O_TRACESYSGOOD)?;
    step_calls(&t, 1)?;
    let result = t.regs()?.rax as i64;
    park(&t)?;
    leader.restore()?;
    t.set_options(0)?;
    mem.write(tail.start, &vec![0; room])?;
    Ok(result)
}
