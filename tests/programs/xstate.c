// Vector and floating-point registers that hold values while the program is away: SSE, AVX,
// AVX-512, x87, MXCSR, the x87 control word, and the general ones.
// mist: cflags -pthread
// mist: dumps 10
// mist: copied
#include "mist.h"
#include <cpuid.h>
#include <pthread.h>
#include <sys/auxv.h>

static volatile int flag;
static uint8_t in[32][64] __attribute__((aligned(64))), out[32][64] __attribute__((aligned(64)));
static uint64_t k_in[8], k_out[8];
static volatile int spinning;
static int have_avx, have_512;

#define Z(n) "vmovdqu64 " #n "*64(%[in]),%%zmm" #n ";"
#define ZS(n) "vmovdqu64 %%zmm" #n "," #n "*64(%[out]);"
#define Y(n) "vmovdqu " #n "*64(%[in]),%%ymm" #n ";"
#define YS(n) "vmovdqu %%ymm" #n "," #n "*64(%[out]);"
#define X(n) "movdqu " #n "*64(%[in]),%%xmm" #n ";"
#define XS(n) "movdqu %%xmm" #n "," #n "*64(%[out]);"
#define K(n) "kmovq " #n "*8(%[kin]),%%k" #n ";"
#define KS(n) "kmovq %%k" #n "," #n "*8(%[kout]);"
#define SIXTEEN(m) m(0) m(1) m(2) m(3) m(4) m(5) m(6) m(7) m(8) m(9) m(10) m(11) m(12) m(13) m(14) m(15)
#define UPPER(m) m(16) m(17) m(18) m(19) m(20) m(21) m(22) m(23) m(24) m(25) m(26) m(27) m(28) m(29) m(30) m(31)
// Holds everything in registers until the flag is set, without a system call.
#define SPIN "movl $1,(%[spinning]); 1: pause; cmpl $0,(%[flag]); je 1b;"
#define OPERANDS                                                                                 \
    : : [in] "r"(in), [out] "r"(out), [kin] "r"(k_in), [kout] "r"(k_out), [flag] "r"(&flag), [spinning] "r"(&spinning) : "memory", "cc"

__attribute__((target("avx512f,avx512bw"))) static void spin_512(void)
{
    asm volatile(SIXTEEN(Z) UPPER(Z) K(1) K(2) K(3) K(4) K(5) K(6) K(7) SPIN SIXTEEN(ZS) UPPER(ZS) KS(1) KS(2) KS(3) KS(4) KS(5)
                     KS(6) KS(7) OPERANDS);
}
__attribute__((target("avx"))) static void spin_avx(void)
{
    asm volatile(SIXTEEN(Y) SPIN SIXTEEN(YS) OPERANDS);
}
static void spin_sse(void)
{
    asm volatile(SIXTEEN(X) SPIN SIXTEEN(XS) OPERANDS);
}

static void *spinner(void *arg)
{
    (void)arg;
    uint32_t mxcsr = 0x1f80 | 0x6000 | 0x8000, got; // round to zero, flush to zero
    uint16_t cw = 0x0f7f, gotcw;                    // round to zero, all masked
    long double x87[3] = {1.5L, -2.25L, 3.0e100L}, back[3];
    asm volatile("ldmxcsr %0; fldcw %1; fldt %2; fldt %3; fldt %4" ::"m"(mxcsr), "m"(cw), "m"(x87[0]), "m"(x87[1]), "m"(x87[2]));
    if (have_512)
        spin_512();
    else if (have_avx)
        spin_avx();
    else
        spin_sse();
    asm volatile("fstpt %0; fstpt %1; fstpt %2; stmxcsr %3; fstcw %4" : "=m"(back[2]), "=m"(back[1]), "=m"(back[0]), "=m"(got), "=m"(gotcw));
    CHECK("MXCSR", mxcsr, got & ~0x3fu);
    CHECK("the x87 control word", cw, gotcw);
    uint32_t usual = 0x1f80;
    uint16_t usualcw = 0x37f;
    asm volatile("ldmxcsr %0; fldcw %1" ::"m"(usual), "m"(usualcw));
    for (int i = 0; i < 3; i++)
        CHECK_MEM("an x87 register", &x87[i], &back[i], 10);
    return NULL;
}

// The general registers and the flags' direction and carry bits.
static volatile int spinning2;
static void *general(void *arg)
{
    (void)arg;
    uint64_t r[6] = {0};
    asm volatile("mov $0x1111222233334444,%%r8; mov $0x5555666677778888,%%r9; mov $0x99aabbccddeeff00,%%r10;"
                 "mov $0x0123456789abcdef,%%r11; mov $0xfedcba9876543210,%%r12; std; stc; movl $1,(%[s]);"
                 "1: pause; mov (%[f]),%%eax; lea -1(%%rax),%%eax; inc %%eax; jz 1b; pushf; pop %%rax; cld;"
                 "mov %%r8,0(%[r]); mov %%r9,8(%[r]); mov %%r10,16(%[r]); mov %%r11,24(%[r]); mov %%r12,32(%[r]); mov %%rax,40(%[r])"
                 : : [r] "r"(r), [f] "r"(&flag), [s] "r"(&spinning2) : "rax", "r8", "r9", "r10", "r11", "r12", "memory", "cc");
    CHECK("r8", 0x1111222233334444, r[0]);
    CHECK("r9", 0x5555666677778888, r[1]);
    CHECK("r10", 0x99aabbccddeeff00, r[2]);
    CHECK("r11", 0x0123456789abcdef, r[3]);
    CHECK("r12", 0xfedcba9876543210, r[4]);
    CHECK("the direction and the carry flag", 0x401, r[5] & 0x401);
    return NULL;
}

int main(void)
{
    have_avx = __builtin_cpu_supports("avx");
    have_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    mist_fill(in, sizeof in, 71);
    mist_fill(k_in, sizeof k_in, 72);
    // FS and GS bases.
    static uint64_t gs[4] = {0x6007d, 1, 2, 3};
    MUST(syscall(SYS_arch_prctl, 0x1001 /* ARCH_SET_GS */, gs));
    pthread_t t, g;
    pthread_create(&t, NULL, spinner, NULL);
    pthread_create(&g, NULL, general, NULL);
    while (!spinning || !spinning2)
        mist_turn();

    mist_ready();
    mist_wait();

    flag = 1;
    pthread_join(t, NULL);
    pthread_join(g, NULL);
    int n = have_512 ? 32 : 16, size = have_512 ? 64 : have_avx ? 32 : 16;
    for (int i = 0; i < n; i++)
        CHECK_MEM("a vector register", in[i], out[i], size);
    if (have_512)
        CHECK_MEM("the mask registers", &k_in[1], &k_out[1], 56);
    else
        fprintf(stderr, "this CPU has no AVX-512\n");
    uint64_t word;
    asm volatile("mov %%gs:0,%0" : "=r"(word));
    CHECK("the GS base", 0x6007d, word);
    mist_pass();
}
