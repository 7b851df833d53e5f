//! What the kernel knows of a thread and tells nobody but the thread itself. When it is going to wake one that sleeps in
//! a system call with a time-out, from what the kernel itself goes by: the timer on the thread's kernel stack while it
//! sleeps, and its restart block once it was stopped. Nothing is guessed: a timer is the thread's when it points to it
//! and is queued. Besides, what it has set for itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};

use super::btf::Btf;
use super::{
    CALL, EXIT, FUNC_GET_CURRENT_TASK, FUNC_PROBE_READ_KERNEL, JEQ_IMM, JGT_IMM, KernelMemory,
    LD_IMM64, LDX_DW, MAP_VALUE, MOV, MOV_IMM, STX_DW, fetch, insn, load, map_of, run,
};
use crate::image::signals::AltStack;
use crate::kernel::tsc;

/// Of a sleeping thread's kernel stack this much is looked at: the frames of the call it sleeps in.
const STACK: usize = 8 * 1024;
/// x86's THREAD_SIZE. With debugging aids of the kernel it is larger, and the stack may end unseen.
const THREAD_SIZE: i32 = 16 * 1024;
/// What precedes the stack in what a look brings.
const HEAD: usize = 144;
const RESTART_BLOCK: usize = 56;
/// Steps from a task to another through a file of /proc.
const HOPS: usize = 7;

/// A thread at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pid: u32,
    /// How often it had gone to sleep.
    sleeps: u64,
    /// It is not on a processor, and waits for something.
    pub asleep: bool,
    restart: [u64; RESTART_BLOCK / 8],
    /// The timer that is to wake it: CLOCK_MONOTONIC, nanoseconds.
    pub until: Option<i64>,
    /// The coarse one, of sockets, that is to: with the tick of this number (jiffies).
    pub until_tick: Option<i64>,
    /// The same, as the thread asked for it: not rounded up.
    pub asked_tick: Option<i64>,
    /// Where it wants a zero written when it ends (set_tid_address(2)).
    pub clear_child_tid: u64,
    /// It may not read the time stamp counter (PR_SET_TSC); None where it is not known which flag that is.
    pub no_tsc: Option<bool>,
    /// Its struct mempolicy: an address, or 0.
    pub mempolicy: u64,
    /// Its struct cred: an address.
    pub cred: u64,
    altstack: AltStack,
}

impl Look {
    /// Whether `self` saw the sleep that ended with the stop which `stopped` saw: nothing but the stop has sent the
    /// thread to sleep since.
    pub fn was_the_last_sleep(&self, stopped: &Look) -> bool {
        self.asleep && self.pid == stopped.pid && stopped.sleeps == self.sleeps + 1
    }

    /// When a futex(2) wait on `word` that was broken off goes on to.
    pub fn futex_until(&self, word: u64) -> Option<i64> {
        let [_, _, at, _, _, until, _] = self.restart;
        (at == word).then_some(until as i64)
    }

    /// What sigaltstack(2) tells a thread with this stack pointer (kernel/signal.c, do_sigaltstack).
    pub fn altstack(&self, sp: u64) -> AltStack {
        const AUTODISARM: i32 = 1 << 31;
        let AltStack { sp: at, size, .. } = self.altstack;
        let kept = self.altstack.flags & AUTODISARM;
        let state = if size == 0 {
            libc::SS_DISABLE
        } else if kept == 0 && sp > at && sp - at <= size {
            libc::SS_ONSTACK
        } else {
            0
        };
        AltStack {
            flags: kept | state,
            ..self.altstack
        }
    }

    /// The same of poll(2) with this array.
    pub fn poll_until(&self, array: u64) -> Option<i64> {
        let [_, _, at, _, seconds, rest, _] = self.restart;
        let seconds = (seconds as i64).checked_mul(1_000_000_000)?;
        (at == array).then(|| seconds.saturating_add(rest as i64))
    }

    /// The same of a sleep that writes what is left to `rest`, by CLOCK_MONOTONIC.
    pub fn sleep_until(&self, rest: u64) -> Option<i64> {
        let [_, _, clock, at, until, ..] = self.restart;
        // Without a place for the rest the address is left over from another call.
        let is_native = clock >> 32 == 1;
        let fits = if rest == 0 {
            clock >> 32 == 0
        } else {
            is_native && at == rest
        };
        (clock as u32 == libc::CLOCK_MONOTONIC as u32 && fits).then_some(until as i64)
    }
}

/// The task_struct of a thread: an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task(pub(crate) u64);

/// Looks at threads. Root only, see [`super`].
#[derive(Debug)]
pub struct Threads {
    layout: Layout,
    /// One look at a time.
    map: Mutex<OwnedFd>,
    look: OwnedFd,
    follow: OwnedFd,
    /// Among the flags of a thread that it may not read the time stamp counter.
    no_tsc: Option<u64>,
}

/// Offsets of fields.
#[derive(Debug)]
struct Layout {
    task: TaskLayout,
    /// From a task over descriptor 0 (to be added) to the list in its struct pid.
    hops: [u64; HOPS],
    pid_links: u64,
    sleeper: SleeperLayout,
    timer: TimerLayout,
}

#[derive(Debug)]
struct TaskLayout {
    pid: u64,
    nvcsw: u64,
    state: u64,
    on_cpu: u64,
    sp: u64,
    stack: u64,
    restart: u64,
    altstack: u64,
    altstack_size: u64,
    altstack_flags: u64,
    clear_child_tid: u64,
    flags: u64,
    cred: u64,
    /// None without CONFIG_NUMA.
    mempolicy: Option<u64>,
}

/// struct hrtimer_sleeper; all but the task by where that is.
#[derive(Debug)]
struct SleeperLayout {
    soft: u64,
    hard: u64,
    function: u64,
    base: u64,
    state: u64,
}

/// struct process_timer, the same way.
#[derive(Debug)]
struct TimerLayout {
    queued: u64,
    expires: u64,
    function: u64,
    flags: u64,
}

impl Layout {
    fn of(btf: &Btf) -> Option<Self> {
        let task = |field| btf.offset("task_struct", field);
        let sleeper = |field| {
            Some(btf.offset("hrtimer_sleeper", "task")? - btf.offset("hrtimer_sleeper", field)?)
        };
        let timer = |field| {
            Some(btf.offset("process_timer", "task")? - btf.offset("process_timer", field)?)
        };
        let restart = btf.offset("restart_block", "futex");
        let fields = [
            ("futex.time", 24),
            ("poll.tv_sec", 16),
            ("poll.tv_nsec", 24),
            ("nanosleep.type", 4),
            ("nanosleep.rmtp", 8),
            ("nanosleep.expires", 16),
        ];
        let as_known = |(field, at): &(&str, u64)| {
            btf.offset("restart_block", field) == restart.map(|r| r + at)
        };
        if restart != Some(16) || !fields.iter().all(as_known) {
            return None;
        }
        let inode = btf
            .offset("proc_inode", "pid")?
            .wrapping_sub(btf.offset("proc_inode", "vfs_inode")?);
        Some(Self {
            task: TaskLayout {
                pid: task("pid")?,
                nvcsw: task("nvcsw")?,
                state: task("__state")?,
                on_cpu: task("on_cpu")?,
                sp: task("thread.sp")?,
                stack: task("stack")?,
                restart: task("restart_block")?,
                altstack: task("sas_ss_sp")?,
                altstack_size: task("sas_ss_size")?,
                altstack_flags: task("sas_ss_flags")?,
                clear_child_tid: task("clear_child_tid")?,
                flags: task("thread_info.flags")?,
                cred: task("cred")?,
                mempolicy: task("mempolicy"),
            },
            hops: [
                task("files")?,
                btf.offset("files_struct", "fdt")?,
                btf.offset("fdtable", "fd")?,
                0,
                btf.offset("file", "f_inode")?,
                inode,
                btf.offset("pid", "tasks")?,
            ],
            pid_links: task("pid_links")?,
            sleeper: SleeperLayout {
                soft: sleeper("timer._softexpires")?,
                hard: sleeper("timer.node.expires")?,
                function: sleeper("timer.function")?,
                base: sleeper("timer.base")?,
                state: sleeper("timer.state")?,
            },
            timer: TimerLayout {
                queued: timer("timer.entry.pprev")?,
                expires: timer("timer.expires")?,
                function: timer("timer.function")?,
                flags: timer("timer.flags")?,
            },
        })
    }
}

/// In what a look brings: nvcsw, stack pointer, stack, pid, state, on_cpu and flags of the alternate stack (four bytes
/// each), restart block, alternate stack, clear_child_tid, mempolicy, flags, cred.
const SLEEPS: i32 = 0;
const SP: i32 = 8;
const BOTTOM: i32 = 16;
const PID: i32 = 24;
const STATE: i32 = 28;
const ON_CPU: i32 = 32;
const ALTSTACK_FLAGS: i32 = 36;
const RESTART: i32 = 40;
const ALTSTACK: i32 = RESTART + RESTART_BLOCK as i32;
const ALTSTACK_SIZE: i32 = ALTSTACK + 8;
const CLEAR_CHILD_TID: i32 = ALTSTACK + 16;
const MEMPOLICY: i32 = ALTSTACK + 24;
const FLAGS: i32 = ALTSTACK + 32;
const CRED: i32 = ALTSTACK + 40;

/// Reads what [`Look`] is made of. The context: the task; what the helper said.
fn look_program(map: i32, l: &TaskLayout) -> Vec<[u8; 8]> {
    let value = |register, at| {
        [
            insn(LD_IMM64, register, MAP_VALUE, 0, map),
            insn(0, 0, 0, 0, at),
        ]
    };
    let add = |register, by| insn(ADD_IMM, register, 0, 0, by);
    let mut p = vec![insn(MOV, 6, 1, 0, 0), insn(LDX_DW, 7, 6, 0, 0)];
    let fields = [
        // The count first: a sleep that begins while we look is not the one that was counted.
        (SLEEPS, l.nvcsw, 8),
        (STATE, l.state, 4),
        (ON_CPU, l.on_cpu, 4),
        (PID, l.pid, 4),
        (SP, l.sp, 8),
        (BOTTOM, l.stack, 8),
        (RESTART, l.restart, RESTART_BLOCK as i32),
        (ALTSTACK, l.altstack, 8),
        (ALTSTACK_SIZE, l.altstack_size, 8),
        (ALTSTACK_FLAGS, l.altstack_flags, 4),
        (CLEAR_CHILD_TID, l.clear_child_tid, 8),
        (FLAGS, l.flags, 8),
        (CRED, l.cred, 8),
    ];
    let mempolicy = l.mempolicy.map(|at| (MEMPOLICY, at, 8));
    for (to, from, len) in fields.into_iter().chain(mempolicy) {
        p.extend(value(1, to));
        p.push(insn(MOV_IMM, 2, 0, 0, len));
        p.push(insn(MOV, 3, 7, 0, 0));
        p.push(add(3, from as i32));
        p.push(insn(CALL, 0, 0, 0, FUNC_PROBE_READ_KERNEL));
        p.push(insn(STX_DW, 6, 0, 8, 0));
    }
    p.extend(value(1, SP));
    p.push(insn(LDX_DW, 3, 1, 0, 0));
    p.extend(value(1, BOTTOM));
    p.push(insn(LDX_DW, 2, 1, 0, 0));
    p.push(add(2, THREAD_SIZE));
    p.push(insn(SUB, 2, 3, 0, 0));
    p.push(insn(JEQ_IMM, 2, 0, 7, 0));
    p.push(insn(JGT_IMM, 2, 0, 1, STACK as i32));
    p.push(insn(JA, 0, 0, 1, 0));
    p.push(insn(MOV_IMM, 2, 0, 0, STACK as i32));
    p.extend(value(1, HEAD as i32));
    p.push(insn(CALL, 0, 0, 0, FUNC_PROBE_READ_KERNEL));
    p.push(insn(STX_DW, 6, 0, 8, 0));
    p.push(insn(MOV_IMM, 0, 0, 0, 0));
    p.push(insn(EXIT, 0, 0, 0, 0));
    p
}

/// Follows pointers from the calling task. The context: an offset for each step; where that leads.
fn follow_program() -> Vec<[u8; 8]> {
    let mut p = vec![
        insn(MOV, 6, 1, 0, 0),
        insn(CALL, 0, 0, 0, FUNC_GET_CURRENT_TASK),
        insn(MOV, 7, 0, 0, 0),
    ];
    for i in 0..HOPS {
        p.push(insn(LDX_DW, 3, 6, 8 * i as i16, 0));
        p.push(insn(ADD, 3, 7, 0, 0));
        p.push(insn(MOV_IMM, 2, 0, 0, 8));
        p.push(insn(MOV, 1, 10, 0, 0));
        p.push(insn(ADD_IMM, 1, 0, 0, -8));
        p.push(insn(CALL, 0, 0, 0, FUNC_PROBE_READ_KERNEL));
        p.push(insn(LDX_DW, 7, 10, -8, 0));
    }
    p.push(insn(STX_DW, 6, 7, 8 * HOPS as i16, 0));
    p.push(insn(MOV_IMM, 0, 0, 0, 0));
    p.push(insn(EXIT, 0, 0, 0, 0));
    p
}

const ADD: u8 = 0x0f;
const ADD_IMM: u8 = 0x07;
const SUB: u8 = 0x1f;
const JA: u8 = 0x05;

impl Threads {
    /// The one of this process; None where we may not, or the kernel cannot. The first call takes some milliseconds.
    pub fn get() -> Option<&'static Self> {
        static ONE: OnceLock<Option<Threads>> = OnceLock::new();
        ONE.get_or_init(|| Self::open().ok()).as_ref()
    }

    fn open() -> Result<Self> {
        let layout = Layout::of(&KernelMemory::get()?.btf)
            .context("this kernel keeps sleeping threads otherwise")?;
        let map = map_of(HEAD + STACK)?;
        let look =
            load(&look_program(map.as_raw_fd(), &layout.task)).context("bpf(BPF_PROG_LOAD)")?;
        let follow = load(&follow_program()).context("bpf(BPF_PROG_LOAD)")?;
        let mut threads = Self {
            layout,
            map: Mutex::new(map),
            look,
            follow,
            no_tsc: None,
        };
        threads.no_tsc = threads.find_no_tsc().unwrap_or(None);
        Ok(threads)
    }

    /// Which flag it is differs from kernel to kernel: the one that comes and goes with ours.
    fn find_no_tsc(&self) -> Result<Option<u64>> {
        /// Another may come and go at the same time: that a thread is to make room, above all.
        const TRIES: usize = 16;
        let own = self.find(nix::unistd::gettid().as_raw())?;
        for _ in 0..TRIES {
            let before = self.bring(own)?;
            // The clocks of the vDSO are read nowhere in between.
            let forbidden = tsc::forbid();
            let during = self.bring(own);
            drop(forbidden);
            let (during, after) = (during?, self.bring(own)?);
            let [before, during, after] = [before, during, after].map(|b| word(&b, FLAGS as usize));
            let flag = during & !before & !after;
            if flag.is_power_of_two() {
                return Ok(Some(flag));
            }
        }
        Ok(None)
    }

    /// # Errors
    /// When there is no such thread.
    pub fn find(&self, tid: i32) -> Result<Task> {
        let path = format!("/proc/{tid}/stat");
        let file = File::open(&path).with_context(|| path.clone())?;
        let mut context = [0; HOPS + 1];
        context[..HOPS].copy_from_slice(&self.layout.hops);
        context[3] = 8 * file.as_raw_fd() as u64;
        run(&self.follow, &mut context)?;
        match context[HOPS] {
            0 => bail!("thread {tid} has ended"),
            link => Ok(Task(link.wrapping_sub(self.layout.pid_links))),
        }
    }

    /// # Errors
    /// When its memory cannot be read.
    pub fn look(&self, task: Task) -> Result<Look> {
        Ok(self.read(task, &self.bring(task)?))
    }

    fn bring(&self, task: Task) -> Result<Vec<u8>> {
        let mut context = [task.0, 0];
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        run(&self.look, &mut context)?;
        let result = context[1] as i64;
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result as i32)).with_context(|| {
                format!("reading the kernel stack of the thread at {:#x}", task.0)
            });
        }
        let mut all = vec![0; HEAD + STACK];
        fetch(&map, &mut all)?;
        Ok(all)
    }

    fn read(&self, task: Task, all: &[u8]) -> Look {
        let word = |at: usize| word(all, at);
        let half = |at: i32| word(at as usize) as u32;
        let mut restart = [0; RESTART_BLOCK / 8];
        for (i, r) in restart.iter_mut().enumerate() {
            *r = word(RESTART as usize + 8 * i);
        }
        let len = word(BOTTOM as usize)
            .wrapping_add(THREAD_SIZE as u64)
            .wrapping_sub(word(SP as usize))
            .min(STACK as u64) as usize;
        let stack = all.get(HEAD..HEAD + len).unwrap_or_default();
        let asleep = half(STATE) != 0 && half(ON_CPU) == 0;
        let l = &self.layout;
        let timer = |at: &dyn Fn(usize) -> Option<i64>| pointers(stack, task).find_map(at);
        let coarse = |at: &dyn Fn(usize) -> Option<(i64, i64)>| pointers(stack, task).find_map(at);
        let tick = asleep.then(|| coarse(&|at| l.timer(stack, at))).flatten();
        Look {
            pid: half(PID),
            sleeps: word(SLEEPS as usize),
            asleep,
            restart,
            until: asleep.then(|| timer(&|at| l.sleeper(stack, at))).flatten(),
            until_tick: tick.map(|(_, until)| until),
            asked_tick: tick.map(|(asked, _)| asked),
            clear_child_tid: word(CLEAR_CHILD_TID as usize),
            no_tsc: self.no_tsc.map(|flag| word(FLAGS as usize) & flag != 0),
            mempolicy: word(MEMPOLICY as usize),
            cred: word(CRED as usize),
            altstack: AltStack {
                sp: word(ALTSTACK as usize),
                flags: half(ALTSTACK_FLAGS) as i32,
                size: word(ALTSTACK_SIZE as usize),
            },
        }
    }
}

/// Where on this stack something points to the task.
fn pointers(stack: &[u8], task: Task) -> impl Iterator<Item = usize> {
    let all = (0..stack.len() / 8).map(|i| 8 * i);
    all.filter(move |at| word(stack, *at) == task.0)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    eight.map_or(0, u64::from_ne_bytes)
}

/// The upper half of the address space.
fn is_kernel(address: u64) -> bool {
    (address as i64) < 0
}

/// Where the kernel's own code is (Documentation/arch/x86/x86_64/mm.rst).
fn is_code(address: u64) -> bool {
    address >= 0xffff_ffff_8000_0000
}

impl Layout {
    /// A struct hrtimer_sleeper, whose field task is at `at`.
    fn sleeper(&self, stack: &[u8], at: usize) -> Option<i64> {
        const MOST_SLACK: i64 = 10_000_000_000;
        let l = &self.sleeper;
        let field = |before: u64| Some(word(stack, at.checked_sub(before as usize)?));
        let queued = field(l.state)? & 0xff == 1;
        let base = field(l.base)?;
        let pointers = is_kernel(base) && !is_code(base) && is_code(field(l.function)?);
        // From the first on it may fire, at the second it must.
        let (soft, hard) = (field(l.soft)? as i64, field(l.hard)? as i64);
        let slack = hard.checked_sub(soft)?;
        (queued && pointers && soft >= 0 && (0..MOST_SLACK).contains(&slack)).then_some(soft)
    }

    /// A struct process_timer. Which of the wheel's levels it is in says how far the end is rounded up
    /// (kernel/time/timer.c, calc_index). Without and with that.
    fn timer(&self, stack: &[u8], at: usize) -> Option<(i64, i64)> {
        const LEVEL_SIZE: u64 = 64;
        const LEVELS: u64 = 9;
        const INDEX_SHIFT: u64 = 22;
        /// Timers of other kinds.
        const KINDS: u64 = 0xf << 18;
        let l = &self.timer;
        let field = |before: u64| Some(word(stack, at.checked_sub(before as usize)?));
        let place = field(l.queued)?;
        let queued = is_kernel(place) && !is_code(place) && is_code(field(l.function)?);
        let (expires, flags) = (field(l.expires)?, field(l.flags)? & 0xffff_ffff);
        let level = (flags >> INDEX_SHIFT) / LEVEL_SIZE;
        let shift = 3 * level;
        (queued && flags & KINDS == 0 && level < LEVELS && !is_kernel(expires))
            .then(|| (expires as i64, (((expires >> shift) + 1) << shift) as i64))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::{Look, Threads};
    use crate::image::signals::AltStack;
    use crate::kernel::time_ns::host_monotonic_ns;

    /// Looks at a thread that does `sleep` until it is asleep with a timer.
    fn until(sleep: fn(), wanted: fn(&Look) -> Option<i64>) -> Option<(i64, i64)> {
        let threads = Threads::get()?;
        let (tell, told) = mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            // SAFETY: no arguments.
            tell.send(unsafe { libc::gettid() }).unwrap();
            sleep();
        });
        let task = threads.find(told.recv().unwrap()).unwrap();
        let begun = Instant::now();
        let found = loop {
            let look = threads.look(task).unwrap();
            if let Some(until) = wanted(&look) {
                assert!(look.asleep);
                break (until, host_monotonic_ns());
            }
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "it never sleeps: {look:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        };
        sleeper.join().unwrap();
        Some(found)
    }

    #[test]
    fn a_sleeping_thread_has_one_timer() {
        let sleep = || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for the one event that is asked for.
            unsafe {
                let epoll = libc::epoll_create1(0);
                libc::epoll_wait(epoll, &raw mut event, 1, 300);
                libc::close(epoll);
            }
        };
        let Some((end, now)) = until(sleep, |l| l.until) else {
            return eprintln!("SKIPPED: needs CAP_BPF");
        };
        assert!(end > now && end <= now + 300_000_000, "{end} at {now}");
    }

    #[test]
    fn what_a_thread_has_set_is_what_it_is_told() {
        let Some(threads) = Threads::get() else {
            return eprintln!("SKIPPED: needs CAP_BPF");
        };
        const PR_GET_TID_ADDRESS: libc::c_int = 40;
        let mut stack = vec![0u8; 64 * 1024];
        let sp = stack.as_mut_ptr() as u64;
        // Beginning, flags (SS_DISABLE, SS_AUTODISARM), bytes.
        for (flags, size) in [(0, 1 << 16), (2, 0), (1 << 31, 1 << 15)] {
            let wanted = [sp, flags, size];
            let (mut told, mut address) = ([0u64; 3], 0u64);
            // SAFETY: a stack_t each; the memory is there until the alternate stack is given up below.
            unsafe {
                libc::sigaltstack(wanted.as_ptr().cast(), told.as_mut_ptr().cast());
                libc::sigaltstack(std::ptr::null(), told.as_mut_ptr().cast());
                libc::prctl(PR_GET_TID_ADDRESS, &raw mut address);
            }
            // SAFETY: no arguments.
            let look = threads
                .find(unsafe { libc::gettid() })
                .and_then(|t| threads.look(t));
            let look = look.unwrap();
            assert_eq!(look.clear_child_tid, address);
            let outside = look.altstack(&raw const told as u64);
            assert_eq!(
                [outside.sp, u64::from(outside.flags as u32), outside.size],
                told
            );
        }
        let look = Look {
            altstack: AltStack {
                sp: 100,
                flags: 0,
                size: 50,
            },
            ..threads
                .find(std::process::id() as i32)
                .and_then(|t| threads.look(t))
                .unwrap()
        };
        let states = [100, 101, 150, 151].map(|sp| look.altstack(sp).flags);
        assert_eq!(states, [0, libc::SS_ONSTACK, libc::SS_ONSTACK, 0]);
        let none = [0u64, libc::SS_DISABLE as u64, 0];
        // SAFETY: a stack_t.
        unsafe { libc::sigaltstack(none.as_ptr().cast(), std::ptr::null_mut()) };
    }

    #[test]
    fn a_socket_s_time_out_is_a_tick() {
        let sleep = || {
            let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
            a.set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            let _ = std::io::Read::read(&mut &a, &mut [0]);
        };
        match until(sleep, |l| l.until_tick) {
            None => eprintln!("SKIPPED: needs CAP_BPF"),
            Some((tick, _)) => assert!(tick > 0),
        }
    }
}
