//! What mistctl and the PVM shim share.
//!
//! * [`table`]: the tid table, a file every PVM task of a user on a host maps.
//! * [`block`]: what a task under the shim publishes about itself; its address is found through the ELF
//!   symbol [`BLOCK_SYMBOL`].
//! * [`place`]: where the table of a pvmd lies.
//! * the numbers of PVM 3.4's protocol that both sides need.
//!
//! A tid has two meanings here. `R` is what pvmd gave an incarnation of a task; it is what goes over
//! the wire. `V` is what the program sees for ever, the `R` of its first enrolment.

use std::ffi::CStr;

pub mod block;
pub mod place;
pub mod table;

/// Name of the dynamic symbol under which the shim exports the address of its [`block::Block`].
pub const BLOCK_SYMBOL: &str = "mist_shim_block";

/// Bits of a tid that name a task: host (bits 18 to 29) and slot (bits 0 to 17).
pub const TID_TASK: u32 = 0x3fff_ffff;
/// Bits of a tid that name the host.
pub const TID_HOST: u32 = 0x3ffc_0000;
/// Set in the tid of a pvmd; alone it addresses the own pvmd.
pub const TID_PVMD: u32 = 0x8000_0000;
/// Set in the address of a group or multicast.
pub const TID_GROUP: u32 = 0x4000_0000;

/// Context of messages from libpvm to libpvm (`SYSCTX_TC`).
pub const CTX_TC: i32 = 0x7ffff;
/// Context of messages between a task and its pvmd (`SYSCTX_TM`).
pub const CTX_TM: i32 = 0x7fffe;
/// The lowest of the contexts that PVM keeps for itself (`SYSCTX_LAST`); up to [`CTX_TC`], the highest, no pvmd gives
/// one out. That of dynamic groups is among them.
pub const CTX_LAST: i32 = 0x7fff6;

/// First words of a `TC_NOOP` that mist sent: "MIST".
pub const NOOP_MAGIC: u32 = 0x4d49_5354;
/// Second word of such a `TC_NOOP`: a flush marker; then follow the number of the request (its high
/// half), V and R of the task that sent it, each a 4-byte big-endian integer.
pub const NOOP_MARKER: u32 = 1;

/// Second word of one in the connection of a task that has moved, behind what it had not read in its old place; then
/// follows R of its old incarnation. What tasks print from here on waits until the notice of that one's end: before
/// it comes what has reached the old incarnation meanwhile ([`WAIT_ID_LATE`]).
pub const NOOP_LATE: u32 = 2;

/// Wait id of a message of some pvmd's to the old incarnation of a task, which a task of mist's passes on.
pub const WAIT_ID_LATE: i32 = 0x4c41_5445;

/// Wait id of requests to a pvmd whose answer nobody waits for: the shim drops an answer that
/// carries it. mistctl may write such a request into the connection of a paused task.
pub const WAIT_ID_IGNORE: i32 = 0x4d49_5354;

/// pvm3.h: PvmMboxMultiInstance. Others may use the same name.
pub const MBOX_MULTI_INSTANCE: i32 = 2;
/// pvm3.h: PvmMboxDirectIndexShift. Above these bits of the flags the caller asks for an index; 0 is the first one that is
/// free.
pub const MBOX_INDEX_SHIFT: u32 = 10;
/// Bit of an entry's flags, which PVM has no use for: it was put with [`MBOX_MULTI_INSTANCE`], which nothing that replaces
/// an entry may have, and handed over to another incarnation since.
pub const MBOX_HANDED_OVER: i32 = 256;

/// The flags of an entry as its owner put it.
pub fn mbox_flags(flags: i32) -> i32 {
    match flags & MBOX_HANDED_OVER {
        0 => flags,
        _ => flags & ((1 << MBOX_INDEX_SHIFT) - 1) & !MBOX_HANDED_OVER | MBOX_MULTI_INSTANCE,
    }
}

/// The mailbox class in which every agent has an entry. A task that enrols on a host whose table is not learned waits
/// for that if there are agents elsewhere: its host is new, and somebody may have moved before it came.
pub const AGENTS: &CStr = c"mist.agent";

/// What mistctl tells pvmd as its pid when it asks something: no process has it, so that nobody ends mistctl by
/// ending all tasks, and the shim does not show the task.
pub const HELPER_PID: i32 = 0x4d49_5354;

/// True for the tid of a task: not a pvmd's, a host's or a group's, not zero, not an error code.
#[inline]
pub fn is_task(tid: u32) -> bool {
    tid & !TID_TASK == 0 && tid & TID_HOST != 0 && tid & !TID_HOST != 0
}
