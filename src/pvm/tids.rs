//! Tids that are used up, so that nobody gets them: a pvmd gives each out once.

use anyhow::{Context, Result};

use crate::error::Failure;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::spawn::{Sink, Spawn};
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Host;

/// Most that are used up for somebody who waits and can be told.
pub const MOST: u32 = 20_000;
/// As many as a host can give out.
pub const ALL: u32 = 1 << 18;

/// Uses up tids of a host until they are behind `slot`; at least one. They are names that nobody has.
///
/// # Errors
/// `Refused` when `most` are not enough; when a pvmd does not answer.
pub fn use_up(client: &mut Client, host: &Host, slot: u32, most: u32) -> Result<Vec<Tid>> {
    let here = match host.tid.host() == client.tid().host() {
        true => Some(Pvmd::find()?.context("no virtual machine is running here")?),
        false => None,
    };
    let mut used = Vec::new();
    for _ in 0..most {
        let next = match &here {
            Some(pvmd) => {
                let other = Client::enrol(pvmd, 0)?;
                let tid = other.tid();
                other.exit()?;
                tid
            }
            None => client.spawn(&Spawn {
                file: b"/bin/true",
                args: &[],
                host: &host.name,
                environment: &[],
                output: Sink::default(),
                trace: Sink::default(),
            })?,
        };
        used.push(next);
        if next.slot() > slot {
            return Ok(used);
        }
    }
    Err(Failure::Refused.because(format!(
        "this virtual machine is young: more than {most} tids of {} would have to be used up first, for tasks that were restored",
        host.name
    )))
}
