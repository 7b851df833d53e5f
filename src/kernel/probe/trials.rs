//! One function per feature that tries it. What could do harm is tried in a forked child, which only issues
//! system calls: other threads of this process may have held locks at the fork.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::c_long;

const PAGE: usize = 4096;

/// What a child tells its parent.
pub type Words = [i64; 8];

/// A system call by number: its result, or minus errno.
fn sys(nr: c_long, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the callers pass addresses of live, long enough objects of their own.
    let r = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if r == -1 { -i64::from(errno()) } else { r }
}

fn errno() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

fn checked(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::from_raw_os_error((-result) as i32))
    } else {
        Ok(result)
    }
}

fn bad(message: &str) -> io::Error {
    io::Error::other(message.to_owned())
}

/// Runs `f` in a forked child and returns what it returns. The child is gone afterwards.
fn in_child(f: impl FnOnce() -> Words) -> io::Result<Words> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the child issues system calls only, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let mut bytes = [0u8; 64];
        for (to, word) in bytes.chunks_exact_mut(8).zip(f()) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let _ = (&writer).write_all(&bytes);
        // SAFETY: ends the child at once, without destructors that belong to the parent.
        unsafe { libc::_exit(0) }
    }
    drop(writer);
    let mut bytes = Vec::new();
    let read = reader.read_to_end(&mut bytes);
    let mut status = 0;
    // SAFETY: our own child, and a valid place for its status.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 && errno() == libc::EINTR {}
    read?;
    let mut words = Words::default();
    if bytes.len() != 64 {
        return Err(bad(&format!(
            "the trial was killed by signal {}",
            libc::WTERMSIG(status)
        )));
    }
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = from.try_into().map(i64::from_ne_bytes).unwrap_or_default();
    }
    Ok(words)
}

/// One number out of a child, negative for an error.
fn one(f: impl FnOnce() -> i64) -> io::Result<i64> {
    let [r, ..] = in_child(|| [f(), 0, 0, 0, 0, 0, 0, 0])?;
    checked(r)
}

/// A process that waits to be looked at; dies with this value.
struct Target(i32);

impl Target {
    fn new() -> io::Result<Target> {
        // SAFETY: the child only sleeps; PDEATHSIG ends it should we be killed.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                sys(
                    libc::SYS_prctl,
                    [
                        libc::PR_SET_PDEATHSIG as u64,
                        libc::SIGKILL as u64,
                        0,
                        0,
                        0,
                        0,
                    ],
                );
                loop {
                    sys(libc::SYS_pause, [0; 6]);
                }
            }
            pid => Ok(Target(pid)),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), 0) < 0 && errno() == libc::EINTR {}
        }
    }
}

/// What one process may do to another that is not its child. Each is a result, or minus errno.
#[derive(Debug, Default)]
pub struct Foreign {
    pub seize: i64,
    pub vm_read: i64,
    pub pidfd_getfd: i64,
    /// Size of the NT_X86_XSTATE register set, bytes.
    pub xstate: i64,
    /// Components of xstate that the kernel keeps (XCR0), a bit each.
    pub xfeatures: i64,
    pub rseq: i64,
    pub kcmp: i64,
}

/// Seizes a sibling process and reads it by every way there is.
pub fn foreign() -> io::Result<Foreign> {
    let target = Target::new()?;
    let pid = target.0 as u64;
    let here = 0x6d69_7374_6374_6c21_u64;
    let address = &raw const here as u64;
    let mut area = [0u8; 16384];
    let [
        seize,
        vm_read,
        pidfd_getfd,
        xstate,
        xfeatures,
        rseq,
        kcmp,
        _,
    ] = in_child(move || {
        let seize = sys(
            libc::SYS_ptrace,
            [u64::from(libc::PTRACE_SEIZE), pid, 0, 0, 0, 0],
        );
        let mut copy = 0u64;
        let local = [&raw mut copy as u64, 8];
        let remote = [address, 8];
        let vm_read = sys(
            libc::SYS_process_vm_readv,
            [pid, local.as_ptr() as u64, 1, remote.as_ptr() as u64, 1, 0],
        );
        let pidfd = sys(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0]);
        let getfd = if pidfd < 0 {
            pidfd
        } else {
            sys(libc::SYS_pidfd_getfd, [pidfd as u64, 2, 0, 0, 0, 0])
        };
        let kcmp = sys(libc::SYS_kcmp, [pid, pid, 0, 1, 1, 0]);
        let (mut xstate, mut xfeatures, mut rseq) = (seize, seize, seize);
        if seize >= 0 {
            sys(
                libc::SYS_ptrace,
                [u64::from(libc::PTRACE_INTERRUPT), pid, 0, 0, 0, 0],
            );
            sys(libc::SYS_wait4, [pid, 0, libc::__WALL as u64, 0, 0, 0]);
            let mut iov = [area.as_mut_ptr() as u64, area.len() as u64];
            let nt_x86_xstate = 0x202;
            xstate = sys(
                libc::SYS_ptrace,
                [
                    u64::from(libc::PTRACE_GETREGSET),
                    pid,
                    nt_x86_xstate,
                    iov.as_mut_ptr() as u64,
                    0,
                    0,
                ],
            );
            if xstate >= 0 {
                xstate = iov[1] as i64;
                let mask = area.get(464..472).and_then(|b| b.try_into().ok());
                xfeatures = mask.map_or(0, i64::from_ne_bytes);
            }
            let mut configuration = [0u64; 4];
            rseq = sys(
                libc::SYS_ptrace,
                [
                    u64::from(libc::PTRACE_GET_RSEQ_CONFIGURATION),
                    pid,
                    32,
                    configuration.as_mut_ptr() as u64,
                    0,
                    0,
                ],
            );
            sys(
                libc::SYS_ptrace,
                [u64::from(libc::PTRACE_DETACH), pid, 0, 0, 0, 0],
            );
        }
        [seize, vm_read, getfd, xstate, xfeatures, rseq, kcmp, 0]
    })?;
    Ok(Foreign {
        seize,
        vm_read,
        pidfd_getfd,
        xstate,
        xfeatures,
        rseq,
        kcmp,
    })
}

/// Anonymous memory of our own; unmapped when dropped.
struct Memory {
    start: u64,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> io::Result<Memory> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a fresh mapping, wherever there is room.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Memory {
                start: p as u64,
                len,
            })
        }
    }

    fn touch(&self) {
        for offset in (0..self.len).step_by(PAGE) {
            // SAFETY: within the mapping, which nobody else knows.
            unsafe { std::ptr::write_volatile((self.start as usize + offset) as *mut u8, 1) }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { libc::munmap(self.start as *mut _, self.len) };
    }
}

/// struct pm_scan_arg (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

fn scan(memory: &Memory, flags: u64, category: u64) -> io::Result<i64> {
    const PAGEMAP_SCAN: u64 = 0xc060_6610;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut regions = [[0u64; 3]; 4];
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags,
        start: memory.start,
        end: memory.start + memory.len as u64,
        vec: regions.as_mut_ptr() as u64,
        vec_len: 4,
        category_anyof_mask: category,
        return_mask: category,
        ..ScanArg::default()
    };
    checked(sys(
        libc::SYS_ioctl,
        [
            pagemap.as_raw_fd() as u64,
            PAGEMAP_SCAN,
            &raw mut arg as u64,
            0,
            0,
            0,
        ],
    ))
}

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// Finds a populated page by the PAGEMAP_SCAN ioctl.
pub fn pagemap_scan() -> io::Result<()> {
    let memory = Memory::new(2 * PAGE)?;
    memory.touch();
    match scan(&memory, 0, PAGE_IS_PRESENT)? {
        0 => Err(bad("finds no page")),
        _ => Ok(()),
    }
}

/// A userfaultfd, made by the system call for faults of kernel and user mode.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let fd = checked(sys(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]))?;
    // SAFETY: a descriptor that the kernel has just given us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// UFFDIO_API with these features; returns all that the kernel has.
pub fn uffd_api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    let mut api = [0xaa_u64, features, 0];
    checked(sys(
        libc::SYS_ioctl,
        [
            fd.as_raw_fd() as u64,
            UFFDIO_API,
            api.as_mut_ptr() as u64,
            0,
            0,
            0,
        ],
    ))?;
    Ok(api[1])
}

pub const UFFD_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6; // fork, remap, remove, unmap
const UFFD_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_WP_ASYNC: u64 = 1 << 15;
pub const UFFD_MOVE: u64 = 1 << 16;

/// Tracks a written page with WP_ASYNC and PAGEMAP_SCAN, without a fault handler.
pub fn wp_async() -> io::Result<()> {
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const REGISTER_MODE_WP: u64 = 2;
    const WP_MATCHING_CHECKED: u64 = 3;
    let fd = userfaultfd()?;
    uffd_api(&fd, UFFD_WP_ASYNC | UFFD_WP_UNPOPULATED)?;
    let memory = Memory::new(2 * PAGE)?;
    memory.touch();
    let mut range = [memory.start, memory.len as u64, REGISTER_MODE_WP, 0];
    checked(sys(
        libc::SYS_ioctl,
        [
            fd.as_raw_fd() as u64,
            UFFDIO_REGISTER,
            range.as_mut_ptr() as u64,
            0,
            0,
            0,
        ],
    ))?;
    scan(&memory, WP_MATCHING_CHECKED, PAGE_IS_WRITTEN)?;
    let before = scan(&memory, 0, PAGE_IS_WRITTEN)?;
    memory.touch();
    match (before, scan(&memory, 0, PAGE_IS_WRITTEN)?) {
        (0, 1..) => Ok(()),
        _ => Err(bad("does not report written pages")),
    }
}

/// Soft-dirty bits: cleared by clear_refs, set by a write.
pub fn soft_dirty() -> io::Result<()> {
    let memory = Memory::new(PAGE)?;
    memory.touch();
    let at = memory.start / PAGE as u64 * 8;
    let dirty = |fd: i64| {
        let mut entry = 0u64;
        let r = sys(
            libc::SYS_pread64,
            [fd as u64, &raw mut entry as u64, 8, at, 0, 0],
        );
        if r < 0 { r } else { (entry >> 55 & 1) as i64 }
    };
    let works = one(|| {
        let open = |path: &std::ffi::CStr, flags: i32| {
            sys(
                libc::SYS_openat,
                [
                    libc::AT_FDCWD as u64,
                    path.as_ptr() as u64,
                    flags as u64,
                    0,
                    0,
                    0,
                ],
            )
        };
        let (clear, pagemap) = (
            open(c"/proc/self/clear_refs", libc::O_WRONLY),
            open(c"/proc/self/pagemap", libc::O_RDONLY),
        );
        if clear < 0 || pagemap < 0 {
            return clear.min(pagemap);
        }
        let cleared = sys(
            libc::SYS_write,
            [clear as u64, c"4".as_ptr() as u64, 1, 0, 0, 0],
        );
        if cleared < 0 {
            return cleared;
        }
        let before = dirty(pagemap);
        memory.touch();
        i64::from(before == 0 && dirty(pagemap) == 1)
    })?;
    if works == 1 {
        Ok(())
    } else {
        Err(bad("not built into this kernel"))
    }
}

/// Gets memory backed by huge pages.
pub fn huge_pages() -> io::Result<()> {
    let huge = || -> io::Result<u64> {
        let text = fs::read_to_string("/proc/self/smaps_rollup")?;
        let field = text.lines().find_map(|l| l.strip_prefix("AnonHugePages:"));
        Ok(field
            .and_then(|f| f.split_whitespace().next()?.parse().ok())
            .unwrap_or(0))
    };
    let before = huge()?;
    let memory = Memory::new(4 << 20)?;
    checked(sys(
        libc::SYS_madvise,
        [
            memory.start,
            memory.len as u64,
            libc::MADV_HUGEPAGE as u64,
            0,
            0,
            0,
        ],
    ))?;
    memory.touch();
    if huge()? > before {
        Ok(())
    } else {
        Err(bad("the kernel gave small pages"))
    }
}

/// Makes a process with an id of our choice (clone3(2), set_tid).
pub fn set_tid() -> io::Result<i64> {
    let max: i64 = fs::read_to_string("/proc/sys/kernel/pid_max")?
        .trim()
        .parse()
        .unwrap_or(32768);
    let mut last = bad("no free id found");
    for tid in (max - 200..max).rev() {
        let wanted = [tid as i32];
        // SAFETY: an all-zero clone_args is valid: a plain fork.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.exit_signal = libc::SIGCHLD as u64;
        args.set_tid = wanted.as_ptr() as u64;
        args.set_tid_size = 1;
        let pid = sys(
            libc::SYS_clone3,
            [
                &raw const args as u64,
                size_of_val(&args) as u64,
                0,
                0,
                0,
                0,
            ],
        );
        if pid == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        match checked(pid) {
            Ok(pid) => {
                sys(libc::SYS_wait4, [pid as u64, 0, 0, 0, 0, 0]);
                return if pid == tid {
                    Ok(pid)
                } else {
                    Err(bad("the kernel gave another id"))
                };
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// Enters new namespaces (CLONE_NEW*), and sets a clock offset when that is a time namespace.
pub fn unshare(flags: i32) -> io::Result<()> {
    one(|| {
        let r = sys(libc::SYS_unshare, [flags as u64, 0, 0, 0, 0, 0]);
        if r < 0 || flags != libc::CLONE_NEWTIME {
            return r;
        }
        let path = c"/proc/self/timens_offsets".as_ptr() as u64;
        let fd = sys(
            libc::SYS_openat,
            [libc::AT_FDCWD as u64, path, libc::O_WRONLY as u64, 0, 0, 0],
        );
        if fd < 0 {
            return fd;
        }
        let offset = c"monotonic 1 0";
        sys(
            libc::SYS_write,
            [
                fd as u64,
                offset.as_ptr() as u64,
                offset.count_bytes() as u64,
                0,
                0,
                0,
            ],
        )
    })
    .map(drop)
}

/// Puts a TCP socket into repair mode.
pub fn tcp_repair() -> io::Result<()> {
    let tcp_repair = 19;
    one(|| {
        let fd = sys(
            libc::SYS_socket,
            [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        );
        let on = 1i32;
        let value = &raw const on as u64;
        if fd < 0 {
            fd
        } else {
            sys(
                libc::SYS_setsockopt,
                [fd as u64, libc::IPPROTO_TCP as u64, tcp_repair, value, 4, 0],
            )
        }
    })
    .map(drop)
}

/// Asks the kernel for its sockets of a family (and protocol) by netlink.
pub fn sock_diag(family: i32, protocol: i32) -> io::Result<()> {
    let len = match family {
        libc::AF_UNIX => 24usize,
        libc::AF_NETLINK => 20,
        _ => 56,
    };
    let mut request = [0u8; 72];
    let total = 16 + len;
    let sock_diag_by_family = 20u16;
    let dump_request = 0x301u16; // NLM_F_REQUEST | NLM_F_DUMP
    request[0..4].copy_from_slice(&(total as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&sock_diag_by_family.to_ne_bytes());
    request[6..8].copy_from_slice(&dump_request.to_ne_bytes());
    request[16] = family as u8;
    request[17] = protocol as u8;
    if family != libc::AF_NETLINK {
        request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes()); // all states
    }
    let netlink_sock_diag = 4;
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
    let fd = checked(sys(
        libc::SYS_socket,
        [libc::AF_NETLINK as u64, kind, netlink_sock_diag, 0, 0, 0],
    ))?;
    // SAFETY: a descriptor that the kernel has just given us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let number = fd.as_raw_fd() as u64;
    checked(sys(
        libc::SYS_sendto,
        [number, request.as_ptr() as u64, total as u64, 0, 0, 0],
    ))?;
    let mut answer = [0u8; 32768];
    let n = checked(sys(
        libc::SYS_recvfrom,
        [
            number,
            answer.as_mut_ptr() as u64,
            answer.len() as u64,
            0,
            0,
            0,
        ],
    ))?;
    if n >= 20 && answer[4..6] == [2, 0] {
        // NLMSG_ERROR
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        checked(i64::from(code))?;
    }
    Ok(())
}

/// struct prctl_mm_map (linux/prctl.h).
#[repr(C)]
struct MmMap {
    addresses: [u64; 11],
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Sets a process's own layout (as it is already) with PR_SET_MM_MAP.
pub fn set_mm_map() -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<u64> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| {
            rest.split_whitespace()
                .map(|f| f.parse().unwrap_or(0))
                .collect()
        })
        .unwrap_or_default();
    // proc_pid_stat(5) counts from 1, and the two fields up to the name are gone.
    let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
    // SAFETY: asks for the end of the heap, changes nothing.
    let brk = unsafe { libc::sbrk(0) } as u64;
    let map = MmMap {
        addresses: [
            field(26),
            field(27),
            field(45),
            field(46),
            field(47),
            brk,
            field(28),
            field(48),
            field(49),
            field(50),
            field(51),
        ],
        auxv: 0,
        auxv_size: 0,
        exe_fd: u32::MAX,
    };
    one(move || {
        let args = [
            libc::PR_SET_MM as u64,
            libc::PR_SET_MM_MAP as u64,
            &raw const map as u64,
            size_of_val(&map) as u64,
            0,
            0,
        ];
        sys(libc::SYS_prctl, args)
    })
    .map(drop)
}

/// Mappings of the kernel in this process: start, end, name.
fn kernel_mappings() -> io::Result<Vec<(u64, u64, String)>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = |l: &str| {
        let mut words = l.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let name = words.nth(4)?;
        let wanted = ["[vvar]", "[vvar_vclock]", "[vdso]"].contains(&name);
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        if wanted {
            Some((hex(start)?, hex(end)?, name.to_owned()))
        } else {
            None
        }
    };
    Ok(maps.lines().filter_map(line).collect())
}

/// Moves [vvar], [vvar_vclock] and [vdso] elsewhere, together.
pub fn move_vdso() -> io::Result<()> {
    let regions = kernel_mappings()?;
    let (Some(first), Some(last)) = (
        regions.iter().map(|r| r.0).min(),
        regions.iter().map(|r| r.1).max(),
    ) else {
        return Err(bad("this process has none"));
    };
    let room = Memory::new((last - first) as usize)?;
    one(|| {
        for (start, end, _) in &regions {
            let len = end - start;
            let to = room.start + (start - first);
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let r = sys(libc::SYS_mremap, [*start, len, len, flags, to, 0]);
            if r < 0 {
                return r;
            }
        }
        0
    })
    .map(drop)
}

/// Bytes behind the ELF contents of [vdso] that nothing uses, and the size of the mapping.
pub fn vdso_tail() -> io::Result<(u64, u64)> {
    let regions = kernel_mappings()?;
    let Some((start, end, _)) = regions.iter().find(|r| r.2 == "[vdso]") else {
        return Err(bad("this process has no vDSO"));
    };
    let mut bytes = vec![0u8; (end - start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&File::open("/proc/self/mem")?, &mut bytes, *start)?;
    let used = crate::kernel::vdso::elf_len(&bytes).map_err(|e| bad(&format!("{e:#}")))?;
    Ok(((end - start).saturating_sub(used), end - start))
}

/// Makes a POSIX timer with an id of our choice (PR_TIMER_CREATE_RESTORE_IDS).
pub fn timer_ids() -> io::Result<()> {
    let pr_timer_create_restore_ids = 77;
    let wanted = 4711i32;
    let got = one(|| {
        let r = sys(
            libc::SYS_prctl,
            [pr_timer_create_restore_ids, 1, 0, 0, 0, 0],
        );
        if r < 0 {
            return r;
        }
        let mut id = wanted;
        let r = sys(
            libc::SYS_timer_create,
            [libc::CLOCK_MONOTONIC as u64, 0, &raw mut id as u64, 0, 0, 0],
        );
        if r < 0 { r } else { i64::from(id) }
    })?;
    if got == i64::from(wanted) {
        Ok(())
    } else {
        Err(bad("the kernel gave another id"))
    }
}

/// Opens a mapped file through /proc/PID/map_files.
pub fn map_files() -> io::Result<()> {
    let entry = fs::read_dir("/proc/self/map_files")?
        .next()
        .ok_or_else(|| bad("is empty"))??;
    File::open(entry.path()).map(drop)
}
