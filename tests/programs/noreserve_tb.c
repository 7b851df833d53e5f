// A terabyte reserved, a few pages of it used: neither slow nor big, and still usable.
// mist: copied
#include "mist.h"
#define TB (1ul << 40)

int main(void)
{
    char *m = MUST(mmap(NULL, TB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    MUST(madvise(m, TB, MADV_NOHUGEPAGE));
    for (int i = 0; i < 40; i++)
        mist_fill(m + (mist_mix(i) % TB & ~4095ul), 4096, i);
    char *none = MUST(mmap(NULL, TB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

    mist_ready();
    mist_wait();

    for (int i = 0; i < 40; i++)
        mist_check_fill("a page in a terabyte", m + (mist_mix(i) % TB & ~4095ul), 4096, i);
    for (int i = 100; i < 140; i++)
        mist_check_byte("a hole in a terabyte", m + (mist_mix(i) % TB & ~4095ul), 4096, 0);
    CHECK("MAP_NORESERVE is kept", 1, strstr(mist_smaps(m, "VmFlags"), "nr") != NULL);
    CHECK("page tables stay small, in KiB", 1, atoi(mist_status(getpid(), "VmPTE")) < 2000);
    CALL(mprotect(none + (TB >> 1), 4096, PROT_READ | PROT_WRITE));
    mist_check_byte("a page out of the reserved ones", none + (TB >> 1), 4096, 0);
    mist_pass();
}
