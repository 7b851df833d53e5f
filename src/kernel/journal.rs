//! What one process has been told of a userfaultfd, for another one that goes on in its place.
//!
//! A message of a userfaultfd is gone once it is read, and the program goes on (fs/userfaultfd.c,
//! userfaultfd_ctx_read). So it is read right into memory that both processes share: a process that is killed is
//! killed before that system call or behind it, and what was told is either still to be told or stands here.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use super::uffd::{Event, MESSAGE, Uffd};

/// Bytes of a record: a message, whose userfaultfd sent it, and room, so that none crosses the end of a page.
const RECORD: usize = 64;
/// Address space, not memory: only what is written is there. More events than any program makes while it is filled.
const LEN: usize = 1 << 30;
/// First byte of a record that says of a userfaultfd: here it is.
const SOURCE: u8 = 0xf0;

/// How far things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Nothing is to be carried on: what is being made dies with its maker.
    Making = 0,
    /// Whoever lives carries on.
    Standing = 1,
    /// Nothing is left to do.
    Done = 2,
}

/// One of the records, in the order they were made.
#[derive(Debug)]
pub enum Record {
    /// The next source; and a number that its owner gave it.
    Source(Uffd, u32),
    /// What the source of this number (from 0, as they came, and children as they were born) has told.
    Event(usize, Event),
}

/// Shared with the children that are forked from here on.
#[derive(Debug)]
pub struct Journal {
    at: NonNull<u8>,
    /// The next record to write.
    next: usize,
}

// SAFETY: the memory is the journal's alone in this process, and the other process only reads it when this one is dead.
unsafe impl Send for Journal {}

impl Journal {
    /// # Errors
    /// When there is no address space.
    pub fn new() -> io::Result<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), LEN, rw, flags, -1, 0) };
        match NonNull::new(map.cast()) {
            Some(at) if map != libc::MAP_FAILED => Ok(Self { at, next: 1 }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The same memory, for the process that is to go on; to be used in a child only.
    pub fn twin(&self) -> Twin {
        Twin { at: self.at }
    }

    pub fn set(&self, phase: Phase) {
        word(self.at).store(phase as u32, Ordering::SeqCst);
    }

    /// A new source of events, which the children of our descriptor table have under the same number.
    pub fn source(&mut self, uffd: &Uffd, number: u32) {
        let mut b = [0; MESSAGE];
        b[8..12].copy_from_slice(&uffd.0.as_raw_fd().to_ne_bytes());
        b[16..20].copy_from_slice(&number.to_ne_bytes());
        b[0] = SOURCE;
        if let Some(record) = self.record(0) {
            record.copy_from_slice(&b);
            self.next += 1;
        }
    }

    /// The next event of a source, if there is one; `number` is its place among the sources.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn event(&mut self, uffd: &Uffd, number: usize) -> Result<Option<Event>> {
        let Some(record) = self.record(number as u32) else {
            return uffd.event();
        };
        if !uffd.read(record)? {
            return Ok(None);
        }
        let event = Event::parse(record)?;
        // Whoever goes on has those who wait tell him again: the next record may take its place.
        if !matches!(event, Event::Fault(_)) {
            self.next += 1;
        }
        Ok(Some(event))
    }

    /// Room for the next message, of this source: written to, so that the kernel needs no page to write there. None
    /// when a program has changed its mappings some million times while it was filled: from then on nobody can carry on.
    fn record(&mut self, source: u32) -> Option<&mut [u8; MESSAGE]> {
        if (self.next + 2) * RECORD > LEN {
            self.set(Phase::Making);
            return None;
        }
        // SAFETY: within the mapping, which is ours and lives as long as `self`; see `Send` for the other process.
        let record = unsafe {
            &mut *self
                .at
                .as_ptr()
                .add(self.next * RECORD)
                .cast::<[u8; RECORD]>()
        };
        let (message, rest) = record.split_first_chunk_mut()?;
        *message = [0; MESSAGE];
        rest[..4].copy_from_slice(&source.to_ne_bytes());
        Some(message)
    }
}

/// The journal in the hands of the process that goes on.
#[derive(Debug)]
pub struct Twin {
    at: NonNull<u8>,
}

// SAFETY: it reads only, in a process whose memory it is as long as that lives.
unsafe impl Send for Twin {}

impl Twin {
    pub fn phase(&self) -> Phase {
        match word(self.at).load(Ordering::SeqCst) {
            1 => Phase::Standing,
            2 => Phase::Done,
            _ => Phase::Making,
        }
    }

    /// All records. Call it once: their descriptors are owned.
    ///
    /// # Errors
    /// When one makes no sense.
    pub fn records(&self) -> Result<Vec<Record>> {
        let mut all = Vec::new();
        for i in 1..LEN / RECORD {
            // SAFETY: within the mapping, which this process has for ever; who wrote it is dead.
            let record = unsafe { &*self.at.as_ptr().add(i * RECORD).cast::<[u8; RECORD]>() };
            let Some((message, rest)) = record.split_first_chunk::<MESSAGE>() else {
                break;
            };
            let at = |b: &[u8], i: usize| {
                b.get(i..i + 4)
                    .and_then(|b| b.try_into().ok())
                    .map_or(0, u32::from_ne_bytes)
            };
            all.push(match message[0] {
                0 => break,
                SOURCE => {
                    // SAFETY: it was open in the table we share when this was written, and who wrote it closes it only
                    // when the phase is `Done`.
                    let fd = unsafe { OwnedFd::from_raw_fd(at(message, 8) as i32) };
                    Record::Source(Uffd(fd), at(message, 16))
                }
                _ => Record::Event(at(rest, 0) as usize, Event::parse(message)?),
            });
        }
        Ok(all)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, with this length; no reference to it is left in this process.
        unsafe { libc::munmap(self.at.as_ptr().cast(), LEN) };
    }
}

fn word<'a>(at: NonNull<u8>) -> &'a AtomicU32 {
    // SAFETY: the first bytes of a mapping, which are used as this atomic only, by both processes; it is page-aligned.
    unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::arch::PAGE;
    use crate::kernel::uffd::EVENTS;

    #[test]
    fn who_waits_for_a_page_is_told_of_again_when_woken() {
        let uffd = Uffd::ours().expect("userfaultfd");
        if uffd.api(0).is_err() {
            eprintln!("SKIPPED: a userfaultfd needs a privilege here");
            return;
        }
        let page = memmap2::MmapMut::map_anon(PAGE as usize).expect("memory");
        let at = page.as_ptr() as u64;
        uffd.register_missing(at, PAGE).expect("register");
        let waits = std::thread::spawn(move || page.first().copied());
        let told = || loop {
            match uffd.event().expect("read") {
                Some(Event::Fault(addr)) => return addr,
                other => assert!(other.is_none(), "{other:?}"),
            }
            std::thread::yield_now();
        };
        assert_eq!(told(), at);
        // Who has read that dies; whoever goes on fills nothing before he wakes those who wait.
        uffd.wake(at, PAGE).expect("wake");
        assert_eq!(told(), at);
        uffd.zero(at, PAGE).expect("a page");
        assert_eq!(waits.join().expect("a thread that waits"), Some(0));
    }

    #[test]
    fn what_was_told_stands_there_in_order() {
        let uffd = Uffd::ours().expect("userfaultfd");
        if uffd.api(EVENTS).is_err() {
            eprintln!("SKIPPED: events of a userfaultfd need CAP_SYS_PTRACE");
            return;
        }
        let len = 16 * PAGE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, rw, flags, -1, 0) } as u64;
        uffd.register_missing(at, len).expect("register");
        let mut journal = Journal::new().expect("memory");
        journal.source(&uffd, 7);
        let give_back = std::thread::spawn(move || {
            for (from, pages) in [(0, 1), (4, 2)] {
                let (from, len) = (at + from * PAGE, (pages * PAGE) as usize);
                // SAFETY: memory that nobody uses. The call waits until it was told.
                let r = unsafe { libc::madvise(from as *mut _, len, libc::MADV_DONTNEED) };
                assert_eq!(r, 0);
            }
        });
        let mut told = 0;
        while told < 2 {
            told += usize::from(journal.event(&uffd, 0).expect("read").is_some());
        }
        give_back.join().expect("a thread that gives memory back");
        journal.set(Phase::Standing);
        let twin = journal.twin();
        assert_eq!(twin.phase(), Phase::Standing);
        let records = twin.records().expect("records");
        let [
            Record::Source(again, 7),
            Record::Event(0, first),
            Record::Event(0, second),
        ] = &records[..]
        else {
            panic!("{records:?}");
        };
        assert_eq!(again.0.as_raw_fd(), uffd.0.as_raw_fd());
        let pages = |e: &Event| match e {
            Event::Gone { start, end } => ((start - at) / PAGE, (end - at) / PAGE),
            other => panic!("{other:?}"),
        };
        assert_eq!((pages(first), pages(second)), ((0, 1), (4, 6)));
        // Owned twice, here where there is one process.
        std::mem::forget(records);
    }
}
