//! Who makes the sockets of an image: processes with the ids and credentials of those that made them first.

use std::collections::HashMap;

use anyhow::Result;

use crate::error::Failure;
use crate::image::Manifest;
use crate::image::files::Kind;
use crate::image::process::Process;
use crate::image::sockets::PeerCreds;
use crate::kernel::maker::{Identity, Maker};
use crate::kernel::pid_ns::PidNamespace;

/// How many there are at a time.
const MOST: usize = 64;

/// Starts makers as they are needed. They end with this value, which has to be before the processes of the image
/// are made, or their ids are taken.
#[derive(Default)]
pub struct Makers<'a> {
    processes: &'a [Process],
    /// First process that has the socket open, by index of the socket.
    holders: HashMap<u32, PeerCreds>,
    namespace: Option<&'a PidNamespace>,
    same_ids: bool,
    /// The only user that they may be; None: any.
    only: Option<u32>,
    /// Ids of makers whose process cannot have its own.
    chosen: HashMap<i32, i32>,
    /// By pid, with the credentials they have now. None: it could not be started.
    running: HashMap<i32, (PeerCreds, Option<Maker>)>,
    pub warnings: Vec<String>,
}

impl<'a> Makers<'a> {
    /// For an image whose processes get the ids they had if `same_ids`, in `namespace` if there is one. Nobody but
    /// user `only` is named, if there is one: an image is untrusted. Call it, and use it, from a single-threaded
    /// program.
    pub fn new(
        m: &'a Manifest,
        same_ids: bool,
        namespace: Option<&'a PidNamespace>,
        only: Option<u32>,
    ) -> Self {
        let mut holders = HashMap::new();
        for p in &m.processes {
            for fd in &p.fds {
                let kind = m.descriptions.get(fd.description as usize).map(|d| &d.kind);
                if let (Some(Kind::Socket { socket }), Some(who)) = (kind, of_process(p)) {
                    holders.entry(*socket).or_insert(who);
                }
            }
        }
        Self {
            processes: &m.processes,
            holders,
            namespace,
            same_ids,
            only,
            ..Self::default()
        }
    }

    /// Who has the socket with this index open: the likely maker where nobody knows.
    pub fn holder(&self, socket: usize) -> Option<PeerCreds> {
        self.holders.get(&u32::try_from(socket).ok()?).copied()
    }

    /// The maker with these credentials; None: there is none, and we make the socket ourselves.
    ///
    /// # Errors
    /// There is none, and sockets that we make would name somebody that they must not.
    pub fn get(&mut self, who: Option<PeerCreds>) -> Result<Option<&Maker>> {
        let Some(who) = self.allowed(who) else {
            return Ok(None);
        };
        let has = self.running.get(&who.pid).map(|(has, _)| *has);
        if has != Some(who) {
            // Only one at a time can have the id.
            self.running.remove(&who.pid);
            if self.running.len() >= MOST {
                self.running.clear();
            }
            let started = self.start(who);
            self.running.insert(who.pid, (who, started));
        }
        let maker = self.running.get(&who.pid).and_then(|(_, m)| m.as_ref());
        if maker.is_none() && self.only.is_some() {
            return Err(Failure::Restore.because(format!(
                "no process could be made that makes unix sockets for user {}",
                who.uid
            )));
        }
        Ok(maker)
    }

    /// Who may be named in the place of him.
    fn allowed(&self, who: Option<PeerCreds>) -> Option<PeerCreds> {
        let Some(only) = self.only else { return who };
        let is_one = |w: &PeerCreds| {
            let mut theirs = self.processes.iter().filter_map(of_process);
            w.uid == only && theirs.any(|t| t.gid == w.gid)
        };
        let gid = self.processes.iter().find_map(of_process)?.gid;
        Some(who.filter(is_one).unwrap_or(PeerCreds {
            pid: who.map_or(0, |w| w.pid),
            uid: only,
            gid,
        }))
    }

    /// Credentials that can be sent for these (pid, uid, gid): a process has to be there to be named.
    pub fn sender(&mut self, sent: (i32, u32, u32)) -> (i32, u32, u32) {
        let (pid, uid, gid) = sent;
        let Some(who) = self.allowed(Some(PeerCreds { pid, uid, gid })) else {
            return sent;
        };
        if pid > 0 && !self.running.contains_key(&pid) {
            let _ = self.get(Some(who));
        }
        let there = self.running.get(&pid).and_then(|(_, m)| m.as_ref());
        (there.map_or(pid, Maker::pid), who.uid, who.gid)
    }

    /// The id that a process is to get whose own it cannot have: the one that its sockets name.
    pub fn chosen(&self, pid: i32) -> Option<i32> {
        self.chosen.get(&pid).copied()
    }

    fn start(&mut self, who: PeerCreds) -> Option<Maker> {
        let process = self.processes.iter().find(|p| p.pid == who.pid);
        let groups = process.and_then(|p| p.threads.first());
        let wanted = if self.same_ids {
            Some(who.pid).filter(|pid| *pid > 0)
        } else {
            self.chosen.get(&who.pid).copied()
        };
        let mut identity = Identity {
            pid: wanted,
            uid: who.uid,
            gid: who.gid,
            groups: groups.map_or(Vec::new(), |t| t.creds.groups.clone()),
        };
        let entrance = self.namespace.map(PidNamespace::entrance);
        let mut maker = Maker::start(&identity, entrance);
        if let (Some(pid), Err(e)) = (wanted, &maker) {
            self.warnings.push(format!(
                "unix sockets that process {pid} made, connected or listened on do not name it as their peer \
                 any more (SO_PEERCRED): {e:#}"
            ));
            identity.pid = None;
            maker = Maker::start(&identity, entrance);
        }
        let maker = maker.ok()?;
        if !self.same_ids {
            self.chosen.entry(who.pid).or_insert(maker.pid());
        }
        Some(maker)
    }
}

fn of_process(p: &Process) -> Option<PeerCreds> {
    let creds = &p.threads.first()?.creds;
    Some(PeerCreds {
        pid: p.pid,
        uid: creds.uids[1],
        gid: creds.gids[1],
    })
}
