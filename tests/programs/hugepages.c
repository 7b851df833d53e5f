// Huge pages: transparent ones, and (where there are any) those of hugetlbfs, private and shared.
// mist: copied
#include "mist.h"
#define HUGE (2ul << 20)

int main(void)
{
    char *room = MUST(mmap(NULL, 5 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char *m = (char *)(((uintptr_t)room + HUGE - 1) & -HUGE);
    if (madvise(m, 4 * HUGE, MADV_HUGEPAGE) < 0)
        fprintf(stderr, "this kernel has no transparent huge pages\n");
    mist_fill(m, HUGE, 61);
    mist_fill(m + 2 * HUGE, HUGE / 2, 62); // half of one
    // One that was split afterwards.
    mist_fill(m + 3 * HUGE, HUGE, 63);
    MUST(madvise(m + 3 * HUGE + 40960, 4096, MADV_DONTNEED));
    char *tlb = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    char *shared = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (tlb == MAP_FAILED || shared == MAP_FAILED)
        fprintf(stderr, "no huge pages are set aside here\n");
    if (tlb != MAP_FAILED)
        mist_fill(tlb, HUGE, 64);
    if (shared != MAP_FAILED)
        mist_fill(shared, HUGE, 65);

    mist_ready();
    mist_wait();

    mist_check_fill("a huge page", m, HUGE, 61);
    mist_check_byte("one that was never touched", m + HUGE, HUGE, 0);
    mist_check_fill("half of one", m + 2 * HUGE, HUGE / 2, 62);
    mist_check_byte("its other half", m + 2 * HUGE + HUGE / 2, HUGE / 2, 0);
    mist_check_byte("a hole in one", m + 3 * HUGE + 40960, 4096, 0);
    mist_check_fill("after the hole", m + 3 * HUGE + 45056, HUGE - 45056, 63 + 45056 / 8);
    CALL(madvise(m, 4 * HUGE, MADV_DONTNEED));
    mist_check_byte("zeros after MADV_DONTNEED", m, 4 * HUGE, 0);
    if (tlb != MAP_FAILED) {
        mist_check_fill("hugetlb", tlb, HUGE, 64);
        mist_check_byte("hugetlb, not touched", tlb + HUGE, HUGE, 0);
        CHECK("hugetlb is kept", 1, strstr(mist_smaps(tlb, "VmFlags"), "ht") != NULL);
    }
    if (shared != MAP_FAILED)
        mist_check_fill("shared hugetlb", shared, HUGE, 65);
    mist_pass();
}
