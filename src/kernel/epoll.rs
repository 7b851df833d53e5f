//! epoll instances whose entries stand under chosen descriptor numbers.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{EpollCreateFlags, EpollEvent, EpollTimeout};

use super::{fds, proc_file};

/// One thing to watch.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// What is watched.
    pub target: BorrowedFd<'a>,
    /// The number it is registered under: with the file it makes the entry's key.
    pub number: RawFd,
    pub events: u32,
    pub data: u64,
}

/// What stays in an entry's events when EPOLLONESHOT has fired (fs/eventpoll.c, EP_PRIVATE_BITS).
const PRIVATE: u32 =
    (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;

/// A new, empty instance.
pub fn create() -> nix::Result<OwnedFd> {
    Ok(nix::sys::epoll::Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?.0)
}

/// Adds entries to `epoll`. It is done on a thread with a copy of the descriptor table, so that any number can be
/// given to any target for the moment; an entry lives as long as its file does, whatever becomes of the number.
pub fn add(epoll: BorrowedFd<'_>, entries: &[Entry<'_>]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    thread::scope(|scope| {
        let work = thread::Builder::new().spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_FILES).context("unshare(CLONE_FILES)")?;
            add_here(epoll, entries)
        });
        match work.context(super::ONE_MORE)?.join() {
            Ok(done) => done,
            Err(_) => anyhow::bail!("the thread that fills an epoll instance panicked"),
        }
    })
}

/// Runs with a descriptor table that nobody else uses.
fn add_here(epoll: BorrowedFd<'_>, entries: &[Entry<'_>]) -> Result<()> {
    // Above all numbers that are about to be overwritten.
    let top = entries
        .iter()
        .map(|e| e.number)
        .max()
        .unwrap_or(0)
        .saturating_add(1);
    let high = |fd| {
        fds::dup_above(fd, top).with_context(|| format!("a descriptor above {top} (ulimit -n)"))
    };
    let epoll = high(epoll)?;
    let targets = entries
        .iter()
        .map(|e| high(e.target))
        .collect::<Result<Vec<_>>>()?;
    let with: Vec<(&Entry<'_>, &OwnedFd)> = entries.iter().zip(&targets).collect();
    let fired =
        |e: &Entry<'_>| e.events & libc::EPOLLONESHOT as u32 != 0 && e.events & !PRIVATE == 0;
    // A one-shot entry that has fired and was not armed again: it is let fire once more, here, before there
    // are others whose events could be taken by mistake.
    let all = (libc::EPOLLIN | libc::EPOLLOUT) as u32;
    for &(entry, target) in with.iter().filter(|(e, _)| fired(e)) {
        control(
            &epoll,
            libc::EPOLL_CTL_ADD,
            target,
            entry,
            entry.events | all,
        )?;
    }
    let mut events = [EpollEvent::empty(); 64];
    if with.iter().any(|(e, _)| fired(e)) {
        let epoll = nix::sys::epoll::Epoll(epoll.as_fd().try_clone_to_owned()?);
        while epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .context("epoll_wait")?
            > 0
        {}
    }
    for &(entry, target) in &with {
        if !fired(entry) {
            control(&epoll, libc::EPOLL_CTL_ADD, target, entry, entry.events)?;
        } else if entry_is_armed(&epoll, entry)? {
            control(&epoll, libc::EPOLL_CTL_MOD, target, entry, entry.events)?;
        }
    }
    Ok(())
}

/// Whether a one-shot entry still waits, as /proc shows it.
fn entry_is_armed(epoll: &OwnedFd, entry: &Entry<'_>) -> Result<bool> {
    // Of this thread: its table is not its process's.
    let path = format!("/proc/thread-self/fdinfo/{}", epoll.as_raw_fd());
    let text = proc_file::text(&path).with_context(|| path)?;
    Ok(text.lines().any(|line| {
        let mut words = line.split_whitespace();
        let number = words.nth(1).and_then(|w| w.parse().ok());
        let events = words.nth(1).and_then(|w| u32::from_str_radix(w, 16).ok());
        number == Some(entry.number) && events.is_some_and(|e| e & !PRIVATE != 0)
    }))
}

fn control(
    epoll: &OwnedFd,
    operation: libc::c_int,
    target: &OwnedFd,
    entry: &Entry<'_>,
    events: u32,
) -> Result<()> {
    let mut event = libc::epoll_event {
        events,
        u64: entry.data,
    };
    // SAFETY: dup2 replaces a descriptor of this thread's own table, in which nobody but this module works; what
    // is used here has higher numbers. epoll_ctl reads one event.
    let r = unsafe {
        Errno::result(libc::dup2(target.as_raw_fd(), entry.number))
            .with_context(|| format!("dup2 to {} (ulimit -n)", entry.number))?;
        libc::epoll_ctl(epoll.as_raw_fd(), operation, entry.number, &raw mut event)
    };
    Errno::result(r)
        .map(drop)
        .with_context(|| format!("epoll_ctl of fd {}", entry.number))
}
