//! x86-64: general registers, the little code that mistctl puts into other processes.

/// Page size; the only one user space sees on x86-64.
pub const PAGE: u64 = 4096;
/// First address past user space with four-level page tables.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// `uname -m`.
pub const MACHINE: &str = "x86_64";

/// The kernel's internal "restart me" results (include/linux/errno.h); a tracer sees them in rax.
pub const ERESTARTSYS: i64 = 512;
pub const ERESTARTNOINTR: i64 = 513;
pub const ERESTARTNOHAND: i64 = 514;
pub const ERESTART_RESTARTBLOCK: i64 = 516;
/// Number of restart_syscall(2).
pub const NR_RESTART_SYSCALL: u64 = 219;

/// General-purpose registers, as PTRACE_GETREGS gives them (struct user_regs_struct).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Regs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const WORDS: usize = 27;

impl Regs {
    /// Bytes of [`Regs::to_bytes`].
    pub const SIZE: usize = WORDS * 8;

    pub fn to_bytes(&self) -> Vec<u8> {
        let words: [u64; WORDS] = [
            self.r15,
            self.r14,
            self.r13,
            self.r12,
            self.rbp,
            self.rbx,
            self.r11,
            self.r10,
            self.r9,
            self.r8,
            self.rax,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.orig_rax,
            self.rip,
            self.cs,
            self.eflags,
            self.rsp,
            self.ss,
            self.fs_base,
            self.gs_base,
            self.ds,
            self.es,
            self.fs,
            self.gs,
        ];
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// None unless there are exactly [`Regs::SIZE`] bytes.
    pub fn from_bytes(b: &[u8]) -> Option<Self> {
        if b.len() != Self::SIZE {
            return None;
        }
        let mut w = [0u64; WORDS];
        for (word, chunk) in w.iter_mut().zip(b.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        let [
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            orig_rax,
            rip,
            cs,
            eflags,
            rsp,
            ss,
            fs_base,
            gs_base,
            ds,
            es,
            fs,
            gs,
        ] = w;
        Some(Self {
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            orig_rax,
            rip,
            cs,
            eflags,
            rsp,
            ss,
            fs_base,
            gs_base,
            ds,
            es,
            fs,
            gs,
        })
    }

    /// The system call the thread was in or on its way out of when it stopped; None in user mode.
    pub fn syscall(&self) -> Option<u64> {
        Self::called(self.orig_rax)
    }

    /// The call that a value of rax asks for. The kernel looks at the low half only (entry_SYSCALL_64), and gives back
    /// the other: [`super::trampoline::noted`].
    pub fn called(rax: u64) -> Option<u64> {
        u64::try_from(rax as i32).ok()
    }

    /// Registers of a system call's arguments.
    pub const ARGS: [R; 6] = ARGS;

    /// Argument `i` of the system call; 0 past the sixth.
    pub fn arg(&self, i: usize) -> u64 {
        ARGS.get(i).map_or(0, |r| self.get(*r))
    }

    pub fn get(&self, r: R) -> u64 {
        let mut copy = *self;
        *copy.place(r)
    }

    pub fn set(&mut self, r: R, value: u64) {
        *self.place(r) = value;
    }

    fn place(&mut self, r: R) -> &mut u64 {
        match r {
            R::Ax => &mut self.rax,
            R::Cx => &mut self.rcx,
            R::Dx => &mut self.rdx,
            R::Bx => &mut self.rbx,
            R::Sp => &mut self.rsp,
            R::Bp => &mut self.rbp,
            R::Si => &mut self.rsi,
            R::Di => &mut self.rdi,
            R::R8 => &mut self.r8,
            R::R9 => &mut self.r9,
            R::R10 => &mut self.r10,
            R::R11 => &mut self.r11,
            R::R12 => &mut self.r12,
            R::R13 => &mut self.r13,
            R::R14 => &mut self.r14,
            R::R15 => &mut self.r15,
        }
    }

    /// A 32-bit program: its code segment is not the 64-bit one.
    pub fn is_32bit(&self) -> bool {
        self.cs != 0x33
    }

    /// rax and rip that make user code go on as the kernel's own restart would, for an exit by a jump:
    /// signal.c, arch_do_signal_or_restart().
    pub fn resume_point(&self) -> (u64, u64) {
        if self.syscall().is_some() {
            match -(self.rax as i64) {
                ERESTART_RESTARTBLOCK => return (NR_RESTART_SYSCALL, self.rip.wrapping_sub(2)),
                ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {
                    return (self.orig_rax, self.rip.wrapping_sub(2));
                }
                _ => {}
            }
        }
        (self.rax, self.rip)
    }
}

/// Register numbers of the instruction encoding.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
pub enum R {
    Ax = 0,
    Cx = 1,
    Dx = 2,
    Bx = 3,
    Sp = 4,
    Bp = 5,
    Si = 6,
    Di = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl R {
    /// None past 15.
    pub fn numbered(n: u8) -> Option<Self> {
        use R::*;
        [
            Ax, Cx, Dx, Bx, Sp, Bp, Si, Di, R8, R9, R10, R11, R12, R13, R14, R15,
        ]
        .get(usize::from(n))
        .copied()
    }
}

const ARGS: [R; 6] = [R::Di, R::Si, R::Dx, R::R10, R::R8, R::R9];

/// A place in the code that a jump goes to, to be filled in.
#[must_use]
pub struct Jump(usize);

/// Emits position-independent code.
#[derive(Default)]
pub struct Asm {
    code: Vec<u8>,
}

impl Asm {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.code
    }

    pub fn len(&self) -> usize {
        self.code.len()
    }

    pub fn is_empty(&self) -> bool {
        self.code.is_empty()
    }

    pub fn raw(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }

    /// mov r, v, in the shortest form that leaves the flags alone.
    pub fn mov(&mut self, r: R, v: u64) {
        let n = r as u8;
        if let Ok(v) = u32::try_from(v) {
            if n >= 8 {
                self.raw(&[0x41]);
            }
            self.raw(&[0xb8 | (n & 7)]);
            self.raw(&v.to_le_bytes());
        } else if (v as i64) < 0 && v as i64 >= i64::from(i32::MIN) {
            self.raw(&[0x48 | (n >> 3), 0xc7, 0xc0 | (n & 7)]);
            self.raw(&(v as u32).to_le_bytes());
        } else {
            self.raw(&[0x48 | (n >> 3), 0xb8 | (n & 7)]);
            self.raw(&v.to_le_bytes());
        }
    }

    /// mov dst, src
    pub fn mov_reg(&mut self, dst: R, src: R) {
        let (d, s) = (dst as u8, src as u8);
        self.raw(&[
            0x48 | (d >> 3) | ((s >> 3) << 2),
            0x89,
            0xc0 | ((s & 7) << 3) | (d & 7),
        ]);
    }

    pub fn syscall_insn(&mut self) {
        self.raw(&[0x0f, 0x05]);
    }

    /// One system call with constant arguments; the result stays in rax.
    pub fn syscall(&mut self, nr: i64, args: &[u64]) {
        for (r, v) in ARGS.iter().zip(args) {
            self.mov(*r, *v);
        }
        self.mov(R::Ax, nr as u64);
        self.syscall_insn();
    }

    pub fn int3(&mut self) {
        self.raw(&[0xcc]);
    }

    /// test eax, eax; jnz (short)
    pub fn jump_if_nonzero(&mut self) -> Jump {
        self.raw(&[0x85, 0xc0, 0x75, 0]);
        Jump(self.code.len())
    }

    /// test eax, eax; jz (short)
    pub fn jump_if_zero(&mut self) -> Jump {
        self.raw(&[0x85, 0xc0, 0x74, 0]);
        Jump(self.code.len())
    }

    /// test rax, rax; js (near): rax is a negative errno. For [`Asm::land_far`].
    pub fn jump_if_error(&mut self) -> Jump {
        self.raw(&[0x48, 0x85, 0xc0, 0x0f, 0x88, 0, 0, 0, 0]);
        Jump(self.code.len())
    }

    /// test rax, rax; jns (short): rax is no errno.
    pub fn jump_unless_error(&mut self) -> Jump {
        self.raw(&[0x48, 0x85, 0xc0, 0x79, 0]);
        Jump(self.code.len())
    }

    /// jmp (short)
    pub fn jump_short(&mut self) -> Jump {
        self.raw(&[0xeb, 0]);
        Jump(self.code.len())
    }

    /// Like [`Asm::land`], for near jumps.
    pub fn land_far(&mut self, j: Jump) {
        let distance = (self.code.len() - j.0) as u32;
        self.code[j.0 - 4..j.0].copy_from_slice(&distance.to_le_bytes());
    }

    /// The jump comes here. Short jumps only: code between is under 128 bytes.
    pub fn land(&mut self, j: Jump) {
        let distance = self.code.len() - j.0;
        debug_assert!(distance < 128);
        self.code[j.0 - 1] = distance as u8;
    }

    /// Runs the [`Call`] records at `table` until one whose `valid` word is 0, storing results.
    pub fn interpreter(&mut self, table: u64) {
        self.mov(R::Bx, table);
        let top = self.code.len();
        self.raw(&[0x48, 0x83, 0x3b, 0x00]); // cmp qword [rbx], 0
        self.raw(&[0x74, 0]); // je end
        let end = Jump(self.code.len());
        self.raw(&[0x48, 0x8b, 0x43, 8]); // mov rax, [rbx+8]
        self.raw(&[0x48, 0x8b, 0x7b, 16]); // mov rdi, [rbx+16]
        self.raw(&[0x48, 0x8b, 0x73, 24]); // mov rsi, [rbx+24]
        self.raw(&[0x48, 0x8b, 0x53, 32]); // mov rdx, [rbx+32]
        self.raw(&[0x4c, 0x8b, 0x53, 40]); // mov r10, [rbx+40]
        self.raw(&[0x4c, 0x8b, 0x43, 48]); // mov r8, [rbx+48]
        self.raw(&[0x4c, 0x8b, 0x4b, 56]); // mov r9, [rbx+56]
        self.syscall_insn();
        self.raw(&[0x48, 0x89, 0x43, 64]); // mov [rbx+64], rax
        self.raw(&[0x48, 0x83, 0xc3, CALL_SIZE as u8]); // add rbx, 72
        let back = top as i64 - (self.code.len() as i64 + 2);
        self.raw(&[0xeb, back as i8 as u8]); // jmp top
        self.land(end);
    }

    /// Sets every general register and the arithmetic flags, and jumps to `rip`: no stack, no signal
    /// frame, no xstate is touched, so the restart block of an interrupted sleep survives
    /// (rt_sigreturn destroys it).
    pub fn jump_to_program(&mut self, regs: &Regs, rax: u64, rip: u64) {
        let fl = regs.eflags;
        self.raw(&[if fl & 0x400 != 0 { 0xfd } else { 0xfc }]); // std / cld
        self.mov(R::Ax, if fl & 0x800 != 0 { 0x7f } else { 0 });
        self.raw(&[0x04, 0x01]); // add al, 1: sets OF as wanted
        self.raw(&[0xb4, (fl & 0xd5) as u8 | 2, 0x9e]); // mov ah, flags; sahf
        for (r, v) in [
            (R::Bx, regs.rbx),
            (R::Cx, regs.rcx),
            (R::Dx, regs.rdx),
            (R::Si, regs.rsi),
            (R::Di, regs.rdi),
            (R::Bp, regs.rbp),
            (R::R8, regs.r8),
            (R::R9, regs.r9),
            (R::R10, regs.r10),
            (R::R11, regs.r11),
            (R::R12, regs.r12),
            (R::R13, regs.r13),
            (R::R14, regs.r14),
            (R::R15, regs.r15),
            (R::Sp, regs.rsp),
            (R::Ax, rax),
        ] {
            self.mov(r, v);
        }
        self.jump(rip);
    }

    /// Jumps to an absolute address; no register is changed.
    pub fn jump(&mut self, to: u64) {
        self.raw(&[0xff, 0x25, 0, 0, 0, 0]); // jmp [rip+0]
        self.raw(&to.to_le_bytes());
    }
}

/// Bytes of an encoded [`Call`].
pub const CALL_SIZE: usize = 72;

/// One system call of a batch, as [`Asm::interpreter`] reads it: valid, nr, six arguments, result.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub nr: i64,
    pub args: [u64; 6],
}

impl Call {
    /// Missing arguments are 0.
    pub fn new(nr: i64, args: &[u64]) -> Self {
        let mut a = [0; 6];
        for (to, from) in a.iter_mut().zip(args) {
            *to = *from;
        }
        Self { nr, args: a }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&1u64.to_le_bytes());
        out.extend_from_slice(&(self.nr as u64).to_le_bytes());
        for a in self.args {
            out.extend_from_slice(&a.to_le_bytes());
        }
        // A result nobody can mistake for one until the call was made.
        out.extend_from_slice(&(-(libc::ENOSYS as i64)).to_le_bytes());
    }
}

/// XCR0: the xstate components the kernel lets user space use; 0 where there is no xsave.
pub fn xfeatures() -> u64 {
    use std::arch::x86_64::__cpuid;
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: xgetbv with ecx = 0 reads XCR0 and exists when OSXSAVE is set.
    unsafe { core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

/// Calls a function on another stack, which ends at `top`, a multiple of 16.
///
/// # Safety
/// Below `top` there is memory enough that nobody else uses, and behind it a page of zeros. The function does not
/// unwind, and may be called with `data`.
pub unsafe fn call_on(
    top: usize,
    function: extern "C" fn(*mut core::ffi::c_void),
    data: *mut core::ffi::c_void,
) {
    // SAFETY: the function keeps r12, as every C function does, and so our stack pointer; what else it may change is
    // said. Its stack is aligned as the ABI wants it.
    unsafe {
        core::arch::asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {function}",
            "mov rsp, r12",
            top = in(reg) top,
            function = in(reg) function,
            in("rdi") data,
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

core::arch::global_asm!(
    ".pushsection .text.mist_stub,\"ax\",@progbits",
    ".globl mist_syscall_stub",
    "mist_syscall_stub:",
    "syscall",
    "int3",
    ".popsection",
);

unsafe extern "C" {
    fn mist_syscall_stub();
}

/// Address in our own text of `syscall; int3`, valid in every fork of us.
pub fn syscall_stub() -> u64 {
    mist_syscall_stub as *const () as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_their_bytes() {
        let r = Regs {
            r15: 1,
            gs: 27,
            rip: u64::MAX,
            ..Regs::default()
        };
        assert_eq!(Regs::from_bytes(&r.to_bytes()), Some(r));
        assert_eq!(Regs::from_bytes(&[0; 10]), None);
    }

    #[test]
    fn an_interrupted_sleep_goes_on_through_restart_syscall() {
        let r = Regs {
            rax: -516i64 as u64,
            orig_rax: 35,
            rip: 100,
            ..Regs::default()
        };
        assert_eq!(r.resume_point(), (NR_RESTART_SYSCALL, 98));
        let r = Regs {
            orig_rax: u64::MAX,
            ..r
        };
        assert_eq!(r.resume_point(), (-516i64 as u64, 100));
    }
}
