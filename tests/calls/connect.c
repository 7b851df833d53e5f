// Connects to a TCP listener that takes nobody any more, with a time-out of a second and a half, and notes the outcome;
// or that of a second call when the first has timed out (again), or when a first that did not block has been waited for
// (soon).
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

int main(int argc, char **argv) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval whole = {1, 500000};
    socklen_t n = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM, 0), first = socket(AF_INET, SOCK_STREAM, 0),
        second = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (void *)&a, n) || listen(listener, 0) || getsockname(listener, (void *)&a, &n) ||
        connect(first, (void *)&a, n) || setsockopt(second, SOL_SOCKET, SO_SNDTIMEO, &whole, sizeof whole))
        return 2;
    if (argc > 1 && !strcmp(argv[1], "again") && (connect(second, (void *)&a, n) != -1 || errno != EINPROGRESS))
        return 2;
    if (argc > 1 && !strcmp(argv[1], "soon")) {
        struct pollfd p = {second, POLLOUT, 0};
        if (fcntl(second, F_SETFL, O_NONBLOCK) || connect(second, (void *)&a, n) != -1 || errno != EINPROGRESS ||
            poll(&p, 1, 100) || fcntl(second, F_SETFL, 0))
            return 2;
    }
    FILE *f = fopen("ready", "w");
    if (!f || fclose(f))
        return 2;
    int r = connect(second, (void *)&a, n);
    int error = errno;
    f = fopen("result.tmp", "w");
    if (!f)
        return 2;
    fprintf(f, "%d %s", r, r < 0 ? strerror(error) : "");
    if (fclose(f) || rename("result.tmp", "result"))
        return 2;
    return 0;
}
