//! Where the task's output and traces go. pvmd has been told nothing of them when it started the lander, whose own
//! messages are for pvmd's log.

use anyhow::{Context, Result};

use crate::image::pvm::PvmTask;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::table;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Stream;
use crate::pvm::wire::Body;

/// Second integer of an output message: the task was spawned, has started.
const SPAWNED: i32 = -1;
const BEGINS: i32 = -2;

/// Sets them as the task had them, where whoever collects still lives. In a virtual machine that was started
/// `anew` only those are meant that have come back before. With `announce` whoever collects is told that the task
/// begins: he has seen its end.
///
/// # Errors
/// When the pvmd does not answer.
pub fn set(
    client: &mut Client,
    pvmd: &Pvmd,
    task: &PvmTask,
    anew: bool,
    announce: bool,
) -> Result<()> {
    for (stream, (tid, ctx, tag)) in [
        (Stream::Output, task.output_to),
        (Stream::Trace, task.trace_to),
    ] {
        let known = table::present(&pvmd.table_path()?, tid)?;
        let Some(now) = known.or((!anew).then_some(tid)) else {
            continue;
        };
        if !Tid(now).is_task() || !client.lives(Tid(now)).unwrap_or(false) {
            continue;
        }
        client
            .set_sink(stream, (now, ctx, tag).into())
            .context("saying where output goes")?;
        if announce && matches!(stream, Stream::Output) {
            for what in [SPAWNED, BEGINS] {
                let body = Body::new().uint(task.v).int(what).uint(client.parent().0);
                client.send_in(Tid(now), ctx, tag as u32, body)?;
            }
        }
    }
    Ok(())
}
