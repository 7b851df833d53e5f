//! Every raw kernel interface, each a small safe type. The only place with `unsafe` outside the shim.

pub mod arch;
pub mod batch;
pub mod body;
pub mod caps;
pub mod epoll;
pub mod fds;
pub mod guardian;
pub mod kcmp;
pub mod mem;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod remote;
pub mod sched;
pub mod shm;
pub mod sock_diag;
pub mod socket;
pub mod sockopt;
pub mod tcp_repair;
pub mod tracee;
pub mod tty;
pub mod uffd;
pub mod undertaker;
pub mod vdso;
pub mod writeback;
