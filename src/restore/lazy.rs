//! Memory that is filled while the program runs: pages it waits for at once, the rest behind.
//!
//! One thread serves all address spaces of a restore. The program's own changes to its mappings come as
//! events, and are obeyed before anything else is copied: what it gave back must read zero, what it moved
//! is filled at its new place, what it shares with a child is filled for both.

mod server;
mod space;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use nix::sys::eventfd::EventFd;

use self::server::{Server, Word};
use self::space::Space;
use super::bulk::Bulk;
use super::memory::lazily;
use super::understudy::Understudy;
use crate::image::memory::SpaceId;
use crate::image::pages::PagesReader;
use crate::image::process::Process;
use crate::image::store::Image;
use crate::kernel::arch::PAGE;
use crate::kernel::journal::{Journal, Record};
use crate::kernel::mem::Mem;
use crate::kernel::uffd::{EVENTS, Uffd};
use crate::kernel::undertaker::{Line, Undertaker};

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
        let server = Server::new(Arc::clone(&image), heard, Arc::clone(&wake), journal);
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
            .context(crate::kernel::ONE_MORE)?;
        Ok(Self {
            image,
            words,
            wake,
            thread,
        })
    }

    /// Takes charge of the anonymous memory of a process, but of what is in `bulk` already. `uffd` is its userfaultfd.
    pub fn serve(&self, uffd: Uffd, p: &Process, bulk: &Bulk, mem: &Mem) -> Result<()> {
        uffd.api(EVENTS)?;
        // Of what is there the image has no pages, and none is ever given.
        for v in p.vmas.iter().filter(|v| lazily(v) && !bulk.has(p, v)) {
            uffd.register_missing(v.start, v.len())?;
        }
        let space = Space::of(uffd, p);
        let (done, filled) = mpsc::channel();
        self.say(Word::Serve(
            Box::new(space),
            urgent(
                p,
                &|addr| match bulk.filled(p).any(|(a, b)| (a..b).contains(&addr)) {
                    true => mem.read_u64(addr),
                    false => word(p.space, addr, self.image.pages()),
                },
            )?,
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
/// futexes that it holds have to be there. Nor does a reader of /proc/PID/cmdline or environ (access_remote_vm in
/// mm/memory.c), who would find them empty.
fn urgent(p: &Process, word: &dyn Fn(u64) -> Result<u64>) -> Result<BTreeSet<u64>> {
    /// ROBUST_LIST_LIMIT of kernel/futex/core.c.
    const LOCKS_MAX: usize = 2048;
    /// Three quarters of _STK_LIM: what execve(2) takes at most.
    const TEXT_MAX: u64 = 6 << 20;
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
    let m = &p.mm;
    for (start, end) in [(m.arg_start, m.arg_end), (m.env_start, m.env_end)] {
        let last = end.min(start.saturating_add(TEXT_MAX));
        let pages = (start - start % PAGE..last).step_by(PAGE as usize);
        // They lie together, unless the program has said otherwise.
        pages.take_while(|at| add(*at)).for_each(drop);
    }
    for t in &p.threads {
        add(t.clear_child_tid);
        // struct robust_list_head: the list, the offset of a futex from its entry, the one in work.
        let head = t.robust_list;
        if !add(head) || !add(head.wrapping_add(16)) {
            continue;
        }
        let offset = word(head.wrapping_add(8))?;
        let mut entry = word(head)?;
        for _ in 0..LOCKS_MAX {
            // Bit 0 tells a priority-inheriting futex.
            let at = entry & !1;
            if at == head || !add(at) {
                break;
            }
            add(at.wrapping_add(offset));
            entry = word(at)?;
        }
        add(word(head.wrapping_add(16))?.wrapping_add(offset));
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
    Server::carry_on(image, known.0, line)?.run()
}
