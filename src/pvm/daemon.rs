//! Starts and ends a virtual machine whose tasks all get the shim.
//!
//! The master pvmd has it in its environment, so every task it starts has it too. The pvmds of other hosts are
//! started by the master through PVM_RSH, with a command line that begins with PVM_DPATH, or with a host's own `dx=`;
//! there it is put in with env(1).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use pvm_abi::place;

use crate::error::Failure;
use crate::kernel::pidfd;
use crate::pvm::client::{Client, PATIENCE, Pvmd};
use crate::pvm::table::TidTable;
use crate::pvm::virtual_machine::Host;

/// How long hosts may take to be added, all of them.
const ADDING: Duration = Duration::from_secs(180);
/// The command by which a pvmd is started on another host, unless PVM_DPATH says otherwise: pvmd's own default.
const PVMD: &str = "pvmd";
/// How long a pvmd may take to end that could not be brought up, and how often that is looked at.
const ENDING: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);

/// What to start.
#[derive(Debug)]
pub struct Start<'a> {
    /// The shim, at the same path on every host.
    pub library: &'a Path,
    /// Value of LD_PRELOAD here: the shim and what was there before.
    pub preload: &'a std::ffi::OsStr,
    /// All other variables, for the pvmd and its tasks.
    pub environment: &'a [(std::ffi::OsString, std::ffi::OsString)],
    /// A hostfile as pvmd reads it.
    pub hostfile: Option<&'a Path>,
    /// The name by which other hosts reach this one; without it, the hostname.
    pub name: Option<&'a str>,
}

/// What was started.
#[derive(Debug)]
pub struct Started {
    /// The master pvmd.
    pub pid: i32,
    /// The hosts there are.
    pub hosts: Vec<Host>,
    /// Hosts of the hostfile that could not be added, and why.
    pub failed: Vec<(String, String)>,
    /// The tid table of this host.
    pub table: PathBuf,
}

/// Starts a virtual machine; returns when it answers and the hosts of the hostfile are in it.
///
/// # Errors
/// When one is running already ([`Failure::Busy`]), or the master pvmd does not start; nothing is left then.
pub fn start(what: &Start<'_>) -> Result<Started> {
    let file = place::own_address_file();
    clear_dead(&file)?;
    let hosts = match what.hostfile {
        Some(path) => {
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read the hostfile {}", path.display()))?;
            Some(Hostfile::of(&text, what))
        }
        None => None,
    };
    let mut pvmd = launch(what, hosts.as_ref(), &file)?;
    let pid = pvmd.id() as i32;
    match bring_up(pid, &file, hosts.as_ref()) {
        Err(e) if !take_down(&mut pvmd) => Err(match clear(&file) {
            Ok(()) => e,
            Err(left) => e.context(format!(
                "the pvmd was killed, for what follows, and its files are still there ({left:#})"
            )),
        }),
        done => done,
    }
}

/// Ends a pvmd. SIGTERM makes it take its files away, and its tasks and slaves down; one that comes right before it waits
/// for other things it sees at the next one only, and one that comes while it writes to its log hangs it (its handler calls
/// localtime(3), too). False: it was killed, so its files are still there; its tasks and slaves end when they miss it.
fn take_down(pvmd: &mut Child) -> bool {
    let pid = nix::unistd::Pid::from_raw(pvmd.id() as i32);
    let until = Instant::now() + ENDING;
    let mut again = Instant::now();
    while Instant::now() < until {
        if matches!(pvmd.try_wait(), Ok(Some(_)) | Err(_)) {
            return true;
        }
        if again <= Instant::now() {
            let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
            again = Instant::now() + Duration::from_secs(1);
        }
        std::thread::sleep(LOOK);
    }
    let _ = pvmd.kill();
    let _ = pvmd.wait();
    false
}

/// Refuses to start beside a pvmd that lives; takes away what one has left that does not.
fn clear_dead(file: &Path) -> Result<()> {
    let Some(pvmd) = Pvmd::find_at(None, file)? else {
        return Ok(());
    };
    if !pvmd.is_dead()? {
        return Err(Failure::Busy.because(format!(
            "a pvmd is running already ({}); `mistctl pvm stop` ends it, or give this one another PVM_VMID or PVM_TMP",
            file.display()
        )));
    }
    clear(file)
}

fn clear(file: &Path) -> Result<()> {
    let socket = place::anchor(None, file);
    for path in [socket.as_path(), file] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| {
                    format!("cannot remove {}, left by a pvmd that died", path.display())
                });
            }
            _ => {}
        }
    }
    place::sweep(&socket);
    Ok(())
}

/// Starts the master pvmd and waits until it says that it listens.
fn launch(what: &Start<'_>, hosts: Option<&Hostfile>, file: &Path) -> Result<Child> {
    let tmp = file.parent().unwrap_or(Path::new("/tmp"));
    let hostfile = hosts
        .map(|hosts| Scratch::new(tmp, "hosts", &hosts.text))
        .transpose()?;
    let errors = Scratch::new(tmp, "errors", "")?;
    let mut command = Command::new(program());
    if let Some(name) = what.name {
        command.arg(format!("-n{name}"));
    }
    if let Some(hostfile) = &hostfile {
        command.arg(&hostfile.path);
    }
    let said = errors.file.try_clone().context("cannot duplicate a file")?;
    let variables = what.environment.iter().map(|(name, value)| (name, value));
    command
        .env_clear()
        .envs(variables)
        .env("LD_PRELOAD", what.preload)
        .env("PVM_DPATH", with_env(what.library, &remote_pvmd()))
        .env_remove("PVMSOCK")
        .env_remove("PVMEPID")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(said)
        // Ctrl-C in the shell that started it is not meant for it.
        .process_group(0);
    let mut pvmd = command
        .spawn()
        .with_context(|| format!("cannot start {}; apt install pvm", program().display()))?;
    if let Err(e) = until_it_listens(&mut pvmd) {
        let _ = pvmd.kill();
        let _ = pvmd.wait();
        let said = errors.read();
        let log = log_of(file);
        return Err(e).with_context(|| format!("pvmd does not start: {} {log}", said.trim()));
    }
    Ok(pvmd)
}

/// The pvmd of this host.
fn program() -> PathBuf {
    let root = std::env::var_os("PVM_ROOT").map(PathBuf::from);
    let candidates = root.into_iter().map(|root| root.join("lib/pvmd"));
    candidates
        .chain([PathBuf::from("/usr/lib/pvm3/lib/pvmd")])
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(PVMD))
}

fn remote_pvmd() -> String {
    std::env::var("PVM_DPATH").unwrap_or_else(|_| PVMD.to_owned())
}

/// A command line that preloads the shim, for the shell of another host.
fn with_env(library: &Path, command: &str) -> String {
    let preload = format!("LD_PRELOAD={}", library.display());
    if command.contains(&preload) {
        return command.to_owned();
    }
    format!("env {preload} {command}")
}

/// Its first line of output is its address.
fn until_it_listens(pvmd: &mut Child) -> Result<()> {
    let mut out = pvmd.stdout.take().context("pvmd has no standard output")?;
    let until = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    while !line.contains(&b'\n') {
        let left = until.saturating_duration_since(Instant::now());
        let ms = left.as_millis().min(60_000) as u16;
        let ready = poll(
            &mut [PollFd::new(out.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(ms),
        );
        match ready {
            Ok(0) => bail!("it did not listen within {} s", PATIENCE.as_secs()),
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("poll of pvmd's output")?,
        };
        let mut bytes = [0; 4096];
        let count = out.read(&mut bytes).context("cannot read pvmd's output")?;
        if count == 0 {
            bail!("it ended");
        }
        line.extend_from_slice(bytes.get(..count).unwrap_or_default());
    }
    Ok(())
}

fn bring_up(pid: i32, file: &Path, hostfile: Option<&Hostfile>) -> Result<Started> {
    let pvmd = Pvmd::find_at(None, file)?
        .with_context(|| format!("pvmd has started, but {} is missing", file.display()))?;
    let mut client = Client::enrol(&pvmd, 0)?;
    let table = crate::pvm::table::path_for(None, file)?;
    // Made now, so that tasks find one they can trust; whoever changes it locks it again.
    TidTable::open(&table)?;
    let mut failed = Vec::new();
    let names = hostfile.map_or(&[][..], |hosts| &hosts.start);
    if !names.is_empty() {
        let added = client.add_hosts(names, ADDING)?;
        for (name, added) in names.iter().zip(added) {
            match added {
                Ok(_) => {}
                // The hostfile may name this host too.
                Err(why) if why.starts_with("PvmDupHost") => {}
                Err(why) => failed.push((name.clone(), why)),
            }
        }
    }
    let hosts = client.hosts()?;
    client.exit()?;
    Ok(Started {
        pid,
        hosts,
        failed,
        table,
    })
}

/// The last lines of a pvmd's log.
fn log_of(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let log = file.with_file_name(name.replacen("pvmd.", "pvml.", 1));
    let text = fs::read(&log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    if lines.is_empty() {
        return String::new();
    }
    let last: Vec<&str> = lines.into_iter().rev().collect();
    format!("({}: {})", log.display(), last.join("; "))
}

/// A hostfile, changed so that every pvmd gets the shim.
#[derive(Debug, PartialEq, Eq)]
struct Hostfile {
    /// What pvmd is to read. It starts none of these hosts by itself: they are added when it answers, which tells
    /// of each whether it came.
    text: String,
    /// Those to be added.
    start: Vec<String>,
}

impl Hostfile {
    fn of(text: &str, what: &Start<'_>) -> Hostfile {
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        let own = what
            .name
            .map_or_else(|| hostname.to_string_lossy().into_owned(), str::to_owned);
        Hostfile::read(text, what.library, &own)
    }

    fn read(text: &str, library: &Path, own: &str) -> Hostfile {
        let mut file = Hostfile {
            text: String::new(),
            start: Vec::new(),
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let Some(first) = words.next().filter(|word| !word.starts_with('#')) else {
                continue;
            };
            if first.starts_with(['*', '&']) || first == own {
                file.text.push_str(first);
            } else {
                file.start.push(first.to_owned());
                file.text.push('&');
                file.text.push_str(first);
            }
            for word in words {
                file.text.push(' ');
                match word.strip_prefix("dx=") {
                    // A value holds no spaces; the remote shell makes some.
                    Some(command) => {
                        let command = with_env(library, command).replace(' ', "${IFS}");
                        file.text.push_str(&format!("dx={command}"));
                    }
                    None => file.text.push_str(word),
                }
            }
            file.text.push('\n');
        }
        file
    }
}

/// A file that is gone when it is not needed any more.
struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    fn new(dir: &Path, what: &str, text: &str) -> Result<Scratch> {
        let path = dir.join(format!("pvmtmp.mist-{what}.{}", std::process::id()));
        // One that a mistctl of this pid left, or that somebody else put there.
        let _ = fs::remove_file(&path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        std::io::Write::write_all(&mut file, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Scratch { path, file })
    }

    fn read(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = &self.file;
        if file.seek(SeekFrom::Start(0)).is_ok() {
            let _ = file.take(4096).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What was ended.
#[derive(Debug)]
pub struct Stopped {
    /// The pvmd of this host; none if it cannot be told, as on hosts that were added.
    pub pid: Option<i32>,
    /// The hosts there were; none if the pvmd had died before.
    pub hosts: Vec<Host>,
}

/// Ends the virtual machine, with all its tasks and on all its hosts, and takes away what it leaves on this one.
/// Returns when the pvmd of this host has ended.
///
/// # Errors
/// When none is running ([`Failure::NoSuchProcess`]), or it does not end.
pub fn stop() -> Result<Stopped> {
    let file = place::own_address_file();
    let Some(pvmd) = Pvmd::find()? else {
        return Err(Failure::NoSuchProcess.because(format!(
            "no virtual machine is running here: {} is missing",
            file.display()
        )));
    };
    if pvmd.is_dead()? {
        clear(&file)?;
        return Ok(Stopped {
            pid: None,
            hosts: Vec::new(),
        });
    }
    let socket = place::anchor(None, &file);
    let mut client = Client::enrol(&pvmd, 0)?;
    let hosts = client.hosts()?;
    let pid = client.pvmd_pid();
    // Without a pid (or if it has just ended) the end of the connection has to do.
    let process = pid.and_then(|pid| pidfd::open(pid).ok());
    // The pvmd will send SIGTERM to all its tasks, and we are one.
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().context("cannot block SIGTERM")?;
    client.halt()?;
    let until = Instant::now() + PATIENCE;
    // Nothing that comes now matters; the end of the connection does.
    while let Ok(message) = client.recv(Some(until.saturating_duration_since(Instant::now()))) {
        if message.is_none() {
            bail!("the pvmd did not end within {} s", PATIENCE.as_secs());
        }
    }
    if let Some(process) = process {
        let left = until.saturating_duration_since(Instant::now());
        let ms = left.as_millis().min(60_000) as u16;
        let ended = poll(
            &mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(ms),
        )
        .context("poll of the pvmd's process")?;
        if ended == 0 {
            bail!(
                "pvmd {} did not end within {} s",
                pid.unwrap_or_default(),
                PATIENCE.as_secs()
            );
        }
    }
    if socket.as_os_str().as_bytes() != file.as_os_str().as_bytes() {
        place::sweep(&socket);
    }
    place::sweep(&file);
    Ok(Stopped { pid, hosts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostfile_is_changed_so_that_every_pvmd_gets_the_shim() {
        let text = "# ours\n\n* ep=/x\nh0 sp=10\nh1\n  h2 dx=/opt/pvmd ep=/y\n&h3 dx=pvmd\n";
        let file = Hostfile::read(text, Path::new("/l/s.so"), "h0");
        assert_eq!(
            file.text,
            "* ep=/x\nh0 sp=10\n&h1\n\
             &h2 dx=env${IFS}LD_PRELOAD=/l/s.so${IFS}/opt/pvmd ep=/y\n\
             &h3 dx=env${IFS}LD_PRELOAD=/l/s.so${IFS}pvmd\n"
        );
        assert_eq!(file.start, ["h1", "h2"]);
    }

    #[test]
    fn a_command_gets_the_shim_once() {
        let once = with_env(Path::new("/l/s.so"), "pvmd");
        assert_eq!(once, "env LD_PRELOAD=/l/s.so pvmd");
        assert_eq!(with_env(Path::new("/l/s.so"), &once), once);
    }
}
