//! A process of its own that decides for the tracer, should that die while the task is parked: it runs when the
//! move is committed, and ends when it is not.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::commit::Waiting;
use super::protocol::{Commit, hear, say};
use crate::kernel::{body, fds, pidfd};

/// The tracer's line to it. Dropped without [`Keeper::dismiss`], it decides.
pub struct Keeper {
    pid: i32,
    line: BufReader<UnixStream>,
}

impl Keeper {
    /// Forks it; call it from a single-threaded program. `connection` is the task's.
    ///
    /// # Errors
    /// When there can be no more processes.
    pub fn start(waiting: &Waiting<'_>, commit: &Commit) -> Result<Self> {
        let (line, theirs) = UnixStream::pair().context("making a pair of sockets")?;
        let pid = body::fork_with(0, None, &mut || {
            fds::close_all_but(&[theirs.as_fd(), waiting.connection]);
            // Signals to the program's group are none for us.
            let _ = nix::unistd::setsid();
            // Nobody can be told of errors: whoever is not let run ends.
            let _ = serve(&theirs, waiting, commit);
        })
        .context("forking")?;
        drop(theirs);
        Ok(Self {
            pid,
            line: BufReader::new(line),
        })
    }

    /// From now on these processes are its, should we die.
    ///
    /// # Errors
    /// When it is gone, or cannot have them.
    pub fn take(&mut self, pids: &[i32]) -> Result<()> {
        say(self.line.get_mut(), &pids)?;
        let ready = hear::<bool>(&mut self.line)?;
        ensure!(ready == Some(true), "the keeper of the parked task is gone");
        Ok(())
    }

    /// All run.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn dismiss(mut self) -> Result<()> {
        // Gone it is dismissed, too.
        let _ = say(self.line.get_mut(), &"done");
        waitpid(Pid::from_raw(self.pid), None).context("waiting for the keeper")?;
        Ok(())
    }
}

fn serve(line: &UnixStream, waiting: &Waiting<'_>, commit: &Commit) -> Result<()> {
    let mut reader = BufReader::new(line.try_clone().context("dup")?);
    let Some(pids) = hear::<Vec<i32>>(&mut reader)? else {
        return Ok(());
    };
    let processes: Vec<OwnedFd> = pids
        .iter()
        .map(|pid| pidfd::open(*pid))
        .collect::<Result<_>>()?;
    say(&mut { line }, &true)?;
    let mut word = String::new();
    let told = reader.read_line(&mut word);
    if told.is_ok_and(|len| len > 0) {
        return Ok(());
    }
    let signal = match waiting.until(commit, None, processes.first().map(AsFd::as_fd)) {
        Ok(()) => libc::SIGCONT,
        Err(_) => libc::SIGKILL,
    };
    for process in &processes {
        let _ = pidfd::send_signal(process.as_fd(), signal);
    }
    Ok(())
}
