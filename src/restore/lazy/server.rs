//! The thread that fills: what somebody waits for first, what the program does to its mappings before anything else.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::space::Space;
use crate::image::store::Image;
use crate::kernel::arch::PAGE;
use crate::kernel::buffer::Buffer;
use crate::kernel::journal::{Journal, Phase};
use crate::kernel::uffd::{Copied, Event};
use crate::kernel::undertaker::{Line, Undertaker};
use crate::restore::understudy::Understudy;
/// Bytes filled between two looks for pages that somebody waits for.
const STEP: usize = 256 << 10;

pub enum Word {
    /// With pages that must be there before anything runs, and where to say that they are.
    Serve(Box<Space>, BTreeSet<u64>, Sender<()>),
    /// From now on an understudy is to carry on; where to say that it would.
    Standing(Sender<()>),
    /// The programs run: fill all that nobody waits for, and end.
    Released(Undertaker, Option<Understudy>),
}

pub struct Server {
    image: Arc<Image>,
    heard: Receiver<Word>,
    wake: Arc<EventFd>,
    spaces: Vec<Space>,
    /// Where events are noted for another process.
    journal: Option<Journal>,
    /// An understudy would carry on.
    standing: bool,
    /// The programs run: what nobody waits for is filled, too.
    behind: bool,
    /// To who ends the programs when nobody fills them any more: children's userfaultfds are kept there.
    line: Option<Line>,
    /// Whom to tell when all is filled.
    dismissed: Option<(Undertaker, Option<Understudy>)>,
    bytes: u64,
}

impl Server {
    /// Nothing to fill yet, and nobody runs. With `journal`, what the programs do is noted there.
    pub fn new(
        image: Arc<Image>,
        heard: Receiver<Word>,
        wake: Arc<EventFd>,
        journal: Option<Journal>,
    ) -> Self {
        Self {
            image,
            heard,
            wake,
            spaces: Vec::new(),
            journal,
            standing: false,
            behind: false,
            line: None,
            dismissed: None,
            bytes: 0,
        }
    }

    /// For programs that run: `spaces` are what another process had left.
    pub fn carry_on(image: Arc<Image>, spaces: Vec<Space>, line: Line) -> Result<Self> {
        let (_, heard) = mpsc::channel();
        let wake = Arc::new(EventFd::new().context("eventfd")?);
        Ok(Self {
            spaces,
            behind: true,
            line: Some(line),
            ..Self::new(image, heard, wake, None)
        })
    }

    /// Fills until nothing is left. An error ends the undertaker's line, and it the programs.
    pub fn run(mut self) -> Result<u64> {
        let done = self.fill_all();
        if done.is_err() && self.standing {
            // The understudy has them from us, when this process ends.
            std::mem::forget(std::mem::take(&mut self.spaces));
        }
        done
    }

    fn fill_all(&mut self) -> Result<u64> {
        let mut buffer = Buffer::new(STEP);
        let mut scratch = Vec::new();
        loop {
            self.listen(&mut buffer)?;
            let mut i = 0;
            let mut idle = true;
            while i < self.spaces.len() {
                idle &= !self.events(i, &mut buffer)?;
                if self.behind {
                    idle &= !self.behind(i, &mut buffer, &mut scratch)?;
                }
                i += 1;
            }
            if idle && self.behind {
                break;
            }
            if idle {
                self.sleep()?;
            }
        }
        if let Some(journal) = self.journal.take() {
            // From here on the numbers it has may be others'.
            journal.set(Phase::Done);
        }
        // With the last copy of a userfaultfd all its registrations end, those too that a growing stack
        // has inherited.
        self.spaces.clear();
        if let Some((undertaker, understudy)) = self.dismissed.take() {
            undertaker.dismiss();
            if let Some(understudy) = understudy {
                understudy.dismiss();
            }
        }
        Ok(self.bytes)
    }

    fn listen(&mut self, buffer: &mut [u8]) -> Result<()> {
        loop {
            match self.heard.try_recv() {
                Ok(Word::Serve(space, urgent, done)) => {
                    let i = self.spaces.len();
                    if let Some(journal) = &mut self.journal {
                        journal.source(&space.uffd, space.space);
                    }
                    self.spaces.push(*space);
                    for page in urgent {
                        self.fault(i, page, buffer)?;
                    }
                    // Who asked may have given up meanwhile.
                    let _ = done.send(());
                }
                Ok(Word::Standing(done)) => {
                    self.stand();
                    let _ = done.send(());
                }
                Ok(Word::Released(undertaker, understudy)) => {
                    self.stand();
                    self.behind = true;
                    self.line = Some(undertaker.second()?);
                    self.dismissed = Some((undertaker, understudy));
                }
                Err(TryRecvError::Empty) => return Ok(()),
                // A restore that failed before the release: nobody is left to serve.
                Err(TryRecvError::Disconnected) if !self.behind => {
                    return Err(anyhow!("the restore ended before its memory was filled"));
                }
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    /// From now on nothing of this dies with us alone.
    fn stand(&mut self) {
        if let Some(journal) = &self.journal {
            journal.set(Phase::Standing);
            self.standing = true;
        }
    }

    fn sleep(&self) -> Result<()> {
        let mut fds: Vec<PollFd> = self
            .spaces
            .iter()
            .map(|s| PollFd::new(s.uffd.0.as_fd(), PollFlags::POLLIN))
            .collect();
        fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).context("waiting for page faults"),
        }
        let woken = fds
            .last()
            .and_then(PollFd::revents)
            .is_some_and(|r| !r.is_empty());
        if woken {
            let _ = self.wake.read();
        }
        Ok(())
    }

    fn event(&mut self, i: usize) -> Result<Option<Event>> {
        match (self.spaces.get(i), &mut self.journal) {
            (Some(s), Some(journal)) => journal.event(&s.uffd, i),
            (Some(s), None) => s.uffd.event(),
            (None, _) => Ok(None),
        }
    }

    /// Serves the faults and events that wait. True: there was one.
    fn events(&mut self, i: usize, buffer: &mut [u8]) -> Result<bool> {
        let mut any = false;
        while let Some(event) = self.event(i)? {
            any = true;
            if let Some(s) = self.spaces.get_mut(i) {
                match event {
                    Event::Fault(addr) => {
                        s.waiting.insert(addr - addr % PAGE);
                    }
                    other => {
                        let child = s.obey(other);
                        if let (Some(child), Some(line)) = (&child, &self.line) {
                            // Without an undertaker, too.
                            let _ = line.keep_open(&child.uffd.0);
                        }
                        self.spaces.extend(child);
                    }
                }
            }
        }
        let waiting = self
            .spaces
            .get(i)
            .map(|s| s.waiting.clone())
            .unwrap_or_default();
        for page in waiting {
            any = true;
            if self.fault(i, page, buffer)?
                && let Some(s) = self.spaces.get_mut(i)
            {
                s.waiting.remove(&page);
                s.uffd.wake(page, PAGE)?;
            }
        }
        Ok(any)
    }

    /// Gives the page at `addr`. False: not now, the program is changing its mappings, and the event that
    /// tells how comes first. Its thread is not woken then: it would only ask again, and the kernel tells of
    /// faults before it tells of events.
    fn fault(&mut self, i: usize, addr: u64, buffer: &mut [u8]) -> Result<bool> {
        let Some(s) = self.spaces.get(i) else {
            return Ok(true);
        };
        let block = match s.find(addr) {
            Some((at, e)) => {
                let from = addr - at + e.from;
                self.image.pages().find(s.space, from)?.map(|b| (at, e, b))
            }
            None => None,
        };
        let Some((at, e, b)) = block else {
            // Never written, or given back.
            let given = s.uffd.zero(addr, PAGE)?;
            if matches!(given, Copied::Again(_)) {
                return Ok(false);
            }
            self.done(i, addr, PAGE);
            return Ok(true);
        };
        let out = buffer.get_mut(..b.bytes()).context("a block is too long")?;
        self.image.pages().read(&b, out)?;
        // The part of the block that lies in this extent.
        let start = b.addr.max(e.from);
        let end = (b.addr + out.len() as u64).min(e.from + e.len);
        let part = &out[(start - b.addr) as usize..(end - b.addr) as usize];
        self.give(i, start - e.from + at, part)
    }

    /// Fills `data` at `addr`, page by page where some are there already.
    /// False: not all of it, see [`Server::fault`].
    fn give(&mut self, i: usize, addr: u64, data: &[u8]) -> Result<bool> {
        let mut done = 0u64;
        while (done as usize) < data.len() {
            let Some(s) = self.spaces.get(i) else {
                return Ok(true);
            };
            let given = s.uffd.copy(addr + done, &data[done as usize..])?;
            let n = match given {
                Copied::Done => data.len() as u64 - done,
                Copied::Exists(n) => {
                    // Filled before, by a fault: the next page may be missing still.
                    s.uffd.wake(addr + done + n, PAGE)?;
                    n + PAGE
                }
                // The program changes its mappings: its event comes first, and what is left of this is
                // found again.
                Copied::Again(n) => {
                    self.done(i, addr + done, n);
                    self.bytes += n;
                    return Ok(false);
                }
                // The kernel fills one mapping at a time, and the program may have split this one.
                Copied::Gone(0) if data.len() as u64 - done > PAGE => {
                    let page = done as usize..(done + PAGE) as usize;
                    let page = data.get(page).context("a part of a page")?;
                    if !self.give(i, addr + done, page)? {
                        return Ok(false);
                    }
                    done += PAGE;
                    continue;
                }
                // Unmapped, and we were told or need not be: the process has ended.
                Copied::Gone(0) => PAGE,
                Copied::Gone(n) => n,
            };
            self.done(i, addr + done, n);
            self.bytes += n;
            done += n;
        }
        Ok(true)
    }

    fn done(&mut self, i: usize, addr: u64, len: u64) {
        if let Some(s) = self.spaces.get_mut(i) {
            s.take(addr, addr + len);
        }
    }

    /// Fills the next piece nobody waits for. True: there was one.
    fn behind(&mut self, i: usize, buffer: &mut [u8], scratch: &mut Vec<u8>) -> Result<bool> {
        let Some(s) = self.spaces.get_mut(i) else {
            return Ok(false);
        };
        let Some((at, e)) = s.left.first_key_value().map(|(a, e)| (*a, *e)) else {
            return Ok(false);
        };
        let image = Arc::clone(&self.image);
        let next = image
            .pages()
            .runs(s.space, e.from, e.from + e.len, STEP)
            .next()
            .transpose()?;
        let Some(run) = next else {
            // Nothing but pages that were never written.
            s.left.remove(&at);
            return Ok(true);
        };
        let out = buffer
            .get_mut(..run.bytes())
            .context("a run of pages is too long")?;
        image.pages().read_run(&run, out, scratch)?;
        let start = run.addr().max(e.from);
        let end = (run.addr() + out.len() as u64).min(e.from + e.len);
        if end <= start {
            s.left.remove(&at);
            return Ok(true);
        }
        if start > e.from {
            s.take(at, at + (start - e.from));
        }
        let part = &out[(start - run.addr()) as usize..(end - run.addr()) as usize];
        self.give(i, start - e.from + at, part)?;
        Ok(true)
    }
}
