//! Capabilities: which ones mistctl holds, and for whom it may use them.
//!
//! Root may do everything. An ordinary user whom file capabilities make strong (`setcap`) is served only for
//! processes and images of his own, and gets nothing out of it that he did not have: [`Caller`] decides.

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, bail};
use caps::{CapSet, Capability};

use crate::error::Failure;
use crate::image::Manifest;
use crate::image::process::Creds;

/// A capability that mistctl makes use of.
#[derive(Debug)]
pub struct Need {
    pub capability: Capability,
    /// What it is used for, for people.
    pub used_for: &'static str,
    /// What goes without it.
    pub without: &'static str,
}

/// What file capabilities should give. CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are left out on purpose: files are
/// always opened with the rights of the user who calls. So are CAP_SETUID, CAP_SETGID and CAP_KILL: an ordinary
/// user's processes need none of them.
pub const NEEDS: [Need; 6] = [
    Need {
        capability: Capability::CAP_SYS_PTRACE,
        used_for: "seize processes that are no children of mistctl, where Yama forbids it; userfaultfd with fork events",
        without: "where kernel.yama.ptrace_scope is 1 or more no process can be dumped",
    },
    Need {
        capability: Capability::CAP_CHECKPOINT_RESTORE,
        used_for: "give processes and threads the ids they had; open deleted files that are mapped; name the program",
        without: "restored programs get other ids, and no deleted files; /proc/PID/exe is not theirs",
    },
    Need {
        capability: Capability::CAP_SYS_ADMIN,
        used_for: "make pid and time namespaces",
        without: "ids that are taken here cannot be had; no time namespaces",
    },
    Need {
        capability: Capability::CAP_SYS_TIME,
        used_for: "set the clocks of a time namespace; the host's clocks are never touched",
        without: "programs from another boot or host see CLOCK_MONOTONIC jump",
    },
    Need {
        capability: Capability::CAP_NET_ADMIN,
        used_for: "TCP_REPAIR: save and rebuild TCP connections; socket buffers beyond the limit",
        without: "no established TCP connections",
    },
    Need {
        capability: Capability::CAP_SYS_RESOURCE,
        used_for: "raise resource limits, and lower oom_score_adj, of restored processes",
        without: "limits above mistctl's own stay at its own, with a warning; oom_score_adj is not lowered",
    },
];

/// Whether this process has the capability, effective or to be raised.
pub fn held(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Permitted, capability).unwrap_or(false)
}

/// Whether mistctl may choose ids and name the program of a process (clone3(2), PR_SET_MM_MAP).
pub fn checkpoint_restore() -> bool {
    held(Capability::CAP_CHECKPOINT_RESTORE) || held(Capability::CAP_SYS_ADMIN)
}

/// Why mistctl may not choose the ids of processes it makes; None when it may.
pub fn why_not_choose_ids() -> Option<&'static str> {
    // Of the user namespace that the pid namespace belongs to (set_tid in kernel/pid.c).
    if !checkpoint_restore() {
        Some("choosing ids needs CAP_CHECKPOINT_RESTORE (see `mistctl check`)")
    } else if !owns_pid_namespace() {
        Some(
            "choosing ids needs rights over this pid namespace, which belongs to a user namespace further out: give mistctl \
             one of its own (unshare --pid --fork --mount-proc)",
        )
    } else {
        None
    }
}

nix::ioctl_none!(ns_get_userns, 0xb7, 0x1);

/// Whether the user namespace that our pid namespace belongs to is ours, or within ours.
fn owns_pid_namespace() -> bool {
    let Ok(namespace) = fs::File::open("/proc/self/ns/pid") else {
        return true;
    };
    // SAFETY: NS_GET_USERNS takes no argument and returns a new descriptor.
    match unsafe { ns_get_userns(namespace.as_raw_fd()) } {
        Ok(fd) => {
            let _ = nix::unistd::close(fd);
            true
        }
        Err(e) => e != nix::errno::Errno::EPERM,
    }
}

/// Whether a program on this host can get the capability at all (capabilities(7), bounding set).
pub fn obtainable(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false)
}

/// Capabilities that are effective as long as this lives; of the calling thread only.
#[derive(Debug)]
pub struct Raised(Vec<Capability>);

/// Makes those of `wanted` effective that are permitted and not effective yet. Dropping the guard lowers them.
pub fn raise(wanted: &[Capability]) -> Raised {
    let mut raised = Vec::new();
    for &c in wanted {
        let off = !caps::has_cap(None, CapSet::Effective, c).unwrap_or(true);
        if off && held(c) && caps::raise(None, CapSet::Effective, c).is_ok() {
            raised.push(c);
        }
    }
    Raised(raised)
}

impl Drop for Raised {
    fn drop(&mut self) {
        for &c in &self.0 {
            let _ = caps::drop(None, CapSet::Effective, c);
        }
    }
}

/// The user on whose behalf mistctl works.
#[derive(Debug)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    groups: Vec<u32>,
    /// Capabilities he has without this program's file capabilities, a bit each: a process that he is to get at
    /// may have no others.
    own: u64,
}

static CALLER: OnceLock<Caller> = OnceLock::new();

/// Called first in main: takes note of who called, and gives up every capability that mistctl has no use for.
///
/// # Errors
/// Run as set-user-ID root, which would make the caller's files root's; the kernel refuses to lower capabilities.
pub fn start() -> anyhow::Result<&'static Caller> {
    if !Path::new("/proc/self/stat").exists() {
        bail!(
            "no /proc is mounted here, and mistctl knows of processes, itself too, only what that tells; mount one \
             (mount -t proc proc /proc)"
        );
    }
    let caller = Caller::new()?;
    if caller.uid != 0 {
        let keep: HashSet<Capability> = NEEDS
            .iter()
            .map(|n| n.capability)
            .filter(|&c| held(c))
            .collect();
        caps::clear(None, CapSet::Ambient).context("cannot clear ambient capabilities")?;
        caps::clear(None, CapSet::Inheritable).context("cannot clear inheritable capabilities")?;
        // Effective first: it may never exceed what is permitted.
        caps::set(None, CapSet::Effective, &HashSet::new()).context("cannot lower capabilities")?;
        caps::set(None, CapSet::Permitted, &keep).context("cannot give up capabilities")?;
        caps::set(None, CapSet::Effective, &keep).context("cannot raise capabilities")?;
        // A program with file capabilities is not dumpable, and its /proc/self root's: it could not read itself.
        // Nothing is lost: ptrace access by the same user still fails, for he lacks the capabilities we hold.
        nix::sys::prctl::set_dumpable(true).context("prctl(PR_SET_DUMPABLE)")?;
    }
    Ok(CALLER.get_or_init(|| caller))
}

/// The user on whose behalf mistctl works; found out on first use if [`start`] was not called.
///
/// # Errors
/// Run as set-user-ID root.
pub fn caller() -> anyhow::Result<&'static Caller> {
    match CALLER.get() {
        Some(c) => Ok(c),
        None => {
            let caller = Caller::new()?;
            Ok(CALLER.get_or_init(|| caller))
        }
    }
}

impl Caller {
    fn new() -> anyhow::Result<Caller> {
        let ids = nix::unistd::getresuid().context("getresuid")?;
        if ids.real != ids.effective || ids.real != ids.saved {
            return Err(Failure::Refused.because(
                "mistctl must not be set-user-ID: remove the bit, and give it file capabilities (mistctl check prints the line)",
            ));
        }
        let strong = file_capabilities(Path::new("/proc/self/exe"))
            .ok()
            .flatten()
            .is_some();
        Ok(Caller {
            uid: ids.real.as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            groups: nix::unistd::getgroups()
                .context("getgroups")?
                .into_iter()
                .map(|g| g.as_raw())
                .collect(),
            own: if strong {
                0
            } else {
                status_of("self")?.cap_permitted
            },
        })
    }

    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Whether the caller may dump (or stop, or kill) process `pid`: root any, others only what ptrace(2) would
    /// let them have without privilege, Yama aside. Ask again once the process is stopped: until then it may exec
    /// a set-user-ID program.
    ///
    /// # Errors
    /// `Refused` when he may not, `NoSuchProcess`.
    pub fn may_dump(&self, pid: i32) -> anyhow::Result<()> {
        if self.is_root() {
            return Ok(());
        }
        let proc = format!("/proc/{pid}");
        let owner = fs::metadata(&proc).map_err(|e| no_process(pid, e))?.uid();
        let refuse = |why: String| {
            Err(Failure::Refused.because(format!("process {pid}: {why}; run mistctl as root")))
        };
        // Credentials are a thread's, not a process's.
        let tasks = fs::read_dir(format!("{proc}/task")).map_err(|e| no_process(pid, e))?;
        for task in tasks.flatten() {
            let Some(tid) = task
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            else {
                continue;
            };
            let status = match status_of(&format!("{pid}/task/{tid}")) {
                Err(e) if tid != pid && Failure::of(&e) == Failure::NoSuchProcess => continue, // it ended
                other => other?,
            };
            if let Some(uid) = other(&status.uids, self.uid) {
                return refuse(format!(
                    "belongs to another user (uid {uid}), and you are uid {}",
                    self.uid
                ));
            }
            if let Some(gid) = other(&status.gids, self.gid) {
                return refuse(format!(
                    "runs under another group (gid {gid}) than you (gid {})",
                    self.gid
                ));
            }
            if status.cap_permitted & !self.own != 0 {
                return refuse("has capabilities that you do not have".to_owned());
            }
        }
        if owner != self.uid {
            return refuse(
                "is not dumpable (prctl(2), PR_SET_DUMPABLE): it keeps secrets even from you"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// Whether the caller may restore an image that belongs to `image_uid` (owner of its directory, as opened):
    /// [`Caller::may_become`] for every thread in it.
    ///
    /// # Errors
    /// `Refused`, naming the process.
    pub fn may_restore(&self, manifest: &Manifest, image_uid: u32) -> anyhow::Result<()> {
        for process in &manifest.processes {
            let ended = process.ended_leader.iter().map(|l| &l.creds);
            for creds in process.threads.iter().map(|t| &t.creds).chain(ended) {
                self.may_become(creds, image_uid)
                    .with_context(|| format!("process {}", process.pid))?;
            }
        }
        Ok(())
    }

    /// The only user that anything out of an image of `image_uid` may be, or be taken for; None: any.
    pub fn only(&self, image_uid: u32) -> Option<u32> {
        // What root restores for a user (or finds in his directory) must not become root's.
        let limit = if self.is_root() { image_uid } else { self.uid };
        (limit != 0).then_some(limit)
    }

    /// Whether the caller may have a process with these credentials restored, from an image that belongs to
    /// `image_uid`. An image is untrusted: it yields no more than its owner has, and no more than the caller has.
    ///
    /// # Errors
    /// `Refused` when he may not.
    pub fn may_become(&self, creds: &Creds, image_uid: u32) -> anyhow::Result<()> {
        let refuse = |why: String| Err(Failure::Refused.because(why));
        if image_uid != self.uid && !self.is_root() {
            return refuse(format!(
                "the image belongs to another user (uid {image_uid}): only its owner and root may restore it"
            ));
        }
        let Some(limit) = self.only(image_uid) else {
            return Ok(());
        };
        if let Some(uid) = creds.uids.iter().find(|&&u| u != limit) {
            return refuse(format!(
                "a process of the image has uid {uid}, but the image belongs to uid {limit}"
            ));
        }
        let all =
            creds.cap_permitted | creds.cap_effective | creds.cap_inheritable | creds.cap_ambient;
        let own = if self.is_root() { 0 } else { self.own };
        if all & !own != 0 {
            return refuse(format!(
                "a process of the image has capabilities that uid {limit} does not have"
            ));
        }
        let (groups, who) = if self.is_root() {
            let way_out = "its owner may restore it, or you when it is yours (chown)";
            (
                groups_of(limit)?,
                format!("uid {limit}, whom the image belongs to, is not; {way_out}"),
            )
        } else {
            let mut groups = self.groups.clone();
            groups.push(self.gid);
            (groups, "you are not".to_owned())
        };
        let mut all = creds.gids.iter().chain(&creds.groups);
        if let Some(gid) = all.find(|g| !groups.contains(g)) {
            return refuse(format!(
                "a process of the image is in group {gid}, and {who}"
            ));
        }
        Ok(())
    }
}

/// The groups a user is in when he logs in; of one whom the system does not know, none.
fn groups_of(uid: u32) -> anyhow::Result<Vec<u32>> {
    let user = nix::unistd::User::from_uid(uid.into())
        .with_context(|| format!("looking for the name of uid {uid}"))?;
    let Some(user) = user else {
        return Ok(Vec::new());
    };
    let name = std::ffi::CString::new(user.name).context("a user's name with a zero byte")?;
    let groups = nix::unistd::getgrouplist(&name, user.gid)
        .with_context(|| format!("looking for the groups of uid {uid}"))?;
    Ok(groups.into_iter().map(|g| g.as_raw()).collect())
}

/// An id among these that is not `mine`.
fn other(ids: &[u32; 4], mine: u32) -> Option<u32> {
    ids.iter().copied().find(|&i| i != mine)
}

fn no_process(pid: i32, e: std::io::Error) -> anyhow::Error {
    if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) {
        return Failure::NoSuchProcess.because(format!("no process has pid {pid}"));
    }
    anyhow::Error::new(e).context(format!("/proc/{pid}: cannot look at the process"))
}

struct Status {
    uids: [u32; 4],
    gids: [u32; 4],
    cap_permitted: u64,
}

/// Of /proc/WHO/status what says whose a process or thread is; `who` may be PID/task/TID.
fn status_of(who: &str) -> anyhow::Result<Status> {
    let path = format!("/proc/{who}/status");
    let pid = who
        .split('/')
        .next()
        .and_then(|p| p.parse().ok())
        .unwrap_or(0);
    let text = super::proc_file::text(&path).map_err(|e| no_process(pid, e))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .with_context(|| format!("{path}: no field {name}"))
    };
    let ids = |name: &str| -> anyhow::Result<[u32; 4]> {
        let ids: Vec<u32> = field(name)?
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect();
        ids.try_into()
            .map_err(|_| anyhow::anyhow!("{path}: field {name} has not four numbers"))
    };
    Ok(Status {
        uids: ids("Uid")?,
        gids: ids("Gid")?,
        cap_permitted: u64::from_str_radix(field("CapPrm")?, 16)
            .with_context(|| format!("{path}: CapPrm"))?,
    })
}

/// Permitted file capabilities of a program, a bit each; None when it has none (capabilities(7), linux/capability.h).
///
/// # Errors
/// The attribute cannot be read, or has a form that this program does not know.
pub fn file_capabilities(path: &Path) -> anyhow::Result<Option<u64>> {
    let name =
        std::ffi::CString::new(path.as_os_str().as_bytes()).context("path with a zero byte")?;
    let mut data = [0u8; 24];
    // SAFETY: both strings end in zero, the buffer is as long as we say.
    let n = unsafe {
        libc::getxattr(
            name.as_ptr(),
            c"security.capability".as_ptr(),
            data.as_mut_ptr().cast(),
            data.len(),
        )
    };
    if n < 0 {
        let e = std::io::Error::last_os_error();
        return match e.raw_os_error() {
            Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(None),
            _ => {
                Err(e).with_context(|| format!("{}: getxattr security.capability", path.display()))
            }
        };
    }
    let word = |i: usize| -> u64 {
        data.get(i * 4..i * 4 + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, |b| u64::from(u32::from_le_bytes(b)))
    };
    match word(0) & 0xff00_0000 {
        0x0200_0000 | 0x0300_0000 if n >= 20 => Ok(Some(word(1) | word(3) << 32)),
        revision => bail!(
            "{}: file capabilities of unknown revision {revision:#x}",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> Caller {
        Caller {
            uid,
            gid: uid,
            groups: vec![uid, 100],
            own: 0,
        }
    }

    fn creds(uid: u32) -> Creds {
        Creds {
            uids: [uid; 4],
            gids: [uid; 4],
            groups: vec![100],
            cap_bounding: !0,
            ..Creds::default()
        }
    }

    #[test]
    fn a_user_restores_what_is_his() {
        user(1000).may_become(&creds(1000), 1000).unwrap();
    }

    #[test]
    fn no_image_yields_another_user_group_or_capability() {
        let me = user(1000);
        let refused = |c: &Creds, owner| {
            let e = me.may_become(c, owner).unwrap_err();
            assert_eq!(Failure::of(&e), Failure::Refused, "{e}");
        };
        refused(&creds(0), 1000);
        refused(
            &Creds {
                uids: [1000, 1000, 0, 1000],
                ..creds(1000)
            },
            1000,
        );
        refused(
            &Creds {
                gids: [1000, 0, 1000, 1000],
                ..creds(1000)
            },
            1000,
        );
        refused(
            &Creds {
                groups: vec![100, 42],
                ..creds(1000)
            },
            1000,
        );
        refused(
            &Creds {
                cap_permitted: 1 << 21,
                ..creds(1000)
            },
            1000,
        );
        refused(
            &Creds {
                cap_ambient: 1,
                ..creds(1000)
            },
            1000,
        );
        refused(&creds(1000), 1001);
        refused(&creds(1000), 0);
    }

    #[test]
    fn root_restores_anything_of_its_own_and_for_a_user_only_what_is_the_users() {
        let root = user(0);
        root.may_become(&creds(0), 0).unwrap();
        root.may_become(&creds(1000), 0).unwrap();
        assert!(root.may_become(&creds(0), 1000).is_err());
        // Whom every system has.
        let name = "nobody";
        let nobody = nix::unistd::User::from_name(name).unwrap().unwrap();
        let (uid, gid) = (nobody.uid.as_raw(), nobody.gid.as_raw());
        let theirs = Creds {
            gids: [gid; 4],
            groups: vec![gid],
            ..creds(uid)
        };
        root.may_become(&theirs, uid).unwrap();
        let refused = |c: Creds| assert!(root.may_become(&c, uid).is_err(), "{c:?}");
        refused(Creds {
            cap_permitted: 2,
            ..theirs.clone()
        });
        refused(Creds {
            groups: vec![gid, 0],
            ..theirs.clone()
        });
        refused(Creds {
            gids: [gid, gid, 0, gid],
            ..theirs.clone()
        });
    }

    #[test]
    fn processes_of_others_are_refused_and_missing_ones_are_missing() {
        let me = user(54321);
        assert_eq!(Failure::of(&me.may_dump(1).unwrap_err()), Failure::Refused);
        assert_eq!(
            Failure::of(&me.may_dump(i32::MAX).unwrap_err()),
            Failure::NoSuchProcess
        );
        user(0).may_dump(1).unwrap();
    }
}
