//! A virtual machine of one host for tests of the shim, and tasks that do what they are told.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use mistctl::pvm::block::TaskBlock;
use mistctl::pvm::table::{TidTable, path_for};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{User, geteuid};

use crate::common;

/// The user under which the tests run when they are started by root: pvmd refuses root, as it should.
const USER: &str = "mist-shim";
/// Set for a test that runs under that user: the folder with what it needs.
const KIT: &str = "MIST_SHIM_KIT";
/// mistctl with a file capability, in the kit; not there where that cannot be had.
pub const STRONG: &str = "strong-mistctl";
/// How long anything may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A test: a name, which reads as a sentence, and what it does, given the folder of the kit.
pub type Test = (&'static str, fn(&Path));

/// Runs the tests as an ordinary user, one after the other: they share a virtual machine.
pub fn main(tests: &[Test]) -> ExitCode {
    for file in ["/usr/bin/pvmd", "/usr/include/pvm3.h", "/usr/bin/gcc"] {
        if !Path::new(file).exists() {
            eprintln!(
                "SKIPPED: all {} tests of the shim: {file} is missing (packages pvm, pvm-dev, gcc)",
                tests.len()
            );
            return ExitCode::SUCCESS;
        }
    }
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let kit = std::env::var_os(KIT).map(PathBuf::from);
    if kit.is_none() && !args.list {
        return outside();
    }
    let trial = |(name, body): &Test| {
        let (body, kit) = (*body, kit.clone().unwrap_or_default());
        Trial::test(name.replace(' ', "_"), move || {
            body(&kit);
            Ok(())
        })
    };
    libtest_mimic::run(&args, tests.iter().map(trial).collect()).exit_code()
}

/// Prepares a kit where an ordinary user can reach it, and runs the tests as such a user.
fn outside() -> ExitCode {
    let root = geteuid().is_root();
    if root && User::from_name(USER).unwrap().is_none() {
        let made = Command::new("useradd")
            .args(["--system", "--create-home", USER])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: all tests of the shim: cannot make the user {USER}");
            return ExitCode::SUCCESS;
        }
    }
    let dir = tempfile::Builder::new()
        .prefix("mist-shim-kit-")
        .tempdir()
        .unwrap();
    let kit = dir.path();
    fs::set_permissions(kit, fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(library(), kit.join("libmistshim.so")).unwrap();
    fs::copy(std::env::current_exe().unwrap(), kit.join("tests")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_mistctl"), kit.join("mistctl")).unwrap();
    make_strong(kit);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim");
    for program in ["actor", "api"] {
        let libraries = ["-lgpvm3", "-lpvm3"].map(String::from);
        let built = common::build_c(&sources.join(format!("{program}.c")), &libraries).unwrap();
        fs::copy(built, kit.join(program)).unwrap();
    }
    let mut tests = Command::new(kit.join("tests"));
    tests
        .args(std::env::args().skip(1))
        .env(KIT, kit)
        .current_dir(kit)
        .stdin(Stdio::null());
    if root {
        let user = User::from_name(USER).unwrap().unwrap();
        tests.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    let ended = tests.status().unwrap();
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&ended) {
        eprintln!("the tests were ended by signal {signal}");
    }
    match ended.code() {
        Some(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Puts mistctl as an administrator installs it beside the other one.
fn make_strong(kit: &Path) {
    let strong = kit.join(STRONG);
    fs::copy(env!("CARGO_BIN_EXE_mistctl"), &strong).unwrap();
    let set = Command::new("setcap")
        .arg("cap_sys_ptrace=ep")
        .arg(&strong)
        .status();
    if !set.is_ok_and(|status| status.success()) {
        fs::remove_file(strong).unwrap();
    }
}

/// The shim: the one MIST_SHIM_LIBRARY names, or one that is built now.
fn library() -> PathBuf {
    if let Some(path) = std::env::var_os("MIST_SHIM_LIBRARY") {
        return PathBuf::from(path);
    }
    let (profile, flag) = if cfg!(debug_assertions) {
        ("debug", None)
    } else {
        ("release", Some("--release"))
    };
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "-p", "pvm-shim"])
        .args(flag)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(
        build.status().unwrap().success(),
        "cargo build -p pvm-shim failed"
    );
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    target.join(profile).join("libmistshim.so")
}

/// A virtual machine with a folder, a pvmd and a tid table of its own.
pub struct Vm {
    /// PVM_TMP of the virtual machine.
    pub dir: PathBuf,
    /// Where the programs are.
    pub kit: PathBuf,
    /// The daemon.
    pub pvmd: Child,
    /// The line pvmd prints: where it listens.
    pub address: String,
}

impl Vm {
    /// Starts one, all of whose tasks get the shim.
    pub fn start(kit: &Path) -> Vm {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Tasks that outlive their pvmd come to us, not to an init that may not reap.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let dir = std::env::temp_dir().join(format!("mist-vm-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Vm::start_in(kit, dir, true)
    }

    /// Starts one that knows nothing of the shim.
    pub fn start_bare(kit: &Path) -> Vm {
        let dir = std::env::temp_dir().join(format!("mist-bare-vm-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Vm::start_in(kit, dir, false)
    }

    /// Starts one in a folder that is there.
    pub fn start_in(kit: &Path, dir: PathBuf, shim: bool) -> Vm {
        let mut vm = Vm {
            dir,
            kit: kit.to_owned(),
            pvmd: Command::new("true").spawn().unwrap(),
            address: String::new(),
        };
        vm.pvmd.wait().unwrap();
        let mut pvmd = vm
            .command("pvmd", shim)
            .arg("-n127.0.0.1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(pvmd.stdout.take().unwrap())
            .read_line(&mut vm.address)
            .unwrap();
        vm.pvmd = pvmd;
        vm.address.pop();
        assert!(
            vm.address.starts_with('/'),
            "pvmd did not start: {}",
            fs::read_to_string(vm.log()).unwrap_or_default()
        );
        vm
    }

    /// pvmd's log.
    pub fn log(&self) -> PathBuf {
        self.dir.join(format!("pvml.{}", geteuid()))
    }

    /// A command in the environment of the virtual machine.
    pub fn command(&self, program: &str, shim: bool) -> Command {
        let kit = self.kit.join(program);
        let mut command = Command::new(if kit.exists() {
            kit
        } else {
            PathBuf::from(program)
        });
        command
            .env("PVM_TMP", &self.dir)
            .env("PVM_ROOT", "/usr/lib/pvm3")
            .env("PVM_ARCH", "LINUX64")
            .env("PVM_PATH", format!("{}:/usr/bin", self.kit.display()))
            .env("HOME", &self.dir)
            .env_remove("PVMSOCK")
            .env_remove("LD_PRELOAD")
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        if shim {
            command.env("LD_PRELOAD", self.kit.join("libmistshim.so"));
        }
        command
    }

    /// A task under the shim.
    pub fn actor(&self) -> Actor {
        Actor::over_pipes(self.command("actor", true))
    }

    /// A task without the shim.
    pub fn bare_actor(&self) -> Actor {
        Actor::over_pipes(self.command("actor", false))
    }

    /// A task under the shim that is let have direct routes.
    pub fn direct_actor(&self) -> Actor {
        let mut command = self.command("actor", true);
        command.env("MIST_DIRECT_ROUTES", "1");
        Actor::over_pipes(command)
    }

    /// A place where a task that PVM starts can be spoken to: the arguments it needs.
    pub fn stage(&self, name: &str) -> (Stage, String) {
        Stage::new(&self.dir, name)
    }

    /// The tid table, for changes.
    pub fn table(&self) -> TidTable {
        let path = path_for(None, &self.dir.join(format!("pvmd.{}", geteuid()))).unwrap();
        TidTable::open(&path).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pvmd.id() as i32);
        // SIGTERM makes pvmd end its tasks and take its files away; one that comes right before it waits for other things
        // it sees only when it has waited for them, or at the next one. One that comes while it writes to its log hangs it:
        // its handler writes to that, too, and waits for localtime(3) for ever.
        let asked = (0..3).any(|_| {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let ended = || Ok(self.pvmd.try_wait()?);
            common::wait_for("pvmd to end", Duration::from_secs(1), ended).is_ok()
        });
        if !asked {
            let _ = self.pvmd.kill();
            let _ = self.pvmd.wait();
        }
        if std::thread::panicking() {
            eprintln!(
                "pvmd's log: {}",
                fs::read_to_string(self.log()).unwrap_or_default()
            );
        }
        while let Ok(status) = nix::sys::wait::waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == nix::sys::wait::WaitStatus::StillAlive {
                break;
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Two FIFOs.
pub struct Stage {
    to: PathBuf,
    from: PathBuf,
}

impl Stage {
    /// FIFOs in a folder, and the arguments for who is to use them.
    pub fn new(dir: &Path, name: &str) -> (Stage, String) {
        let (to, from) = (
            dir.join(format!("{name}.in")),
            dir.join(format!("{name}.out")),
        );
        for fifo in [&to, &from] {
            nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
            // Whoever runs the tests, the task may be another user's.
            fs::set_permissions(fifo, fs::Permissions::from_mode(0o666)).unwrap();
        }
        let args = format!("{} {}", to.display(), from.display());
        (Stage { to, from }, args)
    }

    /// The task that was started with the stage's arguments.
    pub fn actor(self) -> Actor {
        let open = |path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap()
        };
        Actor::new(None, Box::new(open(&self.to)), open(&self.from))
    }
}

/// A task that does what it is told.
pub struct Actor {
    child: Option<Child>,
    to: Mutex<Box<dyn Write + Send>>,
    from: Receiver<String>,
    /// Lines that were no answers.
    pub said: Vec<String>,
}

impl Actor {
    fn over_pipes(mut command: Command) -> Actor {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to: ChildStdin = child.stdin.take().unwrap();
        let from = child.stdout.take().unwrap();
        Actor::new(Some(child), Box::new(to), from)
    }

    fn new(
        child: Option<Child>,
        to: Box<dyn Write + Send>,
        from: impl std::io::Read + Send + 'static,
    ) -> Actor {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Actor {
            child,
            to: Mutex::new(to),
            from: receiver,
            said: Vec::new(),
        }
    }

    /// Gives a command and does not wait.
    pub fn tell(&self, command: &str) {
        let mut to = self.to.lock().unwrap();
        writeln!(to, "{command}").unwrap();
        to.flush().unwrap();
    }

    /// Waits for the answer to a command.
    pub fn answer(&mut self) -> String {
        loop {
            let line = self
                .from
                .recv_timeout(LIMIT)
                .expect("the task does not answer");
            match line.strip_prefix("= ") {
                Some(answer) => return answer.trim().to_owned(),
                None if line == "=" => return String::new(),
                None => self.said.push(line),
            }
        }
    }

    /// Gives a command and waits for its answer.
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    /// As [`Actor::ask`], for an answer that is a tid.
    pub fn tid(&mut self, command: &str) -> u32 {
        let answer = self.ask(command);
        u32::from_str_radix(&answer, 16).unwrap_or_else(|_| panic!("{command}: {answer} is no tid"))
    }

    /// Enrols; the tid it thinks it has.
    pub fn enrol(&mut self) -> u32 {
        self.tid("mytid")
    }

    /// Process of the task.
    pub fn pid(&mut self) -> i32 {
        match &self.child {
            Some(child) => child.id() as i32,
            None => self.ask("pid").parse().unwrap(),
        }
    }

    /// What it publishes.
    pub fn block(&mut self) -> TaskBlock {
        let pid = self.pid();
        TaskBlock::find(pid)
            .unwrap()
            .expect("the task has no block")
    }

    /// Lets it leave PVM and end.
    pub fn leave(mut self) {
        self.ask("exit");
        self.tell("quit");
        self.answer();
        if let Some(child) = &mut self.child {
            child.wait().unwrap();
        }
        self.child = None;
    }

    /// Ends it as a crash would.
    pub fn crash(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `found` says so.
pub fn until(what: &str, mut found: impl FnMut() -> bool) {
    common::wait_for(what, LIMIT, || Ok(found().then_some(()))).unwrap();
}

/// Waits until a task waits in this way (see `pvm_abi::block::wait`).
pub fn until_waits(block: &TaskBlock, wait: u32) {
    until("the task to wait", || {
        block.wait().unwrap() == wait && block.asking().unwrap() == 0
    });
}
