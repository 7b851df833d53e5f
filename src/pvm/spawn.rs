//! Starting a task through PVM (TM_SPAWN).

use anyhow::{Context, Result, bail};

use crate::error::Failure;
use crate::pvm::client::Client;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::error_name;
use crate::pvm::wire::Body;
use crate::pvm::wire::tm;

/// pvm3.h: PvmTaskHost, `where` names a host.
const ON_HOST: i32 = 1;

/// Where a pvmd sends what a task prints, or its traces: messages to `tid`, which is a real tid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sink {
    /// Who collects; 0 for the log of the master pvmd, or for no traces.
    pub tid: u32,
    /// Context of the messages.
    pub ctx: u32,
    /// Their tag.
    pub tag: i32,
}

impl From<(u32, u32, i32)> for Sink {
    fn from((tid, ctx, tag): (u32, u32, i32)) -> Sink {
        Sink { tid, ctx, tag }
    }
}

/// A task to be started.
#[derive(Clone, Debug)]
pub struct Spawn<'a> {
    /// Path of the program, absolute; its name is what PVM's console shows.
    pub file: &'a [u8],
    /// Its arguments, without the program's own name.
    pub args: &'a [&'a str],
    /// Name of the host, as the virtual machine knows it.
    pub host: &'a str,
    /// Additions to the environment that it inherits from its pvmd: NAME=VALUE.
    pub environment: &'a [&'a str],
    /// Where its output goes.
    pub output: Sink,
    /// Where its traces go.
    pub trace: Sink,
}

impl Client {
    /// Starts one task on one host; its tid. The pvmd there has forked it by then, but the program may not run yet.
    ///
    /// # Errors
    /// When PVM does not start it, with PVM's reason; the class is `Refused` for a host or file that is not there.
    pub fn spawn(&mut self, what: &Spawn<'_>) -> Result<Tid> {
        let name = || String::from_utf8_lossy(what.file);
        let body = Body::new()
            .string(what.file)
            .int(ON_HOST)
            .string(what.host.as_bytes())
            .int(1)
            .int(what.args.len() as i32);
        let body = what
            .args
            .iter()
            .fold(body, |b, arg| b.string(arg.as_bytes()));
        let body = [what.output, what.trace].iter().fold(body, |b, sink| {
            b.uint(sink.tid).uint(sink.ctx).int(sink.tag)
        });
        let body = body.int(what.environment.len() as i32);
        let body = what
            .environment
            .iter()
            .fold(body, |b, variable| b.string(variable.as_bytes()));
        let answer = self
            .ask(tm::SPAWN, body)
            .with_context(|| format!("cannot start {} on {}", name(), what.host))?;
        let mut reader = answer.reader();
        let count = reader.int()?;
        let code = match count {
            1 => reader.int()?,
            code if code < 0 => code,
            _ => bail!("the pvmd says that it started {count} tasks, and was asked for one"),
        };
        let tid = Tid(code as u32);
        if tid.is_task() {
            return Ok(tid);
        }
        let error = format!(
            "cannot start {} on {}: {}",
            name(),
            what.host,
            error_name(code)
        );
        Err(match code {
            -6 | -7 => Failure::Refused.because(error),
            _ => anyhow::Error::msg(error),
        })
    }
}
