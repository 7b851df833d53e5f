//! Names on hosts that are added. Their pvmds count from 1, and where tasks were restored from another virtual machine,
//! some of these tids are names already.

use std::time::Duration;

use anyhow::{Result, bail};
use pvm_abi::AGENTS;

use super::call::Caller;
use super::control::{Answer, Known, Peer, Request};
use crate::pvm::client::Client;
use crate::pvm::tid::Tid;
use crate::pvm::tids;
use crate::pvm::virtual_machine::Host;

/// How long an agent may take to tell what it knows.
const PATIENCE: Duration = Duration::from_secs(5);

/// The names among `entries` that a host could give out, and whose tasks are others.
fn names(entries: &[Known], host: Tid) -> impl Iterator<Item = Tid> {
    let taken = entries.iter().filter(|known| known.v != known.r);
    let names = taken.map(|known| Tid(known.v));
    names.filter(move |name| name.host_index() == host.host_index())
}

/// Before a host gets its agent: uses up the tids that are names, or the agent, or a task, would be given one.
///
/// # Errors
/// When a pvmd or an agent does not answer.
pub fn make_room(client: &mut Client, host: &Host) -> Result<()> {
    let class = AGENTS.to_string_lossy();
    for entry in client.mailbox_names(&class)? {
        // One of them knows what all know. Some may have ended, or hang: they must not keep a host without its agent.
        let Ok(answer) = Caller::new(client).ask(entry.owner, Request::Table, PATIENCE) else {
            continue;
        };
        let Answer::Table { entries, .. } = answer else {
            bail!("the agent {} answers {answer:?}", entry.owner);
        };
        if let Some(last) = names(&entries, host.tid).max() {
            // However long it takes: without an agent nothing can be done on any host.
            tids::use_up(client, host, last.slot(), tids::ALL)?;
        }
    }
    Ok(())
}

/// Tasks that a host has started before its agent came, with a real tid that is the name of another task: the real tid
/// of each, and a name of its own. They wait for it.
///
/// # Errors
/// When a pvmd does not answer.
pub fn own_names(
    client: &mut Client,
    agent: &Peer,
    entries: &[Known],
    incarnations: &[(u32, u32)],
) -> Result<Vec<(u32, u32)>> {
    let host = Host {
        tid: Tid(agent.host),
        name: agent.name.clone(),
        arch: String::new(),
        speed: 0,
    };
    let names: Vec<Tid> = names(entries, host.tid).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut given = Vec::new();
    for task in client.tasks(host.tid)? {
        let has_one = incarnations.iter().any(|(r, _)| *r == task.tid.0);
        if names.contains(&task.tid) && !has_one {
            let own = tids::use_up(client, &host, 0, tids::MOST)?;
            given.extend(own.last().map(|name| (task.tid.0, name.0)));
        }
    }
    Ok(given)
}
