//! A PVM task into an image: who it is in the virtual machine, and what of it is on its way.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pvm_abi::block::{flag, state};
use pvm_abi::{CTX_TC, NOOP_LATE, NOOP_MAGIC};

use crate::dump::{self, Session, Sink};
use crate::error::Failure;
use crate::image::Bytes;
use crate::image::pvm::{MailboxEntry, PvmTask, Unread};
use crate::kernel::guardian::Guardian;
use crate::kernel::mem::Mem;
use crate::pvm::asked;
use crate::pvm::block::TaskBlock;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::connection::{Connection, Daemons};
use crate::pvm::contexts;
use crate::pvm::local::uses_libpvm;
use crate::pvm::mailbox::Entry;
use crate::pvm::table;
use crate::pvm::tid::Tid;
use crate::pvm::wire::{FRAGMENT_HEADER, LONGEST_FRAGMENT, MESSAGE_HEADER, tc};

/// Unread bytes up to this many stand in the manifest.
const INLINE: usize = 16 << 10;
/// How long the pvmd may take for an answer while the task stands still.
const PATIENCE: Duration = Duration::from_secs(5);
/// First and only fragment of a message (pvmproto.h: FFSOM, FFEOM).
const WHOLE: u8 = 3;
/// First fragment of one, and its last.
const FIRST: u8 = 1;
const LAST: u8 = 2;

/// What an image has to say of a task, and what it leaves behind.
pub struct Captured {
    pub task: PvmTask,
    /// It has entries in the mailbox, persistent ones or others.
    pub has_entries: bool,
    /// How many of the bytes in its connection are in the image, or left out on purpose.
    pub seen: usize,
}

/// A task under the shim, still running.
pub struct Task {
    pub block: TaskBlock,
    pub connection: Connection,
    /// Virtual and real tid.
    pub v: Tid,
    pub r: Tid,
}

impl Task {
    /// The task that process `pid` is; none for one that has nothing to do with PVM.
    ///
    /// # Errors
    /// [`Failure::Refused`] for a task that cannot be carried, with the reason and what to do instead;
    /// [`Failure::NoSuchProcess`] when it is ending.
    pub fn find(pid: i32) -> Result<Option<Task>> {
        Self::find_among(&Daemons::look()?, pid)
    }

    /// The same, given what the pvmds of this host look like.
    ///
    /// # Errors
    /// As for [`Task::find`].
    pub fn find_among(daemons: &Daemons, pid: i32) -> Result<Option<Task>> {
        let connection = daemons.connection(pid)?;
        let block = TaskBlock::find(pid).map_err(|e| dump::ending_or(pid, e))?;
        let enrolled = match &block {
            Some(block) => block.state()? == state::ENROLLED && block.enrolled_pid()? == pid,
            None => false,
        };
        match (connection, block) {
            (None, _) if !enrolled => Ok(None),
            (None, _) => Err(Failure::Refused.because(format!(
                "process {pid} is a PVM task whose pvmd has ended; nothing can carry it into another virtual machine"
            ))),
            (Some(connection), Some(block)) if enrolled => {
                let (v, r) = (Tid(block.v()?), Tid(block.r()?));
                may_be_carried(&block, v)?;
                Ok(Some(Task {
                    block,
                    connection,
                    v,
                    r,
                }))
            }
            (Some(connection), block) => Err(without_shim(&connection, block.as_ref())?),
        }
    }

    /// Where its pvmd listens.
    ///
    /// # Errors
    /// When that is nowhere.
    pub fn pvmd(&self) -> Result<Pvmd> {
        let address = &self.connection.address;
        let file = address.with_file_name("pvmd");
        let pvmd = Pvmd::find_at(Some(address.as_os_str()), &file)?;
        pvmd.with_context(|| format!("no pvmd listens at {}", address.display()))
    }

    /// Enrols with the task's own pvmd, to ask after the task.
    ///
    /// # Errors
    /// When the pvmd does not take us: it is another user's.
    pub fn client(&self) -> Result<Client> {
        let mut client = Client::enrol(&self.pvmd()?, 0).with_context(|| {
            format!(
                "asking after task {}; run mistctl as the user whose virtual machine it is",
                self.v
            )
        })?;
        client.set_patience(PATIENCE);
        Ok(client)
    }

    /// Whether what it has not read begins with a fragment: libpvm has not read a part of it, and waits for the
    /// rest.
    ///
    /// # Errors
    /// When its socket cannot be peeked.
    pub fn begins_whole(&self) -> Result<bool> {
        let head = self.connection.peek(FRAGMENT_HEADER)?;
        if head.is_empty() {
            return Ok(true);
        }
        let Some([dst, src, _, rest]) = words(&head) else {
            return Ok(false);
        };
        let (dst, src) = (Tid(dst), Tid(src));
        Ok((dst == self.r || dst.is_group())
            && (src.is_task() || src.is_pvmd())
            && rest & !(u32::from(WHOLE) << 24) == 0)
    }

    /// What has not been read, in whole fragments: of one that is still coming the rest is waited for, and of pvmds'
    /// messages, which may come at any time. How many bytes it was with mist's markers, and what is left without.
    fn unread(&self, guardian: &Arc<Guardian>, client: &mut Client) -> Result<(usize, Vec<u8>)> {
        let until = Instant::now() + PATIENCE;
        let mut raised = None;
        loop {
            let unread = self.connection.unread(guardian)?;
            let whole = fragments_of(&unread)
                .with_context(|| format!("what task {} has not read", self.v))?;
            let bytes: usize = whole.iter().map(|f| f.bytes.len()).sum();
            if bytes == unread.len() && are_whole(&whole) {
                let kept = without_markers(&unread, self.r)
                    .with_context(|| format!("what task {} has not read", self.v))?;
                return Ok((bytes, kept));
            }
            if Instant::now() > until {
                return Err(Failure::Busy.because(format!(
                    "its pvmd has not sent the rest of a message to task {} within {} s; nothing was changed, try \
                     again",
                    self.v,
                    PATIENCE.as_secs()
                )));
            }
            if raised.is_none() {
                raised = Some(self.connection.raise(guardian)?);
            }
            // The pvmd looks for room in its sockets when something comes in.
            client.lives(self.r)?;
        }
    }

    /// What an image has to say of the task, which stands still in `session` and has been looked at; of its mailbox these
    /// `entries`.
    ///
    /// # Errors
    /// When it has left the virtual machine meanwhile, its pvmd does not answer, or what it has not read makes no
    /// sense.
    pub fn capture(
        &self,
        session: &Session,
        client: &mut Client,
        sink: &dyn Sink,
        entries: fn(&Entry) -> bool,
    ) -> Result<Captured> {
        let mem = &session.first()?.mem;
        let description = |fd: i32| {
            let found = session.descriptors().iter().find(|f| f.fd == fd);
            found
                .map(|f| f.description)
                .with_context(|| format!("task {} has no descriptor {fd} any more", self.v))
        };
        let (seen, unread) = self.unread(session.guardian(), client)?;
        let (output_to, trace_to) = self.block.sinks()?;
        let origin = self.origin(client)?;
        let pipes = self.connection.pipes()?;
        let (mailbox, has_entries) = self.mailbox(client, entries)?;
        let task = PvmTask {
            v: self.v.0,
            r: self.r.0,
            program: origin.program,
            parent: origin.parent,
            host: origin.host,
            connection: description(self.connection.fd)?,
            output: pipes
                .iter()
                .map(|(fd, _)| description(*fd))
                .collect::<Result<_>>()?,
            output_to,
            trace_to,
            away: false,
            asked: asked::question(&self.block, mem)
                .with_context(|| format!("what task {} asks its pvmd", self.v))?,
            contexts: self.contexts(mem, &unread, &[output_to.1, trace_to.1])?,
            mailbox,
            unread: keep(unread, sink)?,
            block: self.block.address(),
            table: (self.block.table()?, self.block.table_len()?),
        };
        Ok(Captured {
            task,
            has_entries,
            seen,
        })
    }

    /// Context ids it has at hand: its present one, those of messages it has not read, and of its sinks.
    fn contexts(&self, mem: &Mem, unread: &[u8], sinks: &[u32]) -> Result<Vec<u32>> {
        // Its place among the globals (pvm_abi::block::Globals).
        const PVMMYCTX: usize = 8;
        let mut found = sinks.to_vec();
        if let Some(at) = self.block.globals()?.get(PVMMYCTX).filter(|at| **at != 0) {
            let own = mem.read_vec(*at, 4)?.try_into().unwrap_or_default();
            found.push(u32::from_ne_bytes(own));
        }
        let first = fragments(unread, self.r)?
            .into_iter()
            .filter(|f| f.flags & FIRST != 0);
        // The third word of a message's header.
        let context = |f: Fragment<'_>| f.body.get(8..12)?.try_into().ok().map(u32::from_be_bytes);
        found.extend(first.filter_map(context));
        Ok(contexts::highest(found))
    }

    /// Those of its entries that are wanted, and whether it has any.
    fn mailbox(
        &self,
        client: &mut Client,
        wanted: fn(&Entry) -> bool,
    ) -> Result<(Vec<MailboxEntry>, bool)> {
        let mut entries = client.mailbox_names("*")?;
        entries.retain(|entry| entry.owner == self.r);
        let any = !entries.is_empty();
        let mut own = Vec::new();
        for entry in entries.into_iter().filter(wanted) {
            // One that somebody has just taken away is none.
            if let Some(message) = client.mailbox_get(&entry.name, entry.index)? {
                own.push(MailboxEntry {
                    class: entry.name,
                    index: entry.index,
                    flags: entry.flags,
                    message: Bytes(message),
                });
            }
        }
        Ok((own, any))
    }

    /// What its pvmd knows of where it comes from.
    ///
    /// # Errors
    /// When its pvmd does not know it any more, or the tid table cannot be read.
    pub fn origin(&self, client: &mut Client) -> Result<Origin> {
        let tasks = client.tasks(self.r.host())?;
        let task = tasks.into_iter().find(|task| task.tid == self.r);
        let task = task.with_context(|| {
            format!(
                "its pvmd does not know task {} (tid {}) any more",
                self.v, self.r
            )
        })?;
        let hosts = client.hosts()?;
        let host = hosts.into_iter().find(|h| h.tid.host() == self.r.host());
        Ok(Origin {
            parent: match task.parent.is_task() {
                true => table::name(&self.block.table_path()?, task.parent.0)?,
                false => 0,
            },
            program: task.program,
            host: host.map_or_else(String::new, |host| host.name),
        })
    }
}

/// Where a task comes from.
#[derive(Debug)]
pub struct Origin {
    /// Who spawned it (virtual tid); 0: nobody.
    pub parent: u32,
    /// The name it was spawned under; empty for one that was started by hand.
    pub program: String,
    /// The host it is on.
    pub host: String,
}

/// Refuses what PVM's own parts are, and what cannot be found again elsewhere.
fn may_be_carried(block: &TaskBlock, v: Tid) -> Result<()> {
    let flags = block.flags()?;
    let roles = [
        (flag::RESOURCE_MANAGER, "a resource manager"),
        (flag::HOSTER, "a hoster"),
        (flag::TASKER, "a tasker"),
        (flag::TRACER, "a tracer"),
    ];
    for (bit, role) in roles {
        if flags & bit != 0 {
            return Err(Failure::Refused.because(format!(
                "task {v} is registered as {role}, which PVM ties to its host; let it unregister first"
            )));
        }
    }
    let others = [
        (
            flag::DIRECT_ROUTES,
            "may have direct routes (MIST_DIRECT_ROUTES is set), whose other ends would not follow; start it without",
        ),
        (
            flag::NO_TABLE,
            "could not map the tid table of its host when it enrolled; see what it said on its standard error",
        ),
    ];
    for (bit, why) in others {
        if flags & bit != 0 {
            return Err(Failure::Refused.because(format!("task {v} {why}")));
        }
    }
    Ok(())
}

/// What to say of a task that the shim does not serve.
fn without_shim(connection: &Connection, block: Option<&TaskBlock>) -> Result<anyhow::Error> {
    let pid = connection.pid;
    if let Some(block) = block {
        match block.state()? {
            state::UNKNOWN_LIBPVM => {
                return Ok(Failure::Refused.because(format!(
                    "process {pid} is a PVM task with a libpvm that mist's shim does not know; see what it said on its standard error"
                )));
            }
            state::IDLE if uses_libpvm(pid) && block.enrolled_pid()? == 0 => {
                return Ok(Failure::Busy.because(format!(
                    "process {pid} is just joining the virtual machine; nothing was changed, try again"
                )));
            }
            state::ENROLLED => {
                return Ok(Failure::Refused.because(format!(
                    "process {pid} has inherited the connection of PVM task t{:x} (process {}) to its pvmd; dump that process, or let this one close fd {}",
                    block.v()?,
                    block.enrolled_pid()?,
                    connection.fd
                )));
            }
            _ => {}
        }
    }
    let how = if uses_libpvm(pid) {
        "was started without mist's shim, and would lose its connection to the pvmd: start it with `mistctl exec`, or in a virtual machine that `mistctl pvm start` started"
    } else {
        "has libpvm linked in statically, where mist's shim cannot serve it, and would lose its connection to the pvmd: link it with -lpvm3 dynamically, and start it with `mistctl exec`"
    };
    Ok(Failure::Refused.because(format!("process {pid} is a PVM task that {how}")))
}

/// Small things stand in the manifest, others in an object of their own.
fn keep(unread: Vec<u8>, sink: &dyn Sink) -> Result<Unread> {
    if unread.len() <= INLINE {
        return Ok(Unread {
            inline: Bytes(unread),
            object: None,
        });
    }
    let name = c"mist-unread";
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let mut file = File::from(file);
    file.write_all(&unread)
        .context("a file for what the task has not read")?;
    Ok(Unread {
        inline: Bytes::default(),
        object: Some(sink.object(&file)?),
    })
}

/// One fragment of what a pvmd sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment<'a> {
    pub src: Tid,
    pub dst: Tid,
    pub flags: u8,
    pub body: &'a [u8],
    /// Header and body.
    pub bytes: &'a [u8],
}

impl<'a> Fragment<'a> {
    /// Cuts the first fragment off the front; none when it is not whole.
    ///
    /// # Errors
    /// When what stands there is no fragment.
    pub fn take(rest: &mut &'a [u8]) -> Result<Option<Fragment<'a>>> {
        let all = *rest;
        let Some([dst, src, len, last]) = all.get(..FRAGMENT_HEADER).and_then(words) else {
            return Ok(None);
        };
        let (len, flags) = (len as usize, (last >> 24) as u8);
        ensure!(
            len <= LONGEST_FRAGMENT && flags & !WHOLE == 0,
            "it does not begin with a whole fragment"
        );
        let Some(bytes) = all.get(..FRAGMENT_HEADER + len) else {
            return Ok(None);
        };
        *rest = all.get(bytes.len()..).unwrap_or_default();
        Ok(Some(Fragment {
            dst: Tid(dst),
            src: Tid(src),
            flags,
            body: bytes.get(FRAGMENT_HEADER..).unwrap_or_default(),
            bytes,
        }))
    }

    fn word(&self, at: usize) -> Option<u32> {
        let word = self.body.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_be_bytes(word))
    }

    /// The first word of a TC_NOOP.
    fn noop_word(&self) -> Option<u32> {
        let is_one = self.flags == WHOLE
            && self.word(4) == Some(tc::NOOP)
            && self.word(8) == Some(CTX_TC as u32);
        is_one.then(|| self.word(MESSAGE_HEADER))?
    }

    /// What follows the message's header and mist's first word, if it is a TC_NOOP that mist sent.
    pub fn noop(&self) -> Option<&'a [u8]> {
        let ours = self.noop_word() == Some(NOOP_MAGIC);
        ours.then(|| self.body.get(MESSAGE_HEADER + 4..))?
    }

    /// Who has ended, if that is what a pvmd was to say by a TC_NOOP ([`Client::notify_unseen`]).
    pub fn notice(&self) -> Option<Tid> {
        self.noop_word().filter(|_| self.src.is_pvmd()).map(Tid)
    }
}

/// The four words of a fragment's header.
fn words(head: &[u8]) -> Option<[u32; 4]> {
    let word = |at: usize| {
        let word = head.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_be_bytes(word))
    };
    Some([word(0)?, word(4)?, word(8)?, word(12)?])
}

/// The whole fragments at the beginning of `bytes`.
///
/// # Errors
/// When what stands there are no fragments.
pub fn fragments_of(bytes: &[u8]) -> Result<Vec<Fragment<'_>>> {
    let mut rest = bytes;
    let mut all = Vec::new();
    while let Some(fragment) = Fragment::take(&mut rest)? {
        all.push(fragment);
    }
    Ok(all)
}

/// All fragments of `unread`, which are for `r`.
///
/// # Errors
/// When they are not, or the last one is not whole.
pub fn fragments(unread: &[u8], r: Tid) -> Result<Vec<Fragment<'_>>> {
    let mut rest = unread;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let at = unread.len() - rest.len();
        let fragment = Fragment::take(&mut rest).with_context(|| format!("at byte {at}"))?;
        let fragment =
            fragment.with_context(|| format!("the fragment at byte {at} has not arrived whole"))?;
        ensure!(
            fragment.dst == r || fragment.dst.is_group(),
            "the fragment at byte {at} is for {}, not for {r}",
            fragment.dst
        );
        all.push(fragment);
    }
    Ok(all)
}

/// Whether no pvmd's message is there in part.
fn are_whole(fragments: &[Fragment<'_>]) -> bool {
    let mut open: Vec<Tid> = Vec::new();
    for fragment in fragments.iter().filter(|f| f.src.is_pvmd()) {
        open.retain(|src| *src != fragment.src);
        if fragment.flags & LAST == 0 {
            open.push(fragment.src);
        }
    }
    open.is_empty()
}

fn without_markers(unread: &[u8], r: Tid) -> Result<Vec<u8>> {
    let mut kept = Vec::with_capacity(unread.len());
    for fragment in fragments(unread, r)? {
        let word = fragment.noop().and_then(|noop| noop.first_chunk());
        // Who has moved before may not have come to that yet.
        if word.is_none_or(|kind| u32::from_be_bytes(*kind) == NOOP_LATE) {
            kept.extend_from_slice(fragment.bytes);
        }
    }
    Ok(kept)
}
