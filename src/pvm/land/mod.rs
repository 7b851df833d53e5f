//! The lander: what pvmd starts on the host a task comes to, and what becomes the task.
//!
//! It enrols in the place of the task that pvmd believes to have started (R2), takes its orders ([`protocol`]),
//! and rebuilds itself from an image: [`crate::restore::here`]. Its tracer is what goes on as mistctl.

mod arrival;
mod commit;
mod environment;
mod guest;
mod identity;
mod keeper;
pub mod protocol;
mod reach;
mod sinks;
mod unread;

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::error::Failure;
use crate::image::pvm::PvmTask;
use crate::image::store::Image;
use crate::kernel::{caps, code};
use crate::pvm::client::{self, Client, Pvmd};
use crate::pvm::mailbox::{self, Entry};
use crate::pvm::table::{self, TidTable};
use crate::pvm::tid::Tid;
use crate::restore::{self, Options, Outcome, Placed};
use arrival::{Arrived, Door};
use guest::{Incarnated, Task};
use protocol::{Commit, Order, ToAgent, ToLander, hear, say};
use unread::FarEnd;

/// Memory, besides what is in place, from which on the task runs before it is filled, bytes.
const LAZY: u64 = 64 << 20;

/// Who gives the orders.
#[derive(Debug, Clone)]
pub enum Orders {
    /// Nobody: restore this image, at once. Other hosts do not learn of it.
    Image { path: PathBuf, lazy: bool },
    /// The agent that listens at this socket; the number of the move.
    Agent { socket: PathBuf, id: String },
}

/// The line to the agent.
struct Agent {
    reader: BufReader<UnixStream>,
}

impl Agent {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to the agent at {}", socket.display()))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    fn say(&mut self, what: &ToAgent) -> Result<()> {
        say(self.reader.get_mut(), what)
    }

    fn hear(&mut self) -> Result<Option<ToLander>> {
        hear(&mut self.reader)
    }
}

/// Lands. What returns is the tracer of the task that runs: it has to live until memory is filled.
///
/// # Errors
/// Nothing is left but this process, which has to end; the agent has been told.
pub fn run(orders: &Orders, started: Instant) -> Result<Outcome> {
    let mut agent = match orders {
        Orders::Agent { socket, .. } => Some(Agent::connect(socket)?),
        Orders::Image { .. } => None,
    };
    let done = land(orders, &mut agent, started);
    if let (Err(e), Some(agent)) = (&done, &mut agent) {
        let failed = ToAgent::Failed {
            why: format!("{e:#}"),
            failure: Failure::of(e).name().to_owned(),
        };
        // It may be what is gone.
        let _ = agent.say(&failed);
    }
    done
}

fn land(orders: &Orders, agent: &mut Option<Agent>, started: Instant) -> Result<Outcome> {
    let pvmd = Pvmd::find()?.context("no pvmd runs here (PVMSOCK, PVM_TMP, PVM_VMID)")?;
    let mut client = Client::enrol(&pvmd, client::own_cookie())?;
    let far = FarEnd::find()?;
    let ((arrived, placed, rest), lazy, order) = match (orders, &mut *agent) {
        (Orders::Image { path, lazy }, _) => {
            let there = Arrived::There(path.clone());
            ((there, Placed::default(), None), *lazy, None)
        }
        (Orders::Agent { .. }, None) => anyhow::bail!("there is no agent"),
        (Orders::Agent { id, .. }, Some(agent)) => {
            let door = Door::open()?;
            agent.say(&ToAgent::Hello {
                id: id.clone(),
                r: client.tid().0,
                pid: std::process::id() as i32,
                port: door.port,
            })?;
            // The mover has other things to do first.
            code::load();
            let order = match agent.hear()? {
                Some(ToLander::Order(order)) => order,
                Some(ToLander::Run) => anyhow::bail!("the agent says `run` before its order"),
                Some(ToLander::Abandon) | None => anyhow::bail!("the agent has called it off"),
            };
            (
                door.receive(&order.source, id, agent)?,
                order.lazy,
                Some(order),
            )
        }
    };
    let path = arrived.path();
    let image = Arc::new(Image::open(&path)?);
    let task = task_of(&image, order.as_ref())?;
    if order.is_none() {
        publish(&pvmd, &task, client.tid().0)?;
    }
    let announce = order.as_ref().is_none_or(|order| order.announce);
    let commit = order.map_or(Commit::WhenTold, |order| order.commit);
    let anew = commit == Commit::WhenTold && !announce;
    sinks::set(&mut client, &pvmd, &task, anew, announce)?;
    let warnings = match commit {
        Commit::WhenTold => mailbox(&mut client, &pvmd, &task),
        // The mover hands them over.
        Commit::WhenEnded { .. } => Vec::new(),
    };
    let mut guest = Task::new(
        Incarnated { pvmd, client, far },
        Arc::clone(&image),
        task,
        (arrived, rest),
        commit,
        agent.as_mut(),
        warnings,
    )?;
    let options = Options {
        image: path,
        detach: false,
        same_pid: false,
        lazy: lazy && (placed.mappings.is_empty() || placed.left > LAZY),
        stopped: false,
        before_release: None,
        progress: false,
    };
    restore::here(&options, image, placed, &mut guest, started)
}

/// Whom the image holds.
fn task_of(image: &Image, order: Option<&Order>) -> Result<PvmTask> {
    caps::caller()?.may_restore(&image.manifest, image.owner()?)?;
    let path = image.path();
    let Some(task) = image.manifest.pvm.clone() else {
        return Err(Failure::Refused.because(format!(
            "{} is no image of a PVM task; `mistctl restore` restores it",
            path.display()
        )));
    };
    if let Some(order) = order
        && order.v != task.v
    {
        anyhow::bail!(
            "{} holds t{:x}, and t{:x} was to be restored",
            path.display(),
            task.v,
            order.v
        );
    }
    Ok(task)
}

/// Puts the entries of the mailbox again that went with the old incarnation, or with its virtual machine. What cannot be
/// put, for people.
fn mailbox(client: &mut Client, pvmd: &Pvmd, task: &PvmTask) -> Vec<String> {
    let (mut reclaimed, mut warnings) = (Vec::new(), Vec::new());
    if let Err(e) = reclaim(client, pvmd, task, &mut reclaimed) {
        warnings.push(format!("{e:#}"));
    }
    let own = client.tid();
    for e in &task.mailbox {
        let is_it = |entry: &Entry| (&entry.name, entry.index) == (&e.class, e.index);
        if !reclaimed.iter().any(is_it)
            && let Err(e) = client.mailbox_put(own, &e.class, e.index, e.flags, &e.message.0)
        {
            warnings.push(format!("{e:#}"));
        }
    }
    warnings
}

/// Persistent entries have stayed when the old incarnation ended, as nobody's: nobody could change them any more. Those that
/// are its own again are `reclaimed`, also when another fails.
fn reclaim(
    client: &mut Client,
    pvmd: &Pvmd,
    task: &PvmTask,
    reclaimed: &mut Vec<Entry>,
) -> Result<()> {
    let (own, table) = (client.tid(), pvmd.table_path()?);
    for entry in client.mailbox_names("*")? {
        if entry.owner != Tid(0) || entry.vanishes() {
            continue;
        }
        let message = client.mailbox_get(&entry.name, entry.index)?;
        let sender = message.as_deref().and_then(mailbox::sender);
        if let Some(sender) = sender
            && table::name(&table, sender.0)? == task.v
            && client.mailbox_hand_over(&entry, own)?
        {
            reclaimed.push(entry);
        }
    }
    Ok(())
}

/// What agents do on every host, on this one.
fn publish(pvmd: &Pvmd, task: &PvmTask, r: u32) -> Result<()> {
    let mut table = TidTable::open(&pvmd.table_path()?)?;
    table.add_incarnation(r, task.v)?;
    table.open_gate(task.v, r)
}
