//! What only a process itself can be asked: the calls of its batch and how their answers are read.

use anyhow::{Context, Result};

use super::landlock::Landlock;
use crate::image::memory::MemPolicy;
use crate::image::process::Process;
use crate::image::signals::{AltStack, ITimer, SigAction};
use crate::kernel::arch::{Call, PAGE};
use crate::kernel::batch::{Area, Batch, Held};
use crate::kernel::kmem::threads::{Look, Threads};
use crate::kernel::kmem::{KernelMemory, policy};
use crate::kernel::landlock;
use crate::kernel::numa;

const SIGNALS: u64 = 64;
const SIGACTION_SIZE: u64 = 32;

const PR_GET_MDWE: u64 = 66;
const PR_GET_THP_DISABLE: u64 = 42;
const PR_THP_DISABLE_EXCEPT_ADVISED: i64 = 1 << 1;
const PR_GET_MEMORY_MERGE: u64 = 68;
pub const PR_GET_TID_ADDRESS: u64 = 40;

/// KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING. To ask for the one of its session would give it one.
const KEYRINGS: [i32; 2] = [-1, -2];

// Offsets in the batch's data area.
const AT_ACTIONS: u64 = 0;
const AT_ITIMERS: u64 = AT_ACTIONS + SIGNALS * SIGACTION_SIZE;
const AT_SUBREAPER: u64 = AT_ITIMERS + 3 * 32;
const AT_PDEATHSIG: u64 = AT_SUBREAPER + 8;
const LEADER_LEN: u64 = 48;
const AT_LEADER: u64 = AT_PDEATHSIG + 8;
const AT_TSC: u64 = AT_LEADER + LEADER_LEN;
const AT_TIMERS: u64 = AT_TSC + 8;

/// The batch of one process.
#[derive(Default)]
pub struct Queries {
    /// Ids of POSIX timers (/proc/PID/timers).
    pub timers: Vec<i32>,
    /// It has children, dead or alive, or traces somebody; known once it has answered.
    pub has_children: bool,
    /// The init of a pid namespace: it would become the parent of its own copy.
    pub is_init: bool,
    /// Some of its memory is locked.
    pub locked: bool,
    /// It has a local descriptor table (modify_ldt(2)); known once it has answered.
    pub has_ldt: bool,
    /// Its main thread or itself has a keyring (keyctl(2)); known once it has answered.
    pub has_keys: bool,
    /// The process that its threads are told to look at ([`Landlock::probe`]).
    pub probe: i32,
    /// Where its mappings begin, ascending.
    pub mappings: Vec<u64>,
}

/// Places of answers in the results, in the order of [`Queries::calls`].
mod at {
    const PRCTLS: usize = 64 + 3;
    pub const DUMPABLE: usize = PRCTLS;
    pub const THP_DISABLE: usize = PRCTLS + 1;
    pub const MDWE: usize = PRCTLS + 2;
    pub const SECUREBITS: usize = PRCTLS + 3;
    pub const MCE_KILL: usize = PRCTLS + 4;
    pub const SUBREAPER: usize = PRCTLS + 5;
    pub const BRK: usize = PRCTLS + 7;
    pub const CHILDREN: usize = PRCTLS + 11;
    pub const MEMBARRIER: usize = PRCTLS + 12;
    pub const MERGE: usize = PRCTLS + 16;
    pub const LOCKED: usize = PRCTLS + 17;
    pub const LDT: usize = PRCTLS + 18;
    pub const KEYS: [usize; 2] = [PRCTLS + 20, PRCTLS + 21];
    pub const TIMERS: usize = PRCTLS + 22;
}

/// What a process has registered for.
mod membarrier {
    /// GET_REGISTRATIONS; and, for kernels before 6.3, the expedited commands, which are refused without.
    pub const CALLS: [u64; 4] = [1 << 9, 1 << 3, 1 << 5, 1 << 7];

    pub fn registered(results: &[i64; 4]) -> u32 {
        if let Ok(mask) = u32::try_from(results[0]) {
            return mask;
        }
        // The registration of each has the next bit.
        let commands = CALLS.iter().zip(results).skip(1);
        commands.fold(0, |all, (c, r)| {
            all | if *r == 0 { (c << 1) as u32 } else { 0 }
        })
    }
}

impl Queries {
    /// What the batch needs.
    pub fn area(&self) -> Area {
        Area::holding(self.calls(0).len(), self.data_len())
    }

    fn data_len(&self) -> u64 {
        let policies = numa::mask_words().map_or(0, policy_len);
        self.at_policies() + policies * (1 + self.mappings.len() as u64)
    }

    /// Of the thread, and of each mapping: mode, nodes.
    fn at_policies(&self) -> u64 {
        AT_TIMERS + 32 * self.timers.len().max(1) as u64
    }

    pub fn calls(&self, data: u64) -> Vec<Call> {
        let mut v = Vec::new();
        for sig in 1..=SIGNALS {
            let at = data + AT_ACTIONS + (sig - 1) * SIGACTION_SIZE;
            v.push(Call::new(libc::SYS_rt_sigaction, &[sig, 0, at, 8]));
        }
        for which in 0..3 {
            v.push(Call::new(
                libc::SYS_getitimer,
                &[which, data + AT_ITIMERS + which * 32],
            ));
        }
        let prctl = |a: u64, b: u64| Call::new(libc::SYS_prctl, &[a, b, 0, 0, 0]);
        v.push(prctl(libc::PR_GET_DUMPABLE as u64, 0));
        v.push(prctl(PR_GET_THP_DISABLE, 0));
        v.push(prctl(PR_GET_MDWE, 0));
        v.push(prctl(libc::PR_GET_SECUREBITS as u64, 0));
        v.push(prctl(libc::PR_MCE_KILL_GET as u64, 0));
        v.push(prctl(
            libc::PR_GET_CHILD_SUBREAPER as u64,
            data + AT_SUBREAPER,
        ));
        v.push(prctl(libc::PR_GET_PDEATHSIG as u64, data + AT_PDEATHSIG));
        v.push(Call::new(libc::SYS_brk, &[0]));
        v.extend(thread_calls(self.probe, data + AT_LEADER));
        let look = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        let any = libc::P_ALL as u64;
        v.push(Call::new(libc::SYS_waitid, &[any, 0, 0, look as u64, 0]));
        v.extend(membarrier::CALLS.map(|c| Call::new(libc::SYS_membarrier, &[c, 0, 0])));
        v.push(prctl(PR_GET_MEMORY_MERGE, 0));
        // Refused where the mapping that the data stands in, which is new, is locked.
        let cold = libc::MADV_COLD as u64;
        v.push(Call::new(libc::SYS_madvise, &[data, PAGE, cold]));
        // Read, to where the timers' answers come: one entry, if there are any.
        v.push(Call::new(libc::SYS_modify_ldt, &[0, data + AT_TIMERS, 8]));
        v.push(prctl(libc::PR_GET_TSC as u64, data + AT_TSC));
        for keyring in KEYRINGS {
            const KEYCTL_GET_KEYRING_ID: u64 = 0;
            let args = [KEYCTL_GET_KEYRING_ID, i64::from(keyring) as u64, 0];
            v.push(Call::new(libc::SYS_keyctl, &args));
        }
        for (i, id) in self.timers.iter().enumerate() {
            let at = data + AT_TIMERS + i as u64 * 32;
            v.push(Call::new(libc::SYS_timer_gettime, &[*id as u64, at]));
            v.push(Call::new(libc::SYS_timer_getoverrun, &[*id as u64]));
        }
        if let Some(words) = numa::mask_words() {
            let bits = 64 * words as u64 + 1;
            let mut at = data + self.at_policies();
            let mut get = |of: u64, flags: u64| {
                let call = Call::new(libc::SYS_get_mempolicy, &[at, at + 8, bits, of, flags]);
                at += policy_len(words);
                v.push(call);
            };
            get(0, 0);
            const MPOL_F_ADDR: u64 = 1 << 1;
            self.mappings.iter().for_each(|m| get(*m, MPOL_F_ADDR));
        }
        v
    }

    /// Puts the answers into `p`, whose timers stand in the order of `self.timers`. Returns what the
    /// leader's own calls gave.
    pub fn answers(&mut self, batch: &Batch, p: &mut Process) -> Result<ThreadAnswers> {
        let results = batch.results();
        let result = |i: usize| results.get(i).copied().unwrap_or(-1);
        let data = batch.data(0, self.data_len() as usize)?;
        let word = |at: u64| word(&data, at);
        for sig in 1..=SIGNALS {
            let at = AT_ACTIONS + (sig - 1) * SIGACTION_SIZE;
            let a = SigAction {
                signal: sig as i32,
                handler: word(at),
                flags: word(at + 8),
                restorer: word(at + 16),
                mask: word(at + 24),
            };
            let asked = results.get(sig as usize - 1).is_some_and(|r| *r == 0);
            if asked && (a.handler, a.flags, a.mask) != (0, 0, 0) {
                p.sigactions.push(a);
            }
        }
        for which in 0..3 {
            let at = AT_ITIMERS + which * 32;
            let us = |at| word(at) as i64 * 1_000_000 + word(at + 8) as i64;
            let t = ITimer {
                which: which as i32,
                interval_us: us(at),
                left_us: us(at + 16),
            };
            // One that has expired and whose signal was not taken yet is started again with that signal
            // (kernel/time/itimer.c): nothing is left, the interval stands.
            if t.left_us != 0 || t.interval_us != 0 {
                p.itimers.push(t);
            }
        }
        p.dumpable = result(at::DUMPABLE) as i32;
        // 1, and flags.
        p.thp_disable = result(at::THP_DISABLE) > 0;
        p.thp_advised =
            p.thp_disable && result(at::THP_DISABLE) & PR_THP_DISABLE_EXCEPT_ADVISED != 0;
        p.mdwe = result(at::MDWE).max(0) as u32;
        p.mce_kill = u32::try_from(result(at::MCE_KILL)).ok();
        for t in &mut p.threads {
            t.creds.securebits = result(at::SECUREBITS).max(0) as u32;
        }
        p.child_subreaper = result(at::SUBREAPER) == 0 && word(AT_SUBREAPER) as i32 != 0;
        p.mm.brk = result(at::BRK) as u64;
        p.membarrier = membarrier::registered(&std::array::from_fn(|i| result(at::MEMBARRIER + i)));
        p.merge_memory = result(at::MERGE) == 1;
        if result(at::LOCKED) == -i64::from(libc::EINVAL) {
            p.lock_future = libc::MCL_FUTURE as u32;
            self.locked = true;
        }
        self.has_ldt = result(at::LDT) > 0;
        self.has_keys = at::KEYS.iter().any(|i| result(*i) > 0);
        self.has_children = result(at::CHILDREN) != -i64::from(libc::ECHILD);
        for (i, t) in p.posix_timers.iter_mut().enumerate() {
            let at = AT_TIMERS + i as u64 * 32;
            let ns = |at| word(at) as i64 * 1_000_000_000 + word(at + 8) as i64;
            t.interval_ns = ns(at);
            t.left_ns = ns(at + 16);
            t.overrun = results
                .get(at::TIMERS + 2 * i + 1)
                .map_or(0, |r| (*r).max(0) as i32);
        }
        let mut leader = ThreadAnswers::read(&data[AT_LEADER as usize..][..LEADER_LEN as usize]);
        leader.pdeathsig = word(AT_PDEATHSIG) as i32;
        leader.no_tsc = word(AT_TSC) as i32 == libc::PR_TSC_SIGSEGV;
        if let Some(words) = numa::mask_words() {
            let policy = |i: usize| {
                let at = self.at_policies() + i as u64 * policy_len(words);
                let policy = MemPolicy {
                    mode: word(at) as u32,
                    nodes: (0..words as u64).map(|w| word(at + 8 + 8 * w)).collect(),
                };
                (policy.mode != 0).then_some(policy)
            };
            leader.mempolicy = policy(0);
            for v in &mut p.vmas {
                let asked = self.mappings.binary_search(&v.start).ok();
                v.policy = asked.and_then(|i| policy(1 + i));
            }
        }
        Ok(leader)
    }
}

/// What one thread's own calls gave.
#[derive(Debug, Clone, Default)]
pub struct ThreadAnswers {
    pub altstack: AltStack,
    pub clear_child_tid: u64,
    pub pdeathsig: i32,
    pub no_tsc: bool,
    pub mempolicy: Option<MemPolicy>,
    /// It seems to have restricted itself; [`Landlock::refuse`] knows.
    pub restricted: bool,
    /// Its struct cred, where kernel memory can be read.
    cred: u64,
}

impl ThreadAnswers {
    /// Bytes that [`thread_calls`] have written.
    const LEN: usize = LEADER_LEN as usize;

    fn read(b: &[u8]) -> Self {
        Self {
            altstack: AltStack {
                sp: word(b, 0),
                flags: word(b, 8) as i32,
                size: word(b, 16),
            },
            clear_child_tid: word(b, 24),
            // The second word that it is told is never 0.
            restricted: word(b, 40) == 0,
            ..Self::default()
        }
    }
}

/// The same of another thread than the leader. From the kernel's memory where we may look at it: to run calls in a
/// thread takes it a hundred microseconds, of which programs with thousands of threads would see each.
/// What cannot be had like that is taken to be as the main thread's `leader`: threads inherit it.
pub fn of_thread(
    batch: &Batch,
    thread: &Held,
    leader: &ThreadAnswers,
    landlock: &Landlock,
) -> Result<ThreadAnswers> {
    match look(thread) {
        Some(look) => Ok(ThreadAnswers {
            altstack: look.altstack(thread.program.rsp),
            clear_child_tid: look.clear_child_tid,
            pdeathsig: 0,
            no_tsc: look.no_tsc.unwrap_or(leader.no_tsc),
            mempolicy: match look.mempolicy {
                0 => None,
                at => Some(policy::read(KernelMemory::get()?, at)?),
            },
            // Threads that have never changed theirs share them.
            restricted: match look.cred {
                cred if cred == leader.cred => leader.restricted,
                cred => landlock.of(cred),
            },
            cred: look.cred,
        }),
        None => {
            let probe = landlock.probe();
            let calls = |data| thread_calls(probe, data);
            let data = batch.in_thread(thread, ThreadAnswers::LEN, &calls)?;
            Ok(ThreadAnswers {
                no_tsc: leader.no_tsc,
                mempolicy: leader.mempolicy.clone(),
                ..ThreadAnswers::read(&data)
            })
        }
    }
}

/// Adds to what the leader's own calls gave what kernel memory tells of its restrictions.
pub fn restrictions(leader: &mut ThreadAnswers, thread: &Held, landlock: &Landlock) {
    if let Landlock::Seen(_) = landlock
        && let Some(look) = look(thread)
    {
        leader.cred = look.cred;
        leader.restricted = landlock.of(look.cred);
    }
}

fn look(thread: &Held) -> Option<Look> {
    let kernel = Threads::get()?;
    let task = kernel.find(thread.tracee.tid).ok()?;
    kernel.look(task).ok()
}

/// Bytes of the answer to get_mempolicy(2).
fn policy_len(words: usize) -> u64 {
    8 + 8 * words as u64
}

/// sigaltstack, PR_GET_TID_ADDRESS and a look at `probe`, with their results at `data`.
fn thread_calls(probe: i32, data: u64) -> [Call; 3] {
    [
        Call::new(libc::SYS_sigaltstack, &[0, data]),
        Call::new(libc::SYS_prctl, &[PR_GET_TID_ADDRESS, data + 24, 0, 0, 0]),
        landlock::look_at(probe, data + 32),
    ]
}

fn word(b: &[u8], at: u64) -> u64 {
    b.get(at as usize..at as usize + 8)
        .and_then(|s| s.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Parses /proc/PID/timers (fs/proc/base.c, show_timer).
pub fn parse_timers(text: &str) -> Result<Vec<crate::image::signals::PosixTimer>> {
    use crate::image::signals::PosixTimer;
    let mut all: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        let bad = || format!("/proc/PID/timers has an unknown line {line:?}");
        if key == "ID" {
            all.push(PosixTimer {
                id: value.parse().with_context(bad)?,
                clock: 0,
                signal: 0,
                value: 0,
                notify: 0,
                tid: 0,
                left_ns: 0,
                interval_ns: 0,
                overrun: 0,
                due_ns: None,
            });
            continue;
        }
        let Some(t) = all.last_mut() else { continue };
        match key {
            "signal" => {
                let (sig, val) = value.split_once('/').with_context(bad)?;
                t.signal = sig.parse().with_context(bad)?;
                t.value =
                    u64::from_str_radix(val.trim_start_matches("0x"), 16).with_context(bad)?;
            }
            "notify" => {
                // signal/pid.N, none/pid.N, thread/tid.N
                let (how, who) = value.split_once('/').with_context(bad)?;
                let (kind, id) = who.split_once('.').with_context(bad)?;
                t.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    _ if kind == "tid" => libc::SIGEV_THREAD_ID,
                    _ => libc::SIGEV_SIGNAL,
                };
                t.tid = id.parse().with_context(bad)?;
            }
            "ClockID" => t.clock = value.parse().with_context(bad)?,
            _ => {}
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read() {
        let t = parse_timers(
            "ID: 3\nsignal: 14/00000000deadbeef\nnotify: signal/pid.77\nClockID: 1\n\
             ID: 9\nsignal: 34/0000000000000001\nnotify: signal/tid.78\nClockID: 0\n",
        )
        .unwrap();
        assert_eq!(
            (t[0].id, t[0].signal, t[0].value, t[0].notify),
            (3, 14, 0xdead_beef, 0)
        );
        assert_eq!(
            (t[1].id, t[1].notify, t[1].tid),
            (9, libc::SIGEV_THREAD_ID, 78)
        );
        assert!(parse_timers("ID: x\n").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,300}") {
            let _ = parse_timers(&text);
        }
    }
}
