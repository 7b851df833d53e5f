//! A saved task comes back into a virtual machine: through the agent of the host it goes to.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::error::Failure;
use crate::image::pvm::PvmTask;
use crate::pvm::agent::control::{Answer, Known, Landing, Peer, Request};
use crate::pvm::agent::{self, Caller, Gone, Waits, ask_everywhere, ask_last, ensure};
use crate::pvm::away::Note;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::contexts;
use crate::pvm::local::{Doing, Seen};
use crate::pvm::mailbox::packed;
use crate::pvm::tid::Tid;
use crate::pvm::tids;
use crate::pvm::virtual_machine::Host;
use crate::pvm::wire::{Body, tm};

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a task may take to be rebuilt, however large it is.
const BUILDING: Duration = Duration::from_secs(3600);

/// How often it is looked whether a task runs that nobody tells of.
const LOOK: Duration = Duration::from_millis(20);

/// What came back.
#[derive(Debug, Clone, Serialize)]
pub struct Restored {
    /// The tid that the task and its partners know.
    pub virtual_tid: Tid,
    /// The one it has now.
    pub tid: Tid,
    pub host: String,
    /// From its release to its first step; none when nobody could tell.
    pub resume_us: Option<u64>,
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
    let mut agents = ensure(&mut client, waits)?;
    if agents.iter().any(|agent| agent.tid == v.0) {
        make_way(&mut client, v)?;
        agents = ensure(&mut client, waits)?;
    }
    let mut landing = Restore {
        id: format!("r{:x}-{:x}", client.tid().0, v.0),
        client,
        agents,
        host,
    };
    landing.alone(v)?;
    let waited_for = landing.refuse_living(v)?;
    contexts::use_up(&mut landing.client, &landing.agents, &task.contexts)
        .context("cannot use up the contexts that the task may know")?;
    let announce = !begins_anew && !task.away;
    let done = landing.land(path, task, lazy, announce, waited_for);
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

/// Ends the agent that was given the tid `v` in a virtual machine that counts anew. Another one follows, with a tid that
/// it has not given out before.
fn make_way(client: &mut Client, v: Tid) -> Result<()> {
    let kill = Body::new().uint(v.0).int(Signal::SIGKILL as i32);
    client.ask(tm::SENDSIG, kill)?;
    let until = Instant::now() + PATIENCE;
    while client.lives(v)? {
        if Instant::now() > until {
            return Err(Failure::Busy.because(format!(
                "{v} is the tid of one of mist's agents in this virtual machine, which does not end; nothing was changed, try again"
            )));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
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

    /// Two tasks of one name there must not be. True: its partners wait for it.
    fn refuse_living(&mut self, v: Tid) -> Result<bool> {
        let mut all = Vec::new();
        for agent in self.agents.clone() {
            let answer = self.ask(agent.tid, Request::Table, PATIENCE)?;
            let Answer::Table { entries, .. } = answer else {
                bail!("the agent of {} answers {answer:?}", agent.name);
            };
            all.push(entries.into_iter().find(|known| known.v == v.0));
        }
        let away = |known: &Option<Known>| known.is_some_and(|known| known.away);
        let mut present: Vec<Tid> = (all.iter())
            .map(|known| known.map_or(v, |known| Tid(known.r)))
            .collect();
        present.sort_unstable();
        present.dedup();
        for now in present {
            // Of a host that is gone nothing lives.
            if !self.client.lives(now).unwrap_or(false) {
                continue;
            }
            if all.iter().any(away) {
                // Who restored it did not come to its end.
                let (v, r) = (v.0, now.0);
                ask_everywhere(&mut self.client, &Request::AddIncarnation { r, v })?;
                ask_everywhere(&mut self.client, &Request::OpenGate { v, r })?;
            }
            return Err(Failure::Refused.because(format!(
                "a task {v} is running in this virtual machine ({now}); end it first (`kill {now}` in PVM's console)"
            )));
        }
        Ok(all.iter().any(away))
    }

    /// Tells the lander that it may run; how long that took.
    fn run_it(&mut self, id: String) -> Result<u64> {
        self.ask_target(Request::Run { id: id.clone() }, PATIENCE)?;
        match self.ask_target(Request::Running { id }, PATIENCE)? {
            Answer::Running { resume_us } => Ok(resume_us),
            other => bail!("the agent of {} answers {other:?}", self.host),
        }
    }

    /// Whether it runs, though the agent that was to tell us has ended: it was told so before.
    fn runs_all_the_same(&mut self, v: Tid, r: Tid) -> Result<bool> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if !self.client.lives(r)? {
                return Ok(false);
            }
            self.agents = ensure(&mut self.client, &|_| {})?;
            match self.ask_target(Request::Status, PATIENCE) {
                Ok(Answer::Status { tasks }) => {
                    let is_it = |seen: &Seen| {
                        seen.tid == r.0
                            && seen.virtual_tid == Some(v.0)
                            && !matches!(seen.state, Doing::Traced | Doing::Zombie)
                    };
                    if tasks.iter().any(is_it) {
                        return Ok(true);
                    }
                }
                Ok(other) => bail!("the agent of {} answers {other:?}", self.host),
                Err(e) if e.is::<Gone>() => {}
                Err(e) => return Err(e),
            }
            std::thread::sleep(LOOK);
        }
        bail!("{r} neither runs nor ends")
    }

    fn land(
        &mut self,
        path: &Path,
        task: &PvmTask,
        lazy: bool,
        announce: bool,
        waited_for: bool,
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
        let Answer::Parked { mut warnings } = answer else {
            bail!("the agent of {} answers {answer:?}", self.host);
        };
        let open = Request::OpenGate { v: task.v, r };
        let resume_us = if waited_for {
            // Whatever ends before it runs, nothing has been sent to it that would be lost with it.
            let resume_us = match self.run_it(id) {
                Ok(resume_us) => Some(resume_us),
                Err(e) if e.is::<Gone>() && self.runs_all_the_same(Tid(task.v), Tid(r))? => None,
                Err(e) => return Err(e),
            };
            // The agent there sees by its own gate that all are open, and does it should we die.
            if let Err(e) = ask_last(&mut self.client, &open, &self.host) {
                warnings.push(format!(
                    "some of its partners may still wait for task {} ({e:#}); restore it again, which is refused and lets them go on",
                    Tid(task.v)
                ));
            }
            Note::remove(&mut self.client, Tid(task.v));
            resume_us
        } else {
            // Nobody waits: who answers what it says must find it at once.
            ask_everywhere(&mut self.client, &open)?;
            Some(self.run_it(id)?)
        };
        Ok(Restored {
            virtual_tid: Tid(task.v),
            tid: Tid(r),
            host: self.host.clone(),
            resume_us,
            warnings,
        })
    }
}
