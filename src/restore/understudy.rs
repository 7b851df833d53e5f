//! Who goes on filling memory when the process that fills it is killed.
//!
//! Lazily filled memory of a task that has moved here is nowhere else any more, and the task runs, or waits to. So a
//! second process stands by. It shares the first one's table of descriptors, userfaultfds of children born meanwhile
//! among them, and what those have told ([`crate::kernel::journal`]). It knows not what is filled already, and
//! need not: a page that is there stays as it is. When both are killed the undertaker ends the task.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::lazy;
use crate::image::store::Image;
use crate::kernel::journal::{Journal, Phase, Twin};
use crate::kernel::undertaker::{Line, Undertaker};
use crate::kernel::{body, fds, guardian, pidfd};

const NAME: &std::ffi::CStr = c"mist-understudy";

/// The process that stands by, as a child of ours.
pub struct Understudy {
    pid: i32,
    /// Its descriptors, which are ours too: dropped, their numbers would be another's in its table.
    part: ManuallyDrop<Part>,
}

impl Understudy {
    /// Forks it; call it from a single-threaded program. What is read from the userfaultfds from here on is to be
    /// read through the journal.
    ///
    /// # Errors
    /// When there can be no more processes.
    pub fn start(image: &Arc<Image>, undertaker: &Undertaker) -> Result<(Self, Journal)> {
        let journal = Journal::new().context("memory for a journal")?;
        let part = ManuallyDrop::new(Part {
            first: pidfd::open(std::process::id() as i32)?,
            wake: EventFd::new().context("eventfd")?,
            journal: journal.twin(),
            image: Arc::clone(image),
            line: undertaker.second()?,
        });
        let pid = body::fork_with(libc::CLONE_FILES as u64, None, &mut || {
            // Signals to the program's group are none for us.
            let _ = nix::unistd::setsid();
            guardian::rename(NAME);
            // Nobody can be told of errors: the undertaker ends what cannot be filled.
            let _ = part.play();
        })
        .context(crate::kernel::ONE_MORE)?;
        Ok((Self { pid, part }, journal))
    }

    /// All is done, and the journal says so.
    pub fn dismiss(self) {
        if self.part.wake.write(1).is_ok() {
            // Killed it is dismissed, too.
            let _ = waitpid(Pid::from_raw(self.pid), None);
            drop(ManuallyDrop::into_inner(self.part));
        }
    }
}

/// What it is born with.
struct Part {
    first: OwnedFd,
    wake: EventFd,
    journal: Twin,
    image: Arc<Image>,
    line: Line,
}

impl Part {
    fn play(&self) -> Result<()> {
        let mut waits = [
            PollFd::new(self.first.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        while let Err(nix::errno::Errno::EINTR) = poll(&mut waits, PollTimeout::NONE) {}
        if waits[0].any() != Some(true) {
            return Ok(());
        }
        // It has died: the table is ours alone.
        match self.journal.phase() {
            Phase::Making => return Ok(()),
            Phase::Done => {
                self.line.dismiss();
                return Ok(());
            }
            Phase::Standing => {}
        }
        let known = lazy::Known::from(&self.image, self.journal.records()?)?;
        let [pages, map] = self.image.pages().open_files();
        let mut keep = vec![pages, map, self.line.as_fd()];
        keep.extend(known.sources());
        // Above all what would be closed now that it is dead.
        fds::close_all_but(&keep);
        lazy::fill(Arc::clone(&self.image), known, self.line.second()?)?;
        self.line.dismiss();
        Ok(())
    }
}
