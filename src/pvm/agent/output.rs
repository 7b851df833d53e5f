//! Output and traces of tasks whose collector moves: pvmd sends them to an incarnation, and the task itself, which could
//! tell it better, may be computing for hours.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{MsgFlags, send};
use pvm_abi::{CTX_TM, WAIT_ID_IGNORE};

use super::{Agent, CONNECTED};
use crate::error::Failure;
use crate::pvm::block::TaskBlock;
use crate::pvm::capture::Task;
use crate::pvm::connection::Daemons;
use crate::pvm::local;
use crate::pvm::quiet;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Stream;
use crate::pvm::wire::{Body, LONGEST_FRAGMENT, Message, XDR, tm};

/// How long a task may take to come to where its pvmd can be told something in its name, while a move waits for it.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at what a pvmd has read.
const LOOK: Duration = Duration::from_micros(50);
/// Between two attempts to stop a task that somebody else traces.
const AGAIN: Duration = Duration::from_millis(2);

impl Agent {
    /// Tells this host's pvmd that what tasks print, and what tells of them, goes to incarnation `r` of their collector
    /// `v` from here on, and returns when it has read that. Those for whom that was done, and why others do it
    /// themselves, when they next call PVM.
    ///
    /// # Errors
    /// When the tasks of this host cannot be looked at.
    pub(super) fn redirect(
        &mut self,
        v: u32,
        r: u32,
        limit: Duration,
    ) -> Result<(Vec<u32>, Vec<String>)> {
        let mut daemons = None;
        let (mut tids, mut left) = (Vec::new(), Vec::new());
        for pid in self.processes()? {
            let block = local::enrolled(pid)?;
            let Some((output, trace)) = block.and_then(|block| self.stale(&block, v, r)) else {
                continue;
            };
            let daemons = match &daemons {
                Some(daemons) => daemons,
                None => daemons.insert(Daemons::look()?),
            };
            let done = Task::find_among(daemons, pid).and_then(|task| match task {
                Some(task) => tell(&task, r, output, trace, limit).map(|()| Some(task.r.0)),
                None => Ok(None),
            });
            match done {
                Ok(tid) => tids.extend(tid),
                Err(e) if !crate::dump::is_ending(pid) => {
                    left.push(format!("process {pid}: {e:#}"))
                }
                Err(_) => {}
            }
        }
        // Nobody but they themselves can do it.
        for task in self.tasks()? {
            if task.flags & CONNECTED == 0 && self.table.v_of(task.parent.0) == v {
                let (pid, program) = (task.pid, task.program);
                left.push(format!("process {pid} ({program}) has not called PVM yet"));
            }
        }
        let on_host = |why: String| format!("on {}, {why}", self.host);
        Ok((tids, left.into_iter().map(on_host).collect()))
    }

    /// Whether a task's output, and whether its traces, go to another incarnation of `v` than `r`; none when neither.
    fn stale(&self, block: &TaskBlock, v: u32, r: u32) -> Option<(bool, bool)> {
        let own = block.v().ok()?;
        let ((output, ..), (trace, ..)) = block.sinks().ok()?;
        let stale = |tid: u32| Tid(tid).is_task() && tid != r && self.table.v_of(tid) == v;
        let found = (stale(output), stale(trace));
        (own != v && (found.0 || found.1)).then_some(found)
    }
}

/// Writes the request into the connection of a task that stands where it has said nothing by halves.
fn tell(task: &Task, r: u32, output: bool, trace: bool, limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    // Somebody who saves it holds it for a moment.
    let held = loop {
        match quiet::stop(task, limit) {
            Err(e) if Failure::of(&e) == Failure::Busy && Instant::now() < until => {
                std::thread::sleep(AGAIN);
            }
            done => break done?,
        }
    };
    let read = || -> Result<()> {
        while task.connection.unsent()? != 0 {
            ensure!(
                Instant::now() < until,
                "its pvmd has not read what it sent within {limit:?}"
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    };
    read()?;
    let tid = format!("{r:x}");
    let wanted = [(output, Stream::Output), (trace, Stream::Trace)];
    let body = wanted
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(Body::new(), |body, (_, stream)| {
            body.int(stream.option()).string(tid.as_bytes())
        });
    let request = Message {
        src: task.r,
        dst: Tid::PVMD,
        tag: tm::SETOPT,
        ctx: CTX_TM as u32,
        // Its shim drops the answer.
        wait: WAIT_ID_IGNORE as u32,
        encoding: XDR,
        body: body.into_bytes(),
    };
    let bytes = request.encode(LONGEST_FRAGMENT);
    let end = task.connection.task_end()?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = send(end.as_raw_fd(), &bytes, flags).context("writing into its connection")?;
    if sent != bytes.len() {
        bail!("its pvmd takes {sent} of {} bytes", bytes.len());
    }
    task.block
        .set_sinks(output.then_some(r), trace.then_some(r))?;
    read()?;
    held.release()
}
