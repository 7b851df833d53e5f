//! Landlock (landlock(7)): rules that a thread gives itself. No file of /proc shows them. But who has some may not look at
//! a process that has not got them too (hook_ptrace_access_check in security/landlock/ptrace.c), and get_robust_list(2)
//! asks for no more than that right: a [`Probe`] is what threads are told to look at.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::arch::Call;
use super::proc_file;

const VERSION: u32 = 1 << 0;
const ACCESS_FS_EXECUTE: u64 = 1 << 0;

/// Whether the kernel has it, and lets it be used.
pub fn is_there() -> bool {
    // SAFETY: with this flag it takes no memory, and makes no descriptor.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, VERSION) > 0 }
}

/// Gives the calling thread rules, for ever: it executes no program any more.
///
/// # Errors
/// errno of the calls.
pub fn restrict() -> io::Result<()> {
    let handled = ACCESS_FS_EXECUTE;
    // SAFETY: a struct landlock_ruleset_attr of the first version is this one word.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const handled,
            size_of_val(&handled),
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let rules = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // SAFETY: both change rights of the calling thread, and no memory.
    let r = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0)
    };
    match r {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// get_robust_list(2) of process `pid`, with two words of results at `data`.
pub fn look_at(pid: i32, data: u64) -> Call {
    Call::new(libc::SYS_get_robust_list, &[pid as u64, data, data + 8])
}

/// A process that every other of this user may look at, by all rules but Landlock's: it has no privileges and does
/// nothing. It ends with this value, or when we end.
#[derive(Debug)]
pub struct Probe(Child);

impl Probe {
    /// None for root, whose processes have privileges, and where even we may not look at it.
    pub fn start() -> Option<Self> {
        const MOMENT: Duration = Duration::from_secs(1);
        if nix::unistd::Uid::current().is_root() || !is_there() {
            return None;
        }
        // Another program: nothing of us is in its memory.
        let child = Command::new("/bin/sh")
            .args(["-c", "read line"])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let probe = Self(child);
        // Files in /proc are root's until it may be looked at.
        let begun = Instant::now();
        while !probe.may_be_looked_at() {
            if begun.elapsed() > MOMENT {
                return None;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Some(probe)
    }

    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Whether Landlock alone can have kept a thread from looking at it.
    pub fn proves(&self, tid: i32) -> bool {
        let (Ok(own), Ok(theirs)) = (proc_file::status(self.pid()), proc_file::status(tid)) else {
            return false;
        };
        // What other modules go by, as SELinux and AppArmor.
        let label = |who: &str| proc_file::read(format!("/proc/{who}/attr/current")).ok();
        let namespace = |who: i32, kind: &str| {
            let meta = std::fs::metadata(format!("/proc/{who}/ns/{kind}"));
            meta.map(|m| (m.dev(), m.ino())).ok()
        };
        let same = |kind| {
            let theirs = namespace(tid, kind);
            theirs.is_some() && theirs == namespace(self.pid(), kind)
        };
        (own.ruid, own.rgid) == (theirs.ruid, theirs.rgid)
            && label(&self.pid().to_string()) == label("self")
            && label(&tid.to_string()) == label("self")
            && same("pid")
            && same("user")
            && self.may_be_looked_at()
    }

    fn may_be_looked_at(&self) -> bool {
        let path = format!("/proc/{}", self.pid());
        let owned =
            std::fs::metadata(path).is_ok_and(|m| m.uid() == nix::unistd::getuid().as_raw());
        let mut answer = [0u64; 2];
        let [head, len] = &mut answer;
        // SAFETY: two words for the two that it writes.
        let r = unsafe {
            libc::syscall(
                libc::SYS_get_robust_list,
                self.pid(),
                &raw mut *head,
                &raw mut *len,
            )
        };
        owned && r == 0
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
