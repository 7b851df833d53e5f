// Sleeping in calls that wait for another process: wait4, waitid, a record lock that a child
// holds, a futex in shared memory.
// mist: tree
// mist: cflags -pthread
// mist: variants wait4 waitid waitpid_any setlkw shared_futex
#include "mist.h"
#include <linux/futex.h>
#include <pthread.h>

static const char *variant;
static volatile int done, error;
static volatile long result;
static volatile pid_t tid;
static pid_t child;
static int lock;
static uint32_t *word;
static int status;
static siginfo_t si;

static int is(const char *v)
{
    return !strcmp(v, variant);
}
static void *sleeper(void *arg)
{
    (void)arg;
    struct flock l = {.l_type = F_WRLCK, .l_len = 10};
    tid = syscall(SYS_gettid);
    errno = 0;
    long r = is("wait4")         ? syscall(SYS_wait4, child, &status, 0, NULL)
             : is("waitpid_any") ? syscall(SYS_wait4, -1, &status, 0, NULL)
             : is("waitid")      ? syscall(SYS_waitid, P_PID, child, &si, WEXITED, NULL)
             : is("setlkw")      ? fcntl(lock, F_SETLKW, &l)
                                 : syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL, NULL, 0);
    error = r < 0 ? errno : 0;
    result = r;
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

int main(int argc, char **argv)
{
    variant = argc > 1 ? argv[1] : "";
    word = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    lock = MUST(open("lock", O_RDWR | O_CREAT, 0600));
    child = MUST(fork());
    if (!child) {
        struct flock l = {.l_type = F_WRLCK, .l_len = 100};
        MUST(fcntl(lock, F_SETLK, &l));
        word[1] = 1;
        mist_wait();
        while (!word[2]) // until the parent has looked
            mist_turn();
        if (is("shared_futex")) {
            // After any stop a thread may still be on its way back to sleep.
            int woken = 0;
            for (int i = 0; i < 1000 && !woken; i++, mist_sleep(woken ? 0 : 2000))
                woken = CALL(syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0));
            CHECK("threads woken", 1, woken);
        }
        if (is("setlkw")) {
            l.l_type = F_UNLCK;
            CALL(fcntl(lock, F_SETLK, &l));
            while (!word[3])
                mist_turn();
        }
        _exit(55);
    }
    while (!word[1])
        mist_turn();
    pthread_t t;
    pthread_create(&t, NULL, sleeper, NULL);
    while (!tid)
        mist_turn();
    mist_until_in(getpid(), tid, is("setlkw") ? SYS_fcntl : is("shared_futex") ? SYS_futex : is("waitid") ? SYS_waitid : SYS_wait4, -1);

    mist_ready();
    mist_wait();

    if (done)
        mist_fail("%s returned before anything happened, wanted: still asleep, got %ld (%s)", variant, (long)result, strerror(error));
    word[2] = 1;
    for (int i = 0; i < 10000 && !done; i++)
        mist_turn();
    if (!done)
        mist_fail("%s never returned", variant);
    pthread_join(t, NULL);
    word[3] = 1;
    CHECK("what the call returned", is("wait4") || is("waitpid_any") ? child : 0, result);
    CHECK("its errno", 0, error);
    if (is("waitid"))
        CHECK("the child's exit code", 55, si.si_status);
    else {
        if (is("setlkw") || is("shared_futex"))
            CALL(waitpid(child, &status, 0));
        CHECK("the child's exit code", 55, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    }
    mist_pass();
}
