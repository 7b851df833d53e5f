//! System calls that a stop breaks off: which of them have a time-out and where, which transfer bytes.

use anyhow::Result;

use super::arch::trampoline::{self, Seen, Trampoline};
use super::arch::{ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTNOINTR, ERESTARTSYS, Regs};
use super::mem::Mem;
use crate::image::threads::Resume;

const SYS_IO_PGETEVENTS: i64 = 333;
const EINTR: i64 = libc::EINTR as i64;

/// Where a call has the relative time-out it sleeps with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// Milliseconds in this argument.
    Millis(usize),
    /// Argument that points to a struct timespec.
    Timespec(usize),
    /// Argument that points to a struct timeval.
    Timeval(usize),
}

/// How the kernel ends such a call when a stop interrupts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// -ERESTART_RESTARTBLOCK: the kernel knows when it is to end, as long as the thread lives.
    RestartBlock,
    /// -ERESTARTNOHAND, with the time left written over the time-out (select(2), NOTES; -EINTR when
    /// that is read-only).
    Updated,
    /// The time-out stays as it was; -EINTR, or -ERESTARTNOHAND from io_pgetevents.
    Lost,
}

/// The finite relative time-out of the call with these registers, if it has one. Calls with absolute
/// ones are simply issued again, and those whose time-out is the socket's, see [`socket_option`].
pub fn timeout(nr: u64, r: &Regs) -> Option<(Timeout, Broken)> {
    use Broken::*;
    use Timeout::*;
    const TIMER_ABSTIME: u64 = libc::TIMER_ABSTIME as u64;
    const FUTEX_CMD_MASK: u64 = 0x7f;
    let (t, broken) = match nr as i64 {
        libc::SYS_nanosleep => (Timespec(0), RestartBlock),
        libc::SYS_clock_nanosleep if r.arg(1) & TIMER_ABSTIME == 0 => (Timespec(2), RestartBlock),
        libc::SYS_poll => (Millis(2), RestartBlock),
        libc::SYS_futex if r.arg(1) & FUTEX_CMD_MASK == libc::FUTEX_WAIT as u64 => {
            (Timespec(3), RestartBlock)
        }
        libc::SYS_ppoll => (Timespec(2), Updated),
        libc::SYS_pselect6 => (Timespec(4), Updated),
        libc::SYS_select => (Timeval(4), Updated),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (Millis(3), Lost),
        libc::SYS_epoll_pwait2 => (Timespec(3), Lost),
        libc::SYS_semtimedop => (Timespec(3), Lost),
        libc::SYS_rt_sigtimedwait => (Timespec(2), Lost),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => (Timespec(4), Lost),
        _ => return None,
    };
    let finite = match t {
        Millis(i) => r.arg(i) as i32 >= 0,
        Timespec(i) | Timeval(i) => r.arg(i) != 0,
    };
    finite.then_some((t, broken))
}

/// Calls that end with -EINTR for a stop alone, whatever else they would do with signals (signal(7),
/// "Interruption of system calls by stop signals"). For sockets see [`socket_option`].
pub fn shows_stop(nr: u64) -> bool {
    matches!(
        nr as i64,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_getevents
            | libc::SYS_select
            | libc::SYS_pselect6
            | libc::SYS_ppoll
    )
}

/// The socket option that limits how long a call sleeps: SO_RCVTIMEO or SO_SNDTIMEO. The socket is
/// argument 0.
pub fn socket_option(nr: u64) -> Option<i32> {
    match nr as i64 {
        libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_accept
        | libc::SYS_accept4 => Some(libc::SO_RCVTIMEO),
        libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_connect => Some(libc::SO_SNDTIMEO),
        _ => None,
    }
}

/// How a call ends when its socket's time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeIsUp {
    /// What it returns then, if it has transferred nothing.
    pub result: i64,
    /// Its time begins anew with each part that is transferred (sock_alloc_send_pskb in net/core/sock.c).
    pub restarts: bool,
}

/// The same for a call with a time-out of its own.
pub fn own_time_is_up(nr: u64) -> TimeIsUp {
    let result = match nr as i64 {
        libc::SYS_semtimedop | libc::SYS_rt_sigtimedwait => -i64::from(libc::EAGAIN),
        // So many events.
        _ => 0,
    };
    TimeIsUp {
        result,
        restarts: false,
    }
}

/// For a socket of this `domain`, whose time-out it is. `again`: it had been connecting before this call.
pub fn time_is_up(nr: u64, domain: i32, again: bool) -> TimeIsUp {
    let error = match nr as i64 {
        libc::SYS_connect if again && domain != libc::AF_UNIX => libc::EALREADY,
        libc::SYS_connect if domain != libc::AF_UNIX => libc::EINPROGRESS,
        _ => libc::EAGAIN,
    };
    let sends = nr as i64 != libc::SYS_connect && socket_option(nr) == Some(libc::SO_SNDTIMEO);
    TimeIsUp {
        result: -i64::from(error),
        restarts: sends && domain == libc::AF_UNIX,
    }
}

/// Ended by a stop and by nothing else.
pub fn is_broken(r: &Regs) -> bool {
    matches!(
        -(r.rax as i64),
        EINTR | ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK
    )
}

/// What a call transfers, for the rest of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// Arguments: address, bytes.
    Buffer(usize, usize),
    /// Only bytes, in this argument (sendfile).
    Count(usize),
    /// Arguments: struct iovec array, entries.
    Vectors(usize, usize),
    /// Argument: struct msghdr, which is only read.
    Message(usize),
}

/// What such a call transfers, if on a descriptor that blocks it returns less than asked only because
/// something broke it off. (recvmsg with MSG_WAITALL is not among them: it writes to its msghdr.)
pub fn transfer(nr: u64, r: &Regs) -> Option<Transfer> {
    let waits = |flags: u64| flags & libc::MSG_DONTWAIT as u64 == 0;
    let all = |flags: u64| waits(flags) && flags & libc::MSG_WAITALL as u64 != 0;
    match nr as i64 {
        libc::SYS_write => Some(Transfer::Buffer(1, 2)),
        libc::SYS_writev => Some(Transfer::Vectors(1, 2)),
        libc::SYS_sendto if waits(r.arg(3)) => Some(Transfer::Buffer(1, 2)),
        libc::SYS_sendmsg if waits(r.arg(2)) => Some(Transfer::Message(1)),
        libc::SYS_recvfrom if all(r.arg(3)) => Some(Transfer::Buffer(1, 2)),
        libc::SYS_sendfile => Some(Transfer::Count(3)),
        libc::SYS_getrandom => Some(Transfer::Buffer(0, 1)),
        _ => None,
    }
}

/// Bytes asked for, and with vectors those themselves (address, bytes).
pub fn asked(t: Transfer, r: &Regs, mem: &Mem) -> Result<(u64, Vec<(u64, u64)>)> {
    const IOV_MAX: u64 = 1024;
    let (at, n) = match t {
        Transfer::Buffer(_, len) | Transfer::Count(len) => return Ok((r.arg(len), Vec::new())),
        Transfer::Vectors(at, n) => (r.arg(at), r.arg(n)),
        Transfer::Message(m) => (mem.read_u64(r.arg(m) + 16)?, mem.read_u64(r.arg(m) + 24)?),
    };
    let bytes = mem.read_vec(at, 16 * n.min(IOV_MAX) as usize)?;
    let word = |b: &[u8]| b.try_into().map_or(0, u64::from_le_bytes);
    let all: Vec<(u64, u64)> = bytes
        .chunks_exact(16)
        .map(|c| (word(&c[..8]), word(&c[8..])))
        .collect();
    let sum = all.iter().fold(0u64, |s, v| s.saturating_add(v.1));
    Ok((sum, all))
}

/// The trampoline at `at` for the rest of a call: what is left of its time-out, or of its bytes.
/// None for calls that need none.
pub fn rest(
    at: u64,
    program: &Regs,
    resume: &Resume,
    left_ns: i64,
    mem: &Mem,
) -> Result<Option<Trampoline>> {
    let left = left_ns.max(0) as u64;
    let emit = |nr, args: &[(usize, u64)], result, in_data: &[usize], data: &[u8]| {
        Ok(Some(trampoline::emit(
            at, program, nr, args, result, in_data, data,
        )))
    };
    match *resume {
        Resume::Run | Resume::Again { .. } => Ok(None),
        Resume::Timed { nr, .. } => match timeout(nr, program) {
            None | Some((_, Broken::RestartBlock)) => Ok(None),
            Some((Timeout::Millis(i), _)) => {
                emit(nr, &[(i, millis(left_ns))], Seen::AsItIs, &[], &[])
            }
            Some((Timeout::Timespec(i), _)) => {
                emit(nr, &[(i, 0)], Seen::AsItIs, &[i], &timespec(left))
            }
            Some((Timeout::Timeval(i), _)) => {
                emit(nr, &[(i, 0)], Seen::AsItIs, &[i], &timeval(left))
            }
        },
        Resume::Partial { nr, done, .. } => {
            let Some(t) = transfer(nr, program) else {
                return Ok(None);
            };
            let (all, vectors) = asked(t, program, mem)?;
            let (Ok(sum), Some(left)) = (u32::try_from(done), all.checked_sub(done)) else {
                return Ok(None);
            };
            if sum > i32::MAX as u32 {
                return Ok(None);
            }
            let sum = Seen::Added(sum);
            let vectors = skip(&vectors, done);
            let n = vectors.len() as u64;
            let data: Vec<u8> = vectors
                .iter()
                .flat_map(|(a, l)| [a.to_le_bytes(), l.to_le_bytes()])
                .flatten()
                .collect();
            match t {
                Transfer::Buffer(a, l) => {
                    let start = program.arg(a).wrapping_add(done);
                    emit(nr, &[(a, start), (l, left)], sum, &[], &[])
                }
                Transfer::Count(l) => emit(nr, &[(l, left)], sum, &[], &[]),
                Transfer::Vectors(a, l) => emit(nr, &[(a, 0), (l, n)], sum, &[a], &data),
                Transfer::Message(_) => match vectors.as_slice() {
                    // As one send: what else the message carried has gone with its first byte.
                    [(start, len)] => {
                        let args = [(1, *start), (2, *len), (3, program.arg(2)), (4, 0), (5, 0)];
                        emit(libc::SYS_sendto as u64, &args, sum, &[], &[])
                    }
                    _ => emit(libc::SYS_writev as u64, &[(1, 0), (2, n)], sum, &[1], &data),
                },
            }
        }
    }
}

fn skip(vectors: &[(u64, u64)], mut done: u64) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    for (at, len) in vectors {
        let n = done.min(*len);
        done -= n;
        if n < *len {
            all.push((at + n, len - n));
        }
    }
    all
}

/// For a call's argument: never early, at most a millisecond late.
pub fn millis(ns: i64) -> u64 {
    (ns.max(0) as u64).div_ceil(1_000_000).min(i32::MAX as u64)
}

/// struct timespec.
pub fn timespec(ns: u64) -> [u8; 16] {
    pair(ns / 1_000_000_000, ns % 1_000_000_000)
}

/// struct timeval, rounded up.
pub fn timeval(ns: u64) -> [u8; 16] {
    let us = ns.div_ceil(1000);
    pair(us / 1_000_000, us % 1_000_000)
}

fn pair(a: u64, b: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&a.to_le_bytes());
    out[8..].copy_from_slice(&b.to_le_bytes());
    out
}

/// The time-out of a call as its argument says it, nanoseconds.
pub fn argument(t: Timeout, r: &Regs, mem: &Mem) -> Result<i64> {
    let (at, unit) = match t {
        Timeout::Millis(i) => return Ok(i64::from(r.arg(i) as i32) * 1_000_000),
        Timeout::Timespec(i) => (r.arg(i), 1),
        Timeout::Timeval(i) => (r.arg(i), 1000),
    };
    let seconds = mem.read_u64(at)? as i64;
    let fraction = mem.read_u64(at + 8)? as i64;
    Ok(seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(fraction.saturating_mul(unit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_futex_has_a_relative_time_out_and_a_bitset_wait_an_absolute_one() {
        let mut r = Regs {
            rsi: 128,
            r10: 0x1000,
            ..Regs::default()
        };
        let futex = libc::SYS_futex as u64;
        assert_eq!(
            timeout(futex, &r),
            Some((Timeout::Timespec(3), Broken::RestartBlock))
        );
        r.rsi = libc::FUTEX_WAIT_BITSET as u64;
        assert_eq!(timeout(futex, &r), None);
        r.r10 = u64::MAX;
        assert_eq!(timeout(libc::SYS_epoll_wait as u64, &r), None);
    }

    #[test]
    fn the_rest_of_vectors_begins_in_the_middle_of_one() {
        assert_eq!(
            skip(&[(10, 5), (100, 5), (200, 1)], 7),
            [(102, 3), (200, 1)]
        );
        assert_eq!((millis(1), millis(2_000_000), millis(-1)), (1, 2, 0));
    }
}
