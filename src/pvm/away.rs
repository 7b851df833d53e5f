//! A task that is saved, ends, and is to come back: its partners wait for it meanwhile, on all hosts.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use pvm_abi::NOOP_MARKER;
use pvm_abi::block::flag;
use serde::{Deserialize, Serialize};

use crate::dump::Session;
use crate::kernel::proc_file;
use crate::pvm::agent::control::{Answer, Peer, Request};
use crate::pvm::agent::{Caller, ask_everywhere, ensure};
use crate::pvm::capture::Task;
use crate::pvm::client::Client;
use crate::pvm::connection::Raised;
use crate::pvm::flush;
use crate::pvm::mailbox::{OVERWRITABLE, PERSISTENT, packed, unpacked};
use crate::pvm::tid::Tid;

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long gates stay closed should we die: this, and a millisecond for each so many bytes to save.
const LEASE_MS: u64 = 60_000;
const BYTES_A_MS: u64 = 20_000;

/// How long a task may take for its end, until it counts as one that was not ended: much memory takes its time.
const DYING_MS: u64 = 30_000;

/// What people want to know of a task that is away: an entry of the mailbox that outlives who puts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The program's path.
    pub program: String,
    /// Where it was.
    pub host: String,
    /// Its image, on that host.
    pub image: PathBuf,
    /// Since when, seconds since 1970.
    pub since: u64,
}

impl Note {
    fn name(v: Tid) -> String {
        format!("mist.away.{v}")
    }

    /// Of a task; none if there is none that can be read.
    ///
    /// # Errors
    /// When the pvmd does not answer.
    pub fn of(client: &mut Client, v: Tid) -> Result<Option<Note>> {
        let message = client.mailbox_get(&Self::name(v), 0)?;
        Ok(message.and_then(|m| serde_json::from_slice(unpacked(&m)?).ok()))
    }

    fn put(&self, client: &mut Client, v: Tid) -> Result<()> {
        let (own, flags) = (client.tid(), PERSISTENT | OVERWRITABLE);
        let mut json = serde_json::to_vec(self).context("JSON")?;
        // A pvmd keeps whole words.
        json.resize(json.len().next_multiple_of(4), b' ');
        client
            .mailbox_put(own, &Self::name(v), 0, flags, &packed(own, &json))
            .map(drop)
    }

    /// The task is there again.
    pub fn remove(client: &mut Client, v: Tid) {
        // Without an entry in the tables it says nothing.
        let own = client.tid();
        let _ = client.mailbox_remove(own, &Self::name(v), 0);
    }
}

/// The gates of one task, closed everywhere.
pub struct Away {
    agents: Vec<Peer>,
    v: Tid,
    r: Tid,
    /// Of our markers.
    number: u32,
    /// Others print to it.
    collects: bool,
}

impl Away {
    /// Closes the gates of the task on all hosts. When this returns, nobody is inside a send to it. Should we die,
    /// they open by themselves after a while, if it lives.
    ///
    /// # Errors
    /// When an agent cannot be started, or some task does not come to an end of its send. The gates are open then.
    pub fn begin(task: &Task, client: &mut Client) -> Result<Away> {
        let agents = ensure(client, &|_| {}).context(
            "partners are to wait for the task, which needs mistctl's agents on all hosts",
        )?;
        let mut away = Away {
            collects: task.block.flags()? & flag::COLLECTOR != 0,
            agents,
            v: task.v,
            r: task.r,
            number: client.tid().0,
        };
        let status = proc_file::status(task.connection.pid);
        let bytes = status.map_or(0, |s| s.rssanon.unwrap_or(0) * 1024);
        let close = Request::CloseGate {
            v: away.v.0,
            from: away.r.0,
            next: 0,
            lease_ms: LEASE_MS + bytes / BYTES_A_MS,
            saved: false,
        };
        match away.ask_all(client, &close) {
            Ok(answers) => {
                let collects =
                    |answer: &Answer| matches!(answer, Answer::Closed { collects: true });
                away.collects |= answers.iter().any(collects);
                Ok(away)
            }
            Err(e) => Err(away.call_off(client, e)),
        }
    }

    /// Whether what others print is lost while it is away: no gate holds that.
    pub fn collects(&self) -> bool {
        self.collects
    }

    fn ask_all(&self, client: &mut Client, request: &Request) -> Result<Vec<Answer>> {
        let mut caller = Caller::new(client);
        let ask = |agent: &Peer| {
            caller
                .ask(Tid(agent.tid), request.clone(), PATIENCE)
                .with_context(|| format!("the agent of {}", agent.name))
        };
        self.agents.iter().map(ask).collect()
    }

    /// Waits, while the task stands still, until all that was sent to it is in its socket, and all that it sent has
    /// left its host. The socket keeps its large buffers as long as what is returned lives.
    ///
    /// # Errors
    /// When that does not come about in time.
    pub fn flush(&self, task: &Task, session: &Session, client: &mut Client) -> Result<Raised> {
        let marker = Request::Marker {
            r: self.r.0,
            number: self.number,
        };
        self.ask_all(client, &marker)?;
        let agents: Vec<Tid> = self.agents.iter().map(|a| Tid(a.tid)).collect();
        flush::arrived(
            task,
            session.guardian(),
            (NOOP_MARKER, self.number),
            &agents,
            PATIENCE,
        )
    }

    /// The image is complete, and the task about to be ended: should we die from here on, its partners wait when it has
    /// ended, and go on when it has not.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn saved(&self, client: &mut Client, note: &Note) -> Result<()> {
        // It is for people only.
        let _ = note.put(client, self.v);
        let close = Request::CloseGate {
            v: self.v.0,
            from: self.r.0,
            next: 0,
            lease_ms: DYING_MS,
            saved: true,
        };
        ask_everywhere(client, &close)
    }

    /// The task has ended: its partners wait until it is restored.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn stays(&self, client: &mut Client) -> Result<()> {
        let close = Request::CloseGate {
            v: self.v.0,
            from: self.r.0,
            next: 0,
            lease_ms: 0,
            saved: false,
        };
        ask_everywhere(client, &close)
    }

    /// Opens the gates; `why` the task was not saved, which it returns.
    pub fn call_off(&self, client: &mut Client, why: anyhow::Error) -> anyhow::Error {
        Note::remove(client, self.v);
        let open = Request::OpenGate {
            v: self.v.0,
            r: self.r.0,
        };
        match ask_everywhere(client, &open) {
            Ok(()) => why,
            Err(e) => why.context(format!(
                "messages to {} wait for a while, until its gates open by themselves ({e:#})",
                self.v
            )),
        }
    }
}
