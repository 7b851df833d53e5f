// Nothing shows in a busy program: a storm of SIGALRM, children that come and go, threads that
// come and go, and system calls whose results are all checked.
// mist: cflags -pthread
// mist: dumps 40
#include "mist.h"
#include <pthread.h>

static volatile sig_atomic_t alarms;
static volatile int stop;
static volatile long rounds[3];
static void on_alarm(int sig)
{
    (void)sig;
    alarms++;
}

// write and read on a pipe: always whole.
static void *pipes(void *arg)
{
    int p[2];
    char out[256], in[256];
    (void)arg;
    MUST(pipe(p));
    while (!stop) {
        for (int i = 0; i < 20; i++) {
            mist_fill(out, sizeof out, rounds[0]++);
            CHECK("write", sizeof out, write(p[1], out, sizeof out));
            CHECK("read", sizeof in, read(p[0], in, sizeof in));
            CHECK_MEM("what was read", out, in, sizeof in);
        }
        mist_sleep(1000);
    }
    return NULL;
}
static void *nothing(void *arg)
{
    return (void *)((intptr_t)arg + 1);
}
static void *threads(void *arg)
{
    (void)arg;
    while (!stop) {
        pthread_t t;
        void *r;
        intptr_t n = rounds[1]++;
        CHECK("pthread_create", 0, pthread_create(&t, NULL, nothing, (void *)n));
        CHECK("pthread_join", 0, pthread_join(t, &r));
        CHECK("a thread's value", n + 1, (intptr_t)r);
        mist_sleep(1000);
    }
    return NULL;
}

int main(void)
{
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &sa, NULL);
    struct itimerval it = {{0, 3000}, {0, 3000}};
    pthread_t a, b;
    pthread_create(&a, NULL, pipes, NULL);
    pthread_create(&b, NULL, threads, NULL);
    MUST(setitimer(ITIMER_REAL, &it, NULL));
    double want = 0;
    for (int i = 1; i < 20000; i++)
        want += 1.0 / i;
    mist_ready();
    for (int after = 0; after < 50;) {
        after += mist_gone_on();
        // A sum in floating point, all the time.
        double sum = 0;
        for (int i = 1; i < 20000; i++)
            sum += 1.0 / i;
        if (sum != want)
            mist_fail("a sum, wanted %.17g, got %.17g", want, sum);
        rounds[2]++;
        mist_sleep(1000);
    }
    stop = 1;
    pthread_join(a, NULL);
    pthread_join(b, NULL);
    int64_t before = alarms;
    for (int i = 0; i < 2000 && alarms < before + 5; i++)
        mist_turn();
    CHECK("alarms go on", 1, alarms >= before + 5);
    mist_pass();
}
