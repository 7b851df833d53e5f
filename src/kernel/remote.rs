//! System calls in a process that is being rebuilt and dies with us (PTRACE_O_EXITKILL).
//!
//! ```text
//! area   code (one page) | call table | arguments and results
//! ```

use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};

use super::arch::{Asm, CALL_SIZE, Call, Regs, syscall_stub};
use super::mem::Mem;
use super::tracee::{Stop, Tracee};
use super::vacancy;

/// Bytes of the area that a body under construction keeps mapped.
pub const AREA: u64 = 1 << 20;
const TABLE: u64 = 4096;
const DATA: u64 = 256 * 1024;
const CALLS_MAX: usize = (DATA - TABLE) as usize / CALL_SIZE - 1;
/// The one of [`OPTIONS`] by which a body ends with its tracer.
pub const DYING_WITH_US: i32 = libc::PTRACE_O_EXITKILL;
/// What every body is traced with.
pub const OPTIONS: i32 = DYING_WITH_US
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACESYSGOOD;

/// An argument of a remote call.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    Val(u64),
    /// Address of a copy of these bytes in the process.
    In(&'a [u8]),
}

impl From<i32> for Arg<'_> {
    fn from(v: i32) -> Self {
        Self::Val(i64::from(v) as u64)
    }
}

impl From<u64> for Arg<'_> {
    fn from(v: u64) -> Self {
        Self::Val(v)
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(v: &'a [u8]) -> Self {
        Self::In(v)
    }
}

struct Queued {
    call: Call,
    what: String,
    /// Its failure is an error.
    must: bool,
}

/// A child or thread that a body has made: its id for us, and for those inside the body's pid namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    pub id: i32,
    pub inside: i32,
}

/// The rebuilt process's memory and area, common to its threads.
struct Shared {
    pid: i32,
    /// In its own pid namespace.
    inside: i32,
    mem: Mem,
    area: u64,
}

/// One thread of a body, stopped, that makes calls for us.
pub struct Remote {
    pub tracee: Tracee,
    /// Its id in its own pid namespace: what calls that it makes are to name it by.
    pub inside: i32,
    shared: Rc<Shared>,
    queue: Vec<Queued>,
    data: Vec<u8>,
    /// What failed of the calls that may.
    pub warnings: Vec<String>,
}

impl Remote {
    /// Seizes a fork of ours, maps the area and puts our code there. `area` is a free address.
    pub fn attach(pid: i32, area: u64) -> Result<Self> {
        let tracee = Tracee::seize(pid, OPTIONS)
            .with_context(|| format!("tracing the new process {pid}"))?;
        tracee.interrupt()?;
        if tracee.wait_interrupted()?.is_none() {
            bail!("the new process {pid} has ended");
        }
        tracee.set_sigmask(!0)?;
        let inside = by_stub(tracee, libc::SYS_getpid, &[])? as i32;
        let shared = Shared {
            pid,
            inside,
            mem: Mem::open(pid)?,
            area,
        };
        let r = Self::new(tracee, inside, Rc::new(shared));
        let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let args = [area, AREA, rwx as u64, flags as u64, u64::MAX, 0];
        let got = by_stub(tracee, libc::SYS_mmap, &args)?;
        if got as u64 != area {
            bail!("mapping {AREA} bytes at {area:#x} of process {pid}: result {got}");
        }
        r.write_code()?;
        Ok(r)
    }

    /// The area was inherited from the parent body by fork; we are told of the child by an event.
    pub fn adopt(child: Made, parent: &Remote) -> Result<Self> {
        let tracee = Tracee { tid: child.id };
        match tracee.wait()? {
            Stop::Interrupt { .. } => {}
            other => bail!("the new process {} ended: {other:?}", child.id),
        }
        let shared = Shared {
            pid: child.id,
            inside: child.inside,
            mem: Mem::open(child.id)?,
            area: parent.shared.area,
        };
        Ok(Self::new(tracee, child.inside, Rc::new(shared)))
    }

    /// Another thread of the same process, from its first stop on.
    pub fn thread(&self, thread: Made) -> Result<Self> {
        let tracee = Tracee { tid: thread.id };
        match tracee.wait()? {
            Stop::Interrupt { .. } => {}
            other => bail!("the new thread {} ended: {other:?}", thread.id),
        }
        Ok(Self::new(tracee, thread.inside, Rc::clone(&self.shared)))
    }

    fn new(tracee: Tracee, inside: i32, shared: Rc<Shared>) -> Self {
        Self {
            tracee,
            inside,
            shared,
            queue: Vec::new(),
            data: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Of its process, as we see it.
    pub fn pid(&self) -> i32 {
        self.shared.pid
    }

    /// Of its process, as it sees itself.
    pub fn pid_inside(&self) -> i32 {
        self.shared.inside
    }

    pub fn mem(&self) -> &Mem {
        &self.shared.mem
    }

    /// First address of the area.
    pub fn area(&self) -> u64 {
        self.shared.area
    }

    fn write_code(&self) -> Result<()> {
        let mut a = Asm::new();
        a.interpreter(self.shared.area + TABLE);
        a.int3();
        self.shared.mem.write(self.shared.area, a.bytes())
    }

    /// Queues a call that must not fail; `what` says what it does, for the error.
    pub fn must(&mut self, what: impl Into<String>, nr: i64, args: &[Arg]) -> Result<()> {
        self.push(what.into(), nr, args, true)
    }

    /// Queues a call whose failure is a warning.
    pub fn may(&mut self, what: impl Into<String>, nr: i64, args: &[Arg]) -> Result<()> {
        self.push(what.into(), nr, args, false)
    }

    /// Queues a call whose failure is of no account.
    pub fn attempt(&mut self, nr: i64, args: &[Arg]) -> Result<()> {
        self.push(String::new(), nr, args, false)
    }

    /// Queues a call on a structure that holds its own addresses: `make` is told where its `len` bytes will
    /// be, and gives them and the call.
    pub fn must_with(
        &mut self,
        what: &str,
        len: usize,
        make: &dyn Fn(u64) -> (Vec<u8>, Call),
    ) -> Result<()> {
        if self.data.len() + len > (AREA - DATA) as usize || self.queue.len() >= CALLS_MAX {
            self.flush()?;
        }
        let (bytes, call) = make(self.shared.area + DATA + self.data.len() as u64);
        self.data.extend_from_slice(&bytes);
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        self.queue.push(Queued {
            call,
            what: what.to_owned(),
            must: true,
        });
        Ok(())
    }

    /// Makes a call now, after all that are queued, and gives its result (negative errno).
    pub fn call(&mut self, nr: i64, args: &[Arg]) -> Result<i64> {
        self.flush()?;
        self.push(String::new(), nr, args, false)?;
        let results = self.execute()?;
        self.queue.clear();
        self.data.clear();
        results
            .first()
            .copied()
            .context("a remote call gave no result")
    }

    /// Bytes that the last [`Remote::call`] wrote at the `Arg::In` that began `offset` bytes into its data.
    pub fn output(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.shared
            .mem
            .read_vec(self.shared.area + DATA + offset, len)
    }

    fn push(&mut self, what: String, nr: i64, args: &[Arg], must: bool) -> Result<()> {
        let need: usize = args
            .iter()
            .map(|a| {
                if let Arg::In(b) = a {
                    b.len().next_multiple_of(16)
                } else {
                    0
                }
            })
            .sum();
        let room = (AREA - DATA) as usize;
        if need > room {
            bail!("{what}: {need} bytes of arguments are too many");
        }
        if self.data.len() + need > room || self.queue.len() >= CALLS_MAX {
            self.flush()?;
        }
        let mut values = Vec::with_capacity(6);
        for a in args {
            values.push(match a {
                Arg::Val(v) => *v,
                Arg::In(b) => {
                    let at = self.shared.area + DATA + self.data.len() as u64;
                    self.data.extend_from_slice(b);
                    self.data.resize(self.data.len().next_multiple_of(16), 0);
                    at
                }
            });
        }
        self.queue.push(Queued {
            call: Call::new(nr, &values),
            what,
            must,
        });
        Ok(())
    }

    /// Makes all queued calls.
    pub fn flush(&mut self) -> Result<()> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let results = self.execute()?;
        self.data.clear();
        for (q, r) in std::mem::take(&mut self.queue).iter().zip(results) {
            if (-4095..0).contains(&r) {
                let e = std::io::Error::from_raw_os_error(-r as i32);
                if q.must {
                    return Err(anyhow!(e).context(format!("process {}: {}", self.pid(), q.what)));
                }
                if !q.what.is_empty() {
                    self.warnings
                        .push(format!("process {}: {}: {e}", self.pid(), q.what));
                }
            }
        }
        Ok(())
    }

    fn execute(&mut self) -> Result<Vec<i64>> {
        Ok(self.execute_and_see()?.0)
    }

    /// Results of the queued calls, and the id for us of the last child or thread they made.
    fn execute_and_see(&mut self) -> Result<(Vec<i64>, Option<i32>)> {
        let mem = &self.shared.mem;
        let mut table = Vec::with_capacity((self.queue.len() + 1) * CALL_SIZE);
        self.queue.iter().for_each(|q| q.call.encode(&mut table));
        table.resize(table.len() + 8, 0);
        if !self.data.is_empty() {
            mem.write(self.shared.area + DATA, &self.data)?;
        }
        mem.write(self.shared.area + TABLE, &table)?;
        let r = Regs {
            rip: self.shared.area,
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..self.tracee.regs()?
        };
        self.tracee.set_regs(&r)?;
        let made = self.tracee.run_to_trap().with_context(|| {
            let names: Vec<&str> = self.queue.iter().map(|q| q.what.as_str()).take(3).collect();
            format!("while a restored process did: {} ...", names.join(", "))
        })?;
        let mut table = vec![0; self.queue.len() * CALL_SIZE];
        mem.read(self.shared.area + TABLE, &mut table)?;
        let results = table
            .chunks_exact(CALL_SIZE)
            .map(|c| i64::from_le_bytes(c[64..72].try_into().unwrap_or_default()))
            .collect();
        Ok((results, made))
    }

    /// clone3 with these flags (and exit signal 0); the child or thread stops under our hand before its
    /// first instruction. A refusal is an `io::Error`.
    pub fn clone_thread(&mut self, flags: u64, tid: Option<i32>) -> Result<Made> {
        self.clone_with(flags, 0, tid)
    }

    /// A child process that is a copy of this body.
    pub fn fork(&mut self, exit_signal: i32, pid: Option<i32>) -> Result<Made> {
        self.clone_with(0, exit_signal, pid)
    }

    fn clone_with(&mut self, flags: u64, exit_signal: i32, id: Option<i32>) -> Result<Made> {
        let is_taken = |e: &anyhow::Error| {
            let e = e.downcast_ref::<std::io::Error>();
            e.and_then(std::io::Error::raw_os_error) == Some(libc::EEXIST)
        };
        vacancy::once_free(id, is_taken, || self.clone_once(flags, exit_signal, id))
    }

    fn clone_once(&mut self, flags: u64, exit_signal: i32, id: Option<i32>) -> Result<Made> {
        const ARGS: usize = 88;
        self.flush()?;
        self.must_with("clone3", ARGS + 8, &|at| {
            // struct clone_args, and the id it points to behind it.
            let words = [
                flags,
                0,
                0,
                0,
                exit_signal as u64,
                0,
                0,
                0,
                if id.is_some() { at + ARGS as u64 } else { 0 },
                u64::from(id.is_some()),
                0,
            ];
            let mut b: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            b.extend(id.unwrap_or(0).to_le_bytes());
            (b, Call::new(libc::SYS_clone3, &[at, ARGS as u64]))
        })?;
        let (r, made) = self.execute_and_see()?;
        self.queue.clear();
        self.data.clear();
        match (r.first().copied().unwrap_or(0), made) {
            (r, _) if r < 0 => Err(std::io::Error::from_raw_os_error(-r as i32).into()),
            (r, Some(id)) => Ok(Made {
                id,
                inside: r as i32,
            }),
            (r, None) => bail!("process {}: nobody told of its child {r}", self.pid()),
        }
    }

    /// Ends the process with this wait status, as a zombie for its parent.
    pub fn die(self, status: i32) -> Result<()> {
        let t = self.tracee;
        let (nr, args) = if libc::WIFSIGNALED(status) {
            (
                libc::SYS_kill,
                [self.pid_inside() as u64, libc::WTERMSIG(status) as u64],
            )
        } else {
            (libc::SYS_exit_group, [libc::WEXITSTATUS(status) as u64, 0])
        };
        let mut a = Asm::new();
        // Dispositions are the default; a mask would hold the signal back.
        a.syscall(nr, &args);
        a.syscall(libc::SYS_exit_group, &[0]);
        self.shared.mem.write(self.shared.area + TABLE, a.bytes())?;
        let r = Regs {
            rip: self.shared.area + TABLE,
            orig_rax: u64::MAX,
            ..t.regs()?
        };
        t.set_regs(&r)?;
        t.set_sigmask(0)?;
        t.cont(0)?;
        loop {
            match t.wait()? {
                Stop::Exited(_) | Stop::Killed(_) => return Ok(()),
                Stop::Signal(s) => t.cont(s)?,
                _ => t.cont(0)?,
            }
        }
    }

    /// One call through two bytes at `place`, and the thread is stopped behind it: for unmapping the area
    /// itself. The bytes are put back.
    pub fn by_step(&self, place: u64, nr: i64, args: &[u64]) -> Result<i64> {
        let old = self.shared.mem.read_vec(place, 2)?;
        self.shared.mem.write(place, &[0x0f, 0x05])?;
        let c = Call::new(nr, args);
        let mut r = Regs {
            rip: place,
            orig_rax: u64::MAX,
            rax: nr as u64,
            eflags: 0x202,
            ..self.tracee.regs()?
        };
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = c.args;
        self.tracee.set_regs(&r)?;
        self.tracee.step()?;
        loop {
            match self.tracee.wait()? {
                Stop::Signal(libc::SIGTRAP) => break,
                Stop::Interrupt { .. } | Stop::Syscall => self.tracee.step()?,
                other => bail!(
                    "process {} ended while being rebuilt: {other:?}",
                    self.pid()
                ),
            }
        }
        let result = self.tracee.regs()?.rax as i64;
        self.shared.mem.write(place, &old)?;
        Ok(result)
    }
}

/// One call through `syscall; int3` in our own text, before the area is there.
fn by_stub(tracee: Tracee, nr: i64, args: &[u64]) -> Result<i64> {
    let c = Call::new(nr, args);
    let mut r = Regs {
        rip: syscall_stub(),
        orig_rax: u64::MAX,
        rax: nr as u64,
        ..tracee.regs()?
    };
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = c.args;
    tracee.set_regs(&r)?;
    tracee.run_to_trap()?;
    Ok(tracee.regs()?.rax as i64)
}
