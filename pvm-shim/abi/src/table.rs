//! The tid table: which incarnation (R) a virtual tid (V) has now, and which V every R belongs to.
//!
//! ```text
//! offset 0        Header    magic, generation, number of closed gates, whether it is all there
//!        64       Forward   16384 slots of 16 bytes, hashed by V:
//!                             word  V bits 0-29 | R bits 30-59 | state bits 60-63
//!                             next  the R that V may get | lease (see `Lease`)
//!        262208   Reverse   65536 slots of 8 bytes, hashed by R: R bits 0-29 | V bits 30-59
//! ```
//!
//! * A file of zeroes of the right length is a valid, empty table, so whoever comes first may make it.
//! * Every change is one 8-byte store; a writer that dies in the middle leaves no reader waiting.
//! * Slots are claimed and never given back; the reverse half remembers every incarnation there ever
//!   was, so a message that is still under way from an old one is attributed to the right V, and a
//!   notice about an old one is recognised as such.
//! * Order of a change: the reverse entry of the new R, then the forward entry, then the generation.
//! * While `generation` is 0, or `unmoved` is not, nothing ever moved: that is the readers' fast path. `unmoved` becomes
//!   0, for good, before anything else says that something moves.
//! * One writer per host at a time (the agent; it holds a lock on the file).

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// First eight bytes of a table that a writer has touched; zero before.
pub const MAGIC: u64 = u64::from_le_bytes(*b"MISTTIDS");
/// Slots of the forward half; at three quarters it counts as full.
pub const FORWARD_SLOTS: usize = 16384;
/// Slots of the reverse half; at three quarters it counts as full.
pub const REVERSE_SLOTS: usize = 65536;

const TID_BITS: u32 = 30;
const TID_MASK: u64 = (1 << TID_BITS) - 1;
const LEASE_BITS: u32 = 34;

/// What is going on with a V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The incarnation R is the task.
    Settled = 0,
    /// The task is moving: nobody may send to it. R still is the old incarnation.
    Moving = 1,
    /// One of mist's agents: not shown by `pvm_tasks`.
    Hidden = 2,
    /// As `Moving`, on the host it leaves: it is decided that R ends and the task goes on as `next`. Without a `next`, on
    /// all hosts: it is saved, and when R has ended, which it is about to, it comes back some day.
    Decided = 3,
}

impl State {
    fn of(bits: u64) -> State {
        match bits {
            1 => State::Moving,
            2 => State::Hidden,
            3 => State::Decided,
            _ => State::Settled,
        }
    }

    /// Whether the task's gate is closed.
    pub fn is_closed(self) -> bool {
        matches!(self, State::Moving | State::Decided)
    }
}

/// One V of the forward half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The tid the program knows.
    pub v: u32,
    /// The incarnation that bears it now.
    pub r: u32,
    /// Whether it is moving.
    pub state: State,
    /// While its gate is closed: the incarnation it may get, or 0.
    pub next: u32,
    /// While its gate is closed: when the gate's lease ends, CLOCK_MONOTONIC in ms modulo 2^34, or 0.
    pub lease: u64,
}

impl Entry {
    /// Whether the task is saved: about to end if it has not already, to come back some day.
    pub fn is_saved(&self) -> bool {
        self.state == State::Decided && self.next == 0
    }

    /// It was saved and has ended, and its partners wait until it comes back.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.state.is_closed() && self.next == 0 && self.lease == 0
    }
}

/// Reads CLOCK_MONOTONIC as leases count it: ms modulo 2^34.
pub fn lease_clock() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a valid timespec for the duration of the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000) & ((1 << LEASE_BITS) - 1)
}

/// True when a lease (as in [`Entry::lease`]) has ended at time `now` (as from [`lease_clock`]).
pub fn lease_over(lease: u64, now: u64) -> bool {
    lease != 0 && now.wrapping_sub(lease) & ((1 << LEASE_BITS) - 1) < 1 << (LEASE_BITS - 1)
}

/// Head of the table.
#[repr(C)]
pub struct Header {
    /// [`MAGIC`], or 0 in a table nobody wrote to.
    pub magic: AtomicU64,
    /// Number of changes; 0 while nothing ever moved.
    pub generation: AtomicU64,
    /// At least the number of closed gates: raised before one closes, lowered after it opened.
    pub gates: AtomicU64,
    /// 1 when the agent of this host knows all that those of other hosts knew when it began.
    pub learned: AtomicU64,
    /// 1 while every entry there is says that a task is where it always was (agents); see [`Header::nothing_moved`].
    pub unmoved: AtomicU64,
    reserved: [AtomicU64; 3],
}

impl Header {
    /// That of a table nobody wrote to.
    pub const fn new() -> Header {
        Header {
            magic: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            gates: AtomicU64::new(0),
            learned: AtomicU64::new(0),
            unmoved: AtomicU64::new(0),
            reserved: [const { AtomicU64::new(0) }; 3],
        }
    }

    /// Whether every tid stands for itself, and no gate was ever closed. `generation` was read before.
    #[inline]
    pub fn nothing_moved(&self, generation: u64) -> bool {
        (generation == 0) | (self.unmoved.load(SeqCst) != 0)
    }
}

impl Default for Header {
    fn default() -> Header {
        Header::new()
    }
}

#[repr(C)]
struct Forward {
    word: AtomicU64,
    next: AtomicU64,
}

/// The table as it lies in memory. All access is atomic, so a shared mapping of it is sound.
#[repr(C)]
pub struct Table {
    /// See [`Header`].
    pub header: Header,
    forward: [Forward; FORWARD_SLOTS],
    reverse: [AtomicU64; REVERSE_SLOTS],
}

/// Length of the table's file in bytes.
pub const SIZE: usize = size_of::<Table>();

/// No room for another tid.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

fn slot(tid: u32, bits: u32) -> usize {
    (tid.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize
}

impl Table {
    fn find_forward(&self, v: u32) -> Option<(&Forward, u64)> {
        let mut at = slot(v, FORWARD_SLOTS.ilog2());
        for _ in 0..FORWARD_SLOTS {
            let forward = self.forward.get(at)?;
            let word = forward.word.load(SeqCst);
            if word == 0 {
                return None;
            }
            if (word & TID_MASK) as u32 == v {
                return Some((forward, word));
            }
            at = (at + 1) % FORWARD_SLOTS;
        }
        None
    }

    /// The entry of a virtual tid; none for a task that never moved.
    pub fn entry(&self, v: u32) -> Option<Entry> {
        self.find_forward(v)
            .map(|(forward, word)| unpack(word, forward.next.load(SeqCst)))
    }

    /// The V that an incarnation belongs, or belonged, to; none for a task that never moved.
    pub fn v_of(&self, r: u32) -> Option<u32> {
        let mut at = slot(r, REVERSE_SLOTS.ilog2());
        for _ in 0..REVERSE_SLOTS {
            let word = self.reverse.get(at)?.load(SeqCst);
            if word == 0 {
                return None;
            }
            if (word & TID_MASK) as u32 == r {
                return Some((word >> TID_BITS & TID_MASK) as u32);
            }
            at = (at + 1) % REVERSE_SLOTS;
        }
        None
    }

    /// All entries, in no order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.forward
            .iter()
            .filter_map(|forward| match forward.word.load(SeqCst) {
                0 => None,
                word => Some(unpack(word, forward.next.load(SeqCst))),
            })
    }

    /// All incarnations known, as (R, V), in no order.
    pub fn incarnations(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.reverse
            .iter()
            .filter_map(|word| match word.load(SeqCst) {
                0 => None,
                word => Some((
                    (word & TID_MASK) as u32,
                    (word >> TID_BITS & TID_MASK) as u32,
                )),
            })
    }

    /// Writer: says that incarnation `r` is `v`. To be done on every host before `r` runs.
    pub fn set_incarnation(&self, r: u32, v: u32) -> Result<(), Full> {
        self.changing(r != v);
        let word = u64::from(r) & TID_MASK | (u64::from(v) & TID_MASK) << TID_BITS;
        let mut at = slot(r, REVERSE_SLOTS.ilog2());
        let mut used = 0;
        while used < REVERSE_SLOTS / 4 * 3 {
            let Some(reverse) = self.reverse.get(at) else {
                return Err(Full);
            };
            let old = reverse.load(SeqCst);
            if old == 0 || (old & TID_MASK) as u32 == r {
                reverse.store(word, SeqCst);
                self.changed();
                return Ok(());
            }
            at = (at + 1) % REVERSE_SLOTS;
            used += 1;
        }
        Err(Full)
    }

    /// Writer: sets the whole entry of a V, and counts gates. `next` and `lease` only mean something
    /// while the gate is closed.
    pub fn set_entry(&self, new: Entry) -> Result<(), Full> {
        let word = u64::from(new.v) & TID_MASK
            | (u64::from(new.r) & TID_MASK) << TID_BITS
            | (new.state as u64) << (2 * TID_BITS);
        let next = u64::from(new.next) & TID_MASK | new.lease << TID_BITS;
        self.changing(new.r != new.v || new.state.is_closed());
        let mut at = slot(new.v, FORWARD_SLOTS.ilog2());
        for _ in 0..FORWARD_SLOTS / 4 * 3 {
            let Some(forward) = self.forward.get(at) else {
                return Err(Full);
            };
            let old = forward.word.load(SeqCst);
            if old == 0 || (old & TID_MASK) as u32 == new.v {
                let was_moving = old != 0 && State::of(old >> (2 * TID_BITS)).is_closed();
                let moves = new.state.is_closed();
                self.changed();
                if moves && !was_moving {
                    self.header.gates.fetch_add(1, SeqCst);
                }
                forward.next.store(next, SeqCst);
                forward.word.store(word, SeqCst);
                if was_moving && !moves {
                    self.header.gates.fetch_sub(1, SeqCst);
                }
                self.changed();
                return Ok(());
            }
            at = (at + 1) % FORWARD_SLOTS;
        }
        Err(Full)
    }

    /// Writer: the table holds what there is to know.
    pub fn set_learned(&self) {
        self.changing(false);
        self.header.learned.store(1, SeqCst);
        self.changed();
    }

    /// Before a change: whether it says that something moves.
    fn changing(&self, moves: bool) {
        if moves {
            self.header.unmoved.store(0, SeqCst);
        } else if self.header.generation.load(SeqCst) == 0 {
            self.header.unmoved.store(1, SeqCst);
        }
    }

    fn changed(&self) {
        self.header.magic.store(MAGIC, SeqCst);
        self.header.generation.fetch_add(1, SeqCst);
    }
}

fn unpack(word: u64, next: u64) -> Entry {
    Entry {
        v: (word & TID_MASK) as u32,
        r: (word >> TID_BITS & TID_MASK) as u32,
        state: State::of(word >> (2 * TID_BITS)),
        next: (next & TID_MASK) as u32,
        lease: next >> TID_BITS,
    }
}

/// Maps a table's file. The mapping stays for the life of the process unless it is given to
/// [`Mapped`].
///
/// # Errors
/// The errno of fstat or mmap; EINVAL when the file is shorter than a table.
pub fn map_raw(fd: i32, writable: bool) -> Result<*const Table, i32> {
    // SAFETY: an all-zero `stat` is a valid value, and it is only read after fstat filled it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is valid for writing.
    if unsafe { libc::fstat(fd, &mut stat) } != 0 {
        return Err(errno());
    }
    if (stat.st_size as u64) < SIZE as u64 {
        return Err(libc::EINVAL);
    }
    let prot = if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_READ
    };
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, prot, libc::MAP_SHARED, fd, 0) };
    if at == libc::MAP_FAILED {
        Err(errno())
    } else {
        Ok(at.cast())
    }
}

fn errno() -> i32 {
    // SAFETY: the location is this thread's errno, always valid.
    unsafe { *libc::__errno_location() }
}

/// A table that is mapped for reading and writing, unmapped when dropped.
pub struct Mapped(*const Table);

// SAFETY: the table is only ever accessed through atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `file`, which must be open for reading and writing and at least [`SIZE`] long.
    ///
    /// # Errors
    /// See [`map_raw`].
    pub fn new(file: &File) -> io::Result<Mapped> {
        map_raw(file.as_raw_fd(), true)
            .map(Mapped)
            .map_err(io::Error::from_raw_os_error)
    }
}

impl Deref for Mapped {
    type Target = Table;
    fn deref(&self) -> &Table {
        // SAFETY: the pointer is a mapping of SIZE bytes, page aligned, that lives until drop; every
        // bit pattern is a valid table.
        unsafe { &*self.0 }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and no reference to it outlives self.
        unsafe { libc::munmap(self.0.cast_mut().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Box<Table> {
        // SAFETY: all zeroes is a valid table.
        unsafe { Box::<Table>::new_zeroed().assume_init() }
    }

    fn settled(v: u32, r: u32) -> Entry {
        Entry {
            v,
            r,
            state: State::Settled,
            next: 0,
            lease: 0,
        }
    }

    #[test]
    fn a_table_of_zeroes_is_empty() {
        let table = empty();
        assert_eq!(table.header.generation.load(SeqCst), 0);
        assert_eq!(table.entry(0x40002), None);
        assert_eq!(table.v_of(0x40002), None);
    }

    #[test]
    fn agents_do_not_move() {
        let table = empty();
        let moves_nothing = || {
            let generation = table.header.generation.load(SeqCst);
            table.header.nothing_moved(generation)
        };
        let hidden = Entry {
            state: State::Hidden,
            ..settled(0x40001, 0x40001)
        };
        assert!(moves_nothing());
        table.set_entry(hidden).unwrap();
        table.set_learned();
        table.set_incarnation(0x40002, 0x40002).unwrap();
        assert!(moves_nothing());
        let moving = Entry {
            state: State::Moving,
            ..settled(0x40002, 0x40002)
        };
        table.set_entry(moving).unwrap();
        assert!(!moves_nothing());
        table.set_entry(settled(0x40002, 0x40002)).unwrap();
        table.set_entry(hidden).unwrap();
        assert!(!moves_nothing(), "what was closed once stays slow");
    }

    #[test]
    fn a_new_incarnation_is_something_that_moves() {
        for first in [false, true] {
            let table = empty();
            if first {
                table.set_learned();
            }
            table.set_incarnation(0x80003, 0x40002).unwrap();
            let generation = table.header.generation.load(SeqCst);
            assert!(!table.header.nothing_moved(generation));
        }
    }

    #[test]
    fn every_incarnation_is_remembered() {
        let table = empty();
        table.set_incarnation(0x80003, 0x40002).unwrap();
        table.set_entry(settled(0x40002, 0x80003)).unwrap();
        table.set_incarnation(0xc0007, 0x40002).unwrap();
        table.set_entry(settled(0x40002, 0xc0007)).unwrap();
        assert_eq!(table.v_of(0x80003), Some(0x40002));
        assert_eq!(table.v_of(0xc0007), Some(0x40002));
        assert_eq!(table.entry(0x40002).unwrap().r, 0xc0007);
    }

    #[test]
    fn gates_are_counted_once() {
        let table = empty();
        let closed = Entry {
            state: State::Moving,
            next: 0x80003,
            lease: 77,
            ..settled(0x40002, 0x40002)
        };
        table.set_entry(closed).unwrap();
        table.set_entry(closed).unwrap();
        assert_eq!(table.header.gates.load(SeqCst), 1);
        assert_eq!(table.entry(0x40002), Some(closed));
        table.set_entry(settled(0x40002, 0x80003)).unwrap();
        assert_eq!(table.header.gates.load(SeqCst), 0);
    }

    #[test]
    fn the_largest_tid_fits() {
        let table = empty();
        let v = crate::TID_TASK;
        table.set_incarnation(v, v).unwrap();
        table.set_entry(settled(v, v)).unwrap();
        assert_eq!(table.entry(v), Some(settled(v, v)));
        assert_eq!(table.v_of(v), Some(v));
    }

    #[test]
    fn a_full_table_says_so() {
        let table = empty();
        let mut tid = 0x40000;
        while table.set_entry(settled(tid, tid)).is_ok() {
            tid += 1;
        }
        assert!(tid - 0x40000 >= FORWARD_SLOTS as u32 / 2);
        assert_eq!(table.entry(0x40000), Some(settled(0x40000, 0x40000)));
    }

    #[test]
    fn leases_end_also_across_the_wrap() {
        let top = (1 << LEASE_BITS) - 1;
        assert!(!lease_over(0, 5));
        assert!(lease_over(5, 6));
        assert!(!lease_over(6, 5));
        assert!(lease_over(top, 3));
        assert!(!lease_over(3, top));
    }

    #[test]
    fn an_entry_changes_at_once() {
        let table = empty();
        // Both halves of the word differ.
        let two = [settled(0x40002, 0x80001), settled(0x40002, 0xc0002)];
        let incarnations = two.map(|entry| entry.r);
        table.set_entry(two[0]).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for entry in two.iter().cycle().take(200_000) {
                    table.set_entry(*entry).unwrap();
                }
                stop.store(true, SeqCst);
            });
            while !stop.load(SeqCst) {
                let r = table.entry(0x40002).unwrap().r;
                assert!(incarnations.contains(&r), "{r:x} is neither");
            }
        });
    }
}
