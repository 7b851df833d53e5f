//! What threads of a process share: limits, directories, descriptors, marks.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::files::Built;
use super::numbers::{self, Move};
use crate::image::process::Process;
use crate::image::{FileRef, Manifest};
use crate::kernel::remote::{Arg, Remote};

/// A directory that is removed again.
struct Gone {
    path: PathBuf,
}

impl Gone {
    /// One in the place of `path`, or elsewhere where that cannot be made any more.
    fn like(path: &Path) -> Result<Gone> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Ok(Gone {
                path: path.to_owned(),
            }),
            Err(_) => Ok(Gone {
                path: nix::unistd::mkdtemp(&std::env::temp_dir().join("mist-XXXXXX"))
                    .context("a directory in the place of a deleted one")?,
            }),
        }
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn change_directory(body: &mut Remote, to: &Path) -> Result<()> {
    let mut bytes = to.as_os_str().as_bytes().to_vec();
    bytes.push(0);
    body.must(
        format!(
            "changing directory to {} (make it, if it is gone)",
            to.display()
        ),
        libc::SYS_chdir,
        &[Arg::In(&bytes)],
    )
}

/// Directories, umask, personality and the like; needs no memory of the program.
pub fn surroundings(body: &mut Remote, p: &Process, m: &Manifest) -> Result<()> {
    let path = |i: u32| -> Result<&FileRef> {
        m.files
            .get(i as usize)
            .with_context(|| format!("the image has no file {i}"))
    };
    let c = |s: &str| format!("{s}\0");
    let cwd = path(p.cwd)?;
    if cwd.deleted {
        let gone = Gone::like(Path::new(&cwd.path))?;
        change_directory(body, &gone.path)?;
        body.flush()?;
    } else {
        change_directory(body, Path::new(&cwd.path))?;
    }
    let root = c(&path(p.root)?.path);
    if root != "/\0" {
        body.must(
            format!("changing root to {}", root.trim_end_matches('\0')),
            libc::SYS_chroot,
            &[Arg::In(root.as_bytes())],
        )?;
    }
    body.must("umask", libc::SYS_umask, &[u64::from(p.umask).into()])?;
    body.must(
        "personality",
        libc::SYS_personality,
        &[p.personality.into()],
    )?;
    if p.child_subreaper {
        body.must(
            "child subreaper",
            libc::SYS_prctl,
            &[libc::PR_SET_CHILD_SUBREAPER.into(), 1u64.into()],
        )?;
    }
    if p.thp_disable {
        const PR_SET_THP_DISABLE: u64 = 41;
        const PR_THP_DISABLE_EXCEPT_ADVISED: u64 = 1 << 1;
        body.must(
            "disabling huge pages",
            libc::SYS_prctl,
            &[
                PR_SET_THP_DISABLE.into(),
                1u64.into(),
                if p.thp_advised {
                    PR_THP_DISABLE_EXCEPT_ADVISED
                } else {
                    0
                }
                .into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    // While it has one thread the kernel need not wait for anybody.
    for command in (0..u32::BITS).map(|bit| 1u64 << bit) {
        if u64::from(p.membarrier) & command != 0 {
            body.may(
                "registering for membarrier",
                libc::SYS_membarrier,
                &[command.into(), 0u64.into(), 0u64.into()],
            )?;
        }
    }
    body.flush()
}

/// Takes the System V semaphores again that the end of the process has given back, or none of a set.
pub fn semaphores(body: &mut Remote, p: &Process) -> Result<()> {
    const SEM_UNDO: i16 = 0x1000;
    for undo in &p.semaphores {
        // struct sembuf: number, operation, flags.
        let mut operations = Vec::new();
        for (number, adjustment) in undo.adjustments.iter().enumerate() {
            if *adjustment != 0 {
                operations.extend((number as u16).to_ne_bytes());
                operations.extend(adjustment.saturating_neg().to_ne_bytes());
                operations.extend((SEM_UNDO | libc::IPC_NOWAIT as i16).to_ne_bytes());
            }
        }
        let count = operations.len() as u64 / 6;
        let result = body.call(
            libc::SYS_semop,
            &[undo.set.into(), Arg::In(&operations), count.into()],
        )?;
        let what = format!(
            "process {}: taking the System V semaphores of set {} that it held",
            p.pid, undo.set
        );
        if result == -i64::from(libc::EAGAIN) {
            bail!(
                "{what}: somebody else has them now; restore it when they are free (ipcs -s -i {})",
                undo.set
            );
        }
        if let Err(e) = crate::kernel::body::check("semop", result) {
            body.warnings.push(format!("{what}: {e:#}"));
        }
    }
    Ok(())
}

/// Limits, and what would be in the way of rebuilding when set before.
pub fn limits(body: &mut Remote, p: &Process) -> Result<()> {
    if std::fs::write(
        format!("/proc/{}/oom_score_adj", body.pid()),
        p.oom_score_adj.to_string(),
    )
    .is_err()
    {
        body.warnings.push(format!(
            "process {}: oom_score_adj {} could not be set (it needs CAP_SYS_RESOURCE)",
            p.pid, p.oom_score_adj
        ));
    }
    if let Some(filter) = p.coredump_filter
        && let Err(e) = std::fs::write(
            format!("/proc/{}/coredump_filter", body.pid()),
            format!("{filter:#x}"),
        )
    {
        body.warnings.push(format!(
            "process {}: coredump_filter {filter:#x} could not be set: {e}",
            p.pid
        ));
    }
    for l in &p.limits {
        let pair: Vec<u8> = [l.soft, l.hard]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        body.may(
            format!(
                "resource limit {} (raising one needs CAP_SYS_RESOURCE)",
                l.resource
            ),
            libc::SYS_prlimit64,
            &[
                0u64.into(),
                u64::from(l.resource).into(),
                Arg::In(&pair),
                0u64.into(),
            ],
        )?;
    }
    body.flush()
}

/// Last marks; credentials are set, and setting them has cleared dumpable.
pub fn marks(body: &mut Remote, p: &Process) -> Result<()> {
    const PR_SET_MDWE: u64 = 65;
    // SUID_DUMP_ROOT cannot be asked for.
    body.may(
        "dumpable",
        libc::SYS_prctl,
        &[
            libc::PR_SET_DUMPABLE.into(),
            i32::from(p.dumpable == 1).into(),
        ],
    )?;
    const PR_MCE_KILL_SET: u64 = 1;
    // PR_MCE_KILL_DEFAULT, what every process begins with.
    if let Some(how) = p.mce_kill.filter(|how| *how != 2) {
        body.may(
            "memory failure policy",
            libc::SYS_prctl,
            &[
                libc::PR_MCE_KILL.into(),
                PR_MCE_KILL_SET.into(),
                u64::from(how).into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    if p.mdwe != 0 {
        body.must(
            "memory-deny-write-execute",
            libc::SYS_prctl,
            &[
                PR_SET_MDWE.into(),
                u64::from(p.mdwe).into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        )?;
    }
    body.flush()
}

/// Puts every descriptor at its number, and closes all others.
pub fn descriptors(body: &mut Remote, p: &Process, built: &Built) -> Result<()> {
    let wanted: BTreeMap<i32, Move> = (p.fds.iter())
        .filter_map(|f| {
            let from = built.fds.get(&f.description)?.as_raw_fd();
            let (to, cloexec) = (f.fd, f.cloexec);
            Some((to, Move { from, to, cloexec }))
        })
        .collect();
    let moves: Vec<Move> = wanted.values().copied().collect();
    for m in numbers::in_turn(&moves) {
        let what = format!("putting descriptor {} in place", m.to);
        let (from, to) = (u64::from(m.from as u32), u64::from(m.to as u32));
        let flag = |flag: i32| if m.cloexec { flag as u64 } else { 0 };
        if from == to {
            let args = [from, libc::F_SETFD as u64, flag(libc::FD_CLOEXEC)];
            body.must(what, libc::SYS_fcntl, &args.map(Into::into))?;
        } else {
            let args = [from, to, flag(libc::O_CLOEXEC)];
            body.must(what, libc::SYS_dup3, &args.map(Into::into))?;
        }
    }
    let mut from = 0u64;
    for fd in wanted.keys() {
        let fd = *fd as u64;
        if fd > from {
            body.must(
                "closing descriptors",
                libc::SYS_close_range,
                &[from.into(), (fd - 1).into(), 0u64.into()],
            )?;
        }
        from = fd + 1;
    }
    body.must(
        "closing descriptors",
        libc::SYS_close_range,
        &[from.into(), u64::from(u32::MAX).into(), 0u64.into()],
    )?;
    body.flush()
}

/// What only the process itself can do once its descriptors are in place.
pub fn in_body(
    body: &mut Remote,
    p: &Process,
    built: &Built,
    pid_of: &dyn Fn(i32) -> i32,
) -> Result<()> {
    let i = &built.in_body;
    for t in i.terminals.iter().filter(|t| t.session == p.pid) {
        let path = format!("{}\0", t.path);
        let at = i64::from(libc::AT_FDCWD) as u64;
        // A session leader without a terminal gets the one it opens.
        let fd = body.call(
            libc::SYS_openat,
            &[at.into(), Arg::In(path.as_bytes()), libc::O_RDWR.into()],
        )?;
        crate::kernel::body::check(&t.path, fd)?;
        if t.foreground != 0 {
            let group = pid_of(t.foreground).to_le_bytes();
            body.may(
                "foreground group of its terminal",
                libc::SYS_ioctl,
                &[(fd as u64).into(), libc::TIOCSPGRP.into(), Arg::In(&group)],
            )?;
        }
        body.must(
            "closing its terminal",
            libc::SYS_close,
            &[(fd as u64).into()],
        )?;
    }
    for o in i.pidfds.iter().filter(|o| o.pid == p.pid) {
        let target = pid_of(o.target);
        let fd = body.call(libc::SYS_pidfd_open, &[target.into(), o.flags.into()])?;
        place(body, fd, o.fd.fd, o.fd.cloexec, "pidfd_open")?;
    }
    for o in i.opens.iter().filter(|o| o.pid == p.pid) {
        let path = format!("/proc/{}{}\0", pid_of(o.owner), o.rest);
        let at = i64::from(libc::AT_FDCWD) as u64;
        let fd = body.call(
            libc::SYS_openat,
            &[at.into(), Arg::In(path.as_bytes()), o.flags.into()],
        )?;
        place(body, fd, o.fd.fd, o.fd.cloexec, path.trim_end_matches('\0'))?;
        body.may(
            "position",
            libc::SYS_lseek,
            &[o.fd.fd.into(), (o.pos as u64).into(), 0u64.into()],
        )?;
    }
    for l in i.locks.iter().filter(|l| l.pid == p.pid) {
        let c = super::files::c_lock(&l.lock);
        // struct flock: type and whence, start, length, pid.
        let mut b = Vec::with_capacity(32);
        b.extend(c.l_type.to_le_bytes());
        b.extend(c.l_whence.to_le_bytes());
        b.resize(8, 0);
        b.extend(c.l_start.to_le_bytes());
        b.extend(c.l_len.to_le_bytes());
        b.resize(32, 0);
        body.must(
            format!("record lock on descriptor {}", l.fd),
            libc::SYS_fcntl,
            &[l.fd.into(), libc::F_SETLK.into(), Arg::In(&b)],
        )?;
    }
    for o in i.owners.iter().filter(|o| o.pid == p.pid) {
        const F_SETOWN_EX: i32 = 15;
        const F_SETSIG: i32 = 10;
        let mut b = o.owner.who.to_le_bytes().to_vec();
        b.extend(pid_of(o.owner.id).to_le_bytes());
        body.must(
            "owner of a descriptor",
            libc::SYS_fcntl,
            &[o.fd.into(), F_SETOWN_EX.into(), Arg::In(&b)],
        )?;
        if o.owner.signal != 0 {
            body.must(
                "signal of a descriptor",
                libc::SYS_fcntl,
                &[o.fd.into(), F_SETSIG.into(), o.owner.signal.into()],
            )?;
        }
    }
    for f in i.flags.iter().filter(|f| f.pid == p.pid) {
        body.must(
            "flags of a descriptor",
            libc::SYS_fcntl,
            &[f.fd.into(), libc::F_SETFL.into(), f.flags.into()],
        )?;
    }
    for e in i.epoll.iter().filter(|e| e.pid == p.pid) {
        let mut b = e.events.to_le_bytes().to_vec();
        b.extend(e.data.to_le_bytes());
        body.must(
            format!("adding {} to epoll {}", e.fd, e.epoll),
            libc::SYS_epoll_ctl,
            &[
                e.epoll.into(),
                libc::EPOLL_CTL_ADD.into(),
                e.fd.into(),
                Arg::In(&b),
            ],
        )?;
    }
    body.flush()
}

fn place(body: &mut Remote, got: i64, fd: i32, cloexec: bool, what: &str) -> Result<()> {
    crate::kernel::body::check(what, got)?;
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    if got != i64::from(fd) {
        body.must(
            what,
            libc::SYS_dup3,
            &[(got as u64).into(), fd.into(), flags.into()],
        )?;
        body.must(what, libc::SYS_close, &[(got as u64).into()])?;
    }
    body.flush()
}
