//! What this host allows: every feature is tried, not concluded from a version.

mod trials;

use std::fs;
use std::io;
use std::path::PathBuf;

use caps::Capability;
use serde::Serialize;

use super::caps::{self as privileges, NEEDS, Need};

/// A feature of the kernel, the CPU or our privileges, and what was found.
#[derive(Debug, Clone, Serialize)]
pub struct Feature {
    /// Heading it belongs under.
    pub group: &'static str,
    pub name: &'static str,
    pub state: State,
    /// Nothing can be dumped or restored without it.
    pub needed: bool,
    /// What was found, or the error.
    pub found: String,
    /// What its lack costs; empty where it is there.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub cost: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Yes,
    /// In part, or only in some cases.
    Limited,
    No,
}

/// Everything that was probed.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// uname -r and -m.
    pub kernel: String,
    pub machine: String,
    /// What needs nothing that is missing: dump and restore.
    pub works: bool,
    /// How memory that changed is found: "wp_async", "soft_dirty" or "none" (full dumps).
    pub dirty_tracking: &'static str,
    pub features: Vec<Feature>,
    /// The command that gives this program the capabilities it lacks, for an ordinary user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setcap: Option<String>,
}

/// Tries everything. Takes some milliseconds; leaves nothing behind.
pub fn host() -> Host {
    let mut list = List::default();
    processes(&mut list);
    capabilities(&mut list);
    let dirty_tracking = memory(&mut list);
    restoring(&mut list);
    sockets(&mut list);
    let uname = nix::sys::utsname::uname();
    let text = |s: Option<&std::ffi::OsStr>| s.unwrap_or_default().to_string_lossy().into_owned();
    Host {
        kernel: text(uname.as_ref().ok().map(|u| u.release())),
        machine: text(uname.as_ref().ok().map(|u| u.machine())),
        works: list.0.iter().all(|f| !f.needed || f.state != State::No),
        dirty_tracking,
        features: list.0,
        setcap: setcap(),
    }
}

/// Components of xstate that this kernel keeps for a process (XCR0), a bit each, if that can be found out.
pub fn xfeatures() -> Option<u64> {
    let foreign = trials::foreign().ok()?;
    (foreign.xstate >= 0).then_some(foreign.xfeatures as u64)
}

#[derive(Default)]
struct List(Vec<Feature>);

impl List {
    /// Adds what a trial found: `Ok` says more about it, where there is more to say.
    fn add(
        &mut self,
        group: &'static str,
        name: &'static str,
        trial: io::Result<String>,
        cost: &'static str,
    ) -> bool {
        let (state, found, cost) = match trial {
            Ok(found) => (State::Yes, found, ""),
            Err(e) => (State::No, e.to_string(), cost),
        };
        self.0.push(Feature {
            group,
            name,
            state,
            needed: false,
            found,
            cost,
        });
        state == State::Yes
    }

    fn limited(
        &mut self,
        group: &'static str,
        name: &'static str,
        found: String,
        cost: &'static str,
    ) {
        self.0.push(Feature {
            group,
            name,
            state: State::Limited,
            needed: false,
            found,
            cost,
        });
    }

    /// Marks the feature added last as one nothing goes without.
    fn needed(&mut self) {
        if let Some(last) = self.0.last_mut() {
            last.needed = true;
        }
    }
}

fn ok(trial: io::Result<()>) -> io::Result<String> {
    trial.map(|()| String::new())
}

fn word(result: i64) -> io::Result<String> {
    if result < 0 {
        Err(io::Error::from_raw_os_error((-result) as i32))
    } else {
        Ok(String::new())
    }
}

fn sysctl(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok()?;
    Some(text.trim().to_owned())
}

fn processes(list: &mut List) {
    const GROUP: &str = "Reading a process";
    let foreign = match trials::foreign() {
        Ok(f) => f,
        Err(e) => {
            list.add(GROUP, "ptrace", Err(e), "nothing can be dumped");
            return list.needed();
        }
    };
    let yama = match sysctl("kernel.yama.ptrace_scope") {
        Some(scope) => format!("kernel.yama.ptrace_scope is {scope}"),
        None => "no Yama".to_owned(),
    };
    list.add(
        GROUP,
        "ptrace",
        word(foreign.seize)
            .map(|_| yama.clone())
            .map_err(|e| io::Error::other(format!("{e}; {yama}"))),
        "nothing can be dumped: set kernel.yama.ptrace_scope to 0, or give mistctl CAP_SYS_PTRACE",
    );
    list.needed();
    list.add(
        GROUP,
        "process_vm_readv",
        word(foreign.vm_read),
        "memory is read through /proc/PID/mem, which is slower",
    );
    list.add(
        GROUP,
        "pidfd_getfd",
        word(foreign.pidfd_getfd),
        "sockets and pipes cannot be looked into",
    );
    list.needed();
    list.add(
        GROUP,
        "kcmp",
        word(foreign.kcmp),
        "files shared by dup and fork are not recognised (CONFIG_KCMP)",
    );
    list.needed();
    list.add(
        GROUP,
        "PTRACE_GET_RSEQ_CONFIGURATION",
        word(foreign.rseq),
        "programs that use restartable sequences (glibc 2.35 and later) cannot be dumped",
    );
    list.add(
        GROUP,
        "registers with xstate",
        word(foreign.xstate).map(|_| xstate(foreign.xstate, foreign.xfeatures)),
        "nothing can be dumped",
    );
    list.needed();
    list.add(
        GROUP,
        "/proc/PID/map_files",
        ok(trials::map_files()),
        "deleted files that are mapped cannot be read: needs CAP_CHECKPOINT_RESTORE",
    );
    list.add(
        GROUP,
        "/proc/timer_list",
        fs::File::open("/proc/timer_list").map(|_| String::new()),
        "a time-out that stops with EINTR (epoll_wait, sigtimedwait) is continued to the millisecond, not exactly; readable by root only",
    );
    match trials::vdso_tail() {
        Ok((tail, size)) if tail >= 1024 => {
            let found = format!("{tail} bytes behind the vDSO's {}", size - tail);
            list.add(GROUP, "room for calls in the vDSO", Ok(found), "");
        }
        Ok((tail, _)) => {
            list.limited(
                GROUP,
                "room for calls in the vDSO",
                format!("{tail} bytes"),
                "the program's entry code is borrowed instead",
            );
        }
        Err(e) => {
            list.add(
                GROUP,
                "room for calls in the vDSO",
                Err(e),
                "the program's entry code is borrowed instead",
            );
        }
    }
}

/// "2696 bytes: AVX, AVX-512, PKU".
fn xstate(size: i64, features: i64) -> String {
    const NAMES: [(u32, &str); 6] = [
        (2, "AVX"),
        (5, "AVX-512"),
        (9, "PKU"),
        (11, "shadow stacks"),
        (17, "AMX"),
        (19, "APX"),
    ];
    let names: Vec<&str> = NAMES
        .iter()
        .filter(|(bit, _)| features >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect();
    format!(
        "{size} bytes: {}",
        if names.is_empty() {
            "SSE".to_owned()
        } else {
            names.join(", ")
        }
    )
}

fn capabilities(list: &mut List) {
    const GROUP: &str = "Privileges";
    for need in &NEEDS {
        let name = name_of(need.capability);
        let trial = if privileges::held(need.capability) {
            Ok(String::new())
        } else if privileges::obtainable(need.capability) {
            Err(io::Error::other("not held"))
        } else {
            Err(io::Error::other(
                "not to be had on this host, not even by root",
            ))
        };
        list.add(GROUP, name, trial, need.without);
    }
    let found =
        match program().and_then(|p| privileges::file_capabilities(&p).map_err(io::Error::other)) {
            Ok(Some(bits)) => capability_names(bits),
            Ok(None) if nix::unistd::getuid().is_root() => "none; root needs none".to_owned(),
            Ok(None) => "none".to_owned(),
            Err(e) => e.to_string(),
        };
    match setcap() {
        None => drop(list.add(GROUP, "file capabilities of mistctl", Ok(found), "")),
        Some(_) => list.limited(
            GROUP,
            "file capabilities of mistctl",
            found,
            "see the setcap line below",
        ),
    }
}

fn name_of(c: Capability) -> &'static str {
    match c {
        Capability::CAP_SYS_PTRACE => "CAP_SYS_PTRACE",
        Capability::CAP_CHECKPOINT_RESTORE => "CAP_CHECKPOINT_RESTORE",
        Capability::CAP_SYS_ADMIN => "CAP_SYS_ADMIN",
        Capability::CAP_SYS_TIME => "CAP_SYS_TIME",
        Capability::CAP_NET_ADMIN => "CAP_NET_ADMIN",
        Capability::CAP_SYS_RESOURCE => "CAP_SYS_RESOURCE",
        _ => "another capability",
    }
}

fn capability_names(bits: u64) -> String {
    let names: Vec<String> = ::caps::all()
        .into_iter()
        .filter(|c| bits & c.bitmask() != 0)
        .map(|c| c.to_string().to_lowercase())
        .collect();
    let mut names = names;
    names.sort();
    names.join(",")
}

fn program() -> io::Result<PathBuf> {
    fs::read_link("/proc/self/exe")
}

/// The setcap command an ordinary user lacks: names only what this host can give, for a program with an
/// effective capability that cannot be had does not start (execve(2), EPERM).
fn setcap() -> Option<String> {
    if nix::unistd::getuid().is_root() {
        return None;
    }
    let wanted: Vec<&Need> = NEEDS
        .iter()
        .filter(|n| privileges::obtainable(n.capability))
        .collect();
    if wanted.iter().all(|n| privileges::held(n.capability)) {
        return None;
    }
    let names: Vec<String> = wanted
        .iter()
        .map(|n| n.capability.to_string().to_lowercase())
        .collect();
    let path = program().map_or_else(
        |_| "/usr/local/bin/mistctl".to_owned(),
        |p| quoted(&p.to_string_lossy()),
    );
    Some(format!("sudo setcap {}=ep {path}", names.join(",")))
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    if word
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-+@:,".contains(c))
    {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

fn memory(list: &mut List) -> &'static str {
    const GROUP: &str = "Memory";
    let scan = list.add(
        GROUP,
        "PAGEMAP_SCAN",
        ok(trials::pagemap_scan()),
        "pages are looked up one by one in /proc/PID/pagemap: dumps of large or sparse programs take longer",
    );
    let sysctl = sysctl("vm.unprivileged_userfaultfd").unwrap_or_else(|| "?".to_owned());
    let uffd = trials::userfaultfd().and_then(|fd| trials::uffd_api(&fd, 0));
    let features = *uffd.as_ref().unwrap_or(&0);
    let there = list.add(
        GROUP,
        "userfaultfd",
        uffd.map(|f| format!("features {f:#x}"))
            .map_err(|e| io::Error::other(format!("{e}; vm.unprivileged_userfaultfd is {sysctl}"))),
        "no restore --lazy; needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1",
    );
    if there {
        list.add(
            GROUP,
            "userfaultfd events",
            trials::userfaultfd()
                .and_then(|fd| trials::uffd_api(&fd, trials::UFFD_EVENTS))
                .map(|_| String::new()),
            "no restore --lazy: a fork would see memory that was not filled; needs CAP_SYS_PTRACE",
        );
        list.add(
            GROUP,
            "UFFDIO_MOVE",
            if features & trials::UFFD_MOVE != 0 {
                Ok(String::new())
            } else {
                Err(io::Error::other("not in this kernel"))
            },
            "pages are copied at restore, which is a little slower",
        );
    }
    let wp_async = scan
        && list.add(
            GROUP,
            "write tracking (WP_ASYNC)",
            ok(trials::wp_async()),
            "changes are found by soft-dirty bits, or every dump is full",
        );
    let cost = if wp_async {
        "none here: WP_ASYNC is there"
    } else {
        "every dump is full"
    };
    let soft = list.add(GROUP, "soft-dirty bits", ok(trials::soft_dirty()), cost);
    list.add(
        GROUP,
        "transparent huge pages",
        ok(trials::huge_pages()),
        "restores fill memory in small pages: two to three times slower",
    );
    match self::sysctl("vm.overcommit_memory").as_deref() {
        Some("2") => list.limited(
            GROUP,
            "overcommit",
            "vm.overcommit_memory is 2".to_owned(),
            "a copy-on-write clone may not fit: memory is then copied while the program stands still",
        ),
        _ => drop(list.add(GROUP, "overcommit", Ok("a copy-on-write clone needs no memory of its own".to_owned()), "")),
    }
    match (wp_async, soft) {
        (true, _) => "wp_async",
        (false, true) => "soft_dirty",
        (false, false) => "none",
    }
}

fn restoring(list: &mut List) {
    const GROUP: &str = "Rebuilding a process";
    list.add(
        GROUP,
        "clone3 with set_tid",
        trials::set_tid().map(|_| String::new()),
        "restored processes and threads get other ids, which programs that keep them do not expect; no --same-pid",
    );
    list.add(
        GROUP,
        "pid namespaces",
        ok(trials::unshare(libc::CLONE_NEWPID)),
        "a program whose ids are taken here cannot have them back",
    );
    list.add(
        GROUP,
        "time namespaces",
        ok(trials::unshare(libc::CLONE_NEWTIME)),
        "a program from another boot or host sees CLOCK_MONOTONIC jump; needs CAP_SYS_ADMIN and CAP_SYS_TIME",
    );
    list.add(
        GROUP,
        "PR_SET_MM_MAP",
        ok(trials::set_mm_map()),
        "nothing can be restored (CONFIG_CHECKPOINT_RESTORE)",
    );
    list.needed();
    list.add(
        GROUP,
        "vDSO can be moved",
        ok(trials::move_vdso()),
        "the kernel seals its mappings (CONFIG_MSEAL_SYSTEM_MAPPINGS): programs keep the vDSO address of the new process, and old ones are redirected",
    );
    list.add(
        GROUP,
        "POSIX timers with their ids",
        ok(trials::timer_ids()),
        "ids are reached by making and deleting timers, which takes longer (PR_TIMER_CREATE_RESTORE_IDS, Linux 6.15)",
    );
}

fn sockets(list: &mut List) {
    const GROUP: &str = "Sockets";
    list.add(
        GROUP,
        "TCP_REPAIR",
        ok(trials::tcp_repair()),
        "no established TCP connections; needs CAP_NET_ADMIN",
    );
    list.add(
        GROUP,
        "sock_diag, unix",
        ok(trials::sock_diag(libc::AF_UNIX, 0)),
        "the ends of unix sockets are not recognised: programs that use them are refused (CONFIG_UNIX_DIAG)",
    );
    list.add(
        GROUP,
        "sock_diag, TCP",
        ok(trials::sock_diag(libc::AF_INET, libc::IPPROTO_TCP)),
        "the ends of TCP connections inside a tree are not recognised (CONFIG_INET_DIAG)",
    );
    list.add(
        GROUP,
        "sock_diag, UDP",
        ok(trials::sock_diag(libc::AF_INET, libc::IPPROTO_UDP)),
        "UDP sockets are read by getsockopt alone (CONFIG_INET_UDP_DIAG)",
    );
    list.add(
        GROUP,
        "sock_diag, netlink",
        ok(trials::sock_diag(libc::AF_NETLINK, 255)),
        "the groups of netlink sockets are read by getsockopt alone (CONFIG_NETLINK_DIAG)",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_has_a_cost_and_every_feature_a_state() {
        let host = host();
        assert!(host.features.len() > 20);
        for f in &host.features {
            assert_eq!(f.cost.is_empty(), f.state == State::Yes, "{f:?}");
            assert!(f.state == State::Yes || !f.found.is_empty(), "{f:?}");
        }
    }

    #[test]
    fn words_for_the_shell_are_quoted_when_needed() {
        assert_eq!(quoted("/usr/local/bin/mistctl"), "/usr/local/bin/mistctl");
        assert_eq!(quoted("/tmp/a b'c"), "'/tmp/a b'\\''c'");
    }
}
