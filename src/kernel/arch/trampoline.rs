//! The rest of a system call that a stop broke off, and the way back into the program.
//!
//! A thread is set behind the trampoline's `syscall` as if the call had been interrupted there
//! (rax = -ERESTARTNOHAND): without a signal the kernel issues the call, with one it fails with EINTR,
//! as it would have in the program. What follows puts the program's registers back and touches neither
//! flags, stack nor memory:
//!
//! ```text
//! syscall | rax = done + rest, or done | mov reg, program's ... | jmp rcx | data (time-out, vectors)
//! ```
//!
//! The code can be read back ([`run_out`]), so that a later stop finds the program behind it.
//!
//! A call on a socket that has a time-out goes another way: [`wait`].

use super::{Asm, ERESTARTNOHAND, R, Regs};

/// Instructions that [`run_out`] follows at most; a trampoline has fewer.
const STEPS_MAX: usize = 24;
/// Bytes of a trampoline's code at most.
pub const MOST: usize = 512;

/// What is to be written, and the registers that make use of it.
#[derive(Debug)]
pub struct Trampoline {
    pub bytes: Vec<u8>,
    pub regs: Regs,
}

/// For a thread that is in a call with `program` registers: the call goes on with `args` (number of
/// the argument, value) in place of its own. `done` is added to its result. `data` is kept behind the
/// code, and its address added to the values of the arguments in `in_data`.
/// A `note` is for [`note`] to read and does nothing. `at` is a multiple of 8.
#[expect(clippy::too_many_arguments, reason = "the parts of a trampoline")]
pub fn emit(
    at: u64,
    program: &Regs,
    nr: u64,
    args: &[(usize, u64)],
    done: Option<u32>,
    note: Option<i64>,
    in_data: &[usize],
    data: &[u8],
) -> Trampoline {
    let mut a = Asm::new();
    a.syscall_insn();
    let mut regs = *program;
    regs.rip = at + a.len() as u64;
    regs.rax = -ERESTARTNOHAND as u64;
    regs.orig_rax = nr;
    if let Some(note) = note {
        a.raw(&NOTE); // mov rcx, note
        a.raw(&note.to_le_bytes());
    }
    if let Some(done) = done {
        a.mov_reg(R::Cx, R::Ax);
        a.raw(&[0x48, 0x0f, 0xc9]); // bswap rcx
        a.raw(&[0x0f, 0xb6, 0xc9]); // movzx ecx, cl: not 0 for errors only
        a.raw(&[0xe3, 7]); // jrcxz to the addition
        a.raw(&[0xb8]); // mov eax, done
        a.raw(&done.to_le_bytes());
        a.raw(&[0xeb, 7]); // jmp behind it
        a.raw(&[0x48, 0x8d, 0x80]); // lea rax, [rax + done]
        a.raw(&done.to_le_bytes());
    }
    for (i, value) in args {
        if let Some(r) = Regs::ARGS.get(*i) {
            a.mov(*r, program.get(*r));
            regs.set(*r, *value);
        }
    }
    if nr != program.orig_rax {
        say_call(&mut a, program);
    }
    leave(&mut a, program, data.len());
    for i in in_data {
        if let Some(r) = Regs::ARGS.get(*i) {
            regs.set(*r, regs.get(*r).wrapping_add(at + a.len() as u64));
        }
    }
    a.raw(data);
    while !a.len().is_multiple_of(8) {
        a.raw(&[0]);
    }
    Trampoline {
        bytes: a.bytes().to_vec(),
        regs,
    }
}

/// nop, which says for a reader what the program called.
fn say_call(a: &mut Asm, program: &Regs) {
    a.raw(&[0x0f, 0x1f, 0x80]);
    a.raw(&(program.orig_rax as u32).to_le_bytes());
}

/// Into the program. What is emitted next is so much data.
fn leave(a: &mut Asm, program: &Regs, data: usize) {
    a.mov(R::Cx, program.rip);
    a.raw(&[0xff, 0xe1]); // jmp rcx
    a.raw(&[data.div_ceil(8) as u8]); // for [`extent`]
    while !a.len().is_multiple_of(8) {
        a.raw(&[0xcc]);
    }
}

/// A call that sleeps until its socket is ready, and no longer than to its end.
#[derive(Debug, Clone)]
pub struct Wait {
    /// The socket, and whether it is to be ready for writing.
    pub fd: u32,
    pub writes: bool,
    /// To the end.
    pub left: [u8; 16],
    /// The end as the process sees it: struct timespec of CLOCK_MONOTONIC.
    pub end: [u8; 16],
    /// For [`note`].
    pub note: i64,
    /// What times(2) says at the end at least.
    pub clock: i64,
    /// The call that does the same without waiting: its number, and arguments that are not the program's.
    pub probe: Option<Probe>,
}

/// See [`Wait`].
pub type Probe = (u64, Vec<(usize, u64)>);

/// What a socket's own time-out counts by is coarse, and the coarser the longer it is (calc_wheel_index in
/// kernel/time/timer.c): a part of one ends elsewhere than the whole would. select(2) sleeps by the precise clock:
///
/// ```text
///     pselect6 of the socket | EINTR: out
///     times | program's arguments | not yet the end: the program's call, out
///     the call without waiting | not EAGAIN: out
///     sleep to the end | EINTR: out | rax = -EAGAIN
/// out: program's registers | jmp rcx | data (times, set)
/// ```
///
/// It cannot write its sets, so it says EFAULT when the socket is ready as well as when time is up. By times(2) it is
/// known which, but for the last twentieth of a second. A call whose data another thread has taken meanwhile waits
/// its whole time again: it may end late, but not early.
pub fn wait(at: u64, program: &Regs, w: &Wait) -> Trampoline {
    let mut a = Asm::new();
    let mut out = Vec::new();
    let note = |a: &mut Asm| {
        a.raw(&NOTE);
        a.raw(&w.note.to_le_bytes());
    };
    // Without touching flags: lea rcx, [rax + plus]; jrcxz; jmp.
    let mut only_if = |a: &mut Asm, plus: i32| {
        a.raw(&[0x48, 0x8d, 0x48, plus as u8]);
        let on = a.jump_if_rcx_zero();
        out.push(a.jump_ahead());
        a.land(on);
    };
    a.syscall_insn();
    let mut regs = *program;
    regs.rip = at + a.len() as u64;
    regs.rax = -ERESTARTNOHAND as u64;
    regs.orig_rax = libc::SYS_pselect6 as u64;
    note(&mut a);
    only_if(&mut a, libc::EFAULT);
    a.syscall(libc::SYS_times, &[0]);
    a.raw(&NOTE);
    a.raw(&w.clock.wrapping_neg().to_le_bytes());
    a.raw(&[0x48, 0x8d, 0x0c, 0x01]); // lea rcx, [rcx + rax]
    a.raw(&[0x48, 0x0f, 0xc9]); // bswap rcx
    a.raw(&[0x0f, 0xb6, 0xc9]); // movzx ecx, cl: 0 unless it was negative
    for r in Regs::ARGS {
        a.mov(r, program.get(r));
    }
    let near = a.jump_if_rcx_zero();
    a.mov(R::Ax, program.orig_rax);
    a.syscall_insn();
    let called = a.jump_ahead();
    a.land(near);
    if let Some((nr, args)) = &w.probe {
        for (i, value) in args {
            if let Some(r) = Regs::ARGS.get(*i) {
                a.mov(*r, *value);
            }
        }
        a.mov(R::Ax, *nr);
        a.syscall_insn();
        note(&mut a);
        only_if(&mut a, libc::EAGAIN);
    }
    a.raw(&[0x48, 0xba]); // mov rdx, the end
    let end_goes_to = a.len();
    a.raw(&[0; 8]);
    a.mov(R::Di, libc::CLOCK_MONOTONIC as u64);
    a.mov(R::Si, libc::TIMER_ABSTIME as u64);
    a.mov(R::R10, 0);
    a.mov(R::Ax, libc::SYS_clock_nanosleep as u64);
    a.syscall_insn();
    note(&mut a);
    only_if(&mut a, 0);
    a.mov(R::Ax, -i64::from(libc::EAGAIN) as u64);
    for jump in out.into_iter().chain([called]) {
        a.land_far(jump);
    }
    for r in Regs::ARGS {
        a.mov(r, program.get(r));
    }
    say_call(&mut a, program);
    let mut set = vec![0; (w.fd as usize / 64 + 1) * 8];
    set[w.fd as usize / 8] = 1 << (w.fd % 8);
    leave(&mut a, program, w.left.len() + w.end.len() + set.len());
    let left_at = at + a.len() as u64;
    let (end_at, set_at) = (left_at + 16, left_at + 32);
    for data in [&w.left[..], &w.end, &set] {
        a.raw(data);
    }
    let (reads, writes) = if w.writes { (0, set_at) } else { (set_at, 0) };
    for (r, value) in Regs::ARGS
        .iter()
        .zip([u64::from(w.fd) + 1, reads, writes, 0, left_at, 0])
    {
        regs.set(*r, value);
    }
    let mut bytes = a.bytes().to_vec();
    bytes[end_goes_to..end_goes_to + 8].copy_from_slice(&end_at.to_le_bytes());
    Trampoline { bytes, regs }
}

/// mov rcx, imm64: rcx is set again before anyone looks.
const NOTE: [u8; 2] = [0x48, 0xb9];

/// The note in a trampoline, of which `code` is what follows the `syscall`.
pub fn note(code: &[u8]) -> Option<i64> {
    let behind = code.get(10..)?;
    // Else it is the program's rip.
    if !code.starts_with(&NOTE) || behind.starts_with(&[0xff, 0xe1]) {
        return None;
    }
    Some(i64::from_le_bytes(code.get(2..10)?.try_into().ok()?))
}

/// Where a thread that stands in a trampoline will be in the program: follows the `code` at its rip.
/// orig_rax becomes the program's call where that is another one. None when this is no trampoline's
/// code.
pub fn run_out(code: &[u8], at: &Regs) -> Option<Regs> {
    follow(code, at).map(|(regs, _)| regs)
}

/// How long a trampoline is from the `code` at a thread's rip to the end of its data.
pub fn extent(code: &[u8], at: &Regs) -> Option<usize> {
    // As if its call had been broken off: that leads to the end.
    let broken = Regs {
        rax: -i64::from(libc::EINTR) as u64,
        ..*at
    };
    let (_, behind) = follow(code, &broken)?;
    let data = 8 * usize::from(*code.get(behind)?);
    let start = at.rip.checked_add(behind as u64 + 1)?.next_multiple_of(8) - at.rip;
    Some(start as usize + data)
}

/// The registers in the program, and what of the code is behind the jump there.
fn follow(code: &[u8], at: &Regs) -> Option<(Regs, usize)> {
    let mut regs = *at;
    let mut rest = code;
    for _ in 0..STEPS_MAX {
        let rip = regs.rip;
        let len = match *rest {
            [0xff, 0xe1, ..] => {
                regs.rip = regs.rcx;
                return Some((regs, code.len() - rest.len() + 2));
            }
            [0x48, 0x89, 0xc1, ..] => {
                regs.rcx = regs.rax;
                3
            }
            [0x48, 0x0f, 0xc9, ..] => {
                regs.rcx = regs.rcx.swap_bytes();
                3
            }
            [0x0f, 0xb6, 0xc9, ..] => {
                regs.rcx &= 0xff;
                3
            }
            [0xe3, by, ..] => 2 + if regs.rcx == 0 { usize::from(by) } else { 0 },
            [0xeb, by, ..] => 2 + usize::from(by),
            [0xe9, a, b, c, d, ..] => {
                5usize.checked_add(u32::from_le_bytes([a, b, c, d]) as usize)?
            }
            [0x48, 0x8d, 0x48, by, ..] => {
                regs.rcx = regs.rax.wrapping_add_signed(i64::from(by as i8));
                4
            }
            [0x48, 0x8d, 0x0c, 0x01, ..] => {
                regs.rcx = regs.rcx.wrapping_add(regs.rax);
                4
            }
            [0x48, 0x8d, 0x80, a, b, c, d, ..] => {
                let by = i64::from(i32::from_le_bytes([a, b, c, d]));
                regs.rax = regs.rax.wrapping_add_signed(by);
                7
            }
            [0x0f, 0x1f, 0x80, a, b, c, d, ..] => {
                regs.orig_rax = u64::from(u32::from_le_bytes([a, b, c, d]));
                7
            }
            _ => mov(rest, &mut regs)?,
        };
        rest = rest.get(len..)?;
        regs.rip = rip + len as u64;
    }
    None
}

/// One of the forms of [`Asm::mov`]; its length.
fn mov(code: &[u8], regs: &mut Regs) -> Option<usize> {
    let imm32 = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(code.get(at..at + 4)?.try_into().ok()?))
    };
    let (r, value, len) = match *code {
        [0x41, op @ 0xb8..=0xbf, ..] => (8 + (op & 7), u64::from(imm32(2)?), 6),
        [op @ 0xb8..=0xbf, ..] => (op & 7, u64::from(imm32(1)?), 5),
        [rex @ 0x48..=0x49, 0xc7, op @ 0xc0..=0xc7, ..] => (
            (rex & 1) * 8 + (op & 7),
            i64::from(imm32(3)? as i32) as u64,
            7,
        ),
        [rex @ 0x48..=0x49, op @ 0xb8..=0xbf, ..] => (
            (rex & 1) * 8 + (op & 7),
            u64::from_le_bytes(code.get(2..10)?.try_into().ok()?),
            10,
        ),
        _ => return None,
    };
    regs.set(R::numbered(r)?, value);
    Some(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Regs {
        Regs {
            rdi: 3,
            rsi: 0x7fff_1234_5678,
            rdx: 1000,
            r10: u64::MAX - 5,
            r8: 77,
            rip: 0x40_1002,
            rax: -ERESTARTNOHAND as u64,
            orig_rax: 1,
            rcx: 0x40_1002,
            ..Regs::default()
        }
    }

    fn behind(t: &Trampoline, at: u64, rax: i64) -> Regs {
        let r = Regs {
            rax: rax as u64,
            orig_rax: u64::MAX,
            ..t.regs
        };
        run_out(&t.bytes[(r.rip - at) as usize..], &r).unwrap()
    }

    #[test]
    fn the_program_gets_its_registers_and_the_whole_count() {
        let args = [(1, 0x7fff_1234_5680), (2, 992), (3, 0)];
        let t = emit(0x1000, &program(), 1, &args, Some(8), None, &[], &[]);
        assert_eq!(t.regs.orig_rax, 1);
        assert_eq!(
            (t.regs.rsi, t.regs.rdx, t.regs.r10),
            (0x7fff_1234_5680, 992, 0)
        );
        for (rest, whole) in [(992, 1000), (0, 8), (-4, 8), (-32, 8)] {
            let end = Regs {
                rax: whole,
                orig_rax: u64::MAX,
                ..program()
            };
            assert_eq!(behind(&t, 0x1000, rest), end);
        }
    }

    #[test]
    fn a_time_out_leaves_errors_alone() {
        let t = emit(0x2000, &program(), 1, &[(3, 0)], None, None, &[3], &[1; 16]);
        assert_eq!(t.regs.rip, 0x2002);
        assert_eq!(extent(&t.bytes[2..], &t.regs), Some(t.bytes.len() - 2));
        assert_eq!(t.bytes[(t.regs.r10 - 0x2000) as usize..], [1; 16]);
        assert_eq!(behind(&t, 0x2000, -4).rax, -4i64 as u64);
        assert_eq!(behind(&t, 0x2000, 0).r10, program().r10);
        assert_eq!(note(&t.bytes[2..]), None);
        let t = emit(0x2000, &program(), 45, &[], None, Some(-7), &[], &[]);
        assert_eq!(note(&t.bytes[2..]), Some(-7));
        assert_eq!(behind(&t, 0x2000, 5).rip, program().rip);
    }

    #[test]
    fn a_wait_leaves_when_it_is_broken_off_and_calls_otherwise() {
        let w = Wait {
            fd: 70,
            writes: false,
            left: [1; 16],
            end: [2; 16],
            note: 4711,
            clock: 1 << 40,
            probe: Some((45, vec![(3, 0x40)])),
        };
        let p = Regs {
            orig_rax: 0,
            ..program()
        };
        let t = wait(0x3000, &p, &w);
        assert!(t.bytes.len() <= MOST);
        assert_eq!(extent(&t.bytes[2..], &t.regs), Some(t.bytes.len() - 2));
        assert_eq!((t.regs.rip, t.regs.orig_rax, t.regs.rdi), (0x3002, 270, 71));
        let data = |at: u64, len: usize| &t.bytes[(at - 0x3000) as usize..][..len];
        assert_eq!(data(t.regs.r8, 16), [1; 16]);
        assert_eq!(
            data(t.regs.rsi, 16),
            [0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(note(&t.bytes[2..]), Some(4711));
        let end = Regs {
            rax: -4i64 as u64,
            ..p
        };
        assert_eq!(behind(&t, 0x3000, -4), end);
        // Over each of the calls.
        let calls: Vec<usize> = (2..t.bytes.len() - 1)
            .filter(|i| t.bytes[*i..].starts_with(&[0x0f, 0x05]))
            .collect();
        assert_eq!(calls.len(), 4);
        let out_of = |call: usize, result: i64| {
            let at = Regs {
                rip: 0x3000 + call as u64 + 2,
                rax: result as u64,
                orig_rax: u64::MAX,
                ..p
            };
            run_out(&t.bytes[call + 2..], &at).map(|r| r.rax as i64)
        };
        assert_eq!(behind_call(&t, -14), None);
        assert_eq!(out_of(calls[0], (1 << 40) - 1), None);
        assert_eq!(out_of(calls[1], 12), Some(12));
        assert_eq!(out_of(calls[2], 12), Some(12));
        assert_eq!(out_of(calls[2], -11), None);
        assert_eq!(out_of(calls[3], -4), Some(-4));
        assert_eq!(out_of(calls[3], 0), Some(-11));
    }

    fn behind_call(t: &Trampoline, rax: i64) -> Option<Regs> {
        run_out(
            &t.bytes[2..],
            &Regs {
                rax: rax as u64,
                ..t.regs
            },
        )
    }

    proptest::proptest! {
        #[test]
        fn any_code_is_followed_or_refused(code in proptest::collection::vec(0u8.., 0..200)) {
            let _ = run_out(&code, &program());
        }
    }
}
