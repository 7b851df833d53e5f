//! One test: a program, started, saved in one of the ways, and asked for its verdict.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use mistctl::dump::{After, Carried, Options, Session, Tracker};
use mistctl::image::{Compress, Image, RoundsWriter};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{self, describe, ending, mistctl, processes, run, tail, wait_for};
use crate::peer::Peer;
use crate::spec::{Mode, Spec};

/// How long any one step may take before it counts as hung.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How late a timed call may be. Generous: test machines are shared; `scripts/bench` measures.
const LATE_US: i64 = 250_000;
/// How early a timed call may seem to be after a restore. The program takes the time away from
/// its own two-millisecond steps, and in it is the time for which it already stood still while
/// its timers were still to be read.
const EARLY_US: i64 = 150_000;

/// One program, one variant, one way of saving it.
pub struct Test {
    spec: Spec,
    binary: PathBuf,
    variant: String,
    mode: Mode,
    /// Everything of this test; the program runs in `run` below it.
    dir: PathBuf,
    cwd: PathBuf,
    /// The program while it is a child of ours.
    program: Option<Child>,
    pid: u32,
    peer: Option<Peer>,
    /// Dumps made so far; they give the images their names.
    dumps: usize,
    /// What a dump said that refused, as the program's directives allow.
    refusal: Option<String>,
    /// What the program wrote into a pipe that we hold.
    piped: Option<thread::JoinHandle<String>>,
    /// Has the program's pid while that is restored.
    squatter: Option<Child>,
}

impl Test {
    /// From the arguments that `tests` in the crate's root gave it.
    pub fn from_args() -> Result<Self> {
        let mut args = std::env::args().skip(1);
        let mut next = || args.next().context("too few arguments");
        let spec = Spec::read(Path::new(&next()?))?;
        let binary = PathBuf::from(next()?);
        let variant = next()?;
        let mode = next()?;
        let dir = PathBuf::from(next()?);
        let mode = Mode::ALL.into_iter().find(|m| m.name() == mode);
        Ok(Self {
            spec,
            binary,
            variant,
            mode: mode.context("no such mode")?,
            cwd: dir.join("run"),
            dir,
            program: None,
            pid: 0,
            peer: None,
            dumps: 0,
            refusal: None,
            piped: None,
            squatter: None,
        })
    }

    /// None when the test passed, or why it could not run here.
    pub fn carry_out(&mut self) -> Result<Option<String>> {
        let mut outcome = self.steps();
        // Unharmed, but not tested any further.
        if let (Ok(None), Some(why), None) = (&outcome, &self.refusal, &self.spec.refused) {
            outcome = Ok(Some(format!("refused, as it may be: {why}")));
        }
        outcome.map_err(|e| {
            let mut story = format!("{e:#}\n");
            let log = tail(&self.dir.join("log"), 4000);
            if !log.is_empty() {
                story += &format!("the program wrote:\n{log}\n");
            }
            let verdict = tail(&self.cwd.join("result"), 4000);
            if !verdict.is_empty() {
                story += &format!("its verdict: {verdict}");
            }
            story += &format!("processes:\n{}", describe(&processes()));
            anyhow!(story)
        })
    }

    fn steps(&mut self) -> Result<Option<String>> {
        if let Some(why) = self.start()? {
            return Ok(Some(why));
        }
        let mut away = false;
        match self.mode {
            Mode::Alone => {}
            Mode::GoOn => {
                for _ in 0..self.spec.dumps.unwrap_or(3) {
                    self.dump(None)?;
                    self.unharmed()?;
                }
            }
            Mode::Kill | Mode::Lazy => away = self.dump(Some("--kill"))?,
            Mode::Twice => {
                away = self.dump(Some("--kill"))?;
                if away {
                    self.restore_detached()?;
                    self.dump(Some("--kill"))?;
                }
            }
            Mode::Rounds => {
                away = self.dump_in_rounds()?;
            }
            Mode::Copied => {
                away = self.dump(None)?;
                if let (true, Some(program)) = (away, &mut self.program) {
                    program.kill()?;
                    self.leave()?;
                }
            }
            Mode::Taken => {
                away = self.dump(Some("--kill"))?;
                if away {
                    self.take_id()?;
                    self.restore_detached()?;
                    self.dump(Some("--kill"))?;
                }
            }
        }
        if !away {
            // Nothing happened to it, or nothing that it may see.
            self.go()?;
            let mut child = self.program.take().context("the program is gone")?;
            let status = common::wait_child(&mut child, "the program's end", LIMIT)?;
            return self.judge(
                &format!("the program ended with {}", ending(status)),
                status.success(),
            );
        }
        let (mut restore, out) = self.restore_foreground()?;
        self.go()?;
        let status = common::wait_child(&mut restore, "mistctl restore", LIMIT)
            .with_context(|| tail(&self.dir.join("restore.err"), 4000))?;
        if let Some(mut squatter) = self.squatter.take() {
            squatter.kill()?;
            squatter.wait()?;
        }
        let verdict = self.judge(
            &format!(
                "mistctl restore ended with {}: {}",
                ending(status),
                tail(&self.dir.join("restore.err"), 4000)
            ),
            status.success(),
        )?;
        // After a --detach it was /dev/null already.
        if self.spec.stdout && self.mode != Mode::Twice && !tail(&out, 4000).contains("after\n") {
            bail!(
                "the program's standard output was a pipe, so after the restore it is that of \
                 mistctl restore; wanted \"after\", got {:?}",
                tail(&out, 4000)
            );
        }
        Ok(verdict)
    }

    /// Starts the program and waits until it is ready.
    fn start(&mut self) -> Result<Option<String>> {
        fs::create_dir(&self.cwd)?;
        let log = File::create(self.dir.join("log"))?;
        let mut command = Command::new(&self.binary);
        command
            .current_dir(&self.cwd)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("MIST_MARK", "of this program");
        if !self.variant.is_empty() {
            command.arg(&self.variant);
        }
        if self.spec.user {
            // tempfile made the directory for its owner alone.
            std::os::unix::fs::chown(&self.cwd, Some(65534), Some(65534))?;
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&self.dir, open)?;
            command.uid(65534).gid(65534);
        }
        if self.spec.peer {
            let peer = Peer::start()?;
            command.env("MIST_PEER", peer.address.port().to_string());
            self.peer = Some(peer);
        }
        let mut reader = None;
        if self.spec.stdout {
            let (r, w) = std::io::pipe()?;
            command.stdout(w);
            reader = Some(r);
        }
        if self.spec.setsid {
            // The setsid of util-linux: as no group leader it execs in place.
            let mut outer = Command::new("/usr/bin/setsid");
            outer.arg(command.get_program()).args(command.get_args());
            outer.current_dir(&self.cwd).stdin(Stdio::null());
            let log = File::options().append(true).open(self.dir.join("log"))?;
            outer.stdout(log.try_clone()?).stderr(log);
            outer.env_clear();
            for (k, v) in command.get_envs() {
                if let Some(v) = v {
                    outer.env(k, v);
                }
            }
            command = outer;
        } else {
            // Like a job of a shell.
            command.process_group(0);
        }
        let mut child = command.spawn().context("cannot start the program")?;
        // Ends our copy of the pipe's other end.
        drop(command);
        self.pid = child.id();
        if let Some(mut r) = reader {
            self.piped = Some(thread::spawn(move || {
                let mut text = String::new();
                let _ = r.read_to_string(&mut text);
                text
            }));
        }
        let (ready, result) = (self.cwd.join("ready"), self.cwd.join("result"));
        let outcome = wait_for("the program to be ready", LIMIT, || {
            if result.exists() {
                return Ok(Some(false));
            }
            if let Some(status) = child.try_wait()? {
                bail!(
                    "the program ended with {} before it was ready",
                    ending(status)
                );
            }
            Ok(ready.exists().then_some(true))
        });
        let ready = outcome?;
        if !ready {
            let status = common::wait_child(&mut child, "the program's end", LIMIT)?;
            let text = tail(&result, 4000);
            if let Some(why) = text.strip_prefix("SKIPPED: ") {
                return Ok(Some(why.trim().to_owned()));
            }
            bail!("{} (before it was ready; {})", text.trim(), ending(status));
        }
        if self.spec.stopped {
            wait_for("the program to stop itself", LIMIT, || {
                let state = common::status_field(self.pid, "State").unwrap_or_default();
                Ok(state.starts_with('T').then_some(()))
            })?;
        }
        self.program = Some(child);
        Ok(None)
    }

    fn image(&self) -> PathBuf {
        self.dir.join(format!("image{}", self.dumps))
    }

    fn dump_command(&self, and: Option<&str>) -> Command {
        let mut command = mistctl();
        command.arg("dump").arg(self.pid.to_string());
        command.arg("-o").arg(self.image());
        command.arg("--json");
        command.args(and);
        if self.spec.tree {
            command.arg("--tree");
        }
        if self.spec.tcp_established {
            command.arg("--tcp-established");
        }
        command
    }

    /// Whether it was saved; false: it was refused, as the program's directives allow.
    fn dump(&mut self, and: Option<&str>) -> Result<bool> {
        self.dumps += 1;
        let what = format!("mistctl dump (no. {})", self.dumps);
        let output = wait_for("a moment for a dump", LIMIT, || {
            let output = run(self.dump_command(and), &self.dir, "dump", LIMIT)?;
            Ok((!self.not_now(&common::both(&output))).then_some(output))
        })
        .with_context(|| what.clone())?;
        let stderr = common::both(&output);
        if !output.status.success() {
            let (must, may) = (&self.spec.refused, &self.spec.may_refuse);
            if let Some(text) = must.as_ref().or(may.as_ref())
                && stderr.contains(text.as_str())
            {
                if self.image().exists() {
                    bail!("{what} was refused, but left {}", self.image().display());
                }
                self.unharmed()
                    .with_context(|| format!("{what}: {stderr}"))?;
                self.refusal.get_or_insert_with(|| stderr.clone());
                return Ok(false);
            }
            bail!("{what} ended with {}: {stderr}", ending(output.status));
        }
        if let Some(why) = &self.spec.refused {
            bail!("{what}, wanted a refusal for `{why}`, got an image");
        }
        let numbers = [
            "pid",
            "bytes_memory",
            "bytes_written",
            "pages",
            "pages_zero",
            "blackout_us",
            "total_us",
        ];
        self.check_json(&output, &numbers)
            .with_context(|| what.clone())?;
        if self.mode == Mode::Kill {
            let mut verify = mistctl();
            verify.arg("verify").arg(self.image());
            let output = run(verify, &self.dir, "verify", LIMIT)?;
            if !output.status.success() {
                let said = common::both(&output);
                bail!(
                    "mistctl verify ended with {}: {said}",
                    ending(output.status)
                );
            }
        }
        if and == Some("--kill") {
            self.leave()?;
        }
        Ok(true)
    }

    /// Whether that is an error of a moment.
    fn not_now(&self, said: &str) -> bool {
        let moments = self.spec.moments.as_ref();
        moments.is_some_and(|text| said.contains(text.as_str()))
    }

    /// Copies its memory while it runs, again and again, and what is left while it stands.
    fn dump_in_rounds(&mut self) -> Result<bool> {
        self.dumps += 1;
        let options = Options {
            pid: self.pid as i32,
            image: self.image(),
            store: None,
            tree: false,
            after: After::Kill,
            compress: Compress::None,
            tcp_established: self.spec.tcp_established,
            progress: false,
            carried: Carried::All,
            pvmd: None,
        };
        let writer = RoundsWriter::create(&options.image)?;
        let mut tracker = Tracker::start(options.pid)?;
        if let Some(why) = tracker.why_not() {
            bail!("{why}");
        }
        let rounds = self.spec.dumps.unwrap_or(3);
        let mut read = Vec::new();
        for _ in 0..rounds {
            let round = tracker.round(&mut |at, data| writer.put(0, at, data))?;
            read.push(round.bytes);
            writer.settle()?;
        }
        // Programs that wait write little; those that are dumped another number of times do not wait.
        if let (Some(first), Some(last), None) = (read.first(), read.last(), self.spec.dumps)
            && *last > first / 2 + (256 << 10)
        {
            bail!("changes are not followed: the rounds read {read:?} bytes");
        }
        self.unharmed()?;
        let looked = wait_for("a moment for a dump", LIMIT, || {
            let session = Session::stop(&options).and_then(|mut session| {
                session.want_heirs();
                session.look(&writer)?;
                Ok(session)
            });
            match session {
                Err(e) if self.not_now(&format!("{e:#}")) => Ok(None),
                session => Ok(Some(session)),
            }
        })?;
        let mut session = match looked {
            Ok(session) => session,
            Err(e) => {
                let (may, said) = (self.spec.may_refuse.as_ref(), format!("{e:#}"));
                if !may.is_some_and(|text| said.contains(text.as_str())) {
                    return Err(e);
                }
                self.refusal.get_or_insert(said);
                return Ok(false);
            }
        };
        let (runs, _) = session.changes(&mut tracker, &writer)?;
        let mut manifest = session.manifest()?;
        let mut changed = session.changed_flags(&manifest)?;
        for v in manifest.processes.iter_mut().flat_map(|p| &mut p.vmas) {
            v.flags = changed
                .remove(&v.start)
                .unwrap_or(std::mem::take(&mut v.flags));
        }
        writer.finish(&manifest, &[(0, runs)].into(), true)?;
        session.end(After::Kill)?;
        // We are its parent, too: its end has been seen.
        self.program = None;
        Image::open(&self.image())?.verify(&mut |_, _| {})?;
        self.leave()?;
        Ok(true)
    }

    /// The program has been killed: what else goes with it.
    fn leave(&mut self) -> Result<()> {
        if let Some(mut child) = self.program.take() {
            common::wait_child(&mut child, "the program's end after dump --kill", LIMIT)?;
        }
        for name in &self.spec.removed {
            // Gone the first time already.
            let _ = fs::remove_file(self.cwd.join(name));
        }
        for name in &self.spec.replaced {
            let (fresh, path) = (self.cwd.join("fresh"), self.cwd.join(name));
            fs::write(&fresh, "quite another file\n")?;
            fs::rename(&fresh, &path)?;
        }
        // Its children, and whatever mistctl used, are gone soon, too; but for what keeps
        // connections to peers outside.
        let me = std::process::id();
        let name = |p| common::status_field(p, "Name").unwrap_or_default();
        wait_for("the end of all processes after dump --kill", LIMIT, || {
            // What this process has started, and has ended by itself.
            let _ = nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
            let squatter = self.squatter.as_ref().map(Child::id);
            let left = processes().into_iter();
            let left = left.filter(|&p| p != 1 && p != me && Some(p) != squatter);
            let mut left = left.filter(|&p| !self.spec.peer || name(p) != "mist-keeper");
            Ok(left.next().is_none().then_some(()))
        })?;
        Ok(())
    }

    /// After a dump that left the program running: untraced, not stopped.
    fn unharmed(&mut self) -> Result<()> {
        let field = |key| common::status_field(self.pid, key).unwrap_or_default();
        if field("TracerPid") != "0" {
            bail!(
                "after the dump the program is traced by {}",
                field("TracerPid")
            );
        }
        wait_for(
            "the program's state to be as before",
            Duration::from_secs(1),
            || {
                let state = common::status_field(self.pid, "State").unwrap_or_default();
                Ok(
                    (state.starts_with('T') == self.spec.stopped && !state.starts_with('t'))
                        .then_some(()),
                )
            },
        )?;
        if let Some(child) = &mut self.program
            && let Some(status) = child.try_wait()?
        {
            bail!("after the dump the program ended with {}", ending(status));
        }
        Ok(())
    }

    /// Gives the dead program's pid to another process.
    fn take_id(&mut self) -> Result<()> {
        let path = "/proc/sys/kernel/ns_last_pid";
        fs::write(path, (self.pid - 1).to_string()).context(path)?;
        let squatter = Command::new("/bin/sleep").arg("1000").spawn()?;
        let got = squatter.id();
        self.squatter = Some(squatter);
        if got != self.pid {
            bail!("wanted a process with pid {}, got {got}", self.pid);
        }
        Ok(())
    }

    fn restore(&self) -> Command {
        let mut command = mistctl();
        command.arg("restore").arg(self.image());
        if self.mode != Mode::Taken {
            command.arg("--same-pid");
        }
        if self.mode == Mode::Lazy {
            command.arg("--lazy");
        }
        command
    }

    fn restore_detached(&mut self) -> Result<()> {
        let mut command = self.restore();
        command.arg("--detach").arg("--json");
        let output = run(command, &self.dir, "restore-detached", LIMIT)?;
        let stderr = common::both(&output);
        if !output.status.success() {
            bail!(
                "mistctl restore --detach ended with {}: {stderr}",
                ending(output.status)
            );
        }
        if self.mode == Mode::Taken {
            // As it is seen from here.
            let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            let pid = said["pid"].as_u64().context("no pid")?;
            self.pid = u32::try_from(pid)?;
        }
        self.check_json(&output, &["pid", "resume_us", "total_us"])
            .context("mistctl restore --detach")?;
        self.unharmed()
    }

    /// Whether a command printed one object with the program's pid and these numbers in it.
    fn check_json(&self, output: &Output, numbers: &[&str]) -> Result<()> {
        let text = String::from_utf8_lossy(&output.stdout);
        let json: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("--json printed {}", common::both(output)))?;
        let number = |key: &str| json.get(key).and_then(serde_json::Value::as_u64);
        if let Some(missing) = numbers.iter().find(|key| number(key).is_none()) {
            bail!("--json, wanted a number \"{missing}\", got {text}");
        }
        if number("pid") != Some(u64::from(self.pid)) {
            bail!("--json, wanted \"pid\": {}, got {text}", self.pid);
        }
        Ok(())
    }

    /// Starts a restore in the foreground; its output goes to the file that is returned.
    fn restore_foreground(&self) -> Result<(Child, PathBuf)> {
        let mut command = self.restore();
        let out = self.dir.join("restore.out");
        let child = command
            .stdout(File::create(&out)?)
            .stderr(File::create(self.dir.join("restore.err"))?)
            .spawn()
            .context("cannot start mistctl restore")?;
        Ok((child, out))
    }

    /// Lets the program go on to its checks.
    fn go(&self) -> Result<()> {
        fs::write(self.cwd.join("go"), "")?;
        if self.spec.stopped {
            let pid = Pid::from_raw(i32::try_from(self.pid)?);
            wait_for("the program to be there and stopped", LIMIT, || {
                let field = |key| common::status_field(self.pid, key).unwrap_or_default();
                if self.cwd.join("result").exists() {
                    bail!("the program was to stay stopped, but it ran");
                }
                Ok((field("State").starts_with('T') && field("TracerPid") == "0").then_some(()))
            })?;
            kill(pid, Signal::SIGCONT).context("SIGCONT")?;
        }
        Ok(())
    }

    /// The program's own verdict, and the harness's about times.
    fn judge(&mut self, ended: &str, success: bool) -> Result<Option<String>> {
        let text = fs::read_to_string(self.cwd.join("result"))
            .with_context(|| format!("no verdict; {ended}"))?;
        let first = text.lines().next().unwrap_or_default();
        if let Some(why) = first.strip_prefix("SKIPPED: ") {
            return Ok(Some(why.to_owned()));
        }
        if first != "PASS" {
            bail!("{first}; {ended}");
        }
        if !success {
            bail!("the program passed, but {ended}");
        }
        let numbers = |line: &str| -> Vec<i64> {
            line.split_whitespace()
                .filter_map(|w| w.parse().ok())
                .collect()
        };
        let gaps = text.lines().find_map(|l| l.strip_prefix("gaps "));
        let gaps = gaps.map(numbers).unwrap_or_default();
        let away: i64 = gaps.iter().take(self.mode.absences()).sum();
        for line in text.lines().filter(|l| l.starts_with("timed ")) {
            let [elapsed, wanted] = numbers(line)[..] else {
                bail!("cannot read `{line}`");
            };
            // A point in time comes when it comes, however long one was away; unless one was
            // away when it came.
            let absolute = line.contains(" absolute ");
            let late = elapsed - wanted - if absolute { 0 } else { away };
            println!("{line}: late by {late} us, away {away} us, longest pauses {gaps:?}");
            let early = if self.mode.absences() == 0 || absolute {
                0
            } else {
                EARLY_US
            };
            let slack = if absolute { away } else { 0 };
            if late < -early {
                bail!("{line}: {} us too early (away for {away} us)", -late);
            }
            if late > LATE_US + slack {
                bail!("{line}: {late} us too late (away for {away} us)");
            }
        }
        if self.spec.stdout && self.mode.absences() == 0 {
            let piped = self.piped.take().context("no pipe")?;
            let text = piped.join().map_err(|_| anyhow!("reading the pipe"))?;
            if text != "before\nafter\n" {
                bail!("the program's output, wanted before and after, got {text:?}");
            }
        }
        if let Some(peer) = self.peer.take() {
            peer.finish(LIMIT)?;
        }
        Ok(None)
    }
}
