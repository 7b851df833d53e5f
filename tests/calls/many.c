// Fifty threads in each of five calls that sleep with a time-out, each behind registers of its own. When seven tenths of
// the time have passed it is ready, and when half as much again as all of it has, it notes how many of each have ended
// as they should.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { CALLS = 5, EACH = 50, WHOLE_MS = 4000 };

static int ended[CALLS], early[CALLS], semaphore;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static int sleep_in(int call, long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    struct epoll_event event;
    struct sembuf one = {0, -1, 0};
    sigset_t set;
    int s[2];
    char b[16];
    switch (call) {
    case 0: {
        struct timeval whole = {ms / 1000, ms % 1000 * 1000};
        if (socketpair(AF_UNIX, SOCK_DGRAM, 0, s) || setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &whole, sizeof whole))
            exit(2);
        return recv(s[0], b, sizeof b, 0) == -1 && errno == EAGAIN;
    }
    case 1:
        return !epoll_wait(epoll_create1(0), &event, 1, ms);
    case 2:
        return !epoll_pwait2(epoll_create1(0), &event, 1, &t, NULL);
    case 3:
        return semtimedop(semaphore, &one, 1, &t) == -1 && errno == EAGAIN;
    default:
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        return sigtimedwait(&set, NULL, &t) == -1 && errno == EAGAIN;
    }
}

static void *thread(void *arg) {
    long i = (long)arg;
    int call = (int)(i % CALLS);
    long ms = WHOLE_MS + i / CALLS;
    long long begun = now_us();
    int good = sleep_in(call, ms);
    if (now_us() - begun < ms * 1000)
        __atomic_add_fetch(&early[call], 1, __ATOMIC_SEQ_CST);
    if (good)
        __atomic_add_fetch(&ended[call], 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void pass(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t))
        ;
}

int main(void) {
    static pthread_t threads[CALLS * EACH];
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    semaphore = semget(IPC_PRIVATE, 1, 0600);
    if (semaphore < 0)
        return 2;
    for (long i = 0; i < CALLS * EACH; i++)
        if (pthread_create(&threads[i], NULL, thread, (void *)i))
            return 2;
    pass(WHOLE_MS * 7 / 10);
    FILE *f = fopen("ready", "w");
    if (!f || fclose(f))
        return 2;
    pass(WHOLE_MS * 8 / 10);
    f = fopen("result.tmp", "w");
    if (!f)
        return 2;
    for (int i = 0; i < CALLS; i++)
        fprintf(f, "%d %d\n", ended[i], early[i]);
    if (semctl(semaphore, 0, IPC_RMID) || fclose(f) || rename("result.tmp", "result"))
        return 2;
    return 0;
}
