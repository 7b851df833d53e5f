//! Reads, and writes to, the block that a task under the shim publishes.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use pvm_abi::BLOCK_SYMBOL;
use pvm_abi::block::{self, Block, Globals};

use crate::elf::{self, Place};
use crate::kernel::maps::{self, Map};
use crate::pvm::version::Version;

/// What libpvm's `struct Pvmtracer` begins with: three ints of traces, three of output.
const TRACER: usize = 24;

/// What the kernel puts behind the name of a file that is not there any more.
const DELETED: &[u8] = b" (deleted)";

/// Where something of a task's goes: tid, context, tag.
pub type Goes = (u32, u32, i32);

/// The block of one process.
pub struct TaskBlock {
    pid: i32,
    at: u64,
    memory: File,
}

/// Reads a field of the block by its name.
macro_rules! field {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// When the process's memory cannot be read.
        pub fn $name(&self) -> Result<$type> {
            let mut bytes = [0; size_of::<$type>()];
            self.read(offset_of!(Block, $name), &mut bytes)?;
            Ok(<$type>::from_le_bytes(bytes))
        }
    )*};
}

impl TaskBlock {
    /// Finds the block of process `pid`; none when it does not run under the shim.
    ///
    /// # Errors
    /// When /proc cannot be read, or the shim is of another version than this mistctl.
    pub fn find(pid: i32) -> Result<Option<TaskBlock>> {
        let maps = maps::read(pid).with_context(|| format!("cannot read /proc/{pid}/maps"))?;
        let Some((at, library)) = published(pid, &maps)? else {
            return Ok(None);
        };
        let mem_path = format!("/proc/{pid}/mem");
        let memory = File::options()
            .read(true)
            .write(true)
            .open(&mem_path)
            .with_context(|| format!("cannot open {mem_path}; is pid {pid} yours?"))?;
        let mut found = TaskBlock { pid, at, memory };
        let (mut address, mut head) = ([0; 8], [0; 16]);
        found.read(0, &mut address)?;
        // A shim of version 1 had the block itself there.
        if address != block::MAGIC {
            found.at = u64::from_le_bytes(address);
            found.read(0, &mut head)?;
        }
        let mut expected = block::MAGIC.to_vec();
        expected.extend(block::VERSION.to_le_bytes());
        expected.extend((size_of::<Block>() as u32).to_le_bytes());
        if head[..] != expected[..] {
            bail!(
                "the shim of pid {pid} ({}) is of another version than this mistctl; start the task under the one `mistctl shim` names",
                library.display()
            );
        }
        Ok(Some(found))
    }

    field! {
        /// See [`block::state`].
        state: u32;
        /// The virtual tid.
        v: u32;
        /// The real tid.
        r: u32;
        /// See [`block::flag`].
        flags: u32;
        /// libpvm calls on the stack.
        depth: u32;
        /// Callbacks of the program on the stack.
        callbacks: u32;
        /// See [`block::Call`].
        call: u32;
        /// Flags argument of that call.
        call_flags: i32;
        /// See [`block::wait`].
        wait: u32;
        /// Not 0 while the task waits for an answer of its pvmd.
        asking: u32;
        /// What the program asked for with PvmRoute.
        route: i32;
        /// Notices that are kept back.
        held: u32;
        /// Unanswered notify requests.
        notifies: u32;
        /// Stack pointer of the call at the bottom.
        stack: u64;
        /// Generation of the table that was acted upon.
        seen: u64;
        /// Address of the mapped table.
        table: u64;
        /// Length of that mapping.
        table_len: u64;
    }

    /// The process that enrolled; another one than this has inherited the block over fork.
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn enrolled_pid(&self) -> Result<i32> {
        Ok(self.word32(offset_of!(Block, pid))? as i32)
    }

    /// Destinations of messages on their way out; none means "perhaps everybody".
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn sending(&self) -> Result<Option<Vec<u32>>> {
        if self.word32(offset_of!(Block, sending_more))? != 0 {
            return Ok(None);
        }
        let count = self.word32(offset_of!(Block, sending_count))? as usize;
        let start = offset_of!(Block, sending);
        (0..count.min(block::SENDING))
            .map(|at| self.word32(start + 4 * at))
            .collect::<Result<_>>()
            .map(Some)
    }

    /// Path of the table the task has mapped.
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn table_path(&self) -> Result<PathBuf> {
        let mut bytes = [0; block::PATH_LEN];
        self.read(offset_of!(Block, table_path), &mut bytes)?;
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(PathBuf::from(String::from_utf8_lossy(name).into_owned()))
    }

    /// Addresses in the task of libpvm's variables, in the order of [`Globals`].
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn globals(&self) -> Result<Vec<u64>> {
        let start = offset_of!(Block, globals);
        (0..size_of::<Globals>() / 8)
            .map(|at| self.word64(start + 8 * at))
            .collect()
    }

    /// Where libpvm thinks that its output and its traces go: tid, context and tag of each.
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn sinks(&self) -> Result<(Goes, Goes)> {
        let mut bytes = [0; TRACER];
        let at = self.tracer()?;
        self.memory
            .read_exact_at(&mut bytes, at)
            .map_err(|error| self.lost(error))?;
        let mut ints = bytes
            .chunks_exact(4)
            .map(|c| u32::from_ne_bytes(c.try_into().unwrap_or_default()));
        let mut next = || ints.next().unwrap_or(0);
        let trace = (next(), next(), next() as i32);
        Ok(((next(), next(), next() as i32), trace))
    }

    /// Tells libpvm the tids there, as it would note them itself; a task at a quiet point only.
    ///
    /// # Errors
    /// When the process's memory cannot be written.
    pub fn set_sinks(&self, output: Option<u32>, trace: Option<u32>) -> Result<()> {
        let at = self.tracer()?;
        for (tid, offset) in [(trace, 0), (output, TRACER as u64 / 2)] {
            if let Some(tid) = tid {
                self.memory
                    .write_all_at(&tid.to_ne_bytes(), at + offset)
                    .map_err(|error| self.lost(error))?;
            }
        }
        Ok(())
    }

    /// Address of libpvm's `pvmtrc`.
    fn tracer(&self) -> Result<u64> {
        // Its place among the globals (pvm_abi::block::Globals).
        const PVMTRC: usize = 13;
        match self.globals()?.get(PVMTRC) {
            Some(at) if *at != 0 => Ok(*at),
            _ => bail!("libpvm of process {} has no variable pvmtrc", self.pid),
        }
    }

    /// Whether the task may be frozen as far as libpvm is concerned; the reason when it may not. A task
    /// that waits for messages has to be in select() besides, with nothing in the write set.
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn freezable(&self) -> Result<Freezable> {
        if self.depth()? == 0 {
            return Ok(Freezable::Outside);
        }
        if self.asking()? != 0 {
            return Ok(Freezable::No("it waits for an answer of its pvmd"));
        }
        let sends = self.sending()?.is_none_or(|sending| !sending.is_empty());
        Ok(match self.wait()? {
            _ if sends => Freezable::No("it is sending"),
            block::wait::RECEIVE | block::wait::GATE | block::wait::GATE_DEAF => {
                Freezable::IfInSelect
            }
            block::wait::SEND => Freezable::No("it is sending"),
            _ if self.callbacks()? != 0 => Freezable::Outside,
            _ => Freezable::No("it is inside libpvm"),
        })
    }

    /// Where the block is in the process's memory.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Asks for a marker: `number` goes to the task `to` (R) behind everything sent before it, as soon
    /// as the task communicates; a TC_NOOP sent to it makes a waiting one do so.
    ///
    /// # Errors
    /// When the process's memory cannot be accessed, or `slot` is not one of [`block::MARKERS`].
    pub fn ask_marker(&self, slot: usize, to: u32, number: u32) -> Result<()> {
        let at = marker(offset_of!(Block, marker_asked), slot)?;
        self.write(at, &(u64::from(to) | u64::from(number) << 32).to_le_bytes())?;
        self.write(offset_of!(Block, attention), &1u32.to_le_bytes())
    }

    /// A slot in which no marker is asked for that has not been sent; none when all are taken.
    ///
    /// # Errors
    /// When the process's memory cannot be read.
    pub fn free_marker(&self) -> Result<Option<usize>> {
        for slot in 0..block::MARKERS {
            if self.marker_sent(slot)? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Whether the marker last asked for in `slot` has been sent.
    ///
    /// # Errors
    /// As for [`TaskBlock::ask_marker`].
    pub fn marker_sent(&self, slot: usize) -> Result<bool> {
        let asked = self.word64(marker(offset_of!(Block, marker_asked), slot)?)?;
        Ok(asked == self.word64(marker(offset_of!(Block, marker_done), slot)?)?)
    }

    /// Makes sends to `hosts` (bit per host index) wait; no bits: none.
    ///
    /// # Errors
    /// When the process's memory cannot be written.
    pub fn hold_hosts(&self, hosts: &[u64; block::HOST_WORDS]) -> Result<()> {
        let any = hosts.iter().any(|word| *word != 0);
        let bytes: Vec<u8> = hosts.iter().flat_map(|word| word.to_le_bytes()).collect();
        if any {
            self.write(offset_of!(Block, hold_hosts), &bytes)?;
        }
        self.write(offset_of!(Block, hold_any), &u32::from(any).to_le_bytes())?;
        self.write(offset_of!(Block, hold_hosts), &bytes)
    }

    /// Says that incarnation `r` has taken over: the task looks at everything again.
    ///
    /// # Errors
    /// When the process's memory cannot be written.
    pub fn take_over(&self, r: u32) -> Result<()> {
        self.write(offset_of!(Block, r), &r.to_le_bytes())?;
        self.write(offset_of!(Block, seen), &u64::MAX.to_le_bytes())
    }

    fn word32(&self, offset: usize) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn word64(&self, offset: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.memory
            .read_exact_at(bytes, self.at + offset as u64)
            .map_err(|error| self.lost(error))
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.memory
            .write_all_at(bytes, self.at + offset as u64)
            .map_err(|error| self.lost(error))
    }

    fn lost(&self, error: io::Error) -> anyhow::Error {
        anyhow::Error::new(error).context(format!(
            "cannot access the shim's block of pid {} at {:#x}",
            self.pid, self.at
        ))
    }
}

/// Answer of [`TaskBlock::freezable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freezable {
    /// In the program's own code.
    Outside,
    /// Waits for messages or at a gate: yes, if it is in select() and waits for nothing to write.
    IfInSelect,
    /// Not now, for this reason.
    No(&'static str),
}

fn marker(start: usize, slot: usize) -> Result<usize> {
    if slot >= block::MARKERS {
        bail!(
            "there are markers 0 to {} only, not {slot}",
            block::MARKERS - 1
        );
    }
    Ok(start + 8 * slot)
}

/// Where the shim says where its block is, and the shim's path.
fn published(pid: i32, maps: &[Map]) -> Result<Option<(u64, &Path)>> {
    for map in maps {
        let Some(library) = map.shown() else {
            continue;
        };
        if library.file_name().is_some_and(|n| n == "libmistshim.so") {
            let seen = PathBuf::from(format!("/proc/{pid}/root{}", library.display()));
            let place = place_in(&seen).with_context(|| {
                format!("cannot read the shim of pid {pid}, {}", library.display())
            })?;
            let place = place.with_context(|| {
                format!(
                    "{} (loaded by pid {pid}) has no symbol {BLOCK_SYMBOL}",
                    library.display()
                )
            })?;
            return Ok(Some((place.in_file_at(map.start), library)));
        }
        // Another was installed in its place, or the task came with its own: then it has any name.
        if map.offset == 0
            && library.as_os_str().as_bytes().ends_with(DELETED)
            && let Some(place) = unlinked(pid, map)
        {
            return Ok(Some((place.in_file_at(map.start), library)));
        }
    }
    Ok(None)
}

/// Where the block is in libraries that have been read. Hundreds of tasks of a host have the same one.
static READ: Mutex<Vec<(Version, Option<Place>)>> = Mutex::new(Vec::new());

/// Where in the library at `path` the shim says where its block is.
fn place_in(path: &Path) -> Result<Option<Place>> {
    let file = File::open(path)?;
    let version = || file.metadata().map(|now| Version::of(&now));
    let before = version()?;
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, place)) = read.iter().find(|(known, _)| *known == before) {
        return Ok(*place);
    }
    let place = elf::symbol(&file, &[BLOCK_SYMBOL])?;
    if version()? == before {
        read.push((before, place));
    }
    Ok(place)
}

/// The same in a mapped file that has no name any more, if it is a shim.
fn unlinked(pid: i32, map: &Map) -> Option<Place> {
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", map.start, map.end);
    elf::symbol(&File::open(path).ok()?, &[BLOCK_SYMBOL]).ok()?
}
