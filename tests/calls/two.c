// Two threads receive from one socket: the first with a time-out of two seconds, the other with one of ten minutes that
// the socket has got since. Notes how the first call ended.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int s[2];
static volatile int tid;

static int sleeps(void) {
    char path[64], text[16] = "", want[16];
    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", tid);
    snprintf(want, sizeof want, "%d ", SYS_recvmmsg);
    FILE *f = fopen(path, "r");
    if (f) {
        if (!fgets(text, sizeof text, f))
            text[0] = 0;
        fclose(f);
    }
    return !strncmp(text, want, strlen(want));
}

static void *receive(void *result) {
    char b[16];
    tid = gettid();
    struct iovec io = {b, sizeof b};
    struct mmsghdr m = {.msg_hdr = {.msg_iov = &io, .msg_iovlen = 1}};
    int n = recvmmsg(s[0], &m, 1, 0, NULL);
    int error = errno;
    FILE *f = fopen("result.tmp", "w");
    if (f) {
        fprintf(f, "%d %d", n, error == EAGAIN);
        fclose(f);
        rename("result.tmp", result);
    }
    return NULL;
}

static int begin(pthread_t *thread, int seconds, char *result) {
    struct timeval whole = {seconds, 0};
    tid = 0;
    if (setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &whole, sizeof whole) || pthread_create(thread, NULL, receive, result))
        return 0;
    while (!tid || !sleeps())
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    return 1;
}

int main(void) {
    pthread_t one, other;
    if (socketpair(AF_UNIX, SOCK_DGRAM, 0, s) || !begin(&one, 2, "result") || !begin(&other, 600, "other"))
        return 2;
    FILE *f = fopen("ready", "w");
    if (!f || fclose(f))
        return 2;
    pthread_join(other, NULL);
    return 0;
}
