//! Landers of this host: starting them, giving them their order, and telling others what they say.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use nix::libc;
use nix::poll::{PollFd, PollFlags};
use pvm_abi::place;

use super::control::{Answer, Failed, Landing};
use super::lines::Lines;
use super::{Agent, Asker, ENDED, Ticket, call};
use crate::error::Failure;
use crate::kernel::pidfd;
use crate::pvm::land::protocol::{Commit, Order, Source, ToAgent, ToLander};
use crate::pvm::local;
use crate::pvm::spawn::{Sink, Spawn};
use crate::pvm::stream::Key;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Notify;

/// How far a lander has come.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Started,
    /// It is there, and is to restore an image when somebody waits for that: then all hosts know it.
    Greeted,
    Ordered,
    Parked(Vec<String>),
    Running(u64),
    Failed(Failed),
}

struct Lander {
    r: Tid,
    order: Landing,
    stage: Stage,
    line: Option<Lines>,
    /// It was parked for a move when the line to it ended.
    lost: bool,
    /// The incarnation that the task had.
    from: u32,
    /// Of one that is restored: who has it restored, and has to open its gates. None when that has ended.
    restorer: Option<Tid>,
    /// Its restorer has ended, and that has been seen to.
    seen_to: bool,
    /// It has been told to run.
    told: bool,
    /// Who waits to be told of: its enrolment, that it is parked, that it runs.
    landed: Option<Ticket>,
    parked: Option<Ticket>,
    running: Option<Ticket>,
}

/// All of them.
pub struct Landings {
    dir: PathBuf,
    socket: PathBuf,
    landers: HashMap<String, Lander>,
    /// Connections that have not said who they are.
    strangers: Vec<Lines>,
    pub(super) answers: Vec<(Ticket, Result<Answer>)>,
}

/// Most connections that have not said who they are.
const MOST_STRANGERS: usize = 64;

impl Landings {
    pub fn new(dir: PathBuf, socket: PathBuf) -> Landings {
        Landings {
            dir,
            socket,
            landers: HashMap::new(),
            strangers: Vec::new(),
            answers: Vec::new(),
        }
    }

    pub fn connected(&mut self, stream: UnixStream) {
        if self.strangers.len() < MOST_STRANGERS
            && let Ok(lines) = Lines::new(stream)
        {
            self.strangers.push(lines);
        }
    }

    pub fn poll<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let known = self.landers.values().filter_map(|l| l.line.as_ref());
        for line in known.chain(&self.strangers) {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, line.is_full());
            if !line.has_ended() {
                fds.push(PollFd::new(line.as_fd(), flags));
            }
        }
    }

    /// Whether that is what a lander enrolled as, which does not run yet.
    pub fn is_landing(&self, tid: Tid) -> bool {
        let lands = |l: &Lander| !matches!(l.stage, Stage::Running(_) | Stage::Failed(_));
        self.landers.values().any(|l| l.r == tid && lands(l))
    }

    pub fn parked(&mut self, ticket: Ticket, id: &str) -> Result<Option<Answer>> {
        let Landings {
            landers, answers, ..
        } = self;
        let lander = lander_of(landers, id)?;
        match &lander.stage {
            Stage::Parked(warnings) => Ok(Some(Answer::Parked {
                warnings: warnings.clone(),
            })),
            Stage::Running(_) => Ok(Some(Answer::Parked {
                warnings: Vec::new(),
            })),
            Stage::Failed(failed) => Err(failed.clone().into_error()),
            stage => {
                let greeted = *stage == Stage::Greeted;
                lander.parked = Some(ticket);
                if greeted {
                    lander.order_now(id, answers);
                }
                Ok(None)
            }
        }
    }

    pub fn running(&mut self, ticket: Ticket, id: &str) -> Result<Option<Answer>> {
        let lander = self.get(id)?;
        match &lander.stage {
            Stage::Running(resume_us) => Ok(Some(Answer::Running {
                resume_us: *resume_us,
            })),
            Stage::Failed(failed) => Err(failed.clone().into_error()),
            _ => {
                lander.running = Some(ticket);
                Ok(None)
            }
        }
    }

    pub fn tell_run(&mut self, id: &str) -> Result<()> {
        let lander = self.get(id)?;
        match &mut lander.line {
            Some(line) => line.say(&ToLander::Run)?,
            None => bail!("the lander of {id} is not there"),
        }
        lander.told = true;
        Ok(())
    }

    /// What is parked as this incarnation may run: whoever was to say so may have ended.
    pub(super) fn decided(&mut self, r: Tid) {
        for lander in self.landers.values_mut().filter(|l| l.r == r) {
            if let (Stage::Parked(_), Some(line)) = (&lander.stage, &mut lander.line)
                && lander.order.moves.is_some()
            {
                // It asks if it does not hear so.
                let _ = line.say(&ToLander::Run);
            }
        }
    }

    /// Whatever it is at: it exits, unless it runs.
    pub fn abandon(&mut self, id: &str, r: Tid) {
        // Either may be unknown to who asks: a move has no incarnation at first, and no name when its agent has ended.
        let same = |(known, lander): &(&String, &Lander)| {
            !id.is_empty() && *known == id || r.is_task() && lander.r == r
        };
        let Some(id) = self.landers.iter().find(same).map(|(id, _)| id.clone()) else {
            return;
        };
        if let Some(mut lander) = self.landers.remove(&id) {
            if let Some(line) = &mut lander.line {
                // If it does not hear it, it has ended; parked, it finds out by itself.
                let _ = line.say(&ToLander::Abandon);
            }
            let _ = fs::remove_dir_all(place::folder(&self.dir, &id, lander.order.parent));
        }
    }

    fn get(&mut self, id: &str) -> Result<&mut Lander> {
        lander_of(&mut self.landers, id)
    }

    /// Whether somebody sees to it that this incarnation runs, or ends.
    fn tended(&self, r: Tid) -> bool {
        let tends = |l: &Lander| l.line.is_some() || matches!(l.stage, Stage::Running(_));
        self.landers.values().any(|l| l.r == r && tends(l))
    }

    /// Those of moves whose process may stand, and who have just been lost.
    fn lost(&mut self) -> Vec<(u32, Tid)> {
        let mut lost = Vec::new();
        for lander in self.landers.values_mut() {
            if std::mem::take(&mut lander.lost) {
                lost.push((lander.order.v, lander.r));
            }
        }
        lost
    }

    /// Whoever has had tasks restored has ended.
    pub(super) fn forsake(&mut self, restorer: Tid) {
        for lander in self.landers.values_mut() {
            lander.restorer.take_if(|tid| *tid == restorer);
        }
    }

    /// Those whose restorer has ended, once each: the names of those that have not been told to run, and which run, as V,
    /// the incarnation before, and this one.
    pub(super) fn forsaken(&mut self) -> (Vec<String>, Vec<(u32, u32, Tid)>) {
        let (mut idle, mut run) = (Vec::new(), Vec::new());
        for (id, lander) in &mut self.landers {
            if lander.order.moves.is_some() || lander.restorer.is_some() || lander.seen_to {
                continue;
            }
            match lander.stage {
                Stage::Running(_) => run.push((lander.order.v, lander.from, lander.r)),
                _ if !lander.told => idle.push(id.clone()),
                // It is about to run.
                _ => continue,
            }
            lander.seen_to = true;
        }
        (idle, run)
    }

    /// A link to mistctl that bears the program's name.
    fn link(&self, order: &Landing) -> Result<PathBuf> {
        let link = place::link(&self.dir, &order.id, order.parent, &order.program);
        let dir = link.parent().unwrap_or(&self.dir);
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        symlink(call::program()?, &link)
            .with_context(|| format!("cannot make {}", link.display()))?;
        Ok(link)
    }

    /// Hears what landers say.
    fn hear(&mut self) -> Result<()> {
        for mut line in std::mem::take(&mut self.strangers) {
            match line.fill().and_then(|()| line.hear::<ToAgent>()) {
                Ok(Some(ToAgent::Hello { id, r, port, .. })) => self.greet(line, &id, r, port),
                Ok(None) if !line.has_ended() => self.strangers.push(line),
                // It says something else, or has gone.
                _ => {}
            }
        }
        for (id, lander) in &mut self.landers {
            lander.listen(id, &mut self.answers);
        }
        Ok(())
    }

    fn greet(&mut self, line: Lines, id: &str, r: u32, port: u16) {
        let Some(lander) = self.landers.get_mut(id).filter(|l| l.r == Tid(r)) else {
            return;
        };
        if lander.stage != Stage::Started {
            return;
        }
        lander.line = Some(line);
        lander.stage = Stage::Greeted;
        // Where its image comes over a stream it waits for that.
        if lander.order.image.is_none() {
            lander.order_now(id, &mut self.answers);
        }
        let answer = Ok(Answer::Landed { r, port });
        self.answers
            .extend(lander.landed.take().map(|t| (t, answer)));
    }
}

fn lander_of<'l>(landers: &'l mut HashMap<String, Lander>, id: &str) -> Result<&'l mut Lander> {
    let found = landers.get_mut(id);
    found.with_context(|| format!("there is no lander of a move {id}"))
}

impl Lander {
    fn order_now(&mut self, id: &str, answers: &mut Vec<(Ticket, Result<Answer>)>) {
        match self.give_order(id) {
            Ok(()) => self.stage = Stage::Ordered,
            Err(e) => self.failed(Failed::of(&e), answers),
        }
    }

    fn give_order(&mut self, id: &str) -> Result<()> {
        let commit = match self.order.moves {
            Some((r1, lease_ms)) => Commit::WhenEnded { r1, lease_ms },
            None => Commit::WhenTold,
        };
        let source = match &self.order.image {
            Some(path) => Source::Image { path: path.clone() },
            None => Source::Stream {
                key: Key::of_user()?.derive(id).to_hex(),
            },
        };
        let order = Order {
            v: self.order.v,
            source,
            lazy: self.order.lazy,
            announce: self.order.announce,
            commit,
        };
        match &mut self.line {
            Some(line) => line.say(&ToLander::Order(order)),
            None => bail!("the lander has gone"),
        }
    }

    fn failed(&mut self, failed: Failed, answers: &mut Vec<(Ticket, Result<Answer>)>) {
        for ticket in [self.landed.take(), self.parked.take(), self.running.take()] {
            answers.extend(ticket.map(|t| (t, Err(failed.clone().into_error()))));
        }
        self.stage = Stage::Failed(failed);
    }

    fn listen(&mut self, id: &str, answers: &mut Vec<(Ticket, Result<Answer>)>) {
        let Some(line) = &mut self.line else {
            return;
        };
        let said: Result<Vec<ToAgent>> = line
            .flush()
            .and_then(|()| line.fill())
            .and_then(|()| std::iter::from_fn(|| line.hear().transpose()).collect());
        let ended = line.has_ended() || said.is_err();
        for message in said.into_iter().flatten() {
            match message {
                ToAgent::Parked { warnings } => {
                    self.stage = Stage::Parked(warnings.clone());
                    let answer = Ok(Answer::Parked { warnings });
                    answers.extend(self.parked.take().map(|t| (t, answer)));
                }
                ToAgent::Running { resume_us } => {
                    self.stage = Stage::Running(resume_us);
                    let answer = Ok(Answer::Running { resume_us });
                    answers.extend(self.running.take().map(|t| (t, answer)));
                }
                ToAgent::Failed { why, failure } => {
                    self.failed(Failed { failure, why }, answers);
                }
                ToAgent::Hello { .. } => {}
            }
        }
        if ended {
            self.line = None;
            self.lost = matches!(self.stage, Stage::Parked(_)) && self.order.moves.is_some();
            if !matches!(self.stage, Stage::Running(_) | Stage::Failed(_)) {
                let error = anyhow!("the lander of {id} ({}) has ended", self.r);
                self.failed(Failed::of(&error), answers);
            }
        }
    }
}

impl Agent {
    pub(super) fn land(&mut self, ticket: Ticket, order: Landing) -> Result<()> {
        let id = order.id.clone();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
            return Err(Failure::Usage.because(format!("'{id}' is no name of a move")));
        }
        let link = self.landings.link(&order)?;
        let socket = self.landings.socket.to_string_lossy().into_owned();
        let what = Spawn {
            file: link.as_os_str().as_bytes(),
            args: &["land", "--agent", &socket, "--move", &id],
            host: &self.host,
            environment: &[],
            // What it says itself is for the log; the task's it sets when it becomes that.
            output: Sink::default(),
            trace: Sink::default(),
        };
        let r = self.client.spawn(&what)?;
        self.client.notify(Notify::TaskExit, ENDED, &[r])?;
        let from = self.table.r_of(order.v);
        let lander = Lander {
            r,
            order,
            stage: Stage::Started,
            line: None,
            lost: false,
            from,
            restorer: match ticket.asker {
                Asker::Task(asker) => Some(asker),
                Asker::Mover(_) => None,
            },
            seen_to: false,
            told: false,
            landed: Some(ticket),
            parked: None,
            running: None,
        };
        self.landings.landers.insert(id, lander);
        match ticket.asker {
            Asker::Task(asker) => self.watch(asker),
            Asker::Mover(_) => Ok(()),
        }
    }

    /// Landers that end before they have connected to us are heard of only so.
    pub(super) fn landers_ended(&mut self, tids: &[Tid]) -> Result<()> {
        for (id, lander) in &mut self.landings.landers {
            if tids.contains(&lander.r) && lander.stage == Stage::Started {
                let error = anyhow!(
                    "the lander of {id} ({}) ended at once; see the pvmd's log",
                    lander.r
                );
                lander.failed(Failed::of(&error), &mut self.landings.answers);
            }
        }
        self.serve_landers()
    }

    /// An incarnation that was parked, and that nobody tends any more: not its tracer, nor the keeper that would decide
    /// then. It does what came of the move.
    pub(super) fn left_standing(&mut self, r: Tid, runs: bool) -> Result<()> {
        if r.host() != self.own.host() || self.landings.tended(r) {
            return Ok(());
        }
        let left = self.tasks()?.into_iter().find(|task| task.tid == r);
        if let Some(task) = left
            // A tracer that lives lets it run itself, and waits for the SIGSTOP that a SIGCONT would take away.
            && !(runs && local::is_traced(task.pid))
            && local::stands(task.pid)
        {
            let signal = if runs { libc::SIGCONT } else { libc::SIGKILL };
            let _ = pidfd::open(task.pid).map(|p| pidfd::send_signal(p.as_fd(), signal));
        }
        Ok(())
    }

    pub(super) fn serve_landers(&mut self) -> Result<()> {
        self.landings.hear()?;
        for (v, r) in self.landings.lost() {
            // Nobody knows yet what comes of it while the gate is closed; it is seen to when that opens.
            match self.table.entry(v) {
                Some(entry) if entry.state.is_closed() => {}
                entry => self.left_standing(r, entry.is_some_and(|entry| entry.r == r.0))?,
            }
        }
        self.serve_forsaken()?;
        for (ticket, answer) in std::mem::take(&mut self.landings.answers) {
            let answer = answer.with_context(|| format!("the agent of {}", self.host));
            self.answer(ticket, answer)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};

    use super::*;

    /// What its collector hears of an incarnation before its host knows that, it takes for somebody else's.
    #[test]
    fn an_image_is_restored_when_all_hosts_know_the_incarnation() {
        let mut landings = Landings::new(PathBuf::from("/"), PathBuf::from("/"));
        let ticket = |id| Ticket {
            asker: Asker::Mover(1),
            id,
        };
        let lander = Lander {
            r: Tid(0x80003),
            order: Landing {
                id: "one".into(),
                v: 0x40002,
                parent: 0,
                program: "worker".into(),
                moves: None,
                image: Some("/image".into()),
                lazy: false,
                announce: false,
            },
            stage: Stage::Started,
            line: None,
            lost: false,
            from: 0x40002,
            restorer: None,
            seen_to: false,
            told: false,
            landed: Some(ticket(1)),
            parked: None,
            running: None,
        };
        landings.landers.insert("one".into(), lander);
        let (ours, mut its) = UnixStream::pair().unwrap();
        its.set_nonblocking(true).unwrap();
        landings.connected(ours);
        its.write_all(b"{\"say\":\"hello\",\"id\":\"one\",\"r\":524291,\"pid\":7,\"port\":0}\n")
            .unwrap();
        landings.hear().unwrap();
        let answers = std::mem::take(&mut landings.answers);
        assert!(matches!(
            answers.as_slice(),
            [(_, Ok(Answer::Landed { r: 0x80003, .. }))]
        ));
        let mut said = [0; 1000];
        let heard = its.read(&mut said).map_err(|e| e.kind());
        assert_eq!(heard, Err(ErrorKind::WouldBlock));
        // Who asks for this has told all hosts.
        assert_eq!(landings.parked(ticket(2), "one").unwrap(), None);
        let len = its.read(&mut said).unwrap();
        let said = String::from_utf8_lossy(&said[..len]);
        assert!(said.contains("/image"), "{said}");
    }
}
