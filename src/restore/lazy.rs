//! Memory that is filled while the program runs: pages it waits for at once, the rest behind.
//!
//! One thread serves all address spaces of a restore. The program's own changes to its mappings come as
//! events, and are obeyed before anything else is copied: what it gave back must read zero, what it moved
//! is filled at its new place, what it shares with a child is filled for both.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::memory::lazily;
use super::understudy::Understudy;
use crate::image::memory::{SpaceId, Vma};
use crate::image::pages::PagesReader;
use crate::image::process::Process;
use crate::image::store::Image;
use crate::kernel::arch::PAGE;
use crate::kernel::journal::{Journal, Phase, Record};
use crate::kernel::uffd::{Copied, EVENTS, Event, Uffd};
use crate::kernel::undertaker::{Line, Undertaker};

/// Bytes filled between two looks for pages that somebody waits for.
const STEP: usize = 256 << 10;

enum Word {
    /// With pages that must be there before anything runs, and where to say that they are.
    Serve(Box<Space>, BTreeSet<u64>, Sender<()>),
    /// From now on an understudy is to carry on; where to say that it would.
    Standing(Sender<()>),
    /// The programs run: fill all that nobody waits for, and end.
    Released(Undertaker, Option<Understudy>),
}

/// The thread that fills.
pub struct Filler {
    image: Arc<Image>,
    words: Sender<Word>,
    wake: Arc<EventFd>,
    thread: JoinHandle<Result<u64>>,
}

/// Memory of a running program is being filled; it dies with this process until that is done.
#[derive(Debug)]
pub struct Filling {
    thread: JoinHandle<Result<u64>>,
}

impl Filling {
    /// Waits until all memory is filled. Bytes filled.
    ///
    /// # Errors
    /// The image turned out to be damaged: the processes are killed.
    pub fn wait(self) -> Result<u64> {
        self.thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the filling thread panicked")))
            .context("the restored program was killed: its memory could not be filled")
    }
}

impl Filler {
    /// With `journal`, what the program does is noted there for the understudy.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(image: Arc<Image>, journal: Option<Journal>) -> Result<Self> {
        let (words, heard) = mpsc::channel();
        let wake = Arc::new(EventFd::new().context("eventfd")?);
        let server = Server {
            image: Arc::clone(&image),
            heard,
            wake: Arc::clone(&wake),
            spaces: Vec::new(),
            journal,
            standing: false,
            behind: false,
            line: None,
            dismissed: None,
            bytes: 0,
        };
        let thread = std::thread::Builder::new()
            .name("mist-fill".to_owned())
            .spawn(move || {
                // Signals are for the thread that waits for the program: one that this thread took by
                // default, SIGCHLD above all, would be lost to it.
                nix::sys::signal::SigSet::all()
                    .thread_block()
                    .context("blocking signals")?;
                server.run()
            })
            .context("starting the filling thread")?;
        Ok(Self {
            image,
            words,
            wake,
            thread,
        })
    }

    /// Takes charge of the anonymous memory of a process. `uffd` is its userfaultfd.
    pub fn serve(&self, uffd: Uffd, p: &Process) -> Result<()> {
        uffd.api(EVENTS)?;
        for v in p.vmas.iter().filter(|v| lazily(v)) {
            uffd.register_missing(v.start, v.len())?;
        }
        let space = Space::of(uffd, p);
        let (done, filled) = mpsc::channel();
        self.say(Word::Serve(
            Box::new(space),
            urgent(p, self.image.pages())?,
            done,
        ))?;
        filled
            .recv()
            .context("the filling thread has ended; the image may be damaged")
    }

    /// All stands: should we be killed from now on, an understudy carries on.
    pub fn carry_on(&self) -> Result<()> {
        let (done, noted) = mpsc::channel();
        self.say(Word::Standing(done))?;
        noted.recv().context("the filling thread has ended")
    }

    /// All programs run.
    pub fn released(
        self,
        undertaker: Undertaker,
        understudy: Option<Understudy>,
    ) -> Result<Filling> {
        self.say(Word::Released(undertaker, understudy))?;
        Ok(Filling {
            thread: self.thread,
        })
    }

    fn say(&self, word: Word) -> Result<()> {
        self.words
            .send(word)
            .map_err(|_| anyhow!("the filling thread has ended"))?;
        self.wake.write(1).context("waking the filling thread")?;
        Ok(())
    }
}

/// Pages that the kernel itself writes or reads where nobody can wait for them: an exiting thread gets no
/// page through userfaultfd (fs/userfaultfd.c, handle_userfault), so its clear_child_tid and the robust
/// futexes that it holds have to be there.
fn urgent(p: &Process, pages: &PagesReader) -> Result<BTreeSet<u64>> {
    /// ROBUST_LIST_LIMIT of kernel/futex/core.c.
    const LOCKS_MAX: usize = 2048;
    let mut all = BTreeSet::new();
    let mut add = |addr: u64| {
        let mapped = p
            .vmas
            .iter()
            .any(|v| lazily(v) && (v.start..v.end).contains(&addr));
        if mapped {
            all.insert(addr - addr % PAGE);
        }
        mapped
    };
    for t in &p.threads {
        add(t.clear_child_tid);
        // struct robust_list_head: the list, the offset of a futex from its entry, the one in work.
        let head = t.robust_list;
        if !add(head) || !add(head.wrapping_add(16)) {
            continue;
        }
        let offset = word(p.space, head.wrapping_add(8), pages)?;
        let mut entry = word(p.space, head, pages)?;
        for _ in 0..LOCKS_MAX {
            // Bit 0 tells a priority-inheriting futex.
            let at = entry & !1;
            if at == head || !add(at) {
                break;
            }
            add(at.wrapping_add(offset));
            entry = word(p.space, at, pages)?;
        }
        add(word(p.space, head.wrapping_add(16), pages)?.wrapping_add(offset));
    }
    Ok(all)
}

/// Eight bytes of the image; what was never written is zero.
fn word(space: SpaceId, addr: u64, pages: &PagesReader) -> Result<u64> {
    let Some(b) = pages.find(space, addr)? else {
        return Ok(0);
    };
    let mut bytes = vec![0; b.bytes()];
    pages.read(&b, &mut bytes)?;
    let at = (addr - b.addr) as usize;
    let word = bytes.get(at..at + 8).and_then(|w| w.try_into().ok());
    Ok(word.map_or(0, u64::from_le_bytes))
}

/// Memory from the map's key on that is still to be looked at; its content stands at `from` in the image.
#[derive(Debug, Clone, Copy)]
struct Extent {
    len: u64,
    from: u64,
}

struct Space {
    uffd: Uffd,
    space: SpaceId,
    left: BTreeMap<u64, Extent>,
    /// Pages that threads wait for.
    waiting: BTreeSet<u64>,
}

impl Space {
    /// All that is to be filled in a process.
    fn of(uffd: Uffd, p: &Process) -> Self {
        let extent = |v: &Vma| {
            let (len, from) = (v.len(), v.start);
            (v.start, Extent { len, from })
        };
        Self {
            uffd,
            space: p.space,
            left: p.vmas.iter().filter(|v| lazily(v)).map(extent).collect(),
            waiting: BTreeSet::new(),
        }
    }

    /// Takes `start..end` out of what is left, and gives the pieces.
    fn take(&mut self, start: u64, end: u64) -> Vec<(u64, Extent)> {
        let touched: Vec<(u64, Extent)> = self
            .left
            .range(..end)
            .rev()
            .take_while(|(at, e)| *at + e.len > start)
            .map(|(at, e)| (*at, *e))
            .collect();
        let mut taken = Vec::new();
        for (at, e) in touched {
            self.left.remove(&at);
            let (s, t) = (at.max(start), (at + e.len).min(end));
            if at < s {
                self.left.insert(
                    at,
                    Extent {
                        len: s - at,
                        from: e.from,
                    },
                );
            }
            if t < at + e.len {
                self.left.insert(
                    t,
                    Extent {
                        len: at + e.len - t,
                        from: e.from + (t - at),
                    },
                );
            }
            taken.push((
                s,
                Extent {
                    len: t - s,
                    from: e.from + (s - at),
                },
            ));
        }
        taken
    }

    /// Where the content of the page at `addr` stands in the image, and how much there is left around it.
    fn find(&self, addr: u64) -> Option<(u64, Extent)> {
        let (at, e) = self.left.range(..=addr).next_back()?;
        (addr < at + e.len).then_some((*at, *e))
    }

    /// Obeys what the program did to its mappings. A child comes back as a space of its own.
    fn obey(&mut self, event: Event) -> Option<Space> {
        match event {
            Event::Fault(_) => None,
            Event::Gone { start, end } => {
                self.take(start, end);
                None
            }
            Event::Remap { from, to, len } => {
                for (at, e) in self.take(from, from + len) {
                    self.left.insert(at - from + to, e);
                }
                None
            }
            Event::Fork(uffd) => Some(Space {
                uffd,
                space: self.space,
                left: self.left.clone(),
                waiting: BTreeSet::new(),
            }),
        }
    }
}

/// What a process that was killed has left to be filled.
pub struct Known(Vec<Space>);

impl Known {
    /// From what its journal says, of processes of this image. What it had filled already is there: it need not be
    /// known.
    ///
    /// # Errors
    /// For records that make no sense.
    pub fn from(image: &Image, records: Vec<Record>) -> Result<Self> {
        let mut spaces: Vec<Space> = Vec::new();
        for record in records {
            match record {
                Record::Source(uffd, space) => {
                    let mut all = image.manifest.processes.iter();
                    let p = all.find(|p| p.space == space);
                    spaces.push(Space::of(uffd, p.context("a space without a process")?));
                }
                Record::Event(of, event) => {
                    let of = spaces.get_mut(of).context("an event of nobody")?;
                    let child = of.obey(event);
                    spaces.extend(child);
                }
            }
        }
        Ok(Self(spaces))
    }

    pub fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|s| s.uffd.0.as_fd())
    }
}

/// Fills what is left, and serves who waits for it.
///
/// # Errors
/// The image is damaged.
pub fn fill(image: Arc<Image>, known: Known, line: Line) -> Result<u64> {
    for source in known.sources() {
        // Without an undertaker, too.
        let _ = line.keep_open(source);
    }
    for space in &known.0 {
        for (at, extent) in &space.left {
            // Who waited has been told of once, to somebody else: he looks again, is told of again, and comes first.
            let _ = space.uffd.wake(*at, extent.len);
        }
    }
    let (_, heard) = mpsc::channel();
    Server {
        image,
        heard,
        wake: Arc::new(EventFd::new().context("eventfd")?),
        spaces: known.0,
        journal: None,
        standing: false,
        behind: true,
        line: Some(line),
        dismissed: None,
        bytes: 0,
    }
    .run()
}

struct Server {
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
    /// Fills until nothing is left. An error ends the undertaker's line, and it the programs.
    fn run(mut self) -> Result<u64> {
        let done = self.fill_all();
        if done.is_err() && self.standing {
            // The understudy has them from us, when this process ends.
            std::mem::forget(std::mem::take(&mut self.spaces));
        }
        done
    }

    fn fill_all(&mut self) -> Result<u64> {
        let mut buffer = vec![0u8; STEP];
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
