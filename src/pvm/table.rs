//! mistctl's side of the tid table: opens it, and changes it in the order its readers rely on.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result, anyhow, bail};
use pvm_abi::table::{Entry, Full, Mapped, State, lease_clock};
use pvm_abi::{is_task, place};

use crate::error::{Classify, Failure};

/// The tid table of one pvmd, open for changes by this process alone.
pub struct TidTable {
    path: PathBuf,
    map: Mapped,
    _lock: File,
}

/// The path of the table of the pvmd that tasks with this environment enrol with.
///
/// # Errors
/// When no pvmd has left its address there.
pub fn path_for(pvmsock: Option<&OsStr>, address_file: &Path) -> Result<PathBuf> {
    let anchor = place::anchor(pvmsock, address_file);
    place::table_path(&anchor).with_context(|| {
        format!(
            "no pvmd at {} (stat failed); is the virtual machine running?",
            anchor.display()
        )
    })
}

impl TidTable {
    /// Opens the table at `path` for changes and makes it when it is not there. Tables beside it whose
    /// pvmd is gone are taken away.
    ///
    /// # Errors
    /// When the file cannot be opened or is not this user's alone; `Busy` when another process changes it.
    pub fn open(path: &Path) -> Result<TidTable> {
        place::sweep(path);
        let file = place::open(path)
            .with_context(|| format!("cannot open the tid table {} (open)", path.display()))?;
        // A whole-file lock of the open file description; released with the file, also by a crash.
        let lock = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock))
            .or_failure(Failure::Busy)
            .with_context(|| {
                format!(
                    "another process changes the tid table {} (fcntl F_OFD_SETLK on fd {}); only one agent may",
                    path.display(),
                    file.as_raw_fd()
                )
            })?;
        let map = Mapped::new(&file)
            .with_context(|| format!("cannot map the tid table {} (mmap)", path.display()))?;
        Ok(TidTable {
            path: path.to_owned(),
            map,
            _lock: file,
        })
    }

    /// Where the table's file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tasks the table knows, by V.
    pub fn list(&self) -> Vec<Entry> {
        let mut list: Vec<Entry> = self.map.entries().collect();
        list.sort_by_key(|entry| entry.v);
        list
    }

    /// All incarnations there ever were: R and its V.
    pub fn incarnations(&self) -> Vec<(u32, u32)> {
        self.map.incarnations().collect()
    }

    /// The entry of `v`; a task that never moved has none.
    pub fn entry(&self, v: u32) -> Option<Entry> {
        self.map.entry(v)
    }

    /// The V that incarnation `r` belongs or belonged to; `r` itself for a task that never moved.
    pub fn v_of(&self, r: u32) -> u32 {
        self.map.v_of(r).unwrap_or(r)
    }

    /// The current incarnation of `v`; `v` itself for a task that never moved.
    pub fn r_of(&self, v: u32) -> u32 {
        self.map.entry(v).map_or(v, |entry| entry.r)
    }

    /// Makes `r` known as an incarnation of `v`. To be done on every host before `r`'s process runs:
    /// a receiver never looks again at a message it has once rejected.
    ///
    /// # Errors
    /// When a tid is not a task's, `r` is known as another task's, or the table is full.
    pub fn add_incarnation(&mut self, r: u32, v: u32) -> Result<()> {
        check(&[r, v])?;
        match self.map.v_of(r) {
            Some(other) if other != v => {
                bail!("t{r:x} is an incarnation of t{other:x}, not of t{v:x}")
            }
            _ => self.map.set_incarnation(r, v).map_err(|Full| self.full(r)),
        }
    }

    /// Closes the gate of `v`: nobody on this host sends to it any more, once those who are at it have
    /// finished. `next` is the incarnation it may get (0 when that is not known yet); after `lease_ms`
    /// those who wait find out by themselves which of the two lives (0: they wait on).
    ///
    /// # Errors
    /// When a tid is not a task's or the table is full.
    pub fn close_gate(&mut self, v: u32, next: u32, lease_ms: u64) -> Result<()> {
        check(&[v])?;
        let r = self.r_of(v);
        let lease = if lease_ms == 0 {
            0
        } else {
            (lease_clock() + lease_ms).max(1)
        };
        // The present incarnation has to be known as such: its late messages and its exit notice
        // come in when it no longer is the present one.
        self.map
            .set_incarnation(r, v)
            .map_err(|Full| self.full(r))?;
        self.set(Entry {
            v,
            r,
            state: State::Moving,
            next,
            lease,
        })
    }

    /// Notes that the task whose gate is closed ends here and goes on as `next`: by one 8-byte store, which outlives
    /// whoever decided. False when its gate is not closed for that.
    ///
    /// # Errors
    /// When the table is full.
    pub fn decide(&mut self, v: u32, next: u32) -> Result<bool> {
        match self.map.entry(v) {
            Some(entry) if entry.state.is_closed() && entry.next == next => {
                let state = State::Decided;
                self.set(Entry { state, ..entry })?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Has the lease of a closed gate end in `lease_ms`, if it has one.
    ///
    /// # Errors
    /// When the table is full.
    pub fn set_lease(&mut self, v: u32, lease_ms: u64) -> Result<()> {
        match self.map.entry(v) {
            Some(entry) if entry.state.is_closed() && entry.lease != 0 => {
                let lease = (lease_clock() + lease_ms).max(1);
                self.set(Entry { lease, ..entry })
            }
            _ => Ok(()),
        }
    }

    /// Opens the gate of `v`, whose incarnation is `r` from now on.
    ///
    /// # Errors
    /// When a tid is not a task's, `r` was not added before, or the table is full.
    pub fn open_gate(&mut self, v: u32, r: u32) -> Result<()> {
        check(&[v, r])?;
        if r != v && self.map.v_of(r) != Some(v) {
            bail!("t{r:x} has not been made known as an incarnation of t{v:x}; add it first");
        }
        self.map
            .set_incarnation(r, v)
            .map_err(|Full| self.full(r))?;
        self.set(Entry {
            v,
            r,
            state: State::Settled,
            next: 0,
            lease: 0,
        })
    }

    /// Tells tasks that enrol that the table holds what there is to know: see [`pvm_abi::AGENTS`].
    pub fn set_learned(&mut self) {
        self.map.set_learned();
    }

    /// Whether that is so.
    pub fn has_learned(&self) -> bool {
        self.map.header.learned.load(SeqCst) != 0
    }

    /// Hides a task (an agent) from `pvm_tasks`.
    ///
    /// # Errors
    /// When the tid is not a task's or the table is full.
    pub fn hide(&mut self, tid: u32) -> Result<()> {
        check(&[tid])?;
        self.set(Entry {
            v: tid,
            r: tid,
            state: State::Hidden,
            next: 0,
            lease: 0,
        })
    }

    fn set(&mut self, entry: Entry) -> Result<()> {
        self.map.set_entry(entry).map_err(|Full| self.full(entry.v))
    }

    fn full(&self, tid: u32) -> anyhow::Error {
        anyhow!(
            "the tid table {} has no room for t{tid:x}; it empties with the next virtual machine",
            self.path.display()
        )
    }
}

/// The virtual tid of the task that `r` is or was an incarnation of, as the table at `path` knows it.
///
/// # Errors
/// When there is no such table, or it cannot be mapped.
pub fn name(path: &Path, r: u32) -> Result<u32> {
    let failed = || format!("cannot read the tid table {}", path.display());
    let file = place::open(path).with_context(failed)?;
    let map = Mapped::new(&file).with_context(failed)?;
    Ok(map.v_of(r).unwrap_or(r))
}

/// The present incarnation of the task that `r` is or was an incarnation of, if the table at `path` knows it.
///
/// # Errors
/// When there is no such table, or it cannot be mapped.
pub fn present(path: &Path, r: u32) -> Result<Option<u32>> {
    let failed = || format!("cannot read the tid table {}", path.display());
    let file = place::open(path).with_context(failed)?;
    let map = Mapped::new(&file).with_context(failed)?;
    let v = map.v_of(r).unwrap_or(r);
    Ok(map.entry(v).map(|entry| entry.r))
}

/// Whether the table at `path` says that `v` goes on as `next`: for a mover that has lost its agent.
///
/// # Errors
/// When there is no such table, or it cannot be mapped.
pub fn decided(path: &Path, v: u32, next: u32) -> Result<bool> {
    let failed = || format!("cannot read the tid table {}", path.display());
    let file = place::open(path).with_context(failed)?;
    let map = Mapped::new(&file).with_context(failed)?;
    Ok(map.entry(v).is_some_and(|entry| match entry.state {
        State::Decided => entry.next == next,
        _ => entry.r == next,
    }))
}

fn check(tids: &[u32]) -> Result<()> {
    match tids.iter().find(|tid| !is_task(**tid)) {
        Some(tid) => bail!("t{tid:x} is not the tid of a task"),
        None => Ok(()),
    }
}
