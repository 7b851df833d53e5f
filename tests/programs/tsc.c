// Who may read the time stamp counter (PR_SET_TSC), thread by thread.
// mist: variants main other all
#include "mist.h"
#include <pthread.h>

static int forbid_other;

static int forbidden(void)
{
    int how = 0;
    CALL(prctl(PR_GET_TSC, &how));
    return how == PR_TSC_SIGSEGV;
}

static void forbid(void)
{
    if (prctl(PR_SET_TSC, PR_TSC_SIGSEGV) < 0)
        mist_skip("this kernel has no PR_SET_TSC");
}

// The clock of the vDSO reads the counter.
static void rest(void)
{
    struct timespec t = {0, 2000000};
    syscall(SYS_nanosleep, &t, NULL);
}

static void *other(void *done)
{
    if (forbid_other)
        forbid();
    __atomic_store_n((int *)done, 1, __ATOMIC_RELEASE);
    while (!mist_gone_on())
        rest();
    CHECK("the other thread's", forbid_other, forbidden());
    return NULL;
}

int main(int argc, char **argv)
{
    int all = argc > 1 && !strcmp(argv[1], "all"), forbid_main = all || (argc > 1 && !strcmp(argv[1], "main"));
    forbid_other = !forbid_main || all;
    int done = 0;
    pthread_t thread;
    MUST(pthread_create(&thread, NULL, other, &done));
    while (!__atomic_load_n(&done, __ATOMIC_ACQUIRE))
        rest();
    if (forbid_main)
        forbid();
    mist_ready();
    while (!mist_gone_on())
        rest();
    CHECK("the main thread's", forbid_main, forbidden());
    CALL(prctl(PR_SET_TSC, PR_TSC_ENABLE));
    MUST(pthread_join(thread, NULL));
    mist_pass();
}
