//! A saved task comes back into a virtual machine: through the agent of the host it goes to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::error::Failure;
use crate::image::pvm::PvmTask;
use crate::pvm::agent::control::{Answer, Known, Landing, Peer, Request};
use crate::pvm::agent::{self, Caller, Waits, ask_everywhere, ensure};
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::contexts;
use crate::pvm::mailbox::packed;
use crate::pvm::tid::Tid;
use crate::pvm::tids;
use crate::pvm::virtual_machine::Host;

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a task may take to be rebuilt, however large it is.
const BUILDING: Duration = Duration::from_secs(3600);

/// What came back.
#[derive(Debug, Clone, Serialize)]
pub struct Restored {
    /// The tid that the task and its partners know.
    pub virtual_tid: Tid,
    /// The one it has now.
    pub tid: Tid,
    pub host: String,
    /// From its release to its first step.
    pub resume_us: u64,
    pub warnings: Vec<String>,
}

/// Restores the image at `path`, which says of the task what `task` is, to the host of this name; without one, to
/// where it was if that host is in the virtual machine, else here.
///
/// # Errors
/// `Refused` when it cannot be here, `Busy` when a host does not answer; nothing is left of it then.
pub fn run(
    path: &Path,
    task: &PvmTask,
    host: Option<&str>,
    lazy: bool,
    waits: Waits<'_>,
) -> Result<Restored> {
    let pvmd = Pvmd::find()?.ok_or_else(|| {
        Failure::NoSuchProcess.because(format!(
            "{} holds a PVM task, and no virtual machine is running here; `mistctl pvm start` starts one",
            path.display()
        ))
    })?;
    let v = Tid(task.v);
    let mut client = Client::enrol(&pvmd, 0)?;
    let hosts = client.hosts()?;
    let host = choose(&hosts, task, host, client.tid())?.name.clone();
    agent::all_answer(&mut client, waits)?;
    let begins_anew = use_up(&mut client, &hosts, v)?;
    if begins_anew {
        // Ours may be among those that were used up.
        client = Client::enrol(&pvmd, 0)?;
    }
    let agents = ensure(&mut client, waits)?;
    let mut landing = Restore {
        id: format!("r{:x}-{:x}", client.tid().0, v.0),
        client,
        agents,
        host,
    };
    landing.alone(v)?;
    landing.refuse_living(v)?;
    contexts::use_up(&mut landing.client, &landing.agents, &task.contexts)
        .context("cannot use up the contexts that the task may know")?;
    let done = landing.land(path, task, lazy, !begins_anew && !task.away);
    match done {
        Ok(restored) => {
            landing.client.exit()?;
            Ok(restored)
        }
        Err(e) => {
            // It may never have begun.
            let id = landing.id.clone();
            let _ = landing.ask_target(Request::Abandon { id, r: 0 }, PATIENCE);
            Err(Failure::Restore.with(e.context(format!(
                "task {v} was not restored, and nothing of it is left"
            ))))
        }
    }
}

fn choose<'h>(
    hosts: &'h [Host],
    task: &PvmTask,
    wanted: Option<&str>,
    own: Tid,
) -> Result<&'h Host> {
    let named = |name: &str| hosts.iter().find(|h| h.name == name);
    let found = match wanted {
        Some(name) => named(name),
        None => named(&task.host).or_else(|| hosts.iter().find(|h| h.tid.host() == own.host())),
    };
    found.ok_or_else(|| {
        let names: Vec<&str> = hosts.iter().map(|h| h.name.as_str()).collect();
        Failure::Refused.because(format!(
            "there is no host {} in the virtual machine; there are {}",
            wanted.unwrap_or(&task.host),
            names.join(", ")
        ))
    })
}

/// Uses up tids on the host that `v` names until it is behind us: a virtual machine that was started anew counts
/// from 1 again, and some task would be given the very tid. True: there were some to use up.
fn use_up(client: &mut Client, hosts: &[Host], v: Tid) -> Result<bool> {
    let Some(host) = hosts.iter().find(|h| h.tid.host() == v.host()) else {
        return Ok(false);
    };
    let used = tids::use_up(client, host, v.slot(), tids::MOST).with_context(|| {
        let name = &host.name;
        format!(
            "making sure that nobody on {name} gets the tid {v}; if {name} is down, take it out (`delete {name}` in \
             PVM's console), and restore again"
        )
    })?;
    Ok(used.len() > 1)
}

struct Restore {
    id: String,
    client: Client,
    agents: Vec<Peer>,
    host: String,
}

impl Restore {
    fn ask(&mut self, agent: u32, request: Request, limit: Duration) -> Result<Answer> {
        Caller::new(&mut self.client).ask(Tid(agent), request, limit)
    }

    fn ask_target(&mut self, request: Request, limit: Duration) -> Result<Answer> {
        let target = self.agents.iter().find(|a| a.name == self.host);
        let tid = target
            .map(|a| a.tid)
            .with_context(|| format!("there is no agent on {}", self.host))?;
        self.ask(tid, request, limit)
    }

    /// Of two that restore a task at once neither would see the other's: who is first has this entry until it ends.
    fn alone(&mut self, v: Tid) -> Result<()> {
        let (own, name) = (self.client.tid(), format!("mist.restore.{v}"));
        let Err(e) = self.client.mailbox_put(own, &name, 0, 0, &packed(own, &[])) else {
            return Ok(());
        };
        match self.client.mailbox_names(&name)?.first() {
            Some(other) => Err(Failure::Busy.because(format!(
                "another mistctl ({}) is restoring task {v}; `mistctl ps` shows where it is then",
                other.owner
            ))),
            None => Err(e),
        }
    }

    /// Two tasks of one name there must not be.
    fn refuse_living(&mut self, v: Tid) -> Result<()> {
        let answer = self.ask_target(Request::Table, PATIENCE)?;
        let Answer::Table { entries, .. } = answer else {
            bail!("the agent of {} answers {answer:?}", self.host);
        };
        let known = entries.iter().find(|known: &&Known| known.v == v.0);
        let now = known.map_or(v, |known| Tid(known.r));
        if known.is_some_and(|known| known.hidden) {
            return Err(Failure::Refused.because(format!(
                "{v} is the tid of one of mist's agents in this virtual machine; start that anew (`mistctl pvm stop`, `mistctl pvm start`) and restore the task first"
            )));
        }
        // Of a host that is gone nothing lives.
        if self.client.lives(now).unwrap_or(false) {
            return Err(Failure::Refused.because(format!(
                "a task {v} is running in this virtual machine ({now}); end it first (`kill {now}` in PVM's console)"
            )));
        }
        Ok(())
    }

    /// Tells the lander that it may run; how long that took.
    fn run_it(&mut self, id: String) -> Result<u64> {
        self.ask_target(Request::Run { id: id.clone() }, PATIENCE)?;
        match self.ask_target(Request::Running { id }, PATIENCE)? {
            Answer::Running { resume_us } => Ok(resume_us),
            other => bail!("the agent of {} answers {other:?}", self.host),
        }
    }

    fn land(
        &mut self,
        path: &Path,
        task: &PvmTask,
        lazy: bool,
        announce: bool,
    ) -> Result<Restored> {
        let id = self.id.clone();
        let order = Landing {
            id: id.clone(),
            v: task.v,
            parent: task.parent,
            program: task.program.clone(),
            moves: None,
            image: Some(PathBuf::from(path)),
            lazy,
            announce,
        };
        let answer = self.ask_target(Request::Land { order }, PATIENCE)?;
        let Answer::Landed { r, .. } = answer else {
            bail!("the agent of {} answers {answer:?}", self.host);
        };
        ask_everywhere(&mut self.client, &Request::AddIncarnation { r, v: task.v })?;
        let answer = self.ask_target(Request::Parked { id: id.clone() }, BUILDING)?;
        let Answer::Parked { warnings } = answer else {
            bail!("the agent of {} answers {answer:?}", self.host);
        };
        // What is sent to it from here on comes behind what it had not read.
        let open = Request::OpenGate { v: task.v, r };
        let opened = ask_everywhere(&mut self.client, &open);
        let runs = opened.and_then(|()| self.run_it(id));
        if runs.is_err() && task.away {
            // Its partners wait for it again. Where its gate was not opened it is closed still.
            let close = Request::CloseGate {
                v: task.v,
                from: r,
                next: 0,
                lease_ms: 0,
                saved: false,
            };
            let _ = ask_everywhere(&mut self.client, &close);
        }
        let resume_us = runs?;
        Ok(Restored {
            virtual_tid: Tid(task.v),
            tid: Tid(r),
            host: self.host.clone(),
            resume_us,
            warnings,
        })
    }
}
