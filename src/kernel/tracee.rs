//! A thread under ptrace(2), attached with PTRACE_SEIZE.

use std::io;

use anyhow::{Context, Result, bail};

use super::arch::Regs;
use crate::image::threads::Rseq;

/// Stop of a seized tracee that is neither a signal nor one of the named events.
pub const EVENT_STOP: i32 = 128;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const NT_X86_XSTATE: usize = 0x202;
/// Room for every xstate component known, AMX included (11 KiB), and then some.
const XSTATE_MAX: usize = 32 * 1024;
/// sizeof(siginfo_t).
pub const SIGINFO_SIZE: usize = 128;

/// What waitpid told of a tracee.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// PTRACE_EVENT_STOP: our interrupt, or (`signal` other than SIGTRAP) a group stop.
    Interrupt {
        signal: i32,
    },
    /// On its way to deliver this signal.
    Signal(i32),
    /// Entry into or exit from a system call (PTRACE_SYSCALL).
    Syscall,
    /// PTRACE_EVENT_* other than STOP.
    Event(i32),
    Exited(i32),
    Killed(i32),
}

impl Stop {
    /// Decodes a wait status.
    pub fn from_status(st: i32) -> Self {
        if libc::WIFEXITED(st) {
            Self::Exited(libc::WEXITSTATUS(st))
        } else if libc::WIFSIGNALED(st) {
            Self::Killed(libc::WTERMSIG(st))
        } else {
            match st >> 16 {
                EVENT_STOP => Self::Interrupt {
                    signal: libc::WSTOPSIG(st),
                },
                0 if libc::WSTOPSIG(st) == libc::SIGTRAP | 0x80 => Self::Syscall,
                0 => Self::Signal(libc::WSTOPSIG(st)),
                e => Self::Event(e),
            }
        }
    }
}

/// A seized thread. Dropping it does nothing: the kernel lets tracees go when their tracer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracee {
    pub tid: i32,
}

fn request(req: u32, tid: i32, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass either plain numbers or pointers to live buffers of the size the request
    // writes or reads (ptrace(2)); the kernel checks the rest.
    let r = unsafe { libc::ptrace(req as libc::c_uint, tid, addr, data) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

impl Tracee {
    /// PTRACE_SEIZE; the thread goes on running.
    pub fn seize(tid: i32, options: i32) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, options as usize)?;
        Ok(Self { tid })
    }

    pub fn interrupt(&self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    pub fn set_options(&self, options: i32) -> Result<()> {
        request(libc::PTRACE_SETOPTIONS, self.tid, 0, options as usize)
            .with_context(|| format!("PTRACE_SETOPTIONS on thread {}", self.tid))?;
        Ok(())
    }

    /// Waits for its next stop or end.
    pub fn wait(&self) -> Result<Stop> {
        let mut st = 0;
        loop {
            // SAFETY: `st` is a live i32.
            let r = unsafe { libc::waitpid(self.tid, &mut st, libc::__WALL) };
            if r == self.tid {
                return Ok(Stop::from_status(st));
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e).with_context(|| format!("waiting for thread {}", self.tid));
            }
        }
    }

    /// As [`Tracee::wait`], but gives up (None) after `limit`. SIGCHLD is blocked while it waits.
    pub fn wait_timeout(&self, limit: std::time::Duration) -> Result<Option<Stop>> {
        use nix::sys::signal::{SigSet, SigmaskHow, Signal};
        let deadline = std::time::Instant::now() + limit;
        let chld = SigSet::from(Signal::SIGCHLD);
        let old = chld.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let result = loop {
            let mut st = 0;
            // SAFETY: `st` is a live i32.
            let r = unsafe { libc::waitpid(self.tid, &mut st, libc::__WALL | libc::WNOHANG) };
            if r == self.tid {
                break Ok(Some(Stop::from_status(st)));
            }
            if r < 0 {
                break Err(io::Error::last_os_error())
                    .with_context(|| format!("waiting for thread {}", self.tid));
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                break Ok(None);
            }
            let ts = libc::timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            // SAFETY: the set and the time are live; a null siginfo is allowed (sigtimedwait(2)).
            unsafe { libc::sigtimedwait(chld.as_ref(), std::ptr::null_mut(), &ts) };
        };
        old.thread_set_mask()?;
        result
    }

    /// Runs on, delivering `signal` unless it is 0.
    pub fn cont(&self, signal: i32) -> Result<()> {
        request(libc::PTRACE_CONT, self.tid, 0, signal as usize)
            .with_context(|| format!("PTRACE_CONT of thread {}", self.tid))?;
        Ok(())
    }

    /// Runs on to the next entry into or exit from a system call.
    pub fn cont_to_syscall(&self) -> Result<()> {
        request(libc::PTRACE_SYSCALL, self.tid, 0, 0)
            .with_context(|| format!("PTRACE_SYSCALL of thread {}", self.tid))?;
        Ok(())
    }

    pub fn step(&self) -> Result<()> {
        request(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)
            .with_context(|| format!("PTRACE_SINGLESTEP of thread {}", self.tid))?;
        Ok(())
    }

    pub fn detach(&self, signal: i32) -> io::Result<()> {
        request(libc::PTRACE_DETACH, self.tid, 0, signal as usize).map(drop)
    }

    pub fn regs(&self) -> Result<Regs> {
        let mut r = Regs::default();
        request(libc::PTRACE_GETREGS, self.tid, 0, &raw mut r as usize)
            .with_context(|| format!("reading registers of thread {}", self.tid))?;
        Ok(r)
    }

    pub fn set_regs(&self, r: &Regs) -> Result<()> {
        request(libc::PTRACE_SETREGS, self.tid, 0, &raw const *r as usize)
            .with_context(|| format!("setting registers of thread {}", self.tid))?;
        Ok(())
    }

    /// The whole xsave area in its uncompacted form.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let mut buf = vec![0u8; XSTATE_MAX];
        let mut iov = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        request(
            libc::PTRACE_GETREGSET,
            self.tid,
            NT_X86_XSTATE,
            &raw mut iov as usize,
        )
        .with_context(|| format!("reading extended state of thread {}", self.tid))?;
        // Kept for each of thousands of threads: without the room.
        buf.truncate(iov.iov_len);
        buf.shrink_to_fit();
        Ok(buf)
    }

    pub fn set_xstate(&self, state: &[u8]) -> Result<()> {
        let mut buf = state.to_vec();
        let mut iov = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        request(
            libc::PTRACE_SETREGSET,
            self.tid,
            NT_X86_XSTATE,
            &raw mut iov as usize,
        )
        .with_context(|| {
            format!(
                "setting {} bytes of extended state of thread {}",
                state.len(),
                self.tid
            )
        })?;
        Ok(())
    }

    /// Blocked signals, also those ptrace or sigsuspend hold for the thread.
    pub fn sigmask(&self) -> Result<u64> {
        let mut m = 0u64;
        request(PTRACE_GETSIGMASK, self.tid, 8, &raw mut m as usize)
            .with_context(|| format!("reading the signal mask of thread {}", self.tid))?;
        Ok(m)
    }

    pub fn set_sigmask(&self, m: u64) -> Result<()> {
        request(PTRACE_SETSIGMASK, self.tid, 8, &raw const m as usize)
            .with_context(|| format!("setting the signal mask of thread {}", self.tid))?;
        Ok(())
    }

    /// Tid or pid that belongs to the present event stop.
    pub fn event_message(&self) -> Result<i32> {
        let mut m: libc::c_ulong = 0;
        request(libc::PTRACE_GETEVENTMSG, self.tid, 0, &raw mut m as usize)
            .with_context(|| format!("reading the event message of thread {}", self.tid))?;
        Ok(m as i32)
    }

    /// Queued signals (siginfo_t, raw): the thread's own, or those of its whole process.
    pub fn pending(&self, shared: bool) -> Result<Vec<Vec<u8>>> {
        #[repr(C)]
        struct Args {
            off: u64,
            flags: u32,
            nr: i32,
        }
        let mut all = Vec::new();
        loop {
            let args = Args {
                off: all.len() as u64,
                flags: u32::from(shared),
                nr: 16,
            };
            let mut buf = vec![0u8; SIGINFO_SIZE * 16];
            let n = request(
                PTRACE_PEEKSIGINFO,
                self.tid,
                &raw const args as usize,
                buf.as_mut_ptr() as usize,
            )
            .with_context(|| format!("reading queued signals of thread {}", self.tid))?;
            all.extend(
                buf.chunks(SIGINFO_SIZE)
                    .take(n as usize)
                    .map(<[u8]>::to_vec),
            );
            if n < 16 {
                return Ok(all);
            }
        }
    }

    /// Whether the program gets its own system calls as signals (PR_SET_SYSCALL_USER_DISPATCH).
    pub fn has_user_dispatch(&self) -> bool {
        // struct ptrace_sud_config: mode, selector, offset, length.
        let mut config = [0u64; 4];
        let got = request(
            PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            self.tid,
            size_of_val(&config),
            &raw mut config as usize,
        );
        // Kernels before 6.4 do not tell.
        got.is_ok() && config[0] != 0
    }

    /// None when no rseq area is registered.
    pub fn rseq(&self) -> Result<Option<Rseq>> {
        #[repr(C)]
        #[derive(Default)]
        struct Conf {
            pointer: u64,
            size: u32,
            signature: u32,
            flags: u32,
            pad: u32,
        }
        let mut c = Conf::default();
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            size_of::<Conf>(),
            &raw mut c as usize,
        )
        .with_context(|| format!("reading the rseq registration of thread {}", self.tid))?;
        Ok((c.pointer != 0).then_some(Rseq {
            pointer: c.pointer,
            size: c.size,
            signature: c.signature,
        }))
    }

    /// Head and length of the robust futex list (get_robust_list(2)).
    pub fn robust_list(&self) -> Result<(u64, u64)> {
        let (mut head, mut len) = (0u64, 0u64);
        // SAFETY: both pointers are to live u64, the sizes the call writes.
        let r = unsafe {
            libc::syscall(
                libc::SYS_get_robust_list,
                self.tid,
                &raw mut head,
                &raw mut len,
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("get_robust_list of thread {}", self.tid));
        }
        Ok((head, len))
    }

    /// Waits for the stop that our PTRACE_INTERRUPT makes; signals that come first are passed on.
    /// `Ok(None)`: it ended.
    pub fn wait_interrupted(&self) -> Result<Option<Stop>> {
        loop {
            match self.wait()? {
                s @ Stop::Interrupt { .. } => return Ok(Some(s)),
                Stop::Exited(_) | Stop::Killed(_) => return Ok(None),
                Stop::Signal(s) => self.cont(s)?,
                Stop::Syscall | Stop::Event(_) => self.cont(0)?,
            }
        }
    }

    /// Runs to the end of the current piece of restorer code (int3). The id, as we see it, of the last child or
    /// thread that it made meanwhile.
    pub fn run_to_trap(&self) -> Result<Option<i32>> {
        let mut made = None;
        self.cont(0)?;
        loop {
            match self.wait()? {
                Stop::Signal(libc::SIGTRAP) => return Ok(made),
                // An interrupt that was still on its way.
                Stop::Interrupt { .. } => self.cont(0)?,
                Stop::Signal(s) if s == libc::SIGSEGV || s == libc::SIGILL || s == libc::SIGBUS => {
                    let r = self.regs()?;
                    bail!(
                        "restorer code in {} got signal {s} at {:#x}",
                        self.tid,
                        r.rip
                    )
                }
                Stop::Event(libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_CLONE) => {
                    made = Some(self.event_message()?);
                    self.cont(0)?;
                }
                Stop::Signal(_) | Stop::Syscall | Stop::Event(_) => self.cont(0)?,
                other => bail!("restorer code in {} ended early: {other:?}", self.tid),
            }
        }
    }
}

/// Sends a signal to one thread of process `pid`.
///
/// # Errors
/// errno of tgkill(2).
pub fn queue_signal(pid: i32, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    let r = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
