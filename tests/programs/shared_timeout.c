// Threads that wait for one socket with a time-out: none is woken early, and the socket keeps its time-out.
// mist: cflags -pthread
#include "mist.h"
#include <netinet/in.h>
#include <pthread.h>

#define WHOLE_US 1200000ll
#define EARLY_US 50000ll

static int sock;
static volatile int enough;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ll + t.tv_nsec / 1000;
}

static void *waiter(void *which)
{
    char b[16];
    struct iovec io = {b, sizeof b};
    while (!enough) {
        struct mmsghdr m = {{NULL, 0, &io, 1, NULL, 0, 0}, 0};
        int64_t begun = now_us();
        long n = (intptr_t)which ? recvmmsg(sock, &m, 1, 0, NULL) : recv(sock, b, sizeof b, 0);
        int error = errno;
        int64_t took = now_us() - begun;
        CHECK("what a wait returns", -1, n);
        CHECK("its error", EAGAIN, error);
        if (took < WHOLE_US - EARLY_US)
            CHECK("microseconds of a wait", WHOLE_US, took);
    }
    return NULL;
}

int main(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval whole = {WHOLE_US / 1000000, WHOLE_US % 1000000}, now;
    socklen_t n = sizeof now;
    pthread_t threads[4];
    sock = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    MUST(bind(sock, (void *)&a, sizeof a));
    MUST(setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &whole, sizeof whole));
    MUST(getsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &whole, &n));
    for (intptr_t i = 0; i < 4; i++) {
        if (pthread_create(&threads[i], NULL, waiter, (void *)i))
            return 2;
        // Their waits end one after the other.
        nanosleep(&(struct timespec){0, 60000000}, NULL);
    }

    mist_ready();
    mist_wait();

    enough = 1;
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    MUST(getsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &now, &n));
    CHECK("the socket's time-out, microseconds", whole.tv_sec * 1000000ll + whole.tv_usec,
          now.tv_sec * 1000000ll + now.tv_usec);
    mist_pass();
}
