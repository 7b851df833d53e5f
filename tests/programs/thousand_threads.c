// A thousand threads, most in a futex, some in nanosleep, some running.
// mist: cflags -pthread
#include "mist.h"
#include <pthread.h>
#define N 1000

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int started, released;
static __thread uint64_t mine[8];

static void *work(void *arg)
{
    long i = (long)arg;
    mist_fill(mine, sizeof mine, i * 8);
    pid_t tid = syscall(SYS_gettid);
    __atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
    if (i % 10 == 0)
        while (!__atomic_load_n(&released, __ATOMIC_SEQ_CST))
            mist_sleep(50000);
    pthread_mutex_lock(&lock);
    while (!released)
        pthread_cond_wait(&cond, &lock);
    pthread_mutex_unlock(&lock);
    mist_check_fill("TLS", mine, sizeof mine, i * 8);
    CHECK("tid", tid, syscall(SYS_gettid));
    return (void *)i;
}

int main(void)
{
    static pthread_t t[N];
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_setstacksize(&a, 65536);
    for (long i = 0; i < N; i++)
        if (pthread_create(&t[i], &a, work, (void *)i))
            mist_fail("set-up: pthread_create %ld", i);
    while (__atomic_load_n(&started, __ATOMIC_SEQ_CST) < N)
        mist_turn();

    mist_ready();
    mist_wait();

    CHECK("threads", N + 1, atoi(mist_status(getpid(), "Threads")));
    pthread_mutex_lock(&lock);
    __atomic_store_n(&released, 1, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&lock);
    for (long i = 0; i < N; i++) {
        void *r;
        CHECK("pthread_join", 0, pthread_join(t[i], &r));
        CHECK("a thread's value", i, (intptr_t)r);
    }
    mist_pass();
}
