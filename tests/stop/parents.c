// Threads that fork and threads that sleep in calls which any signal ends, be it one that the process ignores: as long
// as nobody traces the program the kernel drops those (SIGCHLD, by default), and no sleep may end by one. It counts its
// turns in the file `turns`.
#include "../programs/mist.h"
#include <pthread.h>
#include <sys/epoll.h>

#define PARENTS 3
#define SLEEPERS 8

static volatile uint64_t *turns; // one counter for all of a kind
static volatile int stop;

static void *forks(void *arg)
{
    for (long n = (long)arg; !stop; n++) {
        mist_sleep(500 + n % 7 * 300);
        pid_t c = fork();
        if (c < 0)
            mist_fail("fork, got %s", strerror(errno));
        if (!c)
            _exit(n % 100);
        int status = -1;
        pid_t w = waitpid(c, &status, __WALL);
        if (w != c)
            mist_fail("waitpid, wanted %d, got %d with status %#x (%s)", c, w, status, strerror(errno));
        CHECK("exit code", n % 100, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
        __atomic_fetch_add(&turns[0], 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *sleeps(void *arg)
{
    long me = (long)arg;
    int ep = MUST(epoll_create1(0));
    struct epoll_event e;
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    for (uint64_t n = 0; !stop; n++) {
        struct timespec t = {0, 200000 + mist_mix(n * SLEEPERS + me) % 8 * 500000};
        long r = syscall(SYS_rt_sigtimedwait, &s, NULL, &t, 8);
        if (r != -1 || errno != EAGAIN)
            mist_fail("sigtimedwait, wanted EAGAIN, got %ld with %s", r, strerror(errno));
        CHECK("epoll_wait", 0, epoll_wait(ep, &e, 1, 1 + me % 3));
        // For a while it is in no call when it is looked at.
        for (volatile int i = 0; i < 20000; i++)
            ;
        __atomic_fetch_add(&turns[1 + me % 3], 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

int main(void)
{
    int fd = MUST(open("turns", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(fd, 4096));
    turns = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    MUST(sigprocmask(SIG_BLOCK, &s, NULL));
    pthread_t t[PARENTS + SLEEPERS];
    for (long i = 0; i < PARENTS + SLEEPERS; i++)
        if (pthread_create(&t[i], NULL, i % 4 == 3 ? forks : sleeps, (void *)i))
            mist_fail("set-up: pthread_create");
    while (!turns[0] || !turns[1] || !turns[2] || !turns[3])
        mist_turn();
    mist_ready();
    mist_wait();
    stop = 1;
    for (int i = 0; i < PARENTS + SLEEPERS; i++)
        pthread_join(t[i], NULL);
    mist_pass();
}
