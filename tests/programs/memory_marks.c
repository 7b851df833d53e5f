// What a process has asked for as to its memory: barriers it has registered for, locks on what it will map and touch,
// pages that may be merged, mappings that are sealed.
#include "mist.h"

enum { GET_REGISTRATIONS = 1 << 9, GLOBAL = 1 << 1, REGISTER_GLOBAL = 1 << 2, PRIVATE = 1 << 3, REGISTER_PRIVATE = 1 << 4 };
enum { SET_MERGE = 67, GET_MERGE = 68 };
#define LEN (1 << 20)

static int membarrier(int command)
{
    return syscall(SYS_membarrier, command, 0, 0);
}

static char *map(int protection)
{
    char *at = mmap(NULL, LEN, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        mist_fail("mmap: %s", strerror(errno));
    return at;
}

// Whether VmFlags of the mapping that begins there has a flag.
static int has(const void *at, const char *flag)
{
    char line[512], begin[32];
    snprintf(begin, sizeof begin, "%lx-", (long)at);
    FILE *f = fopen("/proc/self/smaps", "r");
    int found = 0, there = 0;
    while (fgets(line, sizeof line, f)) {
        if (!strncmp(line, begin, strlen(begin)))
            there = 1;
        else if (there && !strncmp(line, "VmFlags:", 8)) {
            found = strstr(line + 8, flag) != NULL;
            break;
        }
    }
    fclose(f);
    return found;
}

int main(void)
{
    MUST(membarrier(REGISTER_PRIVATE));
    MUST(membarrier(REGISTER_GLOBAL));
    int registered = membarrier(GET_REGISTRATIONS);
    int merges = prctl(SET_MERGE, 1, 0, 0, 0) == 0;
    char *sealed = map(PROT_READ | PROT_WRITE);
    sealed[1] = 1;
    int seals = syscall(462, sealed, LEN, 0) == 0;
    char *lazily = map(PROT_READ | PROT_WRITE), *whole = map(PROT_READ | PROT_WRITE), *barred = map(PROT_NONE);
    lazily[0] = 2;
    MUST(mlock2(lazily, LEN, MLOCK_ONFAULT));
    MUST(mlock(whole, LEN));
    mlock(barred, LEN); // fails, and locks it
    MUST(mlockall(MCL_FUTURE | MCL_ONFAULT));
    mist_ready();
    mist_wait();
    CHECK("private barriers", 0, CALL(membarrier(PRIVATE)));
    CHECK("registrations", registered, membarrier(GET_REGISTRATIONS));
    CHECK("merging", merges, prctl(GET_MERGE, 0, 0, 0, 0) == 1);
    CHECK("locked as it is touched", 1, has(lazily, " lf"));
    CHECK("locked", 1, has(whole, " lo"));
    CHECK("locked whole", 0, has(whole, " lf"));
    CHECK("locked without access", 1, has(barred, " lo"));
    unsigned char there;
    CHECK("mincore", 0, CALL(mincore(lazily + LEN / 2, 4096, &there)));
    CHECK("untouched is not there", 0, there & 1);
    char *later = map(PROT_READ | PROT_WRITE);
    CHECK("what is mapped later is locked", 1, has(later, " lf"));
    if (seals) {
        CHECK("sealed", -1, mprotect(sealed, LEN, PROT_READ));
        CHECK("why", EPERM, errno);
    }
    mist_pass();
}
