//! Ids that are to be given to new processes and threads: whether they are free, and when they will be.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, poll};

use super::{pidfd, proc_file};

/// How long to wait for those who are on their way out, and for their parents.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks, where nothing tells.
pub const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Kernels before 6.9 do not tell when somebody has been waited for.
const POLL_MS: u8 = 20;

/// Whether `id` could be given to a new process or thread here, as far as is seen at once: it may still be the session
/// of somebody.
pub fn is_free(id: i32) -> bool {
    !is_taken_itself(id) && !is_group(id)
}

/// Whether somebody has `id` himself.
pub fn is_taken_itself(id: i32) -> bool {
    std::path::Path::new(&format!("/proc/{id}")).exists()
}

fn is_group(id: i32) -> bool {
    let group = nix::unistd::Pid::from_raw(id);
    id > 1 && nix::sys::signal::killpg(group, None) != Err(nix::errno::Errno::ESRCH)
}

/// Processes and the sessions and groups they are in: these ids nobody else gets, though who had them is gone.
#[derive(Debug, Default)]
pub struct Members(Vec<Member>);

#[derive(Debug)]
struct Member {
    pid: i32,
    name: String,
    group: i32,
    session: i32,
}

impl Members {
    /// All that there are.
    pub fn all() -> Self {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
        Self(pids.filter_map(Member::read).collect())
    }

    fn of(&self, id: i32) -> impl Iterator<Item = &Member> {
        let is_in = move |m: &&Member| m.group == id || m.session == id;
        self.0.iter().filter(is_in)
    }

    /// Whether somebody is in a session or group of this name.
    pub fn has(&self, id: i32) -> bool {
        self.of(id).next().is_some()
    }

    /// Whether all who are in it are on their way out.
    pub fn are_leaving(&self, id: i32) -> bool {
        self.of(id).all(|m| ends(m.pid))
    }

    /// For people: who else keeps an id from being given to somebody.
    pub fn who(&self, id: i32) -> Option<String> {
        let all = || self.of(id).filter(|m| m.pid != id);
        let first = all().next()?;
        let what = match first.session == id {
            true => "session",
            false => "process group",
        };
        let others = match all().count() {
            1 => String::new(),
            n => format!(" and {} others", n - 1),
        };
        Some(format!(
            "still the {what} of process {}, {}{others}",
            first.pid, first.name
        ))
    }
}

impl Member {
    fn read(pid: i32) -> Option<Self> {
        let stat = proc_file::stat(pid).ok()?;
        Some(Self {
            pid,
            name: stat.comm,
            group: stat.pgrp,
            session: stat.session,
        })
    }
}

/// How long somebody who ends now may keep an id.
pub fn patience() -> Instant {
    Instant::now() + PATIENCE
}

/// Whether `id` is free, or has become so by `until`: whoever has it is on his way out.
pub fn becomes_free(id: i32, until: Instant) -> bool {
    while !is_free(id) {
        if !is_leaving(id) || Instant::now() >= until {
            return is_free(id);
        }
        if !is_taken_itself(id) {
            std::thread::sleep(LOOK_EVERY);
            continue;
        }
        match pidfd::open_thread(id) {
            // No event is asked for: it hangs up once somebody has waited for it.
            Ok(fd) => {
                let _ = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::empty())], POLL_MS);
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
    true
}

/// Makes something with this `id`, again if that is still taken by somebody who is on his way out: nobody sees him any
/// more before his id is free.
pub fn once_free<T, E>(
    id: Option<i32>,
    is_taken: impl Fn(&E) -> bool,
    mut make: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = patience();
    loop {
        let made = make();
        let (Err(e), Some(id)) = (&made, id) else {
            return made;
        };
        if !is_taken(e) || Instant::now() >= until || !becomes_free(id, until) {
            return made;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether whoever has an id is on his way out, or those are whose group it names.
fn is_leaving(id: i32) -> bool {
    if is_taken_itself(id) {
        return ends(id);
    }
    Members::all().are_leaving(id)
}

/// Whether a thread has ended and somebody is to wait for it, or ends, or is to be killed.
fn ends(id: i32) -> bool {
    // include/linux/sched.h
    const PF_EXITING: u32 = 0x4;
    const KILLED: u64 = 1 << (libc::SIGKILL - 1);
    let Ok(stat) = proc_file::stat(id) else {
        return true;
    };
    if matches!(stat.state, 'Z' | 'X') || stat.flags & PF_EXITING != 0 {
        return true;
    }
    proc_file::status(id).is_ok_and(|s| (s.sigpnd | s.shdpnd) & KILLED != 0)
}

/// A hint for the errors of clone3(2) with set_tid.
pub fn explain(id: i32, e: io::Error) -> anyhow::Error {
    let why = match e.raw_os_error() {
        Some(libc::EEXIST) => {
            let who = Members::all().who(id).map(|who| format!(" ({who})"));
            format!("pid {id} is taken{}", who.unwrap_or_default())
        }
        Some(libc::EPERM) => {
            format!("choosing pid {id} needs CAP_CHECKPOINT_RESTORE (see `mistctl check`)")
        }
        Some(libc::EAGAIN) => super::ONE_MORE.to_owned(),
        _ => format!("pid {id} cannot be given to a new process"),
    };
    Err::<(), _>(e)
        .context(why)
        .err()
        .unwrap_or_else(|| anyhow::anyhow!("clone3"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::process::CommandExt;

    use super::*;

    #[test]
    fn whatever_its_name_is_who_is_in_a_group_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(std::ffi::OsStr::from_bytes(b"\xff"));
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program)
            .arg("100")
            .process_group(0)
            .spawn()
            .unwrap();
        let known = Members::all().has(child.id() as i32);
        let ended = ends(child.id() as i32);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(known && !ended);
    }
}
