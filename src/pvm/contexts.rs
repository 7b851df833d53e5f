//! Context ids (pvm_newcontext). Every pvmd counts its own up from 1 and gives none out twice, and a new virtual
//! machine counts anew: those that a saved task may know are used up before it runs there, or a stranger would get
//! one of them and receive what is not meant for it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pvm_abi::{AGENTS, CTX_LAST, CTX_TC};

use crate::pvm::agent::Caller;
use crate::pvm::agent::control::{Answer, Peer, Request};
use crate::pvm::client::Client;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::error_name;
use crate::pvm::wire::{Body, tm};

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most that are used up by one request: the agent serves nobody else meanwhile.
const AT_ONCE: u32 = 256;

impl Client {
    /// Has the pvmd of this host give out a context id, and take it back (TM_CONTEXT): nobody gets that one again.
    ///
    /// # Errors
    /// When the pvmd does not answer, or has none left.
    pub fn use_up_context(&mut self) -> Result<u32> {
        let mut ask = |context: u32| -> Result<i32> {
            self.ask(tm::CONTEXT, Body::new().uint(context))
                .context("cannot get a context id")?
                .reader()
                .int()
        };
        let context = ask(0)?;
        if context <= 0 {
            bail!("cannot get a context id: {}", error_name(context));
        }
        ask(context as u32)?;
        Ok(context as u32)
    }
}

/// Of some context ids, which are made as tids are, the highest of each host; without those that all hosts have.
#[must_use]
pub fn highest(contexts: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let mut of_hosts = BTreeMap::new();
    for context in contexts {
        let host = Tid(context).host_index();
        // A task in a barrier has one of PVM's own, which are at the end of what the first host can give out.
        let pvms = CTX_LAST as u32..=CTX_TC as u32;
        if Tid(context).is_task() && !pvms.contains(&context) {
            let known = of_hosts.entry(host).or_insert(context);
            *known = context.max(*known);
        }
    }
    of_hosts.into_values().collect()
}

/// How far the pvmds of the other hosts have counted, as far as there are agents to ask: without any, no task ever
/// moved, and who knows a context of another host has it from a task there, whose image says the same.
///
/// # Errors
/// When an agent does not answer.
pub fn counted_elsewhere(client: &mut Client) -> Result<Vec<u32>> {
    let class = AGENTS.to_str().context("the class of agents")?;
    let own = client.tid().host();
    let agents = client.mailbox_names(class)?.into_iter().map(|e| e.owner);
    agents
        .filter(|agent| agent.host() != own)
        .map(|agent| used_up(client, agent, 1))
        .collect()
}

/// Uses up context ids of the hosts of `agents` until they are behind each of `known`. Those of hosts that are not there
/// nobody can give out.
///
/// # Errors
/// When an agent does not answer, or its pvmd has no more.
pub fn use_up(client: &mut Client, agents: &[Peer], known: &[u32]) -> Result<()> {
    for known in highest(known.iter().copied()).into_iter().map(Tid) {
        let of_host = |agent: &&Peer| Tid(agent.host).host_index() == known.host_index();
        let Some(agent) = agents.iter().find(of_host).map(|agent| Tid(agent.tid)) else {
            continue;
        };
        let mut last = used_up(client, agent, 1)?;
        while last < known.0 {
            let next = used_up(client, agent, (known.0 - last).min(AT_ONCE))?;
            if next <= last {
                // Counted to the end, and from 1 again.
                break;
            }
            last = next;
        }
    }
    Ok(())
}

fn used_up(client: &mut Client, agent: Tid, count: u32) -> Result<u32> {
    match Caller::new(client).ask(agent, Request::UseUpContexts { count }, PATIENCE)? {
        Answer::Context { last } => Ok(last),
        other => bail!("the agent {agent} answers {other:?}"),
    }
}

/// What the agent of a host does: uses up so many, and answers the last one.
///
/// # Errors
/// When the pvmd does not answer, or has none left.
pub fn count(client: &mut Client, count: u32) -> Result<u32> {
    let mut last = 0;
    for _ in 0..count.clamp(1, AT_ONCE) {
        last = client.use_up_context()?;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_of_each_host_counts() {
        let known = [0, 0x40003, 0x80001, 0x40002, 7];
        assert_eq!(highest(known), [0x40003, 0x80001]);
        assert_eq!(highest([]), [0; 0]);
    }

    #[test]
    fn those_that_pvm_keeps_for_itself_are_nobodys() {
        // SYSCTX_FIRST, and the nine below it; SYSCTX_DG, that of dynamic groups, is 0x7fffc.
        assert_eq!(highest(0x7fff6..=0x7ffff), [0; 0]);
        assert_eq!(highest([0x40002, 0x7fffc, 0x7fff5]), [0x7fff5]);
    }
}
