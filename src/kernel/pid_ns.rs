//! A pid namespace in which the ids are free that are taken in ours, with a /proc that fits.
//!
//! Its init is a fork of us that does nothing but reap. Until it is told that all is well it ends with us, and
//! everything in the namespace with it; later it ends when the process it was made for and all that this has left
//! behind have ended.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{body, fds, pidfd};

/// What its init is called.
pub const INIT_NAME: &str = "mist-init";
/// The word: let what is in there live without us.
const RELEASED: u8 = 1;

/// A pid namespace and a mount namespace, and the line to their init. Dropped before [`PidNamespace::release`],
/// everything in it dies.
#[derive(Debug)]
pub struct PidNamespace {
    init: i32,
    line: UnixStream,
    entrance: Entrance,
    mounts: File,
}

/// The way into a pid namespace for children of ours.
#[derive(Debug)]
pub struct Entrance {
    theirs: File,
    ours: File,
}

impl Entrance {
    /// Of the namespace of this task.
    pub fn of(tid: i32) -> Result<Self> {
        let open = |path: String| File::open(&path).context(path);
        Ok(Self {
            theirs: open(format!("/proc/{tid}/ns/pid"))?,
            ours: open("/proc/self/ns/pid".to_owned())?,
        })
    }

    /// Lets `fork` make a process that is born inside, a child of ours.
    pub fn born_inside<T>(&self, fork: impl FnOnce() -> Result<T>) -> Result<T> {
        setns(self.theirs.as_fd(), CloneFlags::CLONE_NEWPID).context("entering a pid namespace")?;
        let made = fork();
        // Threads of ours can be made only where we are.
        setns(self.ours.as_fd(), CloneFlags::CLONE_NEWPID).context("leaving a pid namespace")?;
        made
    }
}

impl PidNamespace {
    /// Makes it for a process that is to have the id `first` in there; new ids begin above `highest`. Call it from
    /// a single-threaded program.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT, and a system that lets /proc be mounted.
    pub fn start(first: i32, highest: i32) -> Result<Self> {
        let (line, theirs) = UnixStream::pair().context("making a pair of sockets")?;
        let flags = (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64;
        let init = body::fork_with(flags, None, &mut || serve(&theirs, first, highest))
            .context("making a pid namespace")?;
        drop(theirs);
        let mut told = String::new();
        let read = BufReader::new(&line).read_line(&mut told);
        let made = || -> Result<Self> {
            read.context("asking the init of a pid namespace")?;
            match told.trim_end() {
                "ready" => {}
                "" => bail!("the init of a pid namespace has ended"),
                why => bail!("{why}"),
            }
            let mounts = format!("/proc/{init}/ns/mnt");
            Ok(Self {
                init,
                entrance: Entrance::of(init)?,
                mounts: File::open(&mounts).context(mounts)?,
                line: line.try_clone()?,
            })
        };
        made().inspect_err(|_| {
            let _ = line.shutdown(std::net::Shutdown::Both);
            let _ = waitpid(Pid::from_raw(init), None);
        })
    }

    /// For a process born inside, which is not to return from its life: the init hears of our end only when nobody
    /// else holds the line.
    pub fn hang_up(&self) {
        let _ = nix::unistd::close(self.line.as_raw_fd());
    }

    /// The way in.
    pub fn entrance(&self) -> &Entrance {
        &self.entrance
    }

    /// For setns(2): the mounts there, with a /proc of its own.
    pub fn mounts(&self) -> BorrowedFd<'_> {
        self.mounts.as_fd()
    }

    /// From now on what is in there lives without us.
    pub fn release(&self) -> Result<()> {
        (&self.line)
            .write_all(&[RELEASED])
            .context("telling the init of a pid namespace")
    }
}

impl Drop for PidNamespace {
    fn drop(&mut self) {
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        // Unless it was released, it ends.
        let _ = waitpid(Pid::from_raw(self.init), Some(WaitPidFlag::WNOHANG));
    }
}

/// The life of an init.
fn serve(line: &UnixStream, first: i32, highest: i32) {
    fds::close_all_but(&[line.as_fd()]);
    let _ = nix::unistd::setsid();
    let children = match set_up(highest) {
        Ok(children) => children,
        Err(e) => {
            let _ = (&*line).write_all(format!("{e:#}\n").as_bytes());
            return;
        }
    };
    let mut word = [0];
    let told = (&*line).write_all(b"ready\n");
    let released = told.is_ok() && matches!((&*line).read(&mut word), Ok(1)) && word[0] == RELEASED;
    if released {
        reap_until_the_end_of(first, &children);
    }
}

fn set_up(highest: i32) -> Result<SignalFd> {
    let none: Option<&str> = None;
    // What is mounted outside is to be seen inside too.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .context("making mounts of one's own")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none).context("mounting a /proc")?;
    // What the first process is going to do.
    let mounts = File::open("/proc/self/ns/mnt").context("/proc/self/ns/mnt")?;
    setns(mounts, CloneFlags::CLONE_NEWNS)
        .context("joining mounts, which needs CAP_SYS_ADMIN and CAP_SYS_CHROOT")?;
    nix::unistd::chdir("/").context("chdir /")?;
    // Low numbers would be given to what is born later; programs from outside this namespace know better ones.
    let _ = std::fs::write("/proc/sys/kernel/ns_last_pid", highest.to_string());
    let name = std::ffi::CString::new(INIT_NAME).unwrap_or_default();
    let _ = nix::sys::prctl::set_name(&name);
    let set = SigSet::from(Signal::SIGCHLD);
    set.thread_block().context("blocking SIGCHLD")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("signalfd")
}

/// Reaps until process `first`, which is no child of ours, has ended, and all that it has left behind.
fn reap_until_the_end_of(first: i32, children: &SignalFd) {
    // None: it has ended and been waited for.
    let mut first = pidfd::open(first).ok();
    loop {
        let mut left = false;
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => {
                    left = true;
                    break;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        if first.is_none() && !left {
            return;
        }
        let mut fds = vec![PollFd::new(children.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            first
                .as_ref()
                .map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN)),
        );
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let ended = fds
            .get(1)
            .is_some_and(|f| f.revents().is_some_and(|r| !r.is_empty()));
        if fds.first().is_some_and(|f| f.any() == Some(true)) {
            let _ = children.read_signal();
        }
        if ended {
            first = None;
        }
    }
}
