//! Those who ask agents: commands, over a PVM connection of their own.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::control::{Answer, Envelope, Known, Peer, Request, TAG, VERSION, What};
use super::names;
use crate::pvm::client::Client;
use crate::pvm::spawn::{Sink, Spawn};
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::{Host, Notify, noticed};
use crate::pvm::wire::Body;

/// Tag of pvmd's notice that an agent has ended.
const ENDED: i32 = TAG + 1;
/// How long an agent may take to say that it is there.
const STARTING: Duration = Duration::from_secs(20);
/// How long one may take for what it has at hand.
const LIMIT: Duration = Duration::from_secs(30);
/// How long the last step of a move may take: then its gates open by themselves. How often that is looked at.
const MOVES_END: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);

/// Asks agents.
pub struct Caller<'c> {
    client: &'c mut Client,
    next: u64,
}

impl<'c> Caller<'c> {
    /// Asks in the name of `client`.
    pub fn new(client: &'c mut Client) -> Caller<'c> {
        Caller { client, next: 1 }
    }

    /// Asks an agent and waits for the answer.
    ///
    /// # Errors
    /// Those of the agent, or that it ended, or did not answer in time.
    pub fn ask(&mut self, agent: Tid, request: Request, limit: Duration) -> Result<Answer> {
        let id = self.next;
        self.next += 1;
        let envelope = Envelope {
            version: VERSION,
            id,
            what: What::Request(request),
        };
        let body = serde_json::to_vec(&envelope).context("JSON")?;
        self.client.notify(Notify::TaskExit, ENDED, &[agent])?;
        self.client.send(agent, TAG, Body::new().bytes(&body))?;
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Some(message) = self.client.recv(Some(left))? else {
                bail!("{agent} did not answer within {} s", limit.as_secs());
            };
            if message.ctx != 0 {
                continue;
            }
            if message.tag == ENDED as u32 && noticed(&message).contains(&agent) {
                return Err(anyhow!(Gone(agent)));
            }
            if message.tag != TAG as u32 || message.src != agent {
                continue;
            }
            match serde_json::from_slice::<Envelope>(&message.body) {
                Ok(answer) if answer.id == id => match answer.what {
                    What::Answer(answer) => return Ok(answer),
                    What::Failed(failed) => return Err(failed.into_error()),
                    What::Request(_) => {}
                },
                _ => {}
            }
        }
    }
}

/// The task that was asked has ended.
#[derive(Debug)]
pub struct Gone(Tid);

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the agent {} has ended", self.0)
    }
}

impl std::error::Error for Gone {}

/// The agents of all hosts: found, or started where there is none. All know each other, and what any of them knows
/// of tasks that moved.
///
/// # Errors
/// When there is no agent on some host and none can be started.
pub fn ensure(client: &mut Client) -> Result<Vec<Peer>> {
    let (agents, learned) = present(client)?;
    if !learned {
        introduce(client, &agents)?;
    }
    Ok(agents)
}

/// The agents of all hosts, and whether all know what the others do: those that do not wait until no move is at its end.
///
/// # Errors
/// As for [`ensure`].
pub(super) fn present(client: &mut Client) -> Result<(Vec<Peer>, bool)> {
    let mut agents = Vec::new();
    let mut all = true;
    for host in client.hosts()? {
        let (tid, learned) = on_host(client, &host)?;
        all &= learned;
        agents.push(Peer {
            host: host.tid.host().0,
            name: host.name,
            tid: tid.0,
        });
    }
    Ok((agents, all))
}

/// Finds the agent of a host, or starts one; true when it has been told what the others know.
pub(super) fn on_host(client: &mut Client, host: &Host) -> Result<(Tid, bool)> {
    let program = program()?;
    let until = Instant::now() + STARTING;
    loop {
        let tasks = client.tasks(host.tid).with_context(|| {
            format!(
                "asking host {} (when one is down or cut off, PVM gives it up after some minutes; try again then)",
                host.name
            )
        })?;
        for task in &tasks {
            let name = task.program.as_bytes();
            if name != program.as_os_str().as_bytes() {
                continue;
            }
            match Caller::new(client).ask(task.tid, Request::Hello, STARTING) {
                Ok(Answer::Hello { learned, .. }) => return Ok((task.tid, learned)),
                Ok(other) => bail!("the agent of {} answers {other:?}", host.name),
                // Another was there before it.
                Err(e) if e.downcast_ref::<Gone>().is_some() => {}
                Err(e) => return Err(e),
            }
        }
        if Instant::now() > until {
            bail!(
                "no agent stays on {}; see the pvmd's log there, and whether {} is installed",
                host.name,
                program.display()
            );
        }
        names::make_room(client, host)?;
        client
            .spawn(&Spawn {
                file: program.as_os_str().as_bytes(),
                args: &["agent"],
                host: &host.name,
                environment: &[],
                output: Sink::default(),
                trace: Sink::default(),
            })
            .with_context(|| {
                format!(
                    "cannot start the agent of {}; mistctl has to be installed there as it is here",
                    host.name
                )
            })?;
    }
}

/// mistctl's own path, by which tasks that are agents are known, too.
///
/// # Errors
/// When it is not to be found there any more.
pub(super) fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where mistctl is")?;
    // What the kernel calls it once another was installed in its place.
    let Some(path) = own.as_os_str().as_bytes().strip_suffix(b" (deleted)") else {
        return Ok(own);
    };
    let path = PathBuf::from(OsStr::from_bytes(path));
    match path.exists() {
        true => Ok(path),
        false => bail!(
            "{} is not there any more; install mistctl there again",
            path.display()
        ),
    }
}

/// Tells all agents of each other, and the new ones what the others know.
fn introduce(client: &mut Client, agents: &[Peer]) -> Result<()> {
    let tids: Vec<u32> = agents.iter().map(|agent| agent.tid).collect();
    for agent in agents {
        let hide = Request::Hide { tids: tids.clone() };
        Caller::new(client).ask(Tid(agent.tid), hide, LIMIT)?;
    }
    // Of a move that is at its end the new ones would never hear what became of it. Tasks wait for them meanwhile.
    let until = Instant::now() + MOVES_END;
    let (mut entries, mut incarnations) = (Vec::new(), Vec::new());
    for agent in agents {
        loop {
            match Caller::new(client).ask(Tid(agent.tid), Request::Table, LIMIT)? {
                Answer::Table { moving: true, .. } if Instant::now() < until => {
                    std::thread::sleep(LOOK);
                }
                Answer::Table {
                    entries: more,
                    incarnations: of_those,
                    ..
                } => {
                    entries.extend(more);
                    incarnations.extend(of_those);
                    break;
                }
                other => bail!("the agent of {} answers {other:?}", agent.name),
            }
        }
    }
    for agent in agents {
        for (r, v) in names::own_names(client, agent, &entries, &incarnations)? {
            incarnations.push((r, v));
            entries.push(Known {
                v,
                r,
                hidden: false,
                away: false,
            });
        }
    }
    for agent in agents {
        let learn = Request::Learn {
            entries: entries.clone(),
            incarnations: incarnations.clone(),
        };
        Caller::new(client).ask(Tid(agent.tid), learn, LIMIT)?;
    }
    Ok(())
}
