//! What a task's image needs to be restored here, besides what any image needs.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{MsgFlags, send};
use pvm_abi::{CTX_TC, CTX_TM, NOOP_LATE, NOOP_MAGIC, place};

use super::Agent;
use super::arrival::Arrived;
use super::commit::{Go, Waiting, end_of};
use super::environment;
use super::identity::{self, Incarnation};
use super::keeper::Keeper;
use super::protocol::{Commit, ToAgent};
use super::reach::{Bridge, Reach};
use super::unread::{self, FarEnd};
use crate::image::memory::{Backing, ChangedFlags};
use crate::image::process::Process;
use crate::image::pvm::{Asked, PvmTask};
use crate::image::store::Image;
use crate::kernel::fds;
use crate::kernel::remote::Remote;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::stream::{self, Stream};
use crate::pvm::tid::Tid;
use crate::pvm::wire::{Body, LONGEST_FRAGMENT, Message, XDR, tc, tm};
use crate::restore::{self, Guest, Replaced};

/// The new incarnation: this process, enrolled.
pub struct Incarnated {
    pub pvmd: Pvmd,
    pub client: Client,
    pub far: FarEnd,
}

/// A task on its way into this process.
pub struct Task<'a> {
    pvmd: Pvmd,
    table: PathBuf,
    task: PvmTask,
    image: Arc<Image>,
    /// Taken away, if it is ours, when the task runs; what is still to be filled has its pages open.
    arrived: Option<Arrived>,
    /// What comes behind the image.
    rest: Option<Stream>,
    commit: Commit,
    agent: Option<&'a mut Agent>,
    warnings: Vec<String>,
    bridge: Bridge,
    /// The incarnation that this is.
    r: u32,
    pid: i32,
    fragment: u32,
    scheduler: u32,
    /// Until right before it runs.
    ends: Option<(OwnedFd, FarEnd)>,
    keeper: Option<Keeper>,
    /// Put into the connection first.
    unread: Vec<u8>,
    /// Bytes in it up to these: others may have written before, as an agent does that wakes all tasks of a host.
    before: usize,
    /// Since when it may run.
    committed: Option<Instant>,
}

impl<'a> Task<'a> {
    pub fn new(
        new: Incarnated,
        image: Arc<Image>,
        task: PvmTask,
        (arrived, rest): (Arrived, Option<Stream>),
        commit: Commit,
        agent: Option<&'a mut Agent>,
        warnings: Vec<String>,
    ) -> Result<Self> {
        let Incarnated {
            pvmd,
            mut client,
            far,
        } = new;
        if let Commit::WhenEnded { r1, .. } = commit {
            client.notify_unseen(Tid(r1))?;
        }
        let mut unread = unread_of(&image, &task)?;
        readdress(&mut unread, client.tid());
        let (r, fragment, scheduler) = (
            client.tid().0,
            client.fragment() as u32,
            client.scheduler().0,
        );
        let connection = client.into_connection()?;
        unread.extend(connection.read);
        if let Commit::WhenEnded { r1, .. } = commit {
            unread.extend(late_begins(r1, Tid(r)));
        }
        Ok(Self {
            table: pvmd.table_path()?,
            pvmd,
            task,
            image,
            arrived: Some(arrived),
            rest,
            commit,
            agent,
            warnings,
            bridge: Bridge::new()?,
            r,
            pid: std::process::id() as i32,
            fragment,
            scheduler,
            ends: Some((connection.socket, far)),
            keeper: None,
            unread,
            before: 0,
            committed: None,
        })
    }

    fn waiting(&self) -> Result<Waiting<'_>> {
        let (connection, _) = self.ends.as_ref().context("no connection")?;
        Ok(Waiting {
            connection: connection.as_fd(),
            before: self.before,
            pvmd: &self.pvmd,
            v: self.task.v,
            r: Tid(self.r),
            parked: None,
        })
    }
}

impl Drop for Task<'_> {
    /// What was to be kept has ended. What may run and does not is its keeper's.
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take()
            && self.committed.is_none()
        {
            let _ = keeper.dismiss();
        }
    }
}

impl Guest for Task<'_> {
    fn replaced(&mut self) -> Result<Replaced> {
        let (connection, _) = self.ends.as_ref().context("no connection")?;
        let mut descriptions =
            BTreeMap::from([(self.task.connection, connection.try_clone().context("dup")?)]);
        for id in &self.task.output {
            let out = std::io::stdout().as_fd().try_clone_to_owned();
            descriptions.insert(*id, out.context("dup of standard output")?);
        }
        let mut files = BTreeMap::new();
        let first = self.image.manifest.processes.first();
        let vma = first
            .into_iter()
            .flat_map(|p| &p.vmas)
            .find(|v| v.start == self.task.table.0 && v.len() >= self.task.table.1);
        match vma.map(|v| &v.backing) {
            Some(Backing::File { file }) => {
                let table = place::open(&self.table).with_context(|| {
                    format!("cannot open the tid table {}", self.table.display())
                })?;
                files.insert(*file, table);
            }
            _ => bail!("the image is damaged: the task's tid table is not where it says"),
        }
        Ok(Replaced {
            descriptions,
            files,
        })
    }

    fn furnish(&mut self, body: &mut Remote, p: &Process) -> Result<()> {
        let mut mem = Reach::new(&self.bridge, body);
        let new = Incarnation {
            r: self.r,
            pid: self.pid,
            fragment: self.fragment,
            scheduler: self.scheduler,
            table: &self.table,
        };
        identity::take_over(&mut mem, &self.task, &new)?;
        environment::update(&mut mem, &self.image, p, &environment::own())?;
        mem.finish()
    }

    fn changed_flags(&mut self) -> Result<ChangedFlags> {
        match self.rest.take() {
            Some(mut rest) => stream::receive_changed_flags(&mut rest),
            None => Ok(ChangedFlags::new()),
        }
    }

    fn stepped_aside(&mut self) -> Result<()> {
        // Who is told to run by an agent is told by us.
        if let Commit::WhenEnded { .. } = self.commit {
            self.keeper = Some(Keeper::start(&self.waiting()?, &self.commit)?);
        }
        Ok(())
    }

    fn entrust(&mut self, pids: &[i32]) -> Result<bool> {
        match &mut self.keeper {
            Some(keeper) => keeper.take(pids).map(|()| true),
            None => Ok(false),
        }
    }

    fn may_run(&mut self, warnings: &[String]) -> Result<()> {
        let (connection, far) = self.ends.as_ref().context("no connection")?;
        let narrow = match self.commit {
            Commit::WhenEnded { .. } => Some(far.widen()?),
            Commit::WhenTold => None,
        };
        let there = fds::readable(connection.as_fd()).context("FIONREAD")?;
        far.put(&self.unread)
            .context("what the task had not read")?;
        if let (Commit::WhenEnded { r1, .. }, Some(keeper)) = (&self.commit, &mut self.keeper) {
            let mark = late_begins(*r1, Tid(self.r));
            self.before = end_of(&mark, connection.as_fd(), there + self.unread.len())?;
            keeper.stand(self.before)?;
        }
        if let Some(asked) = &self.task.asked {
            ask_again(connection, self.r, asked).context("what the task asks its pvmd")?;
        }
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .context("/dev/null")?;
        if let Some(agent) = &mut self.agent {
            agent.say(&ToAgent::Parked {
                warnings: [&self.warnings, warnings].concat(),
            })?;
        }
        let mut agent = self.agent.take();
        let waiting = self.waiting()?;
        let Go::Now = waiting.until(&self.commit, agent.as_deref_mut())? else {
            bail!("the task runs, and we trace it");
        };
        self.agent = agent;
        if let (Some(old), Some((_, far))) = (narrow, &self.ends) {
            far.narrow(old);
        }
        if self.commit == Commit::WhenTold {
            // What was written behind the moment of the dump is written again.
            restore::files::cut_back(&self.image.manifest)
                .context("cutting files back to what they were")?;
        }
        // A move must not fail from here on.
        if let Some(keeper) = &mut self.keeper {
            keeper.let_run();
        }
        self.committed = Some(Instant::now());
        self.ends = None;
        // Standard streams of ours are the program's; with us they would stay open.
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
        Ok(())
    }

    fn runs(&mut self) -> Result<()> {
        let since = self
            .committed
            .map_or(0, |at| at.elapsed().as_micros() as u64);
        if let Some(agent) = &mut self.agent {
            // It runs all the same.
            let _ = agent.say(&ToAgent::Running { resume_us: since });
        }
        if let Some(keeper) = self.keeper.take() {
            keeper.dismiss()?;
        }
        self.arrived = None;
        Ok(())
    }
}

/// From here on others' output may come in two ways (see [`NOOP_LATE`]).
fn late_begins(r1: u32, r: Tid) -> Vec<u8> {
    let body = Body::new().uint(NOOP_MAGIC).uint(NOOP_LATE).uint(r1);
    let message = Message {
        src: r,
        dst: r,
        tag: tc::NOOP,
        ctx: CTX_TC as u32,
        wait: 0,
        encoding: XDR,
        body: body.into_bytes(),
    };
    message.encode(LONGEST_FRAGMENT)
}

/// Makes fragments that were for another incarnation this one's, as if pvmd had sent them here.
fn readdress(unread: &mut [u8], r: Tid) {
    let mut rest = unread;
    while let Some((head, behind)) = std::mem::take(&mut rest).split_first_chunk_mut::<16>() {
        let word = |at: usize| -> [u8; 4] {
            let word = head.get(at..at + 4).and_then(|w| w.try_into().ok());
            word.unwrap_or_default()
        };
        let (dst, len) = (
            Tid(u32::from_be_bytes(word(0))),
            u32::from_be_bytes(word(8)),
        );
        if dst.is_task()
            && let Some(field) = head.first_chunk_mut()
        {
            *field = r.0.to_be_bytes();
        }
        rest = behind.get_mut(len as usize..).unwrap_or_default();
    }
}

/// Writes a question of the task's into its connection, as libpvm had done in the old one.
fn ask_again(connection: &OwnedFd, r: u32, asked: &Asked) -> Result<()> {
    let mut body = asked.body.to_vec();
    // Who asks: behind what is asked for.
    let who = body.get_mut(4..8).context("the image is damaged")?;
    who.copy_from_slice(&r.to_be_bytes());
    let message = Message {
        src: Tid(r),
        dst: Tid::PVMD,
        tag: tm::DB,
        ctx: CTX_TM as u32,
        wait: asked.wait_id,
        encoding: XDR,
        body,
    };
    let bytes = message.encode(LONGEST_FRAGMENT);
    let sent = send(connection.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
    ensure!(sent == bytes.len(), "the pvmd takes nothing");
    Ok(())
}

fn unread_of(image: &Image, task: &PvmTask) -> Result<Vec<u8>> {
    use std::io::Read;
    let Some(object) = &task.unread.object else {
        return Ok(task.unread.inline.to_vec());
    };
    let file = image.object_verified(object)?;
    let what = "what the task had not read";
    let len = file.metadata().context(what)?.len();
    if len > unread::MOST as u64 {
        bail!("{what} is too long: {len} bytes");
    }
    let mut bytes = Vec::with_capacity(len as usize);
    let mut limited = file.take(len);
    limited.read_to_end(&mut bytes).context(what)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pvm::wire::{Message, XDR};

    #[test]
    fn what_was_for_the_old_incarnation_is_for_the_new_one() {
        let message = |dst: u32| Message {
            src: Tid(0x40001),
            dst: Tid(dst),
            tag: 1,
            ctx: 0,
            wait: 0,
            encoding: XDR,
            body: vec![7; 300],
        };
        // Two fragments, and one of a multicast.
        let all = |r: u32| [message(r).encode(200), message(0x4004_0001).encode(4080)].concat();
        let mut bytes = all(0x80001);
        readdress(&mut bytes, Tid(0xc0002));
        assert_eq!(bytes, all(0xc0002));
        readdress(&mut [0; 7], Tid(1));
        readdress(&mut [0xff; 40], Tid(1));
    }
}
