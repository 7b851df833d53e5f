//! What one process may do to another that is not its child.

use std::io;

use super::{errno, in_child, sys};

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
