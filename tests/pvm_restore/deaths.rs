//! Who helps a task back that was saved, or the task on its way, is killed amid that.

use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

/// A task that is away, its partners on both hosts, and their agents, which run.
struct Gone<'s> {
    scene: &'s Scene,
    boss: Actor,
    other: Actor,
    worker: Actor,
    v: u32,
    image: std::path::PathBuf,
}

/// What is to become it, the agent that starts that, and who restores it.
struct Lander {
    pid: u32,
    agent: Pid,
    restore: Child,
}

impl Gone<'_> {
    fn new(scene: &Scene) -> Result<Gone<'_>> {
        let (mut boss, other) = (scene.actor("h0", "boss")?, scene.actor("h1", "other")?);
        let (mut worker, v) = scene.worker(&mut boss, "h1", "worker")?;
        let pid = worker.pid();
        // So that rebuilding it takes longer than stopping an agent.
        worker.ask("hoard 40");
        boss.ask(&format!("notify 1 66 {v:x}"));
        let image = scene.dump("h1", pid, "image", "--kill --away")?;
        Ok(Gone {
            scene,
            boss,
            other,
            worker,
            v,
            image,
        })
    }

    /// Has it restored to a host, by somebody at h0 who is not waited for.
    fn begin(&self, host: &str) -> Result<Child> {
        let command = format!(
            "exec {} restore --json --host {host} {} >{} 2>&1",
            self.scene.mistctl.path(),
            self.image.display(),
            self.scene.path("restore.out").display()
        );
        Ok(self.scene.hosts.command("h0", &command).spawn()?)
    }

    /// The same, up to there being a process that is to become the task.
    fn begin_lander(&self, host: &str) -> Result<Lander> {
        let agent = self.agent(host)?;
        let restore = self.begin(host)?;
        let pid = wait_for("the lander", LIMIT, || lander_of(self.scene, host))?;
        Ok(Lander {
            pid,
            agent,
            restore,
        })
    }

    /// Until who restores it has ended; true if it was.
    fn end_of(&self, mut restore: Child) -> Result<bool> {
        Ok(common::wait_child(&mut restore, "the restore", LIMIT)?.success())
    }

    fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(self.scene.path("restore.out"))?)
    }

    /// The processes of mistctl on a host that do this.
    fn helpers(&self, host: &str, what: &str) -> Result<Vec<Pid>> {
        let list = format!("ps -C mistctl -o pid=,args= | awk '$3 == \"{what}\" {{ print $1 }}'");
        let pids = self.scene.hosts.exec(host, &list)?;
        let pids = pids.split_whitespace();
        pids.map(|pid| Ok(Pid::from_raw(self.scene.pid_outside(host, pid.parse()?)?)))
            .collect()
    }

    fn agent(&self, host: &str) -> Result<Pid> {
        let agents = self.helpers(host, "agent")?;
        ensure!(agents.len() == 1, "{host} has {} agents", agents.len());
        agents.first().copied().context("no agent")
    }

    /// Waits until the table of a host says of the task what is wanted.
    fn until(&self, what: &str, host: &str, is: impl Fn(&Mapped) -> bool) -> Result<()> {
        let tmp = format!("/proc/{}/root/tmp", self.scene.hosts.pid(host)?);
        let name = |path: &std::path::PathBuf| path.to_string_lossy().into_owned();
        let tables = fs::read_dir(tmp)?.flatten().map(|entry| entry.path());
        let path = tables
            .filter(|p| name(p).contains(".mist-") && !name(p).ends_with(".d"))
            .last();
        let path = path.context("no table")?;
        let table = Mapped::new(&fs::File::options().read(true).write(true).open(path)?)?;
        wait_for(what, LIMIT, || Ok(is(&table).then_some(())))
    }

    /// Waits until a host knows what the task is to become.
    fn until_known(&self, host: &str) -> Result<()> {
        self.until("its new incarnation to be known", host, |table| {
            (table.incarnations()).any(|(r, v)| v == self.v && r != v)
        })
    }

    /// Waits until a lander is being made the task, which all hosts have said then that they know.
    fn until_ordered(&self, lander: u32) -> Result<()> {
        wait_for("its agent to order it", LIMIT, || {
            let tracer = common::status_field(lander, "TracerPid");
            let ordered = tracer.is_none_or(|tracer| tracer != "0") || self.runs(lander);
            Ok(ordered.then_some(()))
        })
    }

    /// Whether this is the task, and runs.
    fn runs(&self, pid: u32) -> bool {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let name = self.scene.path("worker.in");
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        exe.ends_with("actor")
            && String::from_utf8_lossy(&command).contains(&*name.to_string_lossy())
            && common::status_field(pid, "TracerPid").as_deref() == Some("0")
    }

    /// Waits until it runs again.
    fn until_runs(&self) -> Result<()> {
        let runs = |pid| self.runs(pid);
        wait_for("the task to run", LIMIT, || {
            Ok(common::processes().into_iter().any(runs).then_some(()))
        })
    }

    /// Saves it once more, which runs on h1.
    fn save_again(&mut self, name: &str) -> Result<()> {
        let pid = self.worker.pid();
        self.image = self.scene.dump("h1", pid, name, "--kill --away")?;
        Ok(())
    }

    /// All that was sent to it is there, and nobody was told of an end.
    fn has(&mut self, texts: &[&str]) -> Result<()> {
        for text in texts {
            let said = self.worker.ask("recv -1 7");
            ensure!(said.contains(&format!("text {text} ")), "{said}");
        }
        ensure!(self.worker.ask("hoarded") == "good");
        ensure!(self.boss.ask("nnotice 66") == "none", "told of an end");
        Ok(())
    }

    fn end(self) {
        self.worker.leave();
        self.other.leave();
        self.boss.leave();
    }
}

fn signal(pid: Pid, signal: Signal) -> Result<()> {
    kill(pid, signal).with_context(|| format!("kill {pid}"))
}

/// The agent of the host that it comes to is killed when it runs, and its gates are not open yet.
pub fn agent_of_the_target(scene: &Scene) -> Result<()> {
    let mut gone = Gone::new(scene)?;
    let (here, there) = (gone.agent("h0")?, gone.agent("h1")?);
    let lander = gone.begin_lander("h0")?;
    gone.until_ordered(lander.pid)?;
    signal(there, Signal::SIGSTOP)?;
    gone.until_runs()?;
    signal(here, Signal::SIGKILL)?;
    let v = gone.v;
    gone.boss.tell(&format!("send {v:x} 7 first"));
    signal(there, Signal::SIGCONT)?;
    ensure!(gone.end_of(lander.restore)?, "{}", gone.said()?);
    ensure!(gone.boss.answer() == "0");
    ensure!(gone.other.ask(&format!("send {v:x} 7 second")) == "0");
    gone.has(&["first", "second"])?;
    gone.end();
    Ok(())
}

/// Who restores it is killed when it runs, and not all gates are open.
pub fn restore_that_is_done(scene: &Scene) -> Result<()> {
    let mut gone = Gone::new(scene)?;
    let here = gone.agent("h0")?;
    let v = gone.v;
    gone.boss.tell(&format!("send {v:x} 7 first"));
    let lander = gone.begin_lander("h1")?;
    gone.until_ordered(lander.pid)?;
    signal(here, Signal::SIGSTOP)?;
    gone.until_runs()?;
    for restore in gone.helpers("h0", "restore")? {
        signal(restore, Signal::SIGKILL)?;
    }
    ensure!(!gone.end_of(lander.restore)?);
    // It must not be told by what was on its way.
    signal(here, Signal::SIGKILL)?;
    ensure!(gone.boss.answer() == "0");
    gone.has(&["first"])?;
    gone.end();
    Ok(())
}

/// Who restores it is killed before it runs: it is still away, and nothing of it is left.
pub fn restore_that_has_begun(scene: &Scene) -> Result<()> {
    let mut gone = Gone::new(scene)?;
    let here = gone.agent("h0")?;
    let v = gone.v;
    let restore = gone.begin("h1")?;
    gone.until_known("h1")?;
    for restore in gone.helpers("h0", "restore")? {
        signal(restore, Signal::SIGKILL)?;
    }
    ensure!(!gone.end_of(restore)?);
    let left = "! ps -C mistctl -o args= | grep -v ' agent$'";
    wait_for("the end of the lander", LIMIT, || {
        Ok(scene.hosts.exec("h1", left).ok())
    })?;
    signal(here, Signal::SIGKILL)?;
    gone.boss.tell(&format!("send {v:x} 7 first"));
    let again = gone.begin("h1")?;
    ensure!(gone.end_of(again)?, "{}", gone.said()?);
    ensure!(gone.boss.answer() == "0");
    gone.has(&["first"])?;
    gone.end();
    Ok(())
}

/// What is to become the task is killed, as soon as it is there and when it stands: it is still away.
pub fn lander(scene: &Scene) -> Result<()> {
    let mut gone = Gone::new(scene)?;
    let v = gone.v;
    gone.boss.tell(&format!("send {v:x} 7 first"));
    killed_lander(&gone, gone.begin_lander("h1")?)?;
    for attempt in 0.. {
        let lander = gone.begin_lander("h1")?;
        if stands(&gone, &lander)? {
            killed_lander(&gone, lander)?;
            break;
        }
        // It was told to run before its agent was stopped.
        signal(lander.agent, Signal::SIGCONT)?;
        ensure!(gone.end_of(lander.restore)?, "{}", gone.said()?);
        ensure!(attempt < 10, "it always runs before its agent is stopped");
        gone.save_again(&format!("again-{attempt}"))?;
    }
    let again = gone.begin("h1")?;
    ensure!(gone.end_of(again)?, "{}", gone.said()?);
    ensure!(gone.boss.answer() == "0");
    gone.has(&["first"])?;
    gone.end();
    Ok(())
}

/// Whether what is to become the task stands, and waits for the word of its agent, which is stopped; or else runs.
fn stands(gone: &Gone, lander: &Lander) -> Result<bool> {
    gone.until_ordered(lander.pid)?;
    signal(lander.agent, Signal::SIGSTOP)?;
    wait_for("its tracer to wait for a word", LIMIT, || {
        if gone.runs(lander.pid) {
            return Ok(Some(false));
        }
        let tracer = common::status_field(lander.pid, "TracerPid").unwrap_or_default();
        let at = fs::read_to_string(format!("/proc/{tracer}/wchan"));
        Ok(at
            .is_ok_and(|at| at.contains("unix_stream"))
            .then_some(true))
    })
}

fn killed_lander(gone: &Gone, lander: Lander) -> Result<()> {
    signal(Pid::from_raw(lander.pid as i32), Signal::SIGKILL)?;
    signal(lander.agent, Signal::SIGCONT)?;
    ensure!(!gone.end_of(lander.restore)?, "{}", gone.said()?);
    let said = gone.said()?;
    ensure!(said.contains("restore_failed"), "{said}");
    gone.until("the end of what is left", "h1", |table| {
        lander_of(gone.scene, "h1").is_ok_and(|left| left.is_none())
            && table.entry(gone.v).is_some_and(|entry| entry.is_away())
    })
}

/// What pvmd has started on a host to become a task, which an agent gives orders.
fn lander_of(scene: &Scene, host: &str) -> Result<Option<u32>> {
    let ns = fs::read_link(format!("/proc/{}/ns/pid", scene.hosts.pid(host)?))?;
    let lands = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = command.split(|b| *b == 0).collect();
        words.get(1..3) == Some(&[&b"land"[..], b"--agent"])
            && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|its| its == ns)
    };
    Ok(common::processes().into_iter().find(lands))
}

pub fn killed_landers(scene: &Scene) -> Result<()> {
    let mut boss = scene.actor(HOST, "boss")?;
    let (mut worker, v) = scene.worker(&mut boss, HOST, "worker")?;
    let pid = worker.pid();
    let image = scene.dump(HOST, pid, "image", "--kill")?;
    let pvmd = scene.hosts.exec(HOST, "pgrep -x pvmd")?;
    let parent = scene.pid_outside(HOST, pvmd.trim().parse()?)? as u32;
    let (mut came, mut gone) = (0, 0);
    // How long one takes that nobody kills.
    let mut whole = None;
    for n in 0..21 {
        let delay = whole.map(|whole: Duration| whole * n / 18);
        let there = common::processes();
        std::thread::scope(|scope| -> Result<()> {
            let killer = scope.spawn(|| kill_lander(parent, &there, delay));
            let lazily = if n % 2 == 0 { "" } else { "--lazy" };
            scene.land(&mut boss, HOST, &image, lazily)?;
            let took = killer.join().unwrap_or_else(|_| bail!("the killer"))?;
            whole = whole.or(Some(took));
            Ok(())
        })?;
        wait_for("the end of all mistctls", LIMIT, || {
            let left = "! ls -l /proc/[0-9]*/exe 2>/dev/null | grep mistctl";
            Ok(scene.hosts.root(HOST, left).ok())
        })?;
        let task = scene.hosts.exec(HOST, &format!("pgrep -P {pvmd}; true"))?;
        if task.is_empty() {
            gone += 1;
            continue;
        }
        came += 1;
        ensure!(worker.ask("mytid") == format!("{v:x}"));
        worker.tell("quit");
        worker.answer();
        wait_for("its end", LIMIT, || {
            let gone = format!("! pgrep -P {pvmd}");
            Ok(scene.hosts.exec(HOST, &gone).ok())
        })?;
    }
    println!("{gone} ended, {came} came through");
    ensure!(gone > 0, "all came through: nobody was killed in time");
    boss.leave();
    Ok(())
}

/// Waits until a process of `parent` is a lander, and kills with this delay whoever has it in hand, and itself, as long as
/// it is not the task. Without a delay: how long it takes until it is.
fn kill_lander(parent: u32, before: &[u32], delay: Option<Duration>) -> Result<Duration> {
    let is_lander = |p: &u32| {
        let exe = fs::read_link(format!("/proc/{p}/exe"));
        exe.is_ok_and(|exe| exe.ends_with("mistctl"))
    };
    let parent = parent.to_string();
    let came = Instant::now();
    // It may be over in some milliseconds.
    let lander = loop {
        let new = common::processes()
            .into_iter()
            .filter(|p| !before.contains(p));
        let its = |p: &u32| common::status_field(*p, "PPid").as_ref() == Some(&parent);
        if let Some(lander) = new.filter(its).find(is_lander) {
            break lander;
        }
        ensure!(came.elapsed() < LIMIT, "no lander came");
    };
    let began = Instant::now();
    let Some(delay) = delay else {
        let traced = || common::status_field(lander, "TracerPid").is_some_and(|t| t != "0");
        while is_lander(&lander) || traced() {}
        return Ok(began.elapsed());
    };
    while began.elapsed() < delay {}
    let tracer = common::status_field(lander, "TracerPid");
    if let Some(tracer) = tracer.and_then(|t| t.parse().ok()).filter(|t| *t != 0) {
        let _ = kill(Pid::from_raw(tracer), Signal::SIGKILL);
    }
    if is_lander(&lander) {
        let _ = kill(Pid::from_raw(lander as i32), Signal::SIGKILL);
    }
    Ok(began.elapsed())
}
