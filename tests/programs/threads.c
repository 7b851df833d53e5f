// Threads: TLS, names, masks, affinity, scheduling, nice values, alternate stacks, mutexes,
// robust mutexes, clear_child_tid through pthread_join.
// mist: cflags -pthread
// mist: copied
#include "mist.h"
#include <pthread.h>
#include <sys/resource.h>
#define N 16

static __thread uint64_t tls[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, robust;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int started, released;
static pid_t tids[N];
static void *altstacks[N];

static void check_me(long i)
{
    char name[16], want[16];
    for (int k = 0; k < 64; k++)
        CHECK("TLS", mist_mix(i * 64 + k), tls[k]);
    CHECK("tid", tids[i], syscall(SYS_gettid));
    snprintf(want, sizeof want, "worker-%ld", i);
    CALL(prctl(PR_GET_NAME, name));
    CHECK_STR("name", want, name);
    sigset_t mask;
    CALL(pthread_sigmask(SIG_SETMASK, NULL, &mask));
    for (int s = 34; s < 34 + N; s++)
        CHECK("signal mask of a thread", s - 34 == i, sigismember(&mask, s));
    cpu_set_t cpus;
    CALL(sched_getaffinity(0, sizeof cpus, &cpus));
    if (i % 2 == 0)
        CHECK("affinity", 1, CPU_COUNT(&cpus));
    CHECK("policy", i == 3 ? SCHED_BATCH : i == 5 ? SCHED_RR : i == 7 ? SCHED_IDLE : SCHED_OTHER, sched_getscheduler(0));
    if (i == 5) {
        struct sched_param sp;
        CALL(sched_getparam(0, &sp));
        CHECK("real-time priority", 7, sp.sched_priority);
    }
    if (i == 9)
        CHECK("nice of a thread", 11, getpriority(PRIO_PROCESS, 0));
    stack_t ss;
    CALL(sigaltstack(NULL, &ss));
    CHECK("alternate stack", (intptr_t)altstacks[i], (intptr_t)ss.ss_sp);
}

static void *work(void *arg)
{
    long i = (long)arg;
    for (int k = 0; k < 64; k++)
        tls[k] = mist_mix(i * 64 + k);
    char name[16];
    snprintf(name, sizeof name, "worker-%ld", i);
    prctl(PR_SET_NAME, name);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, 34 + i);
    // The raw call: glibc keeps 32 and 33 for itself.
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8);
    if (i % 2 == 0) {
        cpu_set_t cpus, one;
        sched_getaffinity(0, sizeof cpus, &cpus);
        CPU_ZERO(&one);
        for (int c = 0, k = i / 2; c < CPU_SETSIZE; c++)
            if (CPU_ISSET(c, &cpus) && (CPU_COUNT(&cpus) == 1 || k-- % 2 == 0)) {
                CPU_SET(c, &one);
                break;
            }
        MUST(sched_setaffinity(0, sizeof one, &one));
    }
    struct sched_param sp = {0}, rr = {7};
    if (i == 3)
        MUST(sched_setscheduler(0, SCHED_BATCH, &sp));
    if (i == 5)
        MUST(sched_setscheduler(0, SCHED_RR, &rr));
    if (i == 7)
        MUST(sched_setscheduler(0, SCHED_IDLE, &sp));
    if (i == 9)
        MUST(setpriority(PRIO_PROCESS, 0, 11));
    stack_t ss = {.ss_sp = altstacks[i] = malloc(32768), .ss_size = 32768};
    MUST(sigaltstack(&ss, NULL));
    tids[i] = syscall(SYS_gettid);

    pthread_mutex_lock(&lock);
    if (i == 1) // dies with it in its hands, later
        pthread_mutex_lock(&robust);
    started++;
    pthread_cond_broadcast(&cond);
    while (!released)
        pthread_cond_wait(&cond, &lock);
    pthread_mutex_unlock(&lock);
    check_me(i);
    return (void *)(i * 100);
}

int main(void)
{
    pthread_t t[N];
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &a);
    for (long i = 0; i < N; i++)
        if (pthread_create(&t[i], NULL, work, (void *)i))
            mist_fail("set-up: pthread_create");
    pthread_mutex_lock(&lock);
    while (started < N)
        pthread_cond_wait(&cond, &lock);
    pthread_mutex_unlock(&lock);

    mist_ready();
    mist_wait();

    pthread_mutex_lock(&lock);
    released = 1;
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&lock);
    for (long i = 0; i < N; i++) {
        void *r;
        CHECK("pthread_join", 0, pthread_join(t[i], &r));
        CHECK("a thread's value", i * 100, (intptr_t)r);
    }
    CHECK("a robust mutex whose owner died", EOWNERDEAD, pthread_mutex_lock(&robust));
    pthread_mutex_consistent(&robust);
    CHECK("unlock", 0, pthread_mutex_unlock(&robust));
    CHECK("threads left", 1, atoi(mist_status(getpid(), "Threads")));
    // And new ones can be made.
    released = 1;
    pthread_t n;
    memset(tids, 0, sizeof tids);
    CHECK("pthread_create", 0, pthread_create(&n, NULL, work, (void *)0));
    CHECK("pthread_join", 0, pthread_join(n, NULL));
    mist_pass();
}
