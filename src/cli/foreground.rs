//! Staying with a restored program as a shell would: signals, the terminal, the status.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::signal::{self, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::termios::{self, SetArg, Termios};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpgrp, getsid, tcgetpgrp, tcsetpgrp};

/// What is passed on to the program. SIGKILL and SIGSTOP cannot be: they hit mistctl alone.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// Signals that wait until [`Signals::follow`] passes them on.
pub struct Signals(SignalFd);

/// Lets the program's signals wait, from before it runs: one of them must not end us in its place.
pub fn hold_back() {
    let mut blocked = SigSet::from_iter(PASSED_ON);
    blocked.add(Signal::SIGCHLD);
    blocked.add(Signal::SIGTTOU); // else handing over the terminal would stop us
    // It fails for unknown signals only.
    let _ = blocked.thread_block();
}

impl Signals {
    /// Begins to hold signals back. From here on they are the program's.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn hold() -> nix::Result<Signals> {
        hold_back();
        let mut set = SigSet::from_iter(PASSED_ON);
        set.add(Signal::SIGCHLD);
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).map(Signals)
    }

    /// Waits until child `pid` ends, lends it the terminal, passes on signals meanwhile, and returns the status to end with: the
    /// program's, or 128 + N when signal N ended it.
    ///
    /// # Errors
    /// When the child cannot be waited for; it runs nevertheless.
    pub fn follow(&self, pid: i32, terminal: Option<Terminal>) -> nix::Result<u8> {
        Program::new(Pid::from_raw(pid), terminal).wait(&self.0)
    }
}

struct Program {
    pid: Pid,
    /// The terminal has other modes than when we began: the program's.
    taken_over: bool,
    /// The process group it leads, when that is not ours: gets the terminal.
    group: Option<Pid>,
    terminal: Option<Terminal>,
}

/// The controlling terminal, if we were in its foreground when we began.
pub struct Terminal {
    tty: File,
    modes: Option<Termios>,
}

impl Program {
    fn new(pid: Pid, terminal: Option<Terminal>) -> Program {
        let group = match getpgid(Some(pid)) {
            Ok(g) if g == pid && g != getpgrp() => Some(g),
            _ => None,
        };
        let ours = getsid(Some(pid)) == getsid(None);
        Program {
            pid,
            taken_over: terminal.as_ref().is_some_and(Terminal::is_changed),
            group,
            terminal: terminal.filter(|_| ours),
        }
    }

    fn wait(&self, signals: &SignalFd) -> nix::Result<u8> {
        self.give_terminal();
        if self.taken_over {
            // Another terminal, another size: programs draw themselves anew.
            self.send(Signal::SIGWINCH, true);
        }
        loop {
            // Before the first signal too: it may have ended before signals were blocked.
            if let Some(status) = self.look()? {
                self.take_terminal(self.taken_over || status > 128);
                return Ok(status);
            }
            match signals.read_signal() {
                Ok(Some(info)) => self.pass_on(&info),
                Ok(None) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes note of what the program did: the status to end with when it ended.
    fn look(&self) -> nix::Result<Option<u8>> {
        loop {
            match waitpid(
                self.pid,
                Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED),
            ) {
                Ok(WaitStatus::Exited(_, status)) => return Ok(Some((status & 0xff) as u8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Some(128 + signal as u8)),
                Ok(WaitStatus::Stopped(_, signal)) => self.stopped(signal),
                Ok(WaitStatus::StillAlive) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The program stopped. At a terminal we stop too, so that the shell can offer `fg` and `bg`; else somebody
    /// will let it go on, and we wait.
    fn stopped(&self, signal: Signal) {
        let Some(terminal) = &self.terminal else {
            return;
        };
        let wants_terminal = matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU);
        if wants_terminal && terminal.foreground() == Some(getpgrp()) {
            self.give_terminal();
            self.send(Signal::SIGCONT, true);
            return;
        }
        self.take_terminal(false);
        let _ = signal::raise(Signal::SIGSTOP);
        // `fg` and `bg` send SIGCONT, which waits in the signal descriptor: pass_on does the rest.
    }

    fn pass_on(&self, info: &siginfo) {
        let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else {
            return;
        };
        // The terminal sends to a whole group (ctrl-C, a new window size); others mean the program.
        let to_group = info.ssi_code == libc::SI_KERNEL;
        match signal {
            Signal::SIGCHLD => {}
            Signal::SIGCONT => {
                self.give_terminal();
                // In our own group the shell's SIGCONT has reached it already.
                if self.group.is_some() || is_stopped(self.pid) {
                    self.send(signal, self.group.is_some());
                }
            }
            _ if to_group && self.group.is_none() => {} // it has reached the program too
            _ => self.send(signal, to_group),
        }
    }

    fn send(&self, signal: Signal, to_group: bool) {
        let _ = match self.group {
            Some(group) if to_group => signal::killpg(group, signal),
            _ => signal::kill(self.pid, signal),
        };
    }

    /// Puts the program's group into the foreground, if we are there.
    fn give_terminal(&self) {
        if let (Some(terminal), Some(group)) = (&self.terminal, self.group)
            && terminal.foreground() == Some(getpgrp())
        {
            let _ = tcsetpgrp(&terminal.tty, group);
        }
    }

    /// Takes the foreground back, and the terminal's modes when the program had no chance to do so.
    fn take_terminal(&self, reset: bool) {
        let Some(terminal) = &self.terminal else {
            return;
        };
        if self.group.is_some() && terminal.foreground() == self.group {
            let _ = tcsetpgrp(&terminal.tty, getpgrp());
        }
        if reset {
            terminal.put_back();
        }
    }
}

impl Terminal {
    /// Notes its modes, which a restored program is going to change.
    pub fn open() -> Option<Terminal> {
        let tty = File::options()
            .read(true)
            .write(true)
            .open("/dev/tty")
            .ok()?;
        let modes = termios::tcgetattr(&tty).ok();
        let terminal = Terminal { tty, modes };
        (terminal.foreground() == Some(getpgrp())).then_some(terminal)
    }

    /// Gives it the modes it had when it was opened.
    pub fn put_back(&self) {
        if let Some(modes) = &self.modes {
            let _ = termios::tcsetattr(&self.tty, SetArg::TCSADRAIN, modes);
        }
    }

    fn is_changed(&self) -> bool {
        termios::tcgetattr(&self.tty).ok() != self.modes
    }

    fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(self.tty.as_fd()).ok()
    }
}

/// Whether the process is group-stopped, from /proc/PID/stat.
fn is_stopped(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|s| s.rsplit_once(") ").map(|(_, rest)| rest.starts_with('T')))
        .unwrap_or(false)
}
