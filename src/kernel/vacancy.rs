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
        let stat = proc_file::text(format!("/proc/{pid}/stat")).ok()?;
        // proc(5): behind the name the state, the parent, the group and the session.
        let (before, behind) = stat.rsplit_once(')')?;
        let mut words = behind.split_whitespace().skip(2);
        Some(Self {
            pid,
            name: before.split_once('(')?.1.to_owned(),
            group: words.next()?.parse().ok()?,
            session: words.next()?.parse().ok()?,
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
    let read = |name: &str| proc_file::text(format!("/proc/{id}/{name}")).unwrap_or_default();
    let stat = read("stat");
    // proc(5): behind the name, which ends with the last parenthesis, the state and six more before the flags.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let mut words = behind.split_whitespace();
    let state = words.next();
    let flags: u32 = words.nth(5).and_then(|w| w.parse().ok()).unwrap_or(0);
    if matches!(state, None | Some("Z" | "X")) || flags & PF_EXITING != 0 {
        return true;
    }
    read("status").lines().any(|l| {
        let pending = l.strip_prefix("SigPnd:").or(l.strip_prefix("ShdPnd:"));
        let pending = pending.and_then(|v| u64::from_str_radix(v.trim(), 16).ok());
        pending.is_some_and(|p| p & KILLED != 0)
    })
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
        _ => format!("pid {id} cannot be given to a new process"),
    };
    Err::<(), _>(e)
        .context(why)
        .err()
        .unwrap_or_else(|| anyhow::anyhow!("clone3"))
}
