// Receives all of a buffer from a socket with a time-out of a second and a half, of which a part comes; or sends more
// than there is room for (send). Notes for how long and with what outcome.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char much[4 << 20];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    int s[2];
    int sends = argc > 1 && !strcmp(argv[1], "send");
    struct timeval whole = {1, 500000};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s) ||
        setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &whole, sizeof whole) ||
        setsockopt(s[0], SOL_SOCKET, SO_SNDTIMEO, &whole, sizeof whole) ||
        send(s[1], much, 1000, 0) != 1000)
        return 2;
    FILE *f = fopen("ready", "w");
    if (!f || fclose(f))
        return 2;
    double begun = now();
    ssize_t n = sends ? send(s[0], much, sizeof much, 0) : recv(s[0], much, sizeof much, MSG_WAITALL);
    double took = now() - begun;
    int left = 0;
    if (sends) {
        // As much as has arrived.
        ssize_t got;
        while ((got = recv(s[1], much, sizeof much, MSG_DONTWAIT)) > 0)
            left += (int)got;
        n -= left;
    }
    f = fopen("result.tmp", "w");
    if (!f)
        return 2;
    fprintf(f, "%zd %.6f\n", n, took);
    if (fclose(f) || rename("result.tmp", "result"))
        return 2;
    return 0;
}
