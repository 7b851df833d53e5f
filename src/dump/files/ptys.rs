//! Terminals. A pseudo terminal whose master is in the dump is carried; any other leads outside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{FileDumper, Place, Seen};
use crate::dump::tables::Tables;
use crate::image::Bytes;
use crate::image::files::{External, Kind, Pty, PtyFile, Stopped};
use crate::kernel::tty::Waiting;
use crate::kernel::{proc_file, tty};

/// One side of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Side {
    index: u32,
    pub(super) master: bool,
}

/// Which side of a pseudo terminal a terminal's descriptor is; none if it is another kind of terminal.
fn side(seen: &Seen<'_>) -> Option<Side> {
    if let Ok(index) = seen.info.decimal("tty-index") {
        return Some(Side {
            index,
            master: true,
        });
    }
    // Of /dev/tty this tells the terminal it stands for.
    let dev = tty::device(seen.own.as_fd()).ok()?;
    let (major, minor) = ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xfff00));
    // UNIX98_PTY_SLAVE_MAJOR and the seven after it (linux/major.h).
    (136..144).contains(&major).then_some(Side {
        index: minor + (major - 136) * 256,
        master: false,
    })
}

/// A terminal, for the time being one to somebody outside.
pub(super) fn kind(seen: &Seen<'_>) -> Option<(Kind, Option<Side>)> {
    if !seen.own.is_terminal() && seen.info.find("tty-index").is_none() {
        return None;
    }
    let kind = Kind::External(External {
        what: format!("terminal {}", seen.place.link),
        terminal: true,
        ..External::default()
    });
    Some((kind, side(seen)))
}

impl FileDumper {
    /// Notes the modes of a terminal to somebody outside, if a process of the dump is in its foreground.
    pub(super) fn in_use(&self, terminal: BorrowedFd<'_>, external: &mut External) -> Option<()> {
        let device = tty::device(terminal).ok()?;
        let stat = proc_file::stat(*self.pids.first()?).ok()?;
        let in_foreground = |pid: &i32| {
            let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(*pid)));
            group.is_ok_and(|g| g.as_raw() == stat.tpgid)
        };
        if stat.tty_nr as u32 != device || !self.pids.iter().any(in_foreground) {
            return None;
        }
        external.termios = Some(Bytes(tty::termios(terminal).ok()?.to_vec()));
        external.foreground = (stat.session == stat.pid).then_some(stat.tpgid);
        Some(())
    }

    /// Carries the pairs whose master is here.
    pub(super) fn ptys(&mut self, tables: &mut Tables) -> Result<()> {
        let sides = |open: &super::Open| open.side;
        let masters: BTreeMap<u32, usize> = self
            .open
            .iter()
            .enumerate()
            .filter_map(|(id, o)| sides(o).filter(|s| s.master).map(|s| (s.index, id)))
            .collect();
        for (&index, &master) in &masters {
            let has_slave = |o: &super::Open| o.side.is_some_and(|s| s.index == index && !s.master);
            let slave = self.open.iter().position(has_slave);
            let open = &self.open[master];
            let pty = pair(&open.own, index).with_context(|| open.place.to_string())?;
            if slave.is_none() && pty.session != 0 && !self.pids.contains(&pty.session) {
                return Err(of_others(&open.place, pty.session));
            }
            let mut waiting = if slave.is_some() || pty.hung_up {
                waiting(&open.own, &pty, &open.place, tables)
            } else {
                Waiting::default()
            };
            for open in &mut self.open {
                let Some(side) = open.side.filter(|s| s.index == index) else {
                    continue;
                };
                // Once a pair, with the first descriptor of the side it goes to.
                let mut carried = Pty {
                    master: side.master,
                    ..pty.clone()
                };
                if side.master {
                    carried.queued = Bytes(std::mem::take(&mut waiting.to_master));
                    carried.stopped = std::mem::take(&mut waiting.stopped);
                    carried.status = std::mem::take(&mut waiting.status);
                } else {
                    carried.queued = Bytes(std::mem::take(&mut waiting.to_slave));
                    carried.unseen = std::mem::take(&mut waiting.unseen) as u32;
                    carried.ends = std::mem::take(&mut waiting.ends);
                }
                open.description.kind = Kind::Pty(carried);
            }
        }
        Ok(())
    }
}

/// Why terminals of a process that runs cannot be carried; each with its side and place. Nothing is read from them.
pub(super) fn refusals(
    terminals: &[(Side, Place, File)],
    pids: &BTreeSet<i32>,
) -> Vec<anyhow::Error> {
    let has_slave = |index: u32| {
        let mut sides = terminals.iter().map(|(side, ..)| side);
        sides.any(|side| side.index == index && !side.master)
    };
    let one = |(side, place, own): &(Side, Place, File)| {
        let session = tty::session(own.as_fd()).unwrap_or(0);
        let outside = side.master && !has_slave(side.index) && session != 0;
        (outside && !pids.contains(&session)).then(|| of_others(place, session))
    };
    terminals.iter().filter_map(one).collect()
}

fn of_others(place: &Place, session: i32) -> anyhow::Error {
    place.refuse(
        &format!("it is the terminal of session {session}, which is outside the dump"),
        "dump that too (--tree), or end it",
    )
}

/// What stands in a pair; what cannot be had is left behind with a warning.
fn waiting(master: &File, pty: &Pty, place: &Place, tables: &mut Tables) -> Waiting {
    let termios = pty.termios[..].try_into().map_err(anyhow::Error::from);
    match termios.and_then(|t| tty::peek(master.as_fd(), &t)) {
        Ok(waiting) => return waiting,
        Err(e) => tables.warn(format!(
            "{place}: bytes in it that have not been read stay behind: {e:#}"
        )),
    }
    Waiting::default()
}

/// State of a pair, asked of its master.
fn pair(master: &File, index: u32) -> Result<Pty> {
    let fd = master.as_fd();
    let none = |r: nix::Result<i32>| match r {
        // No session has it as its terminal; or one of another pid namespace.
        Err(Errno::ENOTTY) => Ok(0),
        other => other,
    };
    let mut polled = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).context("poll of a terminal")?;
    let hung_up = polled[0]
        .revents()
        .is_some_and(|r| r.contains(PollFlags::POLLHUP));
    Ok(Pty {
        index,
        master: true,
        termios: Bytes(tty::termios(fd).context("TCGETS2")?.to_vec()),
        winsize: tty::winsize(fd).context("TIOCGWINSZ")?,
        locked: tty::locked(fd).context("TIOCGPTLCK")?,
        packet: tty::packet_mode(fd).context("TIOCGPKT")?,
        exclusive: tty::exclusive(fd).unwrap_or(false),
        hung_up,
        file: std::fs::metadata(format!("/dev/pts/{index}"))
            .ok()
            .map(|m| PtyFile {
                mode: m.mode() & 0o777,
                uid: m.uid(),
                gid: m.gid(),
            }),
        queued: Bytes::default(),
        unseen: 0,
        ends: Vec::new(),
        stopped: Stopped::default(),
        status: 0,
        session: none(tty::session(fd)).context("TIOCGSID")?,
        foreground: none(tty::foreground(fd)).context("TIOCGPGRP")?,
    })
}
