//! What can be seen of a PVM task on the host it runs on: /proc, and the block that the shim publishes.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use procfs::process::Status;
use pvm_abi::block::{flag, state, wait};
use serde::{Deserialize, Serialize};

use crate::error::{Failure, too_many_files};
use crate::kernel::{maps, pidfd, proc_file};
use crate::pvm::block::TaskBlock;
use crate::pvm::client::{Client, Pvmd};
use crate::pvm::table;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::Task;

/// pvm3.h: PvmRouteDirect
const ROUTE_DIRECT: i32 = 3;

/// The pvmd's flag of a task that is connected to it.
const CONNECTED: i32 = 4;

/// Whether a task runs under the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shim {
    /// It does: it can be moved.
    Yes,
    /// It was started without.
    No,
    /// libpvm is linked into the program itself, where no library gets between.
    Static,
    /// The shim does not know this libpvm, and stands aside.
    Unknown,
}

/// What a task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doing {
    /// On a processor, or waiting for one.
    Running,
    /// Asleep in something that is none of PVM's affair.
    Sleeping,
    /// Asleep in the kernel, where no signal reaches it.
    Waiting,
    /// Waits for messages.
    Receiving,
    /// In a send.
    Sending,
    /// Waits to send to a task that is moving.
    Held,
    /// Is moving itself.
    Moving,
    /// Was saved and has ended, and its partners wait until it is restored.
    Away,
    /// Stopped by a signal.
    Stopped,
    /// Stopped by a debugger or tracer.
    Traced,
    /// Has ended; its parent has not taken note.
    Zombie,
}

/// A task's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Path of the program.
    pub program: Option<String>,
    /// Resident memory in bytes.
    pub memory: u64,
    /// Under the shim?
    pub shim: Shim,
    /// The virtual tid, if the shim says.
    pub virtual_tid: Option<Tid>,
    /// What it is doing.
    pub doing: Doing,
    /// When the process was started.
    pub since: SystemTime,
    /// The program asked for PvmRouteDirect.
    pub direct_route: bool,
    /// It was let have direct routes, and so cannot be moved.
    pub direct_allowed: bool,
}

/// What a host sees of a task of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The tid it has now.
    pub tid: u32,
    /// The virtual tid, if the shim says.
    pub virtual_tid: Option<u32>,
    /// Path of the program.
    pub program: Option<String>,
    /// Resident memory in bytes.
    pub memory: u64,
    pub shim: Shim,
    pub state: Doing,
    /// Since when it is here, seconds since 1970.
    pub since: u64,
    /// The program asked for PvmRouteDirect.
    pub direct_route: bool,
    /// It was let have direct routes, and so cannot be moved.
    pub direct_allowed: bool,
}

/// Looks at a task of this host; none when it has ended, or is another user's.
///
/// # Errors
/// As for [`process`].
pub fn seen(task: &Task) -> Result<Option<Seen>> {
    let process = process(task.pid, task.flags & CONNECTED != 0)?;
    Ok(process.map(|seen| {
        let since = seen.since.duration_since(SystemTime::UNIX_EPOCH);
        Seen {
            tid: task.tid.0,
            virtual_tid: seen.virtual_tid.map(|tid| tid.0),
            program: seen.program,
            memory: seen.memory,
            shim: seen.shim,
            state: seen.doing,
            since: since.unwrap_or_default().as_secs(),
            direct_route: seen.direct_route,
            direct_allowed: seen.direct_allowed,
        }
    }))
}

/// Looks at process `pid`; none when it has ended, or is another user's. `enrolled`: it is connected to its pvmd.
///
/// # Errors
/// When /proc does not look as proc(5) says.
pub fn process(pid: i32, enrolled: bool) -> Result<Option<Process>> {
    let (Ok(status), Ok(stat)) = (
        fs::read_to_string(format!("/proc/{pid}/status")),
        fs::read_to_string(format!("/proc/{pid}/stat")),
    ) else {
        return Ok(None);
    };
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let uid = field("Uid:").and_then(|ids| ids.split_whitespace().next());
    if uid != Some(nix::unistd::getuid().to_string().as_str()) && !nix::unistd::geteuid().is_root()
    {
        return Ok(None);
    }
    let resident = field("VmRSS:")
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    let mut doing = match field("State:").and_then(|s| s.chars().next()) {
        Some('R') => Doing::Running,
        Some('D') => Doing::Waiting,
        Some('T') => Doing::Stopped,
        Some('t') => Doing::Traced,
        Some('Z' | 'X') => Doing::Zombie,
        _ => Doing::Sleeping,
    };
    let mut process = Process {
        program: fs::read_link(format!("/proc/{pid}/exe"))
            .ok()
            .map(|path| path.to_string_lossy().into_owned()),
        memory: resident * 1024,
        shim: Shim::No,
        virtual_tid: None,
        doing,
        since: started(&stat).with_context(|| format!("/proc/{pid}/stat is odd: {stat}"))?,
        direct_route: false,
        direct_allowed: false,
    };
    // What cannot be read (the process has just ended, or is no longer ours) leaves the shim unseen.
    let block = TaskBlock::find(pid).ok().flatten();
    let libpvm = uses_libpvm(pid);
    let Some(block) = block else {
        process.shim = if libpvm || !enrolled {
            Shim::No
        } else {
            Shim::Static
        };
        return Ok(Some(process));
    };
    let (Ok(how), Ok(owner)) = (block.state(), block.enrolled_pid()) else {
        return Ok(None);
    };
    process.shim = match how {
        state::UNKNOWN_LIBPVM => Shim::Unknown,
        state::ENROLLED if owner == pid => Shim::Yes,
        // Loaded, and told of no enrolment.
        _ if enrolled => Shim::Static,
        _ => Shim::Yes,
    };
    if process.shim == Shim::Yes && how == state::ENROLLED {
        process.virtual_tid = block.v().ok().map(Tid);
        process.direct_route = block.route().is_ok_and(|route| route == ROUTE_DIRECT);
        process.direct_allowed = block.flags().is_ok_and(|f| f & flag::DIRECT_ROUTES != 0);
        if matches!(doing, Doing::Running | Doing::Sleeping) {
            doing = match block.wait().unwrap_or(wait::NONE) {
                wait::RECEIVE => Doing::Receiving,
                wait::SEND => Doing::Sending,
                wait::GATE | wait::GATE_DEAF => Doing::Held,
                _ => doing,
            };
        }
        process.doing = doing;
    }
    Ok(Some(process))
}

/// The processes on this host that are PVM tasks with the shim, of whatever virtual machine; as far as this user may see.
///
/// # Errors
/// When /proc cannot be listed.
pub fn tasks() -> Result<impl Iterator<Item = (i32, TaskBlock)>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?.flatten();
    Ok(entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, enrolled(pid).ok()??))
    }))
}

/// The block of a process that is a PVM task with the shim. Another user's processes, and those that just end, are none.
///
/// # Errors
/// When it cannot be said for want of descriptors.
pub fn enrolled(pid: i32) -> Result<Option<TaskBlock>> {
    let block = match TaskBlock::find(pid) {
        Err(e) if too_many_files(&e) => return Err(e),
        found => found.ok().flatten(),
    };
    let is_its = |block: &TaskBlock| {
        let says = (block.state(), block.enrolled_pid());
        matches!(says, (Ok(state::ENROLLED), Ok(own)) if own == pid)
    };
    Ok(block.filter(is_its))
}

/// The process on this host that is the task `tid`, its virtual tid or, where nobody has that, its real one.
///
/// # Errors
/// [`Failure::NoSuchProcess`], which says where the task is if the virtual machine of this environment knows it.
pub fn find(tid: Tid) -> Result<i32> {
    let (mut by_v, mut by_r) = (Vec::new(), Vec::new());
    for (pid, block) in tasks()? {
        if block.v().is_ok_and(|v| v == tid.0) {
            by_v.push(pid);
        } else if block.r().is_ok_and(|r| r == tid.0) {
            by_r.push(pid);
        }
    }
    let found = if by_v.is_empty() { by_r } else { by_v };
    match found[..] {
        [pid] => Ok(pid),
        [] => elsewhere(tid),
        _ => Err(Failure::Usage.because(format!(
            "{} processes are task {tid}, each in a virtual machine of its own: give the pid of the one you mean ({})",
            found.len(),
            found.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
        ))),
    }
}

/// No process here says that it is the task: what the virtual machine says.
fn elsewhere(tid: Tid) -> Result<i32> {
    let nowhere = || {
        Failure::NoSuchProcess.because(format!(
            "no process on this host is PVM task {tid} (`mistctl ps` lists the tasks)"
        ))
    };
    let Ok(Some(pvmd)) = Pvmd::find() else {
        return Err(nowhere());
    };
    let mut client = Client::enrol(&pvmd, 0)?;
    let (own, tasks, hosts) = (client.tid(), client.tasks(Tid::NONE)?, client.hosts()?);
    client.exit()?;
    // Elsewhere it has the tid of the incarnation there.
    let known = pvmd
        .table_path()
        .and_then(|path| table::present(&path, tid.0));
    let now = known.ok().flatten().map_or(tid, Tid);
    let Some(task) = tasks.iter().find(|task| task.tid == now) else {
        return Err(nowhere());
    };
    if task.host.host() == own.host() {
        return Ok(task.pid);
    }
    let host = hosts.iter().find(|h| h.tid.host() == task.host.host());
    Err(Failure::NoSuchProcess.because(format!(
        "task {tid} is on host {}: run mistctl there",
        host.map_or("unknown", |host| &host.name)
    )))
}

/// Whether a process stands by a SIGSTOP, or has one pending that it takes as soon as its tracer lets it go.
pub fn stands(pid: i32) -> bool {
    proc_file::status(pid).is_ok_and(|status| is_stopped(&status))
}

/// Whether a process runs, or sleeps in a call; on its way into a stop it does for a moment, too.
pub fn runs(pid: i32) -> bool {
    let status = proc_file::status(pid);
    status.is_ok_and(|status| status.state.starts_with(['R', 'S', 'D']) && !is_stopped(&status))
}

fn is_stopped(status: &Status) -> bool {
    let pending = (status.sigpnd | status.shdpnd) & 1 << (libc::SIGSTOP - 1);
    status.state.starts_with('T') || pending != 0
}

/// Whether somebody traces a process and goes on doing so: one that is being killed lets go in a moment.
pub fn is_traced(pid: i32) -> bool {
    const MOMENT: u16 = 200;
    let status = proc_file::status(pid);
    let tracer = status.map_or(0, |status| status.tracerpid);
    let Ok(tracer) = pidfd::open(tracer) else {
        return false;
    };
    let mut ended = [PollFd::new(tracer.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut ended, PollTimeout::from(MOMENT)) {
            Err(nix::errno::Errno::EINTR) => {}
            done => return done == Ok(0),
        }
    }
}

/// When a process was started: field 22 of its stat (clock ticks after the boot), which follows a name that may
/// hold anything.
fn started(stat: &str) -> Option<SystemTime> {
    let after_name = stat.rsplit_once(')')?.1;
    let ticks: u64 = after_name.split_whitespace().nth(19)?.parse().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let per_second = u64::try_from(per_second).ok().filter(|n| *n > 0)?;
    let text = fs::read_to_string("/proc/stat").ok()?;
    let boot = text.lines().find_map(|line| line.strip_prefix("btime "))?;
    let boot: u64 = boot.trim().parse().ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(boot.checked_add(ticks / per_second)?))
}

/// Whether a process has libpvm as a library.
pub fn uses_libpvm(pid: i32) -> bool {
    let is_libpvm = |m: &maps::Map| {
        let name = m.shown().and_then(|p| p.file_name());
        name.is_some_and(|n| n.to_string_lossy().starts_with("libpvm3.so"))
    };
    maps::read(pid).is_ok_and(|maps| maps.iter().any(is_libpvm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_without_a_shim() {
        let me = process(std::process::id() as i32, false).unwrap().unwrap();
        assert_eq!(me.shim, Shim::No);
        assert!(me.memory > 0 && me.since <= SystemTime::now());
        assert_eq!(
            me.program.unwrap(),
            std::env::current_exe().unwrap().to_string_lossy()
        );
        // A task that is enrolled and has no libpvm has it inside.
        let me = process(std::process::id() as i32, true).unwrap().unwrap();
        assert_eq!(me.shim, Shim::Static);
    }

    #[test]
    fn a_process_that_is_not_there_is_none() {
        assert!(process(i32::MAX, true).unwrap().is_none());
    }

    #[test]
    fn a_name_with_brackets_and_spaces_does_no_harm() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 0 20";
        assert!(started(stat).is_some());
        assert!(started("7 (a").is_none());
        assert!(started("7 (a) S 1").is_none());
    }
}
