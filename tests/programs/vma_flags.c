// Locked memory and the flags of madvise: they are in smaps' VmFlags, and do what they did.
// mist: no-lazy until they are filled the mappings show that they are being filled (VmFlags um)
// mist: copied
#include "mist.h"
#define PAGE 4096ul
#define SIZE (32 * PAGE)

static char *fresh(int seed)
{
    char *m = MUST(mmap(NULL, SIZE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    munmap(m + SIZE, PAGE); // so that neighbours do not merge
    mist_fill(m, SIZE, seed);
    return m;
}

static const struct { int advice; const char *flag, *name; } advices[] = {
    {MADV_DONTFORK, "dc", "MADV_DONTFORK"}, {MADV_WIPEONFORK, "wf", "MADV_WIPEONFORK"},
    {MADV_DONTDUMP, "dd", "MADV_DONTDUMP"}, {MADV_HUGEPAGE, "hg", "MADV_HUGEPAGE"},
    {MADV_NOHUGEPAGE, "nh", "MADV_NOHUGEPAGE"}, {MADV_MERGEABLE, "mg", "MADV_MERGEABLE"},
    {MADV_SEQUENTIAL, "sr", "MADV_SEQUENTIAL"}, {MADV_RANDOM, "rr", "MADV_RANDOM"},
};
#define N (int)(sizeof advices / sizeof *advices)

static int has(const void *p, const char *flag)
{
    char flags[600];
    snprintf(flags, sizeof flags, " %s ", mist_smaps(p, "VmFlags"));
    char want[8];
    snprintf(want, sizeof want, " %s ", flag);
    return strstr(flags, want) != NULL;
}

int main(void)
{
    char *m[N], what[64];
    int works[N];
    for (int i = 0; i < N; i++) {
        m[i] = fresh(60 + i);
        works[i] = madvise(m[i], SIZE, advices[i].advice) == 0;
        if (works[i])
            CHECK("set-up: flag of madvise", 1, has(m[i], advices[i].flag));
        else
            fprintf(stderr, "this kernel has no %s\n", advices[i].name);
    }
    char *locked = fresh(80), *onfault = fresh(81);
    MUST(mlock(locked, SIZE));
    int lock2 = mlock2(onfault, SIZE, MLOCK_ONFAULT) == 0;
    // A plain mapping, to see that nothing is added.
    char *plain = fresh(82);
    char before[512];
    strcpy(before, mist_smaps(plain, "VmFlags"));
    // A name, where the kernel keeps them.
    char *named = fresh(83);
    int names = prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, named, SIZE, "mist's own") == 0;

    mist_ready();
    mist_wait();

    for (int i = 0; i < N; i++) {
        mist_check_fill(advices[i].name, m[i], SIZE, 60 + i);
        snprintf(what, sizeof what, "%s is kept", advices[i].name);
        if (works[i])
            CHECK(what, 1, has(m[i], advices[i].flag));
    }
    mist_check_fill("locked", locked, SIZE, 80);
    mist_check_fill("locked on fault", onfault, SIZE, 81);
    CHECK("mlock", 1, has(locked, "lo"));
    CHECK("VmLck in KiB", (lock2 + 1) * SIZE / 1024, atoi(mist_status(getpid(), "VmLck")));
    CHECK_STR("flags of a plain mapping", before, mist_smaps(plain, "VmFlags"));
    if (names) {
        char maps[200000];
        mist_slurp("/proc/self/maps", maps, sizeof maps);
        CHECK("the name of a mapping", 1, strstr(maps, "[anon:mist's own]") != NULL);
    }
    // What a fork makes of them.
    pid_t child = CALL(fork());
    if (!child) {
        if (works[1])
            mist_check_byte("wiped in the child", m[1], SIZE, 0);
        unsigned char v;
        if (works[0])
            CHECK_ERR("absent in the child", ENOMEM, mincore(m[0], PAGE, &v));
        _exit(0);
    }
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 0, status);
    CALL(munlock(locked, SIZE));
    mist_pass();
}
