//! Who makes the sockets of an image: processes with the ids and credentials of those that made them first.

use std::collections::HashMap;

use crate::image::Manifest;
use crate::image::files::Kind;
use crate::image::process::Process;
use crate::image::sockets::PeerCreds;
use crate::kernel::maker::{Identity, Maker};
use crate::kernel::pid_ns::PidNamespace;

/// Starts makers as they are needed. They end with this value, which has to be before the processes of the image
/// are made, or their ids are taken.
#[derive(Default)]
pub struct Makers<'a> {
    processes: &'a [Process],
    /// First process that has the socket open, by index of the socket.
    holders: HashMap<u32, PeerCreds>,
    namespace: Option<&'a PidNamespace>,
    same_ids: bool,
    /// Ids of makers whose process cannot have its own.
    chosen: HashMap<i32, i32>,
    /// By pid, with the credentials they have now. None: it could not be started.
    running: HashMap<i32, (PeerCreds, Option<Maker>)>,
    pub warnings: Vec<String>,
}

impl<'a> Makers<'a> {
    /// For an image whose processes get the ids they had if `same_ids`, in `namespace` if there is one. Call it,
    /// and use it, from a single-threaded program.
    pub fn new(m: &'a Manifest, same_ids: bool, namespace: Option<&'a PidNamespace>) -> Self {
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
            ..Self::default()
        }
    }

    /// Who has the socket with this index open: the likely maker where nobody knows.
    pub fn holder(&self, socket: usize) -> Option<PeerCreds> {
        self.holders.get(&u32::try_from(socket).ok()?).copied()
    }

    /// The maker with these credentials; None when there is none, and we make the socket ourselves.
    pub fn get(&mut self, who: Option<PeerCreds>) -> Option<&Maker> {
        let who = who?;
        if self
            .running
            .get(&who.pid)
            .is_none_or(|(has, _)| *has != who)
        {
            // Only one at a time can have the id.
            self.running.remove(&who.pid);
            let started = self.start(who);
            self.running.insert(who.pid, (who, started));
        }
        self.running.get(&who.pid)?.1.as_ref()
    }

    /// The id for us of a process that stands for the sender of a message, which can be named while that is there.
    pub fn sender(&mut self, who: PeerCreds) -> Option<i32> {
        match self.running.get(&who.pid) {
            Some((_, maker)) => maker.as_ref(),
            None => self.get(Some(who)),
        }
        .map(Maker::pid)
    }

    /// The id that a process is to get whose own it cannot have: the one that its sockets name.
    pub fn chosen(&self, pid: i32) -> Option<i32> {
        self.chosen.get(&pid).copied()
    }

    fn start(&mut self, who: PeerCreds) -> Option<Maker> {
        if self.processes.is_empty() {
            return None;
        }
        let groups = self
            .processes
            .iter()
            .find(|p| p.pid == who.pid)
            .and_then(|p| p.threads.first())
            .map(|t| t.creds.groups.clone());
        let wanted = if self.same_ids {
            Some(who.pid)
        } else {
            self.chosen.get(&who.pid).copied()
        };
        let identity = Identity {
            pid: wanted,
            uid: who.uid,
            gid: who.gid,
            groups: groups.unwrap_or_default(),
        };
        match Maker::start(&identity, self.namespace.map(PidNamespace::entrance)) {
            Ok(m) => {
                if !self.same_ids {
                    self.chosen.entry(who.pid).or_insert(m.pid());
                }
                Some(m)
            }
            Err(e) => {
                self.warnings.push(format!(
                    "unix sockets that process {} made, connected or listened on now name mistctl as their \
                     peer (SO_PEERCRED): {e:#}",
                    who.pid
                ));
                None
            }
        }
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
