//! A process of its own that decides for the tracer, should that die while the task is parked: it runs when the
//! move is committed, and ends when it is not.

use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::commit::{Go, Parked, Waiting};
use super::protocol::{Commit, hear, say};
use crate::kernel::{body, fds, pidfd};

/// How often a process is looked at until it is taken to run.
const LOOKS: u32 = 20;

/// What the tracer says to it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ToKeeper {
    /// From now on these processes are its.
    Take(Vec<i32>),
    /// They stand: what pvmd says comes behind so many bytes in the connection.
    Stand(usize),
    /// It is over: they may run.
    Run,
    /// They run.
    Done,
}

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
        say(self.line.get_mut(), &ToKeeper::Take(pids.to_vec()))?;
        let ready = hear::<bool>(&mut self.line)?;
        ensure!(ready == Some(true), "the keeper of the parked task is gone");
        Ok(())
    }

    /// They stand, and whoever moves the task may be told: until now they would have ended with us. In the connection `before`
    /// bytes are not pvmd's word on that.
    ///
    /// # Errors
    /// When it is gone.
    pub fn stand(&mut self, before: usize) -> Result<()> {
        say(self.line.get_mut(), &ToKeeper::Stand(before))
            .context("the keeper of the parked task is gone")
    }

    /// They may run, whatever becomes of us.
    pub fn let_run(&mut self) {
        // Gone it is not there when it is needed: an agent is.
        let _ = say(self.line.get_mut(), &ToKeeper::Run);
    }

    /// All run.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn dismiss(mut self) -> Result<()> {
        // Gone it is dismissed, too.
        let _ = say(self.line.get_mut(), &ToKeeper::Done);
        waitpid(Pid::from_raw(self.pid), None).context("waiting for the keeper")?;
        Ok(())
    }
}

fn serve(line: &UnixStream, waiting: &Waiting<'_>, commit: &Commit) -> Result<()> {
    let mut reader = BufReader::new(line.try_clone().context("dup")?);
    let mut processes = Vec::new();
    let (mut stand, mut may_run) = (None, false);
    // Whatever ends the line, the tracer has ended.
    while let Ok(Some(word)) = hear(&mut reader) {
        match word {
            ToKeeper::Take(pids) => {
                let parked = |pid| {
                    let process = pidfd::open(pid)?;
                    Ok(Parked { pid, process })
                };
                let all = pids.into_iter().map(parked);
                processes = all.collect::<Result<Vec<Parked>>>()?;
                say(&mut { line }, &true)?;
            }
            ToKeeper::Stand(before) => stand = Some(before),
            ToKeeper::Run => may_run = true,
            ToKeeper::Done => return Ok(()),
        }
    }
    if processes.is_empty() {
        return Ok(());
    }
    let signal = match (may_run, stand) {
        // Others may have let it run, and it reads its connection.
        (true, _) => libc::SIGCONT,
        // Nobody was told that it stands.
        (false, None) => libc::SIGKILL,
        (false, Some(before)) => {
            let waiting = Waiting {
                before,
                parked: processes.first(),
                ..*waiting
            };
            match waiting.until(commit, None) {
                Ok(Go::Now) => libc::SIGCONT,
                Ok(Go::Already) => return Ok(()),
                Err(_) => libc::SIGKILL,
            }
        }
    };
    for parked in &processes {
        // A program may have a handler for it: it is for one that stands, or will in a moment.
        if signal != libc::SIGCONT || (0..LOOKS).any(|_| !parked.runs()) {
            let _ = pidfd::send_signal(parked.process.as_fd(), signal);
        }
    }
    Ok(())
}
