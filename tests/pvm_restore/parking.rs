//! A lander that is parked, and what makes it run or end.

use std::path::PathBuf;

use super::*;

/// A task that waits in pvm_recv, and a lander of its that is parked.
pub struct Parking<'s> {
    scene: &'s Scene,
    boss: Actor,
    spawner: Actor,
    worker: Actor,
    line: BufReader<UnixStream>,
    /// The task, and its process on h1.
    v: u32,
    pid: i32,
    /// The new incarnation, and its process.
    r: u32,
    landed: i32,
}

/// What is peculiar to it.
#[derive(Default)]
pub struct Case {
    /// So many MiB of memory, which is filled lazily when that is not 0.
    pub memory: u32,
    /// Messages that others write to the lander while it lands.
    pub writes: u32,
    /// A signal that the task blocks; 0: none.
    pub blocks: i32,
}

/// MiB of memory that is filled behind a task's back.
pub const LAZY: Case = Case {
    memory: 16,
    writes: 0,
    blocks: 0,
};

impl Parking<'_> {
    fn new(scene: &Scene, lease_ms: u64) -> Result<Parking<'_>> {
        Self::with(scene, lease_ms, &Case::default())
    }

    fn with<'s>(scene: &'s Scene, lease_ms: u64, case: &Case) -> Result<Parking<'s>> {
        let mut boss = scene.actor(HOST, "boss")?;
        let mut spawner = scene.actor(HOST, "spawner")?;
        let (mut worker, v) = scene.worker(&mut boss, HOST, "worker")?;
        let pid = worker.pid();
        worker.ask(&format!("hoard {}", case.memory));
        worker.ask(&format!("blocks {}", case.blocks));
        worker.tell("recv -1 7");
        until_receives(scene, HOST, pid)?;
        boss.ask(&format!("send {v:x} 8 early"));
        let image = scene.dump(HOST, pid, "image", "")?;
        let socket = scene.path("agent");
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777))?;
        let link = scene.path("links/actor");
        let spawn = format!(
            "spawnat {HOST} {} land --agent {} --move m1",
            link.display(),
            socket.display()
        );
        let r = spawned(&spawner.ask(&spawn))?;
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut parking = Parking {
            scene,
            boss,
            spawner,
            worker,
            line: BufReader::new(stream),
            v,
            pid,
            r,
            landed: 0,
        };
        match parking.heard()? {
            ToAgent::Hello { id, r, pid, .. } if id == "m1" && r == parking.r => {
                parking.landed = pid;
            }
            other => bail!("{other:?}"),
        }
        parking
            .boss
            .tell(&format!("stream {r:x} 9 {}", case.writes));
        parking.say(&ToLander::Order(Order {
            v,
            source: Source::Image { path: image },
            lazy: case.memory > 0,
            announce: false,
            commit: Commit::WhenEnded { r1: v, lease_ms },
        }))?;
        match parking.heard()? {
            ToAgent::Parked { warnings } => ensure!(warnings.is_empty(), "{warnings:?}"),
            other => bail!("{other:?}"),
        }
        parking.boss.answer();
        Ok(parking)
    }

    fn say(&mut self, what: &ToLander) -> Result<()> {
        protocol::say(self.line.get_mut(), what)
    }

    fn heard(&mut self) -> Result<ToAgent> {
        protocol::hear(&mut self.line)?.context("the lander has gone")
    }

    fn kill(&self, pid: i32) -> Result<()> {
        self.scene
            .hosts
            .exec(HOST, &format!("kill -9 {pid}"))
            .map(drop)
    }

    /// The process that traces the landed one.
    pub fn tracer(&self) -> Result<i32> {
        let said = self.scene.hosts.exec(
            HOST,
            &format!(
                "sed -n 's/^TracerPid:[[:space:]]*//p' /proc/{}/status",
                self.landed
            ),
        )?;
        let tracer: i32 = said.parse()?;
        ensure!(tracer > 0, "nobody traces the parked process");
        Ok(tracer)
    }

    /// The process that decides when the tracer has died: its child.
    fn keeper(&self) -> Result<i32> {
        let of = format!("pgrep -P {}", self.tracer()?);
        let said = self.scene.hosts.exec(HOST, &of)?;
        said.parse()
            .with_context(|| format!("children of the tracer: {said}"))
    }

    /// The process that goes on filling memory when the tracer has died.
    pub fn understudy(&self) -> Result<i32> {
        let of = format!("pgrep -P {} -x mist-understudy", self.tracer()?);
        let said = self.scene.hosts.exec(HOST, &of)?;
        said.parse()
            .with_context(|| format!("children of the tracer: {said}"))
    }

    /// Nobody is left who would decide: the parked one stands still, and nobody traces it.
    fn forsake(&self) -> Result<()> {
        let tracer = self.tracer()?;
        self.kill(self.keeper()?)?;
        self.kill(tracer)?;
        let stands = format!(
            "grep -q '^TracerPid:.0$' /proc/{0}/status && grep -q '^State:.T' /proc/{0}/status",
            self.landed
        );
        wait_for("the parked one to stand still", LIMIT, || {
            Ok(self.scene.hosts.exec(HOST, &stands).ok())
        })
        .map(drop)
    }

    /// Has the agents of the virtual machine started, which take up what others have left.
    fn start_agents(&self) -> Result<()> {
        let start = format!("{} agent --everywhere", self.scene.mistctl.path());
        self.scene.hosts.exec(HOST, &start).map(drop)
    }

    /// The new one is the task, with what the old one had not read.
    fn runs_here(&mut self) -> Result<()> {
        let (r, v) = (self.r, self.v);
        self.boss.ask(&format!("send {r:x} 7 hello"));
        let said = self.worker.answer();
        ensure!(said.contains("text hello"), "{said}");
        let said = self.worker.ask("recv -1 8");
        ensure!(said.contains("text early"), "{said}");
        ensure!(self.worker.pid() == self.landed);
        ensure!(self.worker.ask("mytid") == format!("{v:x}"));
        let memory = self.worker.ask("hoarded");
        ensure!(memory == "good", "memory of the task: {memory}");
        let state = self.scene.hosts.exec(
            HOST,
            &format!(
                "grep -E '^(State|TracerPid|SigPnd|ShdPnd)' /proc/{}/status",
                self.landed
            ),
        )?;
        ensure!(state.contains("TracerPid:\t0"), "{state}");
        ensure!(!state.contains("stopped"), "{state}");
        self.alone()
    }

    /// The old one ends, and the new one runs.
    fn goes_over(mut self) -> Result<()> {
        self.kill(self.pid)?;
        ensure!(matches!(self.heard()?, ToAgent::Running { .. }));
        self.runs_here()?;
        self.end();
        Ok(())
    }

    /// The old one goes on, and the new one has left nothing.
    fn runs_there(&mut self) -> Result<()> {
        let (v, landed) = (self.v, self.landed);
        wait_for("the end of the new one", LIMIT, || {
            let gone = self.scene.hosts.exec(HOST, &format!("! kill -0 {landed}"));
            Ok(gone.ok())
        })?;
        self.boss.ask(&format!("send {v:x} 7 hello"));
        let said = self.worker.answer();
        ensure!(said.contains("text hello"), "{said}");
        ensure!(self.worker.pid() == self.pid);
        self.alone()
    }

    /// No process of a landing is left.
    fn alone(&self) -> Result<()> {
        wait_for("the end of all mistctls but the agent", LIMIT, || {
            let left = "for p in /proc/[0-9]*; do case $(readlink $p/exe) in
                *mistctl) grep -qaz '^agent$' $p/cmdline || exit 1;; esac; done";
            Ok(self.scene.hosts.root(HOST, left).ok())
        })?;
        Ok(())
    }

    /// Notes in the host's table how far the move has come, as an agent does.
    fn note(&self, state: State) -> Result<()> {
        let tmp = format!("/proc/{}/root/tmp", self.scene.hosts.pid(HOST)?);
        let tables = fs::read_dir(tmp)?.flatten().map(|entry| entry.path());
        let name = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut tables = tables.filter(|p| name(p).contains(".mist-") && !name(p).ends_with(".d"));
        let path = tables.next().context("the host has no table")?;
        let table = Mapped::new(&fs::File::options().read(true).write(true).open(path)?)?;
        let (v, r) = (self.v, self.r);
        let full = |_| anyhow::anyhow!("the table is full");
        table.set_incarnation(v, v).map_err(full)?;
        table.set_incarnation(r, v).map_err(full)?;
        let entry = Entry {
            v,
            r: v,
            state,
            next: r,
            lease: lease_clock() + LONG,
        };
        table.set_entry(entry).map_err(full)
    }

    fn end(self) {
        self.worker.leave();
        self.spawner.leave();
        self.boss.leave();
    }
}

pub const LONG: u64 = 60_000;

pub fn runs_when_ended(scene: &Scene) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.say(&ToLander::Run)?;
    parking.goes_over()
}

/// Somebody sends it a SIGCONT, which takes away what it is parked with, and which it does not take.
pub fn continued(scene: &Scene) -> Result<()> {
    let case = Case {
        blocks: libc::SIGCONT,
        ..Case::default()
    };
    let mut parking = Parking::with(scene, LONG, &case)?;
    let to = format!("kill -CONT {}", parking.landed);
    scene.hosts.exec(HOST, &to)?;
    parking.say(&ToLander::Run)?;
    parking.goes_over()
}

/// It is decided, and the lander asks, for it was not told.
pub fn runs_when_it_finds_out(scene: &Scene) -> Result<()> {
    let parking = Parking::new(scene, LONG)?;
    parking.note(State::Decided)?;
    parking.goes_over()
}

/// Nothing is decided: the old one may have been let go on, and have come to its end.
pub fn ended_by_itself(scene: &Scene) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.kill(parking.pid)?;
    match parking.heard()? {
        ToAgent::Failed { why, .. } => ensure!(why.contains("before it was decided"), "{why}"),
        other => bail!("{other:?}"),
    }
    parking.alone()?;
    parking.spawner.leave();
    parking.boss.leave();
    Ok(())
}

pub fn lease_ends(scene: &Scene) -> Result<()> {
    let mut parking = Parking::new(scene, 300)?;
    match parking.heard()? {
        ToAgent::Failed { why, .. } => ensure!(why.contains("still runs"), "{why}"),
        other => bail!("{other:?}"),
    }
    parking.runs_there()?;
    parking.end();
    Ok(())
}

pub fn called_off(scene: &Scene) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.say(&ToLander::Abandon)?;
    match parking.heard()? {
        ToAgent::Failed { why, .. } => ensure!(why.contains("called it off"), "{why}"),
        other => bail!("{other:?}"),
    }
    parking.runs_there()?;
    parking.end();
    Ok(())
}

/// The agents of both hosts have ended, here those are the same, and the mover. Who finds out has another agent started:
/// that one ends what the first had decided, or gives it up.
pub fn agent_dies(scene: &Scene, state: State) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.note(state)?;
    parking.line.get_ref().shutdown(std::net::Shutdown::Both)?;
    match state {
        State::Decided => parking.runs_here()?,
        _ => parking.runs_there()?,
    }
    parking.end();
    Ok(())
}

pub fn tracer_dies_committed(scene: &Scene, case: &Case) -> Result<()> {
    let mut parking = Parking::with(scene, LONG, case)?;
    parking.note(State::Decided)?;
    parking.kill(parking.tracer()?)?;
    parking.runs_here()?;
    parking.end();
    Ok(())
}

pub fn tracer_dies_uncommitted(scene: &Scene) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.note(State::Moving)?;
    parking.kill(parking.tracer()?)?;
    parking.runs_there()?;
    parking.end();
    Ok(())
}

/// The tracer has been killed, and its keeper: the agent of the host does what came of the move.
pub fn both_die(scene: &Scene, state: State) -> Result<()> {
    let mut parking = Parking::new(scene, LONG)?;
    parking.note(state)?;
    parking.forsake()?;
    parking.start_agents()?;
    match state {
        State::Decided => parking.runs_here()?,
        _ => parking.runs_there()?,
    }
    parking.end();
    Ok(())
}

/// The task runs, and its memory is being filled when its tracer is killed, or the one that stands by.
pub fn one_dies_while_it_fills(scene: &Scene, find: fn(&Parking<'_>) -> Result<i32>) -> Result<()> {
    let mut parking = Parking::with(scene, LONG, &LAZY)?;
    let pid = find(&parking)?;
    parking.say(&ToLander::Run)?;
    parking.kill(parking.pid)?;
    ensure!(matches!(parking.heard()?, ToAgent::Running { .. }));
    // It may be at its end, too.
    let _ = parking.kill(pid);
    parking.runs_here()?;
    parking.end();
    Ok(())
}

/// Nobody is left who could fill its memory: it ends rather than read zeros.
pub fn both_die_before_they_fill(scene: &Scene) -> Result<()> {
    let parking = Parking::with(scene, LONG, &LAZY)?;
    parking.note(State::Decided)?;
    let (first, second) = (parking.tracer()?, parking.understudy()?);
    parking.kill(second)?;
    parking.kill(first)?;
    let landed = parking.landed;
    wait_for("the end of the parked one", LIMIT, || {
        let gone = scene.hosts.exec(HOST, &format!("! kill -0 {landed}"));
        Ok(gone.ok())
    })?;
    parking.alone()?;
    parking.spawner.leave();
    parking.boss.leave();
    Ok(())
}
