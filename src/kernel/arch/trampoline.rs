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
//! Threads that make one call in one place share a trampoline which does nothing but lead back ([`Common`]). When each of
//! their calls is to end is noted where everybody has room for it: in the half of orig_rax that is no call's number.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{Asm, ERESTARTNOHAND, R, Regs};
use crate::image::threads::Resume;
use crate::kernel::mem::Mem;

/// Instructions that [`run_out`] follows at most; a trampoline has fewer.
const STEPS_MAX: usize = 24;
/// Bytes of a trampoline's code at most.
pub const MOST: usize = 512;
/// Says that the number of words behind a trampoline's code is in the two bytes that follow.
const MANY: u8 = u8::MAX;

/// What is to be written, and the registers that make use of it.
#[derive(Debug)]
pub struct Trampoline {
    pub bytes: Vec<u8>,
    pub regs: Regs,
}

/// What the program sees of a call's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    AsItIs,
    /// So much more, or so much instead of an error.
    Added(u32),
    /// That of a connect which is called again for one that was called once.
    Connecting,
}

/// For a thread that is in a call with `program` registers: the call goes on with `args` (number of
/// the argument, value) in place of its own. The program is to see its `result`. `data` is kept behind the
/// code, and its address added to the values of the arguments in `in_data`.
/// `at` is a multiple of 8.
pub fn emit(
    at: u64,
    program: &Regs,
    nr: u64,
    args: &[(usize, u64)],
    result: Seen,
    in_data: &[usize],
    data: &[u8],
) -> Trampoline {
    let mut a = Asm::new();
    a.syscall_insn();
    let mut regs = *program;
    regs.rip = at + a.len() as u64;
    regs.rax = -ERESTARTNOHAND as u64;
    regs.orig_rax = nr;
    if let Seen::Added(done) = result {
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
    if result == Seen::Connecting {
        connected_again(&mut a);
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

/// A connect of TCP that goes on says when its time is up that it has been going on. The program has called it once.
fn connected_again(a: &mut Asm) {
    a.raw(&[0x48, 0x8d, 0x48, libc::EALREADY as u8]); // lea rcx, [rax + EALREADY]
    a.raw(&[0xe3, 2]); // jrcxz to the mov
    a.raw(&[0xeb, 7]); // jmp behind it
    a.mov(R::Ax, -i64::from(libc::EINPROGRESS) as u64);
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
    // For [`extent`].
    let words = data.div_ceil(8);
    match u8::try_from(words) {
        Ok(few) if few != MANY => a.raw(&[few]),
        _ => {
            a.raw(&[MANY]);
            a.raw(&(words as u16).to_le_bytes());
        }
    }
    while !a.len().is_multiple_of(8) {
        a.raw(&[0xcc]);
    }
}

/// Trampolines for calls that go on as they are, each for all threads that make one call in one place.
#[derive(Debug, Default)]
pub struct Common {
    known: BTreeMap<Way, u64>,
    /// Bytes of those that may be wanted yet.
    wanted: BTreeMap<Way, usize>,
}

/// The call, whether it is a connect that had been called before, and where in the program it leads.
type Way = (u64, bool, u64);

fn way(how: &Resume, program: &Regs) -> Option<Way> {
    match *how {
        Resume::Timed { nr, again, .. } => Some((nr, again, program.rip)),
        _ => None,
    }
}

fn lead_back(at: u64, program: &Regs, (nr, again, _): Way) -> Trampoline {
    let result = match nr as i64 == libc::SYS_connect && !again {
        true => Seen::Connecting,
        false => Seen::AsItIs,
    };
    emit(at, program, nr, &[], result, &[], &[])
}

impl Common {
    /// This one may be wanted: others leave it room.
    pub fn may_want(&mut self, how: &Resume, program: &Regs) {
        if let Some(way) = way(how, program).filter(|way| !self.known.contains_key(way)) {
            let len = lead_back(0, program, way).bytes.len();
            self.wanted.insert(way, len);
        }
    }

    /// One of an earlier dump: a thread with these registers stands in it.
    pub fn knows(&mut self, how: &Resume, program: &Regs, regs: &Regs) {
        if let (Some(way), Some(at)) = (way(how, program), regs.rip.checked_sub(SYSCALL_LEN)) {
            self.known.insert(way, at);
        }
    }

    /// Bytes for those that may be wanted yet.
    pub fn room(&self) -> u64 {
        self.wanted.values().sum::<usize>() as u64
    }

    /// Registers with which a thread goes on with its call. `take` finds room; None where there is none.
    pub fn place(
        &mut self,
        how: &Resume,
        program: &Regs,
        mem: &Mem,
        take: impl FnOnce(usize) -> Option<u64>,
    ) -> Result<Option<Regs>> {
        let Some(way) = way(how, program) else {
            return Ok(None);
        };
        let lead = |at| lead_back(at, program, way);
        if let Some(at) = self.known.get(&way) {
            return Ok(Some(lead(*at).regs));
        }
        let Some(at) = take(lead(0).bytes.len()) else {
            return Ok(None);
        };
        let t = lead(at);
        mem.write(at, &t.bytes)?;
        self.known.insert(way, at);
        self.wanted.remove(&way);
        Ok(Some(t.regs))
    }
}

const SYSCALL_LEN: u64 = 2;

/// Notes count in units of so many nanoseconds, as a power of two: fine ones, or coarse ones where the end is far off.
const UNITS: [u32; 2] = [14, 22];
/// Bits of a note; one more says which units.
const BITS: u32 = 31;

/// orig_rax of a thread in call `nr` which is to end at `end`, for [`noted`] to read. Without a note where that is
/// further off than some fifty days.
pub fn note(nr: u64, end: i64, now: i64) -> u64 {
    for (scale, unit) in UNITS.iter().enumerate() {
        let span = 1i64 << (unit + BITS);
        if end.saturating_sub(now) < span / 2 {
            let units = end.saturating_add((1 << unit) - 1) >> unit;
            let note = (units as u32 & !(1 << BITS)) | (scale as u32) << BITS;
            // 0 is none.
            return nr | u64::from(note.max(1)) << 32;
        }
    }
    nr
}

/// When the call of a thread in a trampoline is to end, where its orig_rax says so: a clock's time that is never early.
pub fn noted(orig_rax: u64, now: i64) -> Option<i64> {
    let note = (orig_rax >> 32) as u32;
    let unit = UNITS.get((note >> BITS) as usize)?;
    let span = 1i64 << (unit + BITS);
    let at = i64::from(note & !(1 << BITS)) << unit;
    // Counts begin anew: the nearest there is.
    let ahead = (at - now % span).rem_euclid(span);
    let ahead = if ahead < span / 2 {
        ahead
    } else {
        ahead - span
    };
    (note != 0).then_some(now + ahead)
}

/// Whether such an orig_rax says that the call is to end later than at `end`, by more than notes are coarse by.
pub fn noted_later(orig_rax: u64, end: i64, now: i64) -> bool {
    let note = (orig_rax >> 32) as u32;
    let unit = UNITS.get((note >> BITS) as usize).copied().unwrap_or(0);
    noted(orig_rax, now).is_some_and(|at| at > end.saturating_add(1 << unit))
}

/// Where a thread that stands in a trampoline will be in the program: follows the `code` at its rip.
/// orig_rax becomes the program's call where that is another one. None when this is no trampoline's
/// code.
pub fn run_out(code: &[u8], at: &Regs) -> Option<Regs> {
    follow(code, at).map(|(regs, _)| regs)
}

/// Whether a connect in a trampoline, whose `code` from its rip on this is, had been called before.
pub fn leads_connect_again(code: &[u8], at: &Regs) -> bool {
    let already = -i64::from(libc::EALREADY) as u64;
    let out = run_out(
        code,
        &Regs {
            rax: already,
            ..*at
        },
    );
    at.syscall() == Some(libc::SYS_connect as u64) && out.is_some_and(|r| r.rax == already)
}

/// How long a trampoline is from the `code` at a thread's rip to the end of its data.
pub fn extent(code: &[u8], at: &Regs) -> Option<usize> {
    // As if its call had been broken off: that leads to the end.
    let broken = Regs {
        rax: -i64::from(libc::EINTR) as u64,
        ..*at
    };
    let (_, behind) = follow(code, &broken)?;
    let (words, len) = match *code.get(behind..)? {
        [MANY, a, b, ..] => (u16::from_le_bytes([a, b]).into(), 3),
        [few, ..] => (usize::from(few), 1),
        [] => return None,
    };
    let data = 8 * words;
    let start = at.rip.checked_add(behind as u64 + len)?.next_multiple_of(8) - at.rip;
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
            [0x48, 0x8d, 0x48, by, ..] => {
                regs.rcx = regs.rax.wrapping_add_signed(i64::from(by as i8));
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
        let t = emit(0x1000, &program(), 1, &args, Seen::Added(8), &[], &[]);
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
        let t = emit(
            0x2000,
            &program(),
            1,
            &[(3, 0)],
            Seen::AsItIs,
            &[3],
            &[1; 16],
        );
        assert_eq!(t.regs.rip, 0x2002);
        assert_eq!(extent(&t.bytes[2..], &t.regs), Some(t.bytes.len() - 2));
        assert_eq!(t.bytes[(t.regs.r10 - 0x2000) as usize..], [1; 16]);
        assert_eq!(behind(&t, 0x2000, -4).rax, -4i64 as u64);
        assert_eq!(behind(&t, 0x2000, 0).r10, program().r10);
        for bytes in [16, 2032, 2040, 2048, 16384] {
            let t = emit(
                0x2000,
                &program(),
                20,
                &[(1, 0)],
                Seen::Added(1),
                &[1],
                &vec![1; bytes],
            );
            assert_eq!(extent(&t.bytes[2..], &t.regs), Some(t.bytes.len() - 2));
            assert_eq!(t.bytes[(t.regs.rsi - 0x2000) as usize..], vec![1; bytes]);
        }
        let t = emit(0x2000, &program(), 45, &[], Seen::AsItIs, &[], &[]);
        assert_eq!(behind(&t, 0x2000, 5).rip, program().rip);
    }

    #[test]
    fn a_connect_that_goes_on_says_what_the_first_would_have_said() {
        let p = Regs {
            orig_rax: libc::SYS_connect as u64,
            ..program()
        };
        for (again, busy) in [(false, -115), (true, -114)] {
            let t = lead_back(0x3000, &p, (p.orig_rax, again, p.rip));
            assert_eq!(extent(&t.bytes[2..], &t.regs), Some(t.bytes.len() - 2));
            for (says, said) in [(0, 0), (-4, -4), (-11, -11), (-114, busy), (-111, -111)] {
                assert_eq!(behind(&t, 0x3000, says).rax as i64, said);
            }
            assert_eq!(leads_connect_again(&t.bytes[2..], &t.regs), again);
        }
    }

    #[test]
    fn a_note_says_when_a_call_ends_and_is_no_part_of_its_number() {
        const HOUR: i64 = 3_600_000_000_000;
        for now in [0, 7, 123_456 * HOUR + 12_345] {
            for (ahead, late) in [
                (-1_000_000, 1 << 14),
                (0, 1 << 15),
                (1_234_567_890, 1 << 14),
                (4 * HOUR, 1 << 14),
                (5 * HOUR, 1 << 22),
                (1000 * HOUR, 1 << 22),
            ] {
                let orig_rax = note(45, now + ahead, now);
                assert_eq!(Regs::called(orig_rax), Some(45));
                let end = noted(orig_rax, now + 1).unwrap();
                assert!(
                    (0..=late).contains(&(end - now - ahead)),
                    "{now} {ahead} {end}"
                );
            }
            assert_eq!(note(45, i64::MAX, now), 45);
            assert_eq!(noted(45, now), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_code_is_followed_or_refused(code in proptest::collection::vec(0u8.., 0..200)) {
            let _ = run_out(&code, &program());
        }
    }
}
