//! Pseudo terminals of which both ends belong to the image.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};

use super::in_body::Terminal;
use super::{Builder, status_flags};
use crate::error::Failure;
use crate::image::files::{DescriptionId, Kind, Pty, Stopped};
use crate::kernel::tty::Waiting;
use crate::kernel::{fds, tty};

/// What surely finds room in a new pair, bytes in each direction.
const ROOM: usize = 16 * 1024;
/// How many numbers to pass over for the sake of an old one.
const SKIP_MAX: u32 = 4096;

impl Builder<'_> {
    pub(super) fn ptys(&mut self) -> Result<()> {
        let manifest = self.manifest;
        let mut pairs: BTreeMap<u32, Vec<(DescriptionId, &Pty)>> = BTreeMap::new();
        for (id, description) in manifest.descriptions.iter().enumerate() {
            if let Kind::Pty(pty) = &description.kind {
                let sides = pairs.entry(pty.index).or_default();
                sides.push((id as DescriptionId, pty));
            }
        }
        for (index, sides) in pairs {
            self.pair(index, &sides)
                .with_context(|| format!("pseudo terminal {index}"))?;
        }
        Ok(())
    }

    /// A terminal outside that the first process, a session's leader, had as its own: becomes that of the new
    /// session if it is ours to give. `group` was in its foreground.
    pub(super) fn hand_over(&mut self, terminal: BorrowedFd<'_>, group: i32) -> Result<()> {
        let Some(first) = self.manifest.processes.first() else {
            return Ok(());
        };
        let known = &self.built.in_body.terminals;
        let leads = first.sid == first.pid && known.iter().all(|t| t.session != first.pid);
        if self.surroundings.detached || !leads || !terminal.is_terminal() {
            return Ok(());
        }
        let session = nix::unistd::getsid(None).context("getsid")?;
        let its = tty::session(terminal);
        if its == Ok(session.as_raw()) && session == nix::unistd::getpid() {
            let path = nix::unistd::ttyname(terminal).context("the name of the terminal")?;
            tty::give_up(terminal).context("TIOCNOTTY")?;
            self.built.in_body.terminals.push(Terminal {
                session: first.pid,
                foreground: group,
                path: path.to_string_lossy().into_owned(),
            });
        } else {
            let warning = format!(
                "process {} ({}) had a terminal of its own session, and this one belongs to that of your shell: \
                 it can read, write and be interrupted, but not open /dev/tty nor move jobs between foreground \
                 and background; to give it one: script -qec 'exec mistctl restore IMAGE' /dev/null",
                first.pid, first.comm
            );
            // Of several standard streams once.
            if !self.built.warnings.contains(&warning) {
                self.built.warnings.push(warning);
            }
        }
        Ok(())
    }

    fn pair(&mut self, index: u32, sides: &[(DescriptionId, &Pty)]) -> Result<()> {
        let Some(&(_, pty)) = sides.iter().find(|(_, p)| p.master) else {
            return Err(Failure::Damaged.because("its master is not in the image"));
        };
        let master = master(index)?;
        let number = tty::number(master.as_fd()).context("TIOCGPTN")?;
        if number != index {
            self.built.warnings.push(format!(
                "/dev/pts/{index} is taken: the program's terminal is /dev/pts/{number} now"
            ));
        }
        let path = format!("/dev/pts/{number}");
        if let Some(file) = &pty.file {
            // An ordinary user's terminal is that user's already.
            let _ = std::os::unix::fs::chown(&path, Some(file.uid), Some(file.gid));
            let mode = std::fs::Permissions::from_mode(file.mode & 0o777);
            let _ = std::fs::set_permissions(&path, mode);
        }
        tty::set_locked(master.as_fd(), false).context("TIOCSPTLCK")?;
        let flags = libc::O_RDWR | libc::O_NOCTTY;
        // A slave that was never open reads as if it were to come; one that was opened and closed as hung up.
        let has_slave = sides.iter().any(|(_, p)| !p.master);
        let slave = if has_slave || pty.hung_up || pty.session != 0 {
            Some(tty::open_peer(master.as_fd(), flags).context("TIOCGPTPEER")?)
        } else {
            None
        };
        let termios: tty::Termios2 = pty.termios[..]
            .try_into()
            .map_err(|_| Failure::Damaged.because("its settings have a wrong length"))?;
        tty::set_winsize(master.as_fd(), pty.winsize).context("TIOCSWINSZ")?;
        tty::set_termios(master.as_fd(), &termios).context("TCSETS2")?;
        if let Some(slave) = &slave {
            self.queued(&master, slave, &termios, sides)?;
        }
        tty::set_packet_mode(master.as_fd(), pty.packet).context("TIOCPKT")?;

        for &(id, side) in sides {
            let Some(description) = self.manifest.descriptions.get(id as usize) else {
                continue;
            };
            let fd = if side.master {
                master.try_clone()?
            } else {
                let mode = description.flags & libc::O_ACCMODE;
                tty::open_peer(master.as_fd(), mode | libc::O_NOCTTY).context("TIOCGPTPEER")?
            };
            status_flags(fd.as_fd(), description.flags)?;
            self.keep(id, fd)?;
        }
        if pty.exclusive {
            tty::set_exclusive(master.as_fd()).context("TIOCEXCL")?;
        }
        if pty.locked {
            tty::set_locked(master.as_fd(), true).context("TIOCSPTLCK")?;
        }
        let leader = |p: &&crate::image::Process| p.pid == pty.session && p.sid == pty.session;
        if pty.session != 0 && self.manifest.processes.iter().any(|p| leader(&p)) {
            self.built.in_body.terminals.push(Terminal {
                session: pty.session,
                foreground: pty.foreground,
                path,
            });
        }
        Ok(())
    }

    /// Puts back what stood in the pair.
    fn queued(
        &mut self,
        master: &OwnedFd,
        slave: &OwnedFd,
        termios: &tty::Termios2,
        sides: &[(DescriptionId, &Pty)],
    ) -> Result<()> {
        let mut waiting = Waiting::default();
        let mut packet = false;
        for (_, side) in sides {
            if side.master {
                packet |= side.packet;
                waiting.to_master.extend_from_slice(&side.queued);
                waiting.status |= side.status;
                if waiting.stopped == Stopped::No {
                    waiting.stopped = side.stopped;
                }
            } else if !side.queued.is_empty() || !side.ends.is_empty() {
                waiting.to_slave = side.queued.to_vec();
                waiting.unseen = side.unseen as usize;
                waiting.ends = side.ends.clone();
            }
        }
        if waiting == Waiting::default() {
            return Ok(());
        }
        // Until the descriptions get their own flags.
        fds::set_flags(master.as_fd(), libc::O_NONBLOCK).context("F_SETFL")?;
        fds::set_flags(slave.as_fd(), libc::O_NONBLOCK).context("F_SETFL")?;
        if waiting.to_slave.len().max(waiting.to_master.len()) > ROOM {
            tty::make_room(master.as_fd(), slave.as_fd(), termios).context("emptying it")?;
        }
        let lost = tty::put(master.as_fd(), slave.as_fd(), termios, packet, &waiting)
            .context("putting back what stood in it")?;
        if lost > 0 {
            self.built.warnings.push(format!(
                "{lost} of {} bytes that stood in a terminal found no room and are lost",
                waiting.to_slave.len() + waiting.to_master.len()
            ));
        }
        Ok(())
    }
}

/// A new master, of pair `index` if that is free. The kernel gives the lowest free number: those below are taken
/// for the moment.
fn master(index: u32) -> Result<OwnedFd> {
    let open = || fds::open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY).context("/dev/ptmx: open");
    let mut below = Vec::new();
    loop {
        let master = open()?;
        let number = tty::number(master.as_fd()).context("TIOCGPTN")?;
        if number == index {
            return Ok(master);
        }
        if number > index || below.len() as u32 >= SKIP_MAX {
            // It is taken, or far away: the lowest that is free will do.
            drop(below);
            drop(master);
            return open();
        }
        below.push(master);
    }
}
