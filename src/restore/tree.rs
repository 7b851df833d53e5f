//! The processes of an image as bodies: who forks whom, sessions, process groups, the dead.

use std::collections::{BTreeMap, BTreeSet};

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};

use super::bulk::Bulk;
use super::ids::Ids;
use crate::image::process::{Process, State};
use crate::kernel::body;
use crate::kernel::remote::{Made, Remote};
use crate::kernel::tracee::Stop;
use crate::kernel::vacancy;

/// What the first body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// A fork of ours, in a session of its own when detached.
    Fork { detach: bool },
    /// This very process, in the session and group it is in.
    Here,
}

/// Bodies by the pid in the image; their ids as they see them, by the one in the image.
pub struct Bodies<'a> {
    pub remotes: BTreeMap<i32, Remote>,
    pub ids: BTreeMap<i32, i32>,
    pub warnings: Vec<String>,
    wanted: &'a Ids,
}

impl<'a> Bodies<'a> {
    /// Forks every process of the image: the first from us, the others from their parents. The first fills
    /// `bulk` by itself before we take it in hand.
    pub fn create(
        processes: &[Process],
        area: u64,
        wanted: &'a Ids,
        root_in: Root,
        born: &mut dyn FnMut(i32) -> Result<()>,
        bulk: &mut Bulk,
    ) -> Result<Self> {
        let Some(root) = processes.first() else {
            bail!("the image holds no process")
        };
        let mut pipe = bulk.pipe()?;
        let id = wanted.wanted_first(root.pid);
        let mut fork = |us| {
            body::fork_idle(id, us, &mut || {
                if let Some(n) = wanted.namespace() {
                    n.hang_up();
                }
                bulk.fill(&mut pipe)
            })
            .map_err(|e| vacancy::explain(id.unwrap_or(root.pid), e))
        };
        let (pid, tie) = match (root_in, wanted.namespace()) {
            (Root::Here, _) => {
                let (pid, tie) = body::step_aside(&mut || bulk.fill(&mut pipe))?;
                (pid, Some(tie))
            }
            (_, Some(n)) => (n.entrance().born_inside(|| fork(0))?, None),
            (_, None) => (fork(std::process::id() as i32)?, None),
        };
        born(pid)?;
        bulk.await_filled(pipe)?;
        let mut remote = Remote::attach(pid, area)?;
        // It dies with us from here on.
        drop(tie);
        let detach = root_in == Root::Fork { detach: true };
        if let Some(n) = wanted.namespace() {
            remote.must(
                "entering the mounts of its pid namespace",
                libc::SYS_setns,
                &[n.mounts().as_raw_fd().into(), libc::CLONE_NEWNS.into()],
            )?;
            remote.flush()?;
        }
        let mut me = Self {
            ids: BTreeMap::from([(root.pid, remote.inside)]),
            remotes: BTreeMap::from([(root.pid, remote)]),
            warnings: Vec::new(),
            wanted,
        };
        let inside: BTreeSet<i32> = processes.iter().map(|p| p.pid).collect();
        // The first process stands in our session, unless it led one, or is to live without us.
        let ours = root.sid;
        if detach && root.sid != root.pid && !inside.contains(&root.sid) {
            me.setsid(root.pid)?;
        }
        me.descend(root, processes, ours, born)?;
        me.groups(processes, &inside, root, detach)?;
        Ok(me)
    }

    fn remote(&mut self, pid: i32) -> Result<&mut Remote> {
        self.remotes
            .get_mut(&pid)
            .with_context(|| format!("process {pid} of the image has no body"))
    }

    fn setsid(&mut self, pid: i32) -> Result<()> {
        let r = self.remote(pid)?;
        r.must("making a session", libc::SYS_setsid, &[])?;
        r.flush()
    }

    /// Forks the children of `p`, whose body stands in session `session`: those that stay in it first,
    /// then, when `p` leads a session of its own, those that belong there.
    fn descend(
        &mut self,
        p: &Process,
        all: &[Process],
        session: i32,
        born: &mut dyn FnMut(i32) -> Result<()>,
    ) -> Result<()> {
        let children: Vec<&Process> = all.iter().skip(1).filter(|c| c.ppid == p.pid).collect();
        let leads = p.sid == p.pid;
        for c in children
            .iter()
            .filter(|c| leads && c.sid == session && c.sid != p.sid)
        {
            self.fork(p.pid, c, all, session, born)?;
        }
        if leads {
            self.setsid(p.pid)?;
        }
        for c in children
            .iter()
            .filter(|c| !(leads && c.sid == session && c.sid != p.sid))
        {
            if c.sid != p.sid && c.sid != c.pid {
                self.warnings.push(format!(
                    "process {}: the leader of its session {} is gone; it joins its parent's session {}",
                    c.pid, c.sid, p.sid
                ));
            }
            self.fork(p.pid, c, all, p.sid, born)?;
        }
        Ok(())
    }

    fn fork(
        &mut self,
        parent: i32,
        c: &Process,
        all: &[Process],
        session: i32,
        born: &mut dyn FnMut(i32) -> Result<()>,
    ) -> Result<()> {
        let wanted = self.wanted.wanted(c.pid);
        let from = self.remote(parent)?;
        let made = from.fork(c.exit_signal.max(0), wanted).map_err(|e| {
            match e.downcast::<std::io::Error>() {
                Ok(e) => vacancy::explain(c.pid, e),
                Err(e) => e,
            }
        })?;
        born(made.id)?;
        let remote = Remote::adopt(made, self.remote(parent)?)?;
        self.ids.insert(c.pid, made.inside);
        self.remotes.insert(c.pid, remote);
        self.descend(c, all, session, born)
    }

    /// Process groups: leaders first, then members. A group whose leader is gone is made by a stand-in
    /// with the leader's id.
    fn groups(
        &mut self,
        all: &[Process],
        inside: &BTreeSet<i32>,
        root: &Process,
        detach: bool,
    ) -> Result<()> {
        let outside = |g: i32| !inside.contains(&g);
        let mut stand_ins: BTreeMap<i32, (Made, i32)> = BTreeMap::new();
        // A session's leader leads a group already.
        let led = |p: &Process| p.sid == p.pid || detach && p.pid == root.pid && outside(root.sid);
        for p in all.iter().filter(|p| p.pgid == p.pid && !led(p)) {
            self.setpgid(p.pid, 0)?;
        }
        for p in all.iter().filter(|p| p.pgid != p.pid) {
            if outside(p.pgid) && p.pgid == root.pgid {
                // The caller's group (a job of its shell), or the new session's.
                if detach && p.pid != root.pid && p.sid == root.sid {
                    let group = self.id(root.pid);
                    self.setpgid(p.pid, group)?;
                }
                continue;
            }
            let group = if outside(p.pgid) {
                match stand_ins.get(&p.pgid) {
                    Some((made, _)) => made.inside,
                    None => {
                        let made = self.stand_in(p)?;
                        stand_ins.insert(p.pgid, (made, p.pid));
                        made.inside
                    }
                }
            } else {
                self.id(p.pgid)
            };
            self.setpgid(p.pid, group)?;
        }
        for (made, parent) in stand_ins.values() {
            let r = self.remote(*parent)?;
            r.must(
                "ending a stand-in",
                libc::SYS_kill,
                &[made.inside.into(), libc::SIGKILL.into()],
            )?;
            r.flush()?;
            wait_dead(made.id)?;
            let r = self.remote(*parent)?;
            let wall = u64::from(libc::__WALL as u32);
            r.must(
                "reaping a stand-in",
                libc::SYS_wait4,
                &[made.inside.into(), 0u64.into(), wall.into(), 0u64.into()],
            )?;
            r.flush()?;
        }
        Ok(())
    }

    fn id(&self, old: i32) -> i32 {
        self.ids.get(&old).copied().unwrap_or(old)
    }

    fn setpgid(&mut self, pid: i32, group: i32) -> Result<()> {
        let r = self.remote(pid)?;
        r.must(
            format!("joining process group {group}"),
            libc::SYS_setpgid,
            &[0u64.into(), group.into()],
        )?;
        r.flush()
    }

    /// A child of `p`'s body that leads the group `p` was in.
    fn stand_in(&mut self, p: &Process) -> Result<Made> {
        let wanted = self.wanted.wanted_if_free(p.pgid);
        let parent = self.remote(p.pid)?;
        let made = parent.fork(0, wanted)?;
        let mut leader = Remote::adopt(made, self.remote(p.pid)?)?;
        leader.must(
            "leading a process group",
            libc::SYS_setpgid,
            &[0u64.into(), 0u64.into()],
        )?;
        leader.flush()?;
        Ok(made)
    }

    /// Lets those die that were dead, as they died; their parents still have default dispositions and
    /// everything blocked, so a SIGCHLD that was taken long ago is taken again.
    pub fn bury(&mut self, all: &[Process]) -> Result<()> {
        let mut parents = BTreeSet::new();
        for p in all {
            let State::Zombie { status } = p.state else {
                continue;
            };
            let Some(mut dead) = self.remotes.remove(&p.pid) else {
                continue;
            };
            let comm = format!("{}\0", p.comm);
            dead.must(
                "name",
                libc::SYS_prctl,
                &[libc::PR_SET_NAME.into(), comm.as_bytes().into()],
            )?;
            dead.flush()?;
            dead.die(status)?;
            parents.insert(p.ppid);
        }
        for parent in parents {
            let Some(r) = self.remotes.get_mut(&parent) else {
                continue;
            };
            let set = (1u64 << (libc::SIGCHLD - 1)).to_le_bytes();
            let now = [0u8; 16];
            r.may(
                "taking SIGCHLD",
                libc::SYS_rt_sigtimedwait,
                &[
                    set.as_slice().into(),
                    0u64.into(),
                    now.as_slice().into(),
                    8u64.into(),
                ],
            )?;
            r.flush()?;
            r.warnings.retain(|w| !w.contains("taking SIGCHLD"));
        }
        Ok(())
    }
}

fn wait_dead(pid: i32) -> Result<()> {
    let t = crate::kernel::tracee::Tracee { tid: pid };
    loop {
        match t.wait()? {
            Stop::Exited(_) | Stop::Killed(_) => return Ok(()),
            _ => t.cont(0)?,
        }
    }
}
