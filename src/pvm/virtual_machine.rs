//! What a task can ask of the virtual machine: hosts, tasks, notices.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pvm_abi::{HELPER_PID, place};
use serde::Serialize;

use crate::pvm::client::Client;
use crate::pvm::spawn::Sink;
use crate::pvm::tid::Tid;
use crate::pvm::wire::{Body, Message, Reader, tm};

/// Hosts and tasks that are read from one answer; PVM has room for 4095 hosts.
const MOST: usize = 1 << 20;

/// pvm3.h: PvmNoTask
const NO_TASK: i32 = -31;

/// A host of the virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its tid.
    pub tid: Tid,
    /// The name it was added under.
    pub name: String,
    /// PVM's name for its kind: LINUX64.
    pub arch: String,
    /// Relative speed, as the hostfile has it.
    pub speed: i32,
}

/// A task, as the pvmd of its host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The tid it has now.
    pub tid: Tid,
    /// Who spawned it.
    pub parent: Tid,
    /// The host it is on.
    pub host: Tid,
    /// The pvmd's flags.
    pub flags: i32,
    /// What it was spawned as, before it moved; empty for a task that enrolled by itself.
    pub program: String,
    /// Its pid, as its host counts.
    pub pid: i32,
}

/// What a pvmd collects of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// What it prints.
    Output,
    /// Its traces.
    Trace,
}

impl Stream {
    /// What pvmd calls the tid it goes to; its context and its tag follow (TM_SETOPT).
    #[must_use]
    pub fn option(&self) -> i32 {
        match self {
            Stream::Output => 1,
            Stream::Trace => 4,
        }
    }
}

/// What can be asked for with [`Client::notify`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// These tasks end.
    TaskExit,
    /// These hosts go.
    HostDelete,
    /// Hosts come, as often as that happens.
    HostAdd,
}

impl Client {
    /// The hosts of the virtual machine (TM_CONFIG).
    ///
    /// # Errors
    /// When the pvmd does not answer, or not in PVM's way.
    pub fn hosts(&mut self) -> Result<Vec<Host>> {
        let answer = self
            .ask(tm::CONFIG, Body::new())
            .context("cannot get the list of hosts")?;
        let mut reader = answer.reader();
        let (count, _formats) = (reader.int()?, reader.int()?);
        (0..bounded(count)?).map(|_| host(&mut reader)).collect()
    }

    /// The tasks on one host, or with [`Tid::NONE`] on all (TM_TASK), but for those that only ask, as we do.
    ///
    /// # Errors
    /// When a pvmd does not answer, or there is no such host.
    pub fn tasks(&mut self, at: Tid) -> Result<Vec<Task>> {
        let answer = self
            .ask(tm::TASK, Body::new().uint(at.0))
            .context("cannot get the list of tasks")?;
        tasks(at, &answer)
    }

    /// Begins to ask for the tasks on a host: the question's wait id.
    ///
    /// # Errors
    /// As for [`Client::begin`].
    pub fn begin_tasks(&mut self, at: Tid) -> Result<u32> {
        self.begin(tm::TASK, Body::new().uint(at.0))
    }

    /// The answer to [`Client::begin_tasks`]; none when it has not come in time, and still may.
    ///
    /// # Errors
    /// When the connection breaks, or there is no such host.
    pub fn end_tasks(
        &mut self,
        at: Tid,
        question: u32,
        limit: Duration,
    ) -> Result<Option<Vec<Task>>> {
        let until = Some(Instant::now() + limit);
        let answer = self.answer_until(tm::TASK, question, until)?;
        answer.map(|answer| tasks(at, &answer)).transpose()
    }

    /// Whether a task lives (TM_PSTAT).
    ///
    /// # Errors
    /// When the pvmd does not answer, or says something else, as when the host is gone.
    pub fn lives(&mut self, tid: Tid) -> Result<bool> {
        let answer = self
            .ask(tm::PSTAT, Body::new().uint(tid.0))
            .with_context(|| format!("cannot ask whether {tid} lives"))?;
        said_of_life(tid, &answer)
    }

    /// Whether a task lives, if its host is in the virtual machine for the own pvmd. A pvmd that does not answer is waited
    /// for: it does, or is taken for dead in the end.
    ///
    /// # Errors
    /// When the own pvmd has ended, or cannot tell.
    pub fn lives_here(&mut self, tid: Tid) -> Result<Option<bool>> {
        let wait = self.begin_lives(tid)?;
        let answer = self.answer(tm::PSTAT, wait, None)?;
        match self.has_host(tid)? {
            true => said_of_life(tid, &answer).map(Some),
            false => Ok(None),
        }
    }

    /// Whether the host of a tid is in the virtual machine.
    ///
    /// # Errors
    /// As for [`Client::hosts`].
    pub fn has_host(&mut self, tid: Tid) -> Result<bool> {
        let there = |host: &Host| host.tid.host() == tid.host();
        Ok(self.hosts()?.iter().any(there))
    }

    /// Begins to ask whether a task lives; the answer bears this wait id, and [`said_of_life`] reads it.
    ///
    /// # Errors
    /// As for [`Client::begin`].
    pub fn begin_lives(&mut self, tid: Tid) -> Result<u32> {
        self.begin(tm::PSTAT, Body::new().uint(tid.0))
    }

    /// Asks to be told of an event by a message with this tag, in the default context (TM_NOTIFY); see
    /// [`noticed`]. About a task that is dead already the notice comes at once.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn notify(&mut self, what: Notify, tag: i32, about: &[Tid]) -> Result<()> {
        let body = Body::new();
        let body = match what {
            Notify::TaskExit => body.int(1),
            Notify::HostDelete => body.int(2),
            Notify::HostAdd => body.int(3),
        };
        let body = body.int(0).int(tag);
        let body = match what {
            Notify::HostAdd => body.int(-1),
            _ => about
                .iter()
                .fold(body.int(about.len() as i32), |b, tid| b.uint(tid.0)),
        };
        self.tell(tm::NOTIFY, body)
    }

    /// Adds hosts (TM_ADDHOST); each is a name with options, as in a hostfile. Gives, for each, the host or why
    /// it was not added. `limit` is for all of them together.
    ///
    /// # Errors
    /// When the pvmd does not answer in time, or refuses all of them.
    pub fn add_hosts(
        &mut self,
        lines: &[String],
        limit: Duration,
    ) -> Result<Vec<Result<Host, String>>> {
        let body = lines
            .iter()
            .fold(Body::new().int(lines.len() as i32), |body, line| {
                body.string(line.as_bytes())
            });
        self.set_patience(limit);
        let answer = self.ask(tm::ADDHOST, body);
        self.set_patience(super::client::PATIENCE);
        let answer = answer.context("cannot add hosts")?;
        let mut reader = answer.reader();
        let count = reader.int()?;
        if count < 0 {
            bail!("cannot add hosts: {}", error_name(count));
        }
        let _formats = reader.int()?;
        (0..bounded(count)?)
            .map(|_| {
                let host = host(&mut reader)?;
                Ok(match host.tid.0 as i32 {
                    code if code < 0 => Err(error_name(code)),
                    _ => Ok(host),
                })
            })
            .collect()
    }

    /// Tells the own pvmd where to send this task's output, or its traces, from now on (TM_SETOPT).
    ///
    /// # Errors
    /// When the pvmd does not answer.
    pub fn set_sink(&mut self, what: Stream, to: Sink) -> Result<()> {
        let first = what.option();
        let values = [
            format!("{:x}", to.tid),
            format!("{:x}", to.ctx),
            format!("{:x}", to.tag),
        ];
        // The tid last: with it pvmd tells the collector at once that the task begins, by the context and tag it
        // has by then (tm_setopt, tdpro.c).
        let body = [first, first + 1, first + 2]
            .into_iter()
            .zip(&values)
            .rev()
            .fold(Body::new(), |body, (option, value)| {
                body.int(option).string(value.as_bytes())
            });
        let answer = self
            .ask(tm::SETOPT, body)
            .context("cannot say where output goes")?;
        drop(answer);
        Ok(())
    }

    /// Where the own pvmd sends this task's output, and its traces (TM_GETOPT).
    ///
    /// # Errors
    /// When the pvmd does not answer.
    pub fn sinks(&mut self) -> Result<(Sink, Sink)> {
        let answer = self
            .ask(tm::GETOPT, Body::new())
            .context("cannot ask where output goes")?;
        let mut reader = answer.reader();
        let (_tid, _parent) = (reader.tid()?, reader.tid()?);
        let mut sink = || -> Result<Sink> {
            Ok(Sink {
                tid: reader.uint()?,
                ctx: reader.uint()?,
                tag: reader.int()?,
            })
        };
        Ok((sink()?, sink()?))
    }

    /// Ends the virtual machine: every task, every pvmd (TM_HALT). The pvmds do it after this has returned; the
    /// connection ends with the own one.
    ///
    /// # Errors
    /// When the connection breaks before.
    pub fn halt(&mut self) -> Result<()> {
        self.tell(tm::HALT, Body::new())
    }
}

fn bounded(count: i32) -> Result<usize> {
    match usize::try_from(count) {
        Ok(count) if count <= MOST => Ok(count),
        _ => bail!("the pvmd tells of {count} hosts, which cannot be"),
    }
}

fn host(reader: &mut Reader<'_>) -> Result<Host> {
    let host = Host {
        tid: reader.tid()?,
        name: reader.text()?,
        arch: reader.text()?,
        speed: reader.int()?,
    };
    let _signature = reader.int()?;
    Ok(host)
}

fn tasks(at: Tid, answer: &Message) -> Result<Vec<Task>> {
    let mut reader = answer.reader();
    let status = reader.int()?;
    if status < 0 {
        bail!("cannot list the tasks of {at}: {}", error_name(status));
    }
    let mut tasks = Vec::new();
    while !reader.rest().is_empty() {
        let mut task = Task {
            tid: reader.tid()?,
            parent: reader.tid()?,
            host: reader.tid()?,
            flags: reader.int()?,
            program: reader.text()?,
            pid: reader.int()?,
        };
        if let Some((parent, name)) = place::spawned_as(task.program.as_bytes()) {
            task.parent = Tid(parent);
            task.program = String::from_utf8_lossy(name).into_owned();
        }
        tasks.push(task);
    }
    tasks.retain(|task| task.pid != HELPER_PID);
    Ok(tasks)
}

/// What an answer to [`Client::begin_lives`] says.
///
/// # Errors
/// When the pvmd cannot tell, as when the host is gone.
pub fn said_of_life(tid: Tid, answer: &Message) -> Result<bool> {
    match answer.reader().int()? {
        0 => Ok(true),
        NO_TASK => Ok(false),
        code => bail!("cannot tell whether {tid} lives: {}", error_name(code)),
    }
}

/// The tids in a notice of [`Client::notify`].
pub fn noticed(message: &Message) -> Vec<Tid> {
    let mut reader = message.reader();
    std::iter::from_fn(|| reader.tid().ok()).collect()
}

/// PVM's name of an error, and what it means.
pub fn error_name(code: i32) -> String {
    let name = match code {
        -2 => "PvmBadParam, an argument makes no sense",
        -6 => "PvmNoHost, there is no such host",
        -7 => "PvmNoFile, there is no such program",
        -8 => "PvmDenied",
        -10 => "PvmNoMem, out of memory",
        -14 => "PvmSysErr, no pvmd answers",
        -22 => "PvmHostFail, the host failed",
        -24 => "PvmNotImpl",
        -25 => "PvmDSysErr, see the pvmd's log",
        -26 => "PvmBadVersion, its pvmd is of another version",
        -27 => "PvmOutOfRes, out of resources",
        -28 => "PvmDupHost, it is in the virtual machine already",
        -29 => {
            "PvmCantStart, its pvmd cannot be started; does `$PVM_RSH HOST true` work without questions?"
        }
        -30 => "PvmAlready, another is at it",
        NO_TASK => "PvmNoTask, there is no such task",
        -32 => "PvmNotFound",
        -33 => "PvmExists",
        -34 => "PvmHostrNMstr, only the master may",
        -36 => {
            "PvmIPLoopback, this host calls itself by a loopback address; start the pvmd with --name"
        }
        code => return format!("error {code}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_hosts_is_bounded_before_anything_is_set_aside() {
        assert!(bounded(-1).is_err());
        assert!(bounded(i32::MAX).is_err());
        assert_eq!(bounded(4095).unwrap(), 4095);
    }
}
