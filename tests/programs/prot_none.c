// PROT_NONE pages with content, and MADV_GUARD pages: the content comes back, the fault too.
// mist: copied
#include "mist.h"
#include <setjmp.h>
#define PAGE 4096ul
#define GUARD_INSTALL 102
static sigjmp_buf after;
static void on_segv(int sig)
{
    siglongjmp(after, sig);
}
static int faults(volatile char *p)
{
    if (sigsetjmp(after, 1))
        return 1;
    char c = *p;
    (void)c;
    return 0;
}

int main(void)
{
    char *m = MUST(mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(m, 64 * PAGE, 51);
    MUST(mprotect(m + 16 * PAGE, 16 * PAGE, PROT_NONE));
    char *g = MUST(mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(g, 64 * PAGE, 52);
    int guards = madvise(g + 8 * PAGE, 2 * PAGE, GUARD_INSTALL) == 0;
    signal(SIGSEGV, on_segv);
    if (guards)
        CHECK("set-up: a guard page faults", 1, faults(g + 8 * PAGE));

    mist_ready();
    mist_wait();

    CHECK("PROT_NONE faults", 1, faults(m + 16 * PAGE));
    CHECK("its last page too", 1, faults(m + 31 * PAGE));
    CHECK("the page after it does not", 0, faults(m + 32 * PAGE));
    CHECK_STR("its permissions", "---p", mist_smaps(m + 16 * PAGE, NULL));
    CALL(mprotect(m + 16 * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE));
    mist_check_fill("all of it", m, 64 * PAGE, 51);
    if (guards) {
        CHECK("a guard page faults", 1, faults(g + 8 * PAGE));
        CHECK("the second too", 1, faults(g + 9 * PAGE + 4095));
        CHECK("the page after does not", 0, faults(g + 10 * PAGE));
        CALL(madvise(g + 8 * PAGE, 2 * PAGE, GUARD_INSTALL + 1));
        mist_check_byte("zeros after the guard is gone", g + 8 * PAGE, 2 * PAGE, 0);
        mist_check_fill("beside the guard", g + 10 * PAGE, 54 * PAGE, 52 + 10 * 512);
    } else
        fprintf(stderr, "this kernel has no guard pages\n");
    mist_pass();
}
