// Limits and habits of a process: rlimits, umask, personality, nice, oom_score_adj, comm,
// parent-death signal, subreaper, timer slack, THP, memory-deny-write-execute is elsewhere.
#include "mist.h"
#include <sys/personality.h>
#include <sys/resource.h>

// Lowered to what is allowed, as raising a hard limit takes a privilege of its own.
static struct { int what; rlim_t soft, hard; const char *name; } want[] = {
    {RLIMIT_CPU, 5000, 6000, "RLIMIT_CPU"},
    {RLIMIT_FSIZE, 1 << 20, 2 << 20, "RLIMIT_FSIZE"},
    {RLIMIT_STACK, 4 << 20, 16 << 20, "RLIMIT_STACK"},
    {RLIMIT_CORE, 0, 12345, "RLIMIT_CORE"},
    {RLIMIT_NOFILE, 77, 512, "RLIMIT_NOFILE"},
    {RLIMIT_MEMLOCK, 65536, 131072, "RLIMIT_MEMLOCK"},
    {RLIMIT_AS, 1ul << 40, RLIM_INFINITY, "RLIMIT_AS"},
    {RLIMIT_MSGQUEUE, 1000, 2000, "RLIMIT_MSGQUEUE"},
    {RLIMIT_NICE, 5, 15, "RLIMIT_NICE"},
    {RLIMIT_RTPRIO, 3, 9, "RLIMIT_RTPRIO"},
    {RLIMIT_SIGPENDING, 50, 60, "RLIMIT_SIGPENDING"},
};

int main(void)
{
    int high = MUST(dup2(2, 300)); // above the limit of descriptors to come
    for (unsigned i = 0; i < sizeof want / sizeof *want; i++) {
        struct rlimit r;
        MUST(getrlimit(want[i].what, &r));
        if (want[i].hard > r.rlim_max)
            want[i].hard = r.rlim_max;
        if (want[i].soft > want[i].hard)
            want[i].soft = want[i].hard;
        r = (struct rlimit){want[i].soft, want[i].hard};
        MUST(setrlimit(want[i].what, &r));
    }
    umask(0137);
    MUST(personality(PER_LINUX | ADDR_NO_RANDOMIZE | UNAME26));
    MUST(setpriority(PRIO_PROCESS, 0, 7));
    int fd = MUST(open("/proc/self/oom_score_adj", O_WRONLY));
    MUST(write(fd, "321", 3));
    close(fd);
    MUST(prctl(PR_SET_NAME, "a (strange) nm"));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    // PR_THP_DISABLE_EXCEPT_ADVISED where there is that (Linux 6.18).
    int thp = prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0) == 0 || prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0;
    long thp_how = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    fd = open("/proc/self/coredump_filter", O_WRONLY);
    int filters = fd >= 0;
    if (filters)
        MUST(write(fd, "0x7f", 4));
    close(fd);
    MUST(prctl(PR_SET_TSC, PR_TSC_ENABLE));

    mist_ready();
    mist_wait();

    for (unsigned i = 0; i < sizeof want / sizeof *want; i++) {
        struct rlimit r;
        CALL(getrlimit(want[i].what, &r));
        CHECK(want[i].name, want[i].soft, r.rlim_cur);
        CHECK(want[i].name, want[i].hard, r.rlim_max);
    }
    CHECK("a descriptor above its limit", 0, CALL(fcntl(high, F_GETFD)));
    CHECK("umask", 0137, umask(0));
    CHECK("personality", PER_LINUX | ADDR_NO_RANDOMIZE | UNAME26, personality(0xffffffff));
    CHECK("nice", 7, getpriority(PRIO_PROCESS, 0));
    char text[64];
    mist_slurp("/proc/self/oom_score_adj", text, sizeof text);
    CHECK("oom_score_adj", 321, atoi(text));
    mist_slurp("/proc/self/comm", text, sizeof text);
    CHECK_STR("comm", "a (strange) nm\n", text);
    int v = 0;
    CALL(prctl(PR_GET_CHILD_SUBREAPER, &v));
    CHECK("PR_GET_CHILD_SUBREAPER", 1, v);
    CHECK("timer slack", 123456, prctl(PR_GET_TIMERSLACK));
    if (thp)
        CHECK("THP disabled", thp_how, prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
    mist_slurp("/proc/self/coredump_filter", text, sizeof text);
    if (filters)
        CHECK("coredump_filter", 0x7f, strtol(text, NULL, 16));
    CHECK("dumpable", 1, prctl(PR_GET_DUMPABLE));
    mist_pass();
}
