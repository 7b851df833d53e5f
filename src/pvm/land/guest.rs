//! What a task's image needs to be restored here, besides what any image needs.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pvm_abi::place;

use super::Agent;
use super::commit::Waiting;
use super::environment;
use super::identity::{self, Incarnation};
use super::protocol::{Commit, ToAgent};
use super::reach::{Bridge, Reach};
use super::unread::FarEnd;
use crate::image::memory::Backing;
use crate::image::process::Process;
use crate::image::pvm::PvmTask;
use crate::image::store::Image;
use crate::kernel::remote::Remote;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::tid::Tid;
use crate::restore::{Guest, Replaced};

/// A task on its way into this process.
pub struct Task<'a> {
    pvmd: Pvmd,
    table: PathBuf,
    task: PvmTask,
    image: Image,
    commit: Commit,
    agent: Option<&'a mut Agent>,
    bridge: Bridge,
    /// The incarnation that this is.
    r: u32,
    pid: i32,
    fragment: u32,
    scheduler: u32,
    /// Whom pvmd was when it forked us.
    parent: i32,
    connection: Option<OwnedFd>,
    /// Put into the connection first.
    unread: Vec<u8>,
    /// Its own end is closed with this, right before the task runs.
    committed: Option<Instant>,
}

impl<'a> Task<'a> {
    /// `client` has enrolled as the new incarnation.
    pub fn new(
        pvmd: Pvmd,
        mut client: Client,
        task: PvmTask,
        image: PathBuf,
        commit: Commit,
        agent: Option<&'a mut Agent>,
    ) -> Result<Self> {
        if let Commit::WhenEnded { r1, .. } = commit {
            client.notify_unseen(Tid(r1))?;
        }
        let image = Image::open(&image)?;
        let mut unread = unread_of(&image, &task)?;
        let (r, fragment, scheduler) = (
            client.tid().0,
            client.fragment() as u32,
            client.scheduler().0,
        );
        let connection = client.into_connection()?;
        unread.extend(connection.read);
        Ok(Self {
            table: pvmd.table_path()?,
            pvmd,
            task,
            image,
            commit,
            agent,
            bridge: Bridge::new()?,
            r,
            pid: std::process::id() as i32,
            fragment,
            scheduler,
            parent: nix::unistd::getppid().as_raw(),
            connection: Some(connection.socket),
            unread,
            committed: None,
        })
    }

    /// It runs.
    ///
    /// # Errors
    /// When the agent cannot be told: it will ask pvmd.
    pub fn runs(&mut self) -> Result<()> {
        let since = self
            .committed
            .map_or(0, |at| at.elapsed().as_micros() as u64);
        if let Some(agent) = &mut self.agent {
            // It runs all the same.
            let _ = agent.say(&ToAgent::Running { resume_us: since });
        }
        Ok(())
    }
}

impl Guest for Task<'_> {
    fn replaced(&mut self) -> Result<Replaced> {
        let connection = self.connection.as_ref().context("no connection")?;
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
        environment::update(&mut mem, &self.image, p, &environment::own())
    }

    fn may_run(&mut self, warnings: &[String]) -> Result<()> {
        let connection = self.connection.take().context("no connection")?;
        FarEnd::of(connection.as_fd(), self.parent)?
            .put(&self.unread)
            .context("what the task had not read")?;
        if let Some(agent) = &mut self.agent {
            agent.say(&ToAgent::Parked {
                warnings: warnings.to_vec(),
            })?;
        }
        let waiting = Waiting {
            connection: connection.as_fd(),
            before: self.unread.len(),
            pvmd: &self.pvmd,
        };
        waiting.until(&self.commit, self.agent.as_deref_mut())?;
        self.committed = Some(Instant::now());
        drop(connection);
        let_go_of_streams()
    }
}

/// Standard streams of ours are the program's; with us they would stay open.
fn let_go_of_streams() -> Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("/dev/null")?;
    nix::unistd::dup2_stdin(&null).context("dup2")?;
    nix::unistd::dup2_stdout(&null).context("dup2")?;
    nix::unistd::dup2_stderr(&null).context("dup2")?;
    Ok(())
}

fn unread_of(image: &Image, task: &PvmTask) -> Result<Vec<u8>> {
    use std::io::Read;
    let Some(object) = &task.unread.object else {
        return Ok(task.unread.inline.to_vec());
    };
    let mut bytes = Vec::new();
    image
        .object_verified(object)?
        .read_to_end(&mut bytes)
        .context("what the task had not read")?;
    Ok(bytes)
}
