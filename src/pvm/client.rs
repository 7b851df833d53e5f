//! A task of the virtual machine that is not built on libpvm: speaks to the pvmd of this host by itself.
//!
//! One connection, one thread; everything has a time limit, and every error names the pvmd. What the virtual
//! machine can be asked is in [`crate::pvm::virtual_machine`].

mod proof;
mod pvmd;

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, sockopt};
use pvm_abi::{CTX_TC, CTX_TM, HELPER_PID, NOOP_MAGIC};

use proof::{Proof, give_proof};
pub use pvmd::Pvmd;

use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::error_name;
use crate::pvm::wire::{self, Assembler, Body, Message, Reader, XDR, tc, tm};

/// How long a pvmd may take for an answer before it counts as hung, unless told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of messages that may be half received.
const PARTIAL_LIMIT: usize = 256 << 20;

/// Our own cookie, PVMEPID: by it pvmd knows whom it has forked. Without it we are a task that nobody spawned.
pub fn own_cookie() -> i32 {
    std::env::var("PVMEPID")
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|pid| *pid == std::process::id() as i32)
        .unwrap_or(0)
}

/// A task of the virtual machine.
pub struct Client {
    fd: OwnedFd,
    pvmd: String,
    assembler: Assembler,
    inbox: VecDeque<Message>,
    fragment: usize,
    wait: u32,
    tid: Tid,
    parent: Tid,
    scheduler: Tid,
    patience: Duration,
}

/// What is left of a [`Client`] when somebody else takes over its connection.
pub struct Connection {
    /// The socket.
    pub socket: OwnedFd,
    /// What has been read of it, and nobody has looked at.
    pub read: Vec<u8>,
}

impl Client {
    /// Enrols with `pvmd`. A process that the pvmd started itself passes on PVMEPID from its environment as
    /// `cookie` and becomes that task; with 0 it is a new one, which programs under the shim do not see.
    ///
    /// # Errors
    /// When nobody answers within [`PATIENCE`], it is none of this user's pvmds, or it does not want us.
    pub fn enrol(pvmd: &Pvmd, cookie: i32) -> Result<Client> {
        let mut client = Client {
            fd: pvmd.connect(PATIENCE)?,
            pvmd: pvmd.name.clone(),
            assembler: Assembler::new(PARTIAL_LIMIT),
            inbox: VecDeque::new(),
            fragment: 4080,
            wait: 0,
            tid: Tid::NONE,
            parent: Tid::NONE,
            scheduler: Tid::NONE,
            patience: PATIENCE,
        };
        client
            .shake_hands(pvmd, cookie)
            .with_context(|| format!("cannot enrol with {}", pvmd.name))?;
        Ok(client)
    }

    fn shake_hands(&mut self, pvmd: &Pvmd, cookie: i32) -> Result<()> {
        let proof = Proof::new(&pvmd.tmp)?;
        let hello = Body::new()
            .int(wire::PROTOCOL)
            .string(proof.path.as_os_str().as_bytes());
        let answer = self.ask(tm::CONNECT, hello)?;
        let mut reader = answer.reader();
        let (version, ok) = (reader.int()?, reader.int()?);
        if version != wire::PROTOCOL || ok != 1 {
            bail!(
                "it speaks version {version} of the protocol and answers {ok}; this needs {}",
                wire::PROTOCOL
            );
        }
        if !proof.given()? {
            bail!(
                "it did not write to {}: it is no pvmd of this user's",
                proof.path.display()
            );
        }
        give_proof(Path::new(OsStr::from_bytes(reader.string()?)))?;
        // What pvmd itself started is an agent or a lander, whose pid counts.
        let pid = match cookie {
            0 => HELPER_PID,
            _ => std::process::id() as i32,
        };
        let whoami = Body::new().int(pid).int(cookie);
        let answer = self.ask(tm::CONN2, whoami)?;
        let mut reader = answer.reader();
        let ok = reader.int()?;
        if ok < 1 {
            bail!("it refuses: {}", error_name(ok));
        }
        (self.tid, self.parent) = (reader.tid()?, reader.tid()?);
        if !self.tid.is_task() {
            bail!("it gave {}, which is no task's tid", self.tid);
        }
        // Where output and traces go, with context and tag each.
        for _ in 0..6 {
            reader.int()?;
        }
        self.fragment = reader.uint()? as usize;
        // Data signature, and the address where routes of this host are opened.
        let _ = (reader.int()?, reader.string()?);
        self.scheduler = reader.tid()?;
        Ok(())
    }

    /// Our tid.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Who spawned us; [`Tid::NONE`] for a task nobody spawned.
    pub fn parent(&self) -> Tid {
        self.parent
    }

    /// The resource manager's tid; [`Tid::NONE`] without one.
    pub fn scheduler(&self) -> Tid {
        self.scheduler
    }

    /// Bytes of a fragment, with its header, that the pvmd wants.
    pub fn fragment(&self) -> usize {
        self.fragment
    }

    /// Gives the connection away: to a libpvm that goes on with it. What has come in part is waited for: its rest would
    /// stand where a message begins.
    ///
    /// # Errors
    /// When it does not come.
    pub fn into_connection(mut self) -> Result<Connection> {
        let until = Instant::now() + self.patience;
        loop {
            while let Some(message) = self.complete()? {
                self.inbox.push_back(message);
            }
            if self.assembler.is_empty() {
                break;
            }
            if Instant::now() > until || !self.fill(Some(until))? {
                bail!("{} is in the middle of a message to us", self.pvmd);
            }
        }
        let mut read = Vec::new();
        for message in &self.inbox {
            read.extend(message.encode(self.fragment));
        }
        Ok(Connection {
            socket: self.fd,
            read,
        })
    }

    /// How long the pvmd may take for an answer from now on; returns how long it might until now.
    pub fn set_patience(&mut self, patience: Duration) -> Duration {
        std::mem::replace(&mut self.patience, patience)
    }

    /// Asks to be told when `about` ends, by a message that every libpvm discards unseen: it may stay in the
    /// connection when that is given away. When its pvmd has not said so, but is taken for dead itself, a notice of the host
    /// comes before it: hosts fail for whoever waits longest first (hostfailentry, pvmd.c).
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn notify_unseen(&mut self, about: Tid) -> Result<()> {
        const TASK_EXIT: i32 = 1;
        const HOST_DELETE: i32 = 2;
        for (what, tid) in [(HOST_DELETE, about.host()), (TASK_EXIT, about)] {
            let body = Body::new()
                .int(what)
                .int(CTX_TC)
                .uint(tc::NOOP)
                .int(1)
                .uint(tid.0);
            self.tell(tm::NOTIFY, body)?;
        }
        Ok(())
    }

    /// The pid of the pvmd, where it can be told: socket(7), SO_PEERCRED names the process that began to listen,
    /// which in the pvmds of added hosts has forked since, and ended.
    pub fn pvmd_pid(&self) -> Option<i32> {
        let peer = getsockopt(&self.fd, sockopt::PeerCredentials).ok()?;
        let name = std::fs::read_to_string(format!("/proc/{}/comm", peer.pid())).ok()?;
        (peer.pid() > 0 && name.starts_with("pvmd")).then(|| peer.pid())
    }

    /// Leaves the virtual machine as `pvm_exit` does. Dropping the client does it too, as a crash would.
    ///
    /// # Errors
    /// When the pvmd does not say that it has taken note.
    pub fn exit(mut self) -> Result<()> {
        self.ask(tm::EXIT, Body::new()).map(drop)
    }

    /// Asks the own pvmd; messages that come meanwhile are kept for [`Client::recv`].
    ///
    /// # Errors
    /// When the connection breaks, or no answer comes in time.
    pub fn ask(&mut self, tag: u32, body: Body) -> Result<Message> {
        let until = Instant::now() + self.patience;
        let wait = self.begin(tag, body)?;
        self.answer(tag, wait, Some(until))
    }

    /// Asks the own pvmd several things: all leave at once, if there is room for them.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn ask_several<const N: usize>(
        &mut self,
        tag: u32,
        bodies: [Body; N],
    ) -> Result<[Message; N]> {
        let until = Instant::now() + self.patience;
        let mut bytes = Vec::new();
        let questions = bodies.map(|body| {
            self.wait += 1;
            bytes.extend(self.encode(Tid::PVMD, tag, CTX_TM as u32, self.wait, body.into_bytes()));
            self.wait
        });
        self.write(Tid::PVMD, &bytes, until)?;
        let mut answers = Vec::new();
        for question in questions {
            answers.push(self.answer(tag, question, Some(until))?);
        }
        answers
            .try_into()
            .map_err(|_| anyhow::anyhow!("an answer is missing"))
    }

    pub(super) fn answer(
        &mut self,
        tag: u32,
        wait: u32,
        until: Option<Instant>,
    ) -> Result<Message> {
        self.answer_until(tag, wait, until)?.with_context(|| {
            format!(
                "{} did not answer within {} s (request {:#x})",
                self.pvmd,
                self.patience.as_secs(),
                tag
            )
        })
    }

    /// An answer of the pvmd; none when it has not come in time.
    pub(super) fn answer_until(
        &mut self,
        tag: u32,
        wait: u32,
        until: Option<Instant>,
    ) -> Result<Option<Message>> {
        let is_it = |m: &Message| m.wait == wait && m.ctx == CTX_TM as u32 && m.tag == tag;
        if let Some(at) = self.inbox.iter().position(is_it) {
            return Ok(self.inbox.remove(at));
        }
        while let Some(message) = self.next(until)? {
            if is_it(&message) {
                return Ok(Some(message));
            }
            self.inbox.push_back(message);
        }
        Ok(None)
    }

    /// Asks the own pvmd, and does not wait for the answer: a message that bears this wait id.
    ///
    /// # Errors
    /// When the connection breaks, or the pvmd takes nothing.
    pub fn begin(&mut self, tag: u32, body: Body) -> Result<u32> {
        self.wait += 1;
        let (wait, until) = (self.wait, Instant::now() + self.patience);
        let ctx = CTX_TM as u32;
        self.post(Tid::PVMD, tag, ctx, wait, body.into_bytes(), until)?;
        Ok(wait)
    }

    /// Tells the own pvmd something that it does not answer.
    ///
    /// # Errors
    /// When the connection breaks, or the pvmd takes nothing.
    pub fn tell(&mut self, tag: u32, body: Body) -> Result<()> {
        let until = Instant::now() + self.patience;
        self.post(Tid::PVMD, tag, CTX_TM as u32, 0, body.into_bytes(), until)
    }

    /// Sends a message in the default context, as `pvm_send` does. Messages to tasks that are no more vanish.
    ///
    /// # Errors
    /// When the connection breaks, or the pvmd takes nothing.
    pub fn send(&mut self, to: Tid, tag: i32, body: Body) -> Result<()> {
        let until = Instant::now() + self.patience;
        self.post(to, tag as u32, 0, 0, body.into_bytes(), until)
    }

    /// Sends a message in another context.
    ///
    /// # Errors
    /// As for [`Client::send`].
    pub fn send_in(&mut self, to: Tid, ctx: u32, tag: u32, body: Body) -> Result<()> {
        let until = Instant::now() + self.patience;
        self.post(to, tag, ctx, 0, body.into_bytes(), until)
    }

    /// Sends somebody else's message on, with a wait id that says so.
    ///
    /// # Errors
    /// As for [`Client::send`].
    pub fn pass_on(&mut self, to: Tid, message: Message, wait: i32) -> Result<()> {
        let until = Instant::now() + self.patience;
        let message = Message {
            src: self.tid,
            dst: to,
            wait: wait as u32,
            ..message
        };
        self.write(to, &message.encode(self.fragment), until)
    }

    /// Sends a TC_NOOP, which every libpvm discards unseen: behind everything sent to that task before. Its body
    /// begins with the words that say it is one of mist's, and `kind`.
    ///
    /// # Errors
    /// As for [`Client::send`].
    pub fn send_noop(&mut self, to: Tid, kind: u32, rest: &[u8]) -> Result<()> {
        let body = Body::new().uint(NOOP_MAGIC).uint(kind).bytes(rest);
        let until = Instant::now() + self.patience;
        self.post(to, tc::NOOP, CTX_TC as u32, 0, body.into_bytes(), until)
    }

    /// The next message, whatever it is: of a program, a notice, a TC_NOOP. None when `limit` is over; without
    /// one it waits as long as it takes.
    ///
    /// # Errors
    /// When the connection breaks: the pvmd has ended.
    pub fn recv(&mut self, limit: Option<Duration>) -> Result<Option<Message>> {
        if let Some(message) = self.inbox.pop_front() {
            return Ok(Some(message));
        }
        self.next(limit.map(|limit| Instant::now() + limit))
    }

    /// The next message from `from` (none: anybody) in the default context with this tag; others are kept.
    ///
    /// # Errors
    /// As for [`Client::recv`].
    pub fn recv_from(
        &mut self,
        from: Option<Tid>,
        tag: i32,
        limit: Duration,
    ) -> Result<Option<Message>> {
        let wanted = |m: &Message| {
            m.ctx == 0 && m.tag == tag as u32 && from.is_none_or(|from| from == m.src)
        };
        if let Some(at) = self.inbox.iter().position(wanted) {
            return Ok(self.inbox.remove(at));
        }
        let until = Instant::now() + limit;
        while let Some(message) = self.next(Some(until))? {
            if wanted(&message) {
                return Ok(Some(message));
            }
            self.inbox.push_back(message);
        }
        Ok(None)
    }

    fn post(
        &mut self,
        dst: Tid,
        tag: u32,
        ctx: u32,
        wait: u32,
        body: Vec<u8>,
        until: Instant,
    ) -> Result<()> {
        let bytes = self.encode(dst, tag, ctx, wait, body);
        self.write(dst, &bytes, until)
    }

    fn encode(&self, dst: Tid, tag: u32, ctx: u32, wait: u32, body: Vec<u8>) -> Vec<u8> {
        let message = Message {
            src: self.tid,
            dst,
            tag,
            ctx,
            wait,
            encoding: XDR,
            body,
        };
        message.encode(self.fragment)
    }

    fn write(&mut self, dst: Tid, bytes: &[u8], until: Instant) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match send(self.fd.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EAGAIN) => {
                    if !self.ready(PollFlags::POLLOUT, Some(until))? {
                        bail!("{} takes nothing: a message to {dst} got stuck", self.pvmd);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(e) => {
                    return Err(e).with_context(|| format!("cannot write to {}", self.pvmd));
                }
            }
        }
        Ok(())
    }

    /// The next message from the connection; none when it is too late.
    fn next(&mut self, until: Option<Instant>) -> Result<Option<Message>> {
        loop {
            if let Some(message) = self.complete()? {
                return Ok(Some(message));
            }
            if !self.fill(until)? {
                return Ok(None);
            }
        }
    }

    /// The next message of those that were read.
    fn complete(&mut self) -> Result<Option<Message>> {
        loop {
            let message = self
                .assembler
                .message()
                .with_context(|| format!("{} sends what makes no sense", self.pvmd))?;
            match message {
                Some(m) if m.ctx == CTX_TC as u32 && m.tag == tc::CONREQ => {
                    self.refuse_route(&m)?;
                }
                other => return Ok(other),
            }
        }
    }

    /// Reads what there is; false when it is too late.
    fn fill(&mut self, until: Option<Instant>) -> Result<bool> {
        let mut bytes = [0; 65536];
        loop {
            match recv(self.fd.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(0) => bail!("{} has ended the connection", self.pvmd),
                Ok(count) => {
                    self.assembler.push(bytes.get(..count).unwrap_or_default());
                    return Ok(true);
                }
                Err(Errno::EAGAIN) => {
                    if !self.ready(PollFlags::POLLIN, until)? {
                        return Ok(false);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => bail!("{} has ended the connection", self.pvmd),
                Err(e) => {
                    return Err(e).with_context(|| format!("cannot read from {}", self.pvmd));
                }
            }
        }
    }

    /// Waits until the connection can be used; false when it is too late.
    fn ready(&self, what: PollFlags, until: Option<Instant>) -> Result<bool> {
        loop {
            let timeout = match until {
                None => PollTimeout::NONE,
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    // Rounded up, so that nothing spins in the last millisecond.
                    let ms = left.as_micros().div_ceil(1000).min(60_000) as u16;
                    PollTimeout::from(ms)
                }
            };
            match poll(&mut [PollFd::new(self.fd.as_fd(), what)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(e) => return Err(e).context("poll of the connection to the pvmd"),
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(false);
            }
        }
    }

    /// A task that gets no answer to its wish for a direct route waits for ever.
    fn refuse_route(&mut self, wish: &Message) -> Result<()> {
        let version = Reader::new(&wish.body).int().unwrap_or(wire::PROTOCOL);
        let no = Body::new().int(version).int(1).string(b"");
        let until = Instant::now() + self.patience;
        self.post(
            wish.src,
            tc::CONACK,
            CTX_TC as u32,
            0,
            no.into_bytes(),
            until,
        )
    }
}

/// To wait for messages together with other things. Something may be there without the descriptor being
/// readable: call [`Client::recv`] with a limit of 0 until it gives none.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
