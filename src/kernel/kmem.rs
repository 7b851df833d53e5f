//! Kernel memory, read and never written: for what no system call tells about a process that stands still. A
//! BPF program of a few instructions copies it (bpf_probe_read_kernel, bpf-helpers(7)); BTF tells where the
//! fields are. Root only: CAP_BPF and CAP_PERFMON, which file capabilities do not give mistctl.

pub mod aio;
mod btf;
pub mod dnotify;
pub mod landlock;
mod per_cpu;
pub mod policy;
pub mod posix_timers;
pub mod semaphores;
pub mod threads;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, anyhow};

use super::arch::PAGE;
use btf::{Btf, Bytes};

/// What one copy brings at most, bytes.
const MOST: usize = 64 * 1024;
/// As for a field: all that is fetched costs, whatever was asked for.
const FEW: usize = 64;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_SYSCALL: u32 = 31;
const F_SLEEPABLE: u32 = 1 << 4;
const FUNC_GET_CURRENT_TASK: i32 = 35;
const FUNC_PROBE_READ_KERNEL: i32 = 113;

/// Reads kernel memory.
#[derive(Debug)]
pub struct KernelMemory {
    btf: Btf,
    few: Copier,
    most: Copier,
    pages: OnceLock<Pages>,
    /// What is added to a pointer to a variable of each processor, for each of them.
    processors: OnceLock<Vec<u64>>,
}

/// Copies up to so many bytes by way of a map.
#[derive(Debug)]
struct Copier {
    room: usize,
    map: Mutex<OwnedFd>,
    program: OwnedFd,
}

fn bpf(command: libc::c_int, attributes: &mut [u8]) -> io::Result<i64> {
    // SAFETY: the kernel reads and writes at most the bytes of `attributes`, an union bpf_attr cut where zeros
    // follow; every pointer in it is to memory that outlives the call.
    let r = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            attributes.len(),
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

fn descriptor(command: libc::c_int, attributes: &mut [u8]) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: both commands that make something return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Words of an union bpf_attr, one behind the other.
fn words(list: &[&[u8]]) -> Vec<u8> {
    list.concat()
}

/// One instruction (struct bpf_insn).
fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> [u8; 8] {
    let mut i = [0; 8];
    i[0] = code;
    i[1] = src << 4 | dst;
    i[2..4].copy_from_slice(&off.to_ne_bytes());
    i[4..].copy_from_slice(&imm.to_ne_bytes());
    i
}

const LD_IMM64: u8 = 0x18;
const LDX_DW: u8 = 0x79;
const STX_DW: u8 = 0x7b;
const MOV: u8 = 0xbf;
const MOV_IMM: u8 = 0xb7;
const JEQ_IMM: u8 = 0x15;
const JGT_IMM: u8 = 0x25;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// The immediate is a map's descriptor; the register gets the address of its value.
const MAP_VALUE: u8 = 2;

/// Copies `len` bytes at `address` into the map, and tells the calling task.
fn read_program(map: i32, room: usize) -> Vec<[u8; 8]> {
    vec![
        insn(MOV, 6, 1, 0, 0),
        insn(CALL, 0, 0, 0, FUNC_GET_CURRENT_TASK),
        insn(STX_DW, 6, 0, 16, 0),
        insn(LD_IMM64, 1, MAP_VALUE, 0, map),
        insn(0, 0, 0, 0, 0),
        insn(LDX_DW, 2, 6, 8, 0),
        insn(LDX_DW, 3, 6, 0, 0),
        insn(JEQ_IMM, 2, 0, 3, 0),
        insn(JGT_IMM, 2, 0, 2, room as i32),
        insn(CALL, 0, 0, 0, FUNC_PROBE_READ_KERNEL),
        insn(STX_DW, 6, 0, 24, 0),
        insn(MOV_IMM, 0, 0, 0, 0),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

fn load(program: &[[u8; 8]]) -> io::Result<OwnedFd> {
    const LICENCE: &[u8] = b"Dual MIT/GPL\0";
    let program: Vec<u8> = program.concat();
    descriptor(
        PROG_LOAD,
        &mut words(&[
            &PROG_TYPE_SYSCALL.to_ne_bytes(),
            &(program.len() as u32 / 8).to_ne_bytes(),
            &(program.as_ptr() as u64).to_ne_bytes(),
            &(LICENCE.as_ptr() as u64).to_ne_bytes(),
            // log_level, log_size, log_buf, kern_version.
            &[0; 20],
            &F_SLEEPABLE.to_ne_bytes(),
        ]),
    )
}

/// What this kernel says of its types.
fn types() -> Result<Btf> {
    let path = "/sys/kernel/btf/vmlinux";
    let bytes = Bytes::of(path).with_context(|| path.to_owned())?;
    Btf::parse(bytes).with_context(|| format!("{path} is no BTF"))
}

/// A map with one value of so many bytes.
fn map_of(bytes: usize) -> Result<OwnedFd> {
    let size = |n: usize| (n as u32).to_ne_bytes();
    descriptor(
        MAP_CREATE,
        &mut words(&[
            &MAP_TYPE_ARRAY.to_ne_bytes(),
            &size(4),
            &size(bytes),
            &size(1),
        ]),
    )
    .context("bpf(BPF_MAP_CREATE)")
}

/// Runs a program on `context`, which it reads and writes.
fn run(program: &OwnedFd, context: &mut [u64]) -> Result<()> {
    bpf(
        PROG_TEST_RUN,
        &mut words(&[
            &program.as_raw_fd().to_ne_bytes(),
            // retval, data_size_in, data_size_out, data_in, data_out, repeat, duration.
            &[0; 36],
            &(size_of_val(context) as u32).to_ne_bytes(),
            &[0; 4],
            &(context.as_mut_ptr() as u64).to_ne_bytes(),
            &[0; 8],
        ]),
    )
    .context("bpf(BPF_PROG_TEST_RUN)")?;
    Ok(())
}

/// The value of a map; `value` is as long as that.
fn fetch(map: &OwnedFd, value: &mut [u8]) -> Result<()> {
    let key = 0u32;
    bpf(
        MAP_LOOKUP_ELEM,
        &mut words(&[
            &map.as_raw_fd().to_ne_bytes(),
            &[0; 4],
            &(&raw const key as u64).to_ne_bytes(),
            &(value.as_mut_ptr() as u64).to_ne_bytes(),
            &[0; 8],
        ]),
    )
    .context("bpf on a map")?;
    Ok(())
}

impl Copier {
    fn of(room: usize) -> Result<Self> {
        let map = map_of(room)?;
        let program = load(&read_program(map.as_raw_fd(), room)).context("bpf(BPF_PROG_LOAD)")?;
        Ok(Self {
            room,
            map: Mutex::new(map),
            program,
        })
    }

    /// Copies into the map. Gives the task_struct of the thread that asks.
    fn copy(&self, address: u64, len: usize) -> Result<u64> {
        // As [`read_program`] has it: address, length; task_struct, result of the helper.
        let mut context = [address, len as u64, 0, 0];
        run(&self.program, &mut context)?;
        let [_, _, task, result] = context.map(|w| w as i64);
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result as i32))
                .with_context(|| format!("reading {len} bytes of kernel memory at {address:#x}"));
        }
        Ok(task as u64)
    }
}

impl KernelMemory {
    /// The one of this process. The first call takes some milliseconds.
    ///
    /// # Errors
    /// A kernel without BTF or BPF; a missing privilege.
    pub fn get() -> Result<&'static Self> {
        static ONE: OnceLock<Result<KernelMemory, String>> = OnceLock::new();
        let one = ONE.get_or_init(|| Self::open().map_err(|e| format!("{e:#}")));
        one.as_ref().map_err(|e| anyhow!(e.clone()))
    }

    fn open() -> Result<Self> {
        let btf = types()?;
        Ok(Self {
            btf,
            few: Copier::of(FEW)?,
            most: Copier::of(MOST)?,
            pages: OnceLock::new(),
            processors: OnceLock::new(),
        })
    }

    /// Kernel memory at `address`.
    ///
    /// # Errors
    /// EFAULT: nothing is mapped there.
    pub fn read(&self, address: u64, len: usize) -> Result<Vec<u8>> {
        let copier = if len <= FEW { &self.few } else { &self.most };
        let mut all = Vec::new();
        let mut value = vec![0; copier.room];
        let map = copier.map.lock().unwrap_or_else(PoisonError::into_inner);
        while all.len() < len {
            let n = (len - all.len()).min(copier.room);
            copier.copy(address.wrapping_add(all.len() as u64), n)?;
            fetch(&map, &mut value)?;
            all.extend_from_slice(value.get(..n).unwrap_or_default());
        }
        Ok(all)
    }

    /// The task_struct of the calling thread.
    pub fn current(&self) -> Result<u64> {
        self.few.copy(0, 0)
    }

    pub fn u64(&self, address: u64) -> Result<u64> {
        let b = self.read(address, 8)?;
        Ok(b.try_into().map_or(0, u64::from_ne_bytes))
    }

    pub fn u32(&self, address: u64) -> Result<u32> {
        let b = self.read(address, 4)?;
        Ok(b.try_into().map_or(0, u32::from_ne_bytes))
    }

    /// Where a field of the structure at `address` is.
    pub fn field(&self, address: u64, structure: &str, field: &str) -> Result<u64> {
        let offset = self
            .btf
            .offset(structure, field)
            .with_context(|| format!("this kernel's struct {structure} has no {field}"))?;
        Ok(address.wrapping_add(offset))
    }

    /// Where a field of one bit is in a structure: byte and mask.
    pub fn flag(&self, structure: &str, field: &str) -> Result<(u64, u8)> {
        let bit = self
            .btf
            .bit(structure, field)
            .with_context(|| format!("this kernel's struct {structure} has no {field}"))?;
        Ok((bit / 8, 1 << (bit % 8)))
    }

    /// The pointer in a field.
    pub fn pointer(&self, address: u64, structure: &str, field: &str) -> Result<u64> {
        self.u64(self.field(address, structure, field)?)
    }

    /// The file behind a descriptor of this process.
    pub fn file(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let files = self.pointer(self.current()?, "task_struct", "files")?;
        let table = self.pointer(files, "files_struct", "fdt")?;
        let list = self.pointer(table, "fdtable", "fd")?;
        self.u64(list.wrapping_add(8 * fd.as_raw_fd() as u64))
    }

    /// Where a variable is that each processor has for itself, of each one there may be.
    pub fn per_cpu(&self, variable: u64) -> Result<Vec<u64>> {
        let offsets = match self.processors.get() {
            Some(known) => known,
            None => {
                let found =
                    per_cpu::offsets(self).context("where processors have their variables")?;
                self.processors.get_or_init(|| found)
            }
        };
        Ok(offsets.iter().map(|o| variable.wrapping_add(*o)).collect())
    }

    /// Where the memory of a struct page is mapped.
    pub fn page(&self, page: u64) -> Result<u64> {
        let pages = match self.pages.get() {
            Some(known) => known,
            None => {
                let found = Pages::find(self).context("where the kernel maps its memory")?;
                self.pages.get_or_init(|| found)
            }
        };
        let number = page.wrapping_sub(pages.first) / pages.size;
        Ok(pages.memory.wrapping_add(number.wrapping_mul(PAGE)))
    }

    /// Bytes of a structure.
    pub fn size(&self, structure: &str) -> Result<u64> {
        self.btf
            .size(structure)
            .with_context(|| format!("this kernel has no struct {structure}"))
    }
}

/// Where all memory is mapped, and the list of struct page, one for each page of it: both are at random
/// addresses.
#[derive(Debug)]
struct Pages {
    memory: u64,
    first: u64,
    size: u64,
}

impl Pages {
    /// Found with a page of our own, whose number and content we know: lent to a pipe, its struct page is in
    /// the pipe's list, and its content is where memory is mapped.
    fn find(k: &KernelMemory) -> Result<Self> {
        const NUMBER: u64 = (1 << 55) - 1;
        let mut buffer = vec![0u8; 2 * PAGE as usize];
        let skip = buffer.as_ptr().align_offset(PAGE as usize);
        let page = buffer
            .get_mut(skip..skip + PAGE as usize)
            .context("no page in two")?;
        let at = page.as_ptr() as u64;
        let (time, pid) = (
            super::time_ns::host_monotonic_ns() as u64,
            std::process::id(),
        );
        for (i, word) in page.chunks_exact_mut(8).enumerate() {
            let mark = (time ^ u64::from(pid)).wrapping_mul(i as u64 * 2 + 0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&mark.to_ne_bytes());
        }
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let part = libc::iovec {
            iov_base: page.as_mut_ptr().cast(),
            iov_len: PAGE as usize,
        };
        // SAFETY: `part` is memory that outlives the pipe and is not changed while the pipe has it.
        nix::errno::Errno::result(unsafe {
            libc::vmsplice(write.as_raw_fd(), &raw const part, 1, 0)
        })
        .context("vmsplice")?;
        let mut entry = [0; 8];
        std::fs::File::open("/proc/self/pagemap")
            .and_then(|f| f.read_exact_at(&mut entry, at / PAGE * 8))
            .context("/proc/self/pagemap")?;
        let number = u64::from_ne_bytes(entry) & NUMBER;
        anyhow::ensure!(number != 0, "/proc/self/pagemap hides where pages are");
        let pipe = k.pointer(k.file(read.as_fd())?, "file", "private_data")?;
        let buffers = k.pointer(pipe, "pipe_inode_info", "bufs")?;
        let lent = k.pointer(buffers, "pipe_buffer", "page")?;
        let size = k.size("page")?.max(1);
        // A multiple of the randomization's granule (arch/x86/mm/kaslr.c), below what is in it.
        const GRANULE: u64 = 1 << 30;
        const MOST: u64 = 1 << 14;
        let highest = k.current()? & !(GRANULE - 1);
        let found = (0..MOST)
            .map(|i| highest.wrapping_sub(i * GRANULE))
            .find(|base| {
                let there = k.read(base.wrapping_add(number * PAGE), PAGE as usize);
                there.is_ok_and(|b| b == *page)
            });
        Ok(Self {
            memory: found.context("our own page is nowhere to be found")?,
            first: lent.wrapping_sub(number * size),
            size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::KernelMemory;

    #[test]
    fn reads_its_own_task() {
        if !caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_BPF).unwrap() {
            return eprintln!("SKIPPED: needs CAP_BPF");
        }
        let kernel = KernelMemory::get().unwrap();
        let task = kernel.current().unwrap();
        let pid = kernel.field(task, "task_struct", "pid").unwrap();
        let comm = kernel.field(task, "task_struct", "comm").unwrap();
        let comm = kernel.read(comm, 16).unwrap();
        let own = std::fs::read("/proc/thread-self/comm").unwrap();
        assert!(comm.starts_with(&own[..own.len() - 1]), "{comm:?}");
        assert!(kernel.u32(pid).unwrap() > 0);
        assert!(kernel.read(8, 8).is_err());
        super::Pages::find(kernel).unwrap();
    }
}
