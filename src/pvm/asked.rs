//! A question to the pvmd that may stay open for ever: pvm_recvinfo with PvmMboxWaitForInfo. A task is frozen in it,
//! and its question asked again from where it goes on.

use anyhow::{Result, ensure};
use pvm_abi::block::{Call, wait};

use crate::image::Bytes;
use crate::image::pvm::Asked;
use crate::kernel::mem::Mem;
use crate::pvm::block::TaskBlock;

/// pvm3.h: PvmMboxReadAndDelete, PvmMboxWaitForInfo.
const READ_AND_DELETE: i32 = 16;
const WAIT_FOR_INFO: i32 = 32;
/// pvmproto.h: TMDB_GET.
const GET: u32 = 3;
/// Pieces of a message's body, and bytes of each; such a question has one of a hundred bytes or so.
const PIECES: usize = 64;
const PIECE: u32 = 1 << 20;

/// What a task waits for an answer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// Nothing of that kind.
    No,
    /// An entry of the mailbox, which can be asked for again.
    ForInfo,
    /// One that it takes away when it is there: asked twice, it could be taken twice, or be lost.
    ToTake,
}

/// How a task waits, as its block says; whether it is in select() is to be seen besides.
///
/// # Errors
/// When the block cannot be read.
pub fn waits(block: &TaskBlock) -> Result<Waits> {
    let flags = block.call_flags()?;
    let such = block.call()? == Call::Recvinfo as u32
        && flags & WAIT_FOR_INFO != 0
        && block.asking()? == 1
        // libpvm waits in the call that sends the question.
        && matches!(block.wait()?, wait::RECEIVE | wait::SEND)
        && block.callbacks()? == 0
        && block.sending()?.is_some_and(|to| to.is_empty());
    Ok(match such {
        false => Waits::No,
        true if flags & READ_AND_DELETE != 0 => Waits::ToTake,
        true => Waits::ForInfo,
    })
}

/// The question, from the memory of a task that stands still; none when it has not asked one.
///
/// # Errors
/// When its memory does not look as libpvm's does.
pub fn question(block: &TaskBlock, mem: &Mem) -> Result<Option<Asked>> {
    if waits(block)? != Waits::ForInfo {
        return Ok(None);
    }
    // Its place among the globals (pvm_abi::block::Globals), and in PVM's structures (pmsg.h, pvmfrag.h).
    const PVMSBUF: usize = 5;
    let globals = block.globals()?;
    let global = |i: usize| globals.get(i).copied().unwrap_or(0);
    let int = |at: u64| -> Result<u32> {
        let bytes = mem.read_vec(at, 4)?;
        Ok(u32::from_ne_bytes(bytes.try_into().unwrap_or_default()))
    };
    let message = mem.read_u64(global(PVMSBUF))?;
    // struct pmsg, struct frag: wait id, list of pieces; next, data, length.
    let wait_id = int(message + 60)?;
    let head = mem.read_u64(message + 24)?;
    let mut piece = mem.read_u64(head)?;
    let mut body = Vec::new();
    for _ in 0..PIECES {
        if piece == head {
            break;
        }
        let len = int(piece + 36)?;
        ensure!(len <= PIECE, "a piece of its question has {len} bytes");
        body.extend(mem.read_vec(mem.read_u64(piece + 24)?, len as usize)?);
        piece = mem.read_u64(piece)?;
    }
    let first = body.get(..4).and_then(|b| b.try_into().ok());
    ensure!(
        piece == head && wait_id != 0 && first.map(u32::from_be_bytes) == Some(GET),
        "libpvm's memory is not as this mistctl knows it: what the task asks its pvmd cannot be found"
    );
    Ok(Some(Asked {
        wait_id,
        body: Bytes(body),
    }))
}
