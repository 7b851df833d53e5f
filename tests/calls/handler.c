// Waits in epoll_wait with a time-out. The handler of SIGUSR1 says that it runs, and goes on until the file "go" is
// there; then the wait has to end with EINTR.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

static int put(const char *name, const char *text) {
    FILE *f = fopen("tmp", "w");
    return !f || fputs(text, f) < 0 || fclose(f) || rename("tmp", name);
}

static void handler(int signal) {
    (void)signal;
    if (put("handling", ""))
        _exit(2);
    while (access("go", F_OK)) {
        struct timespec t = {0, 2000000};
        nanosleep(&t, NULL);
    }
}

int main(void) {
    struct epoll_event event;
    int e = epoll_create1(0);
    if (e < 0 || signal(SIGUSR1, handler) == SIG_ERR || put("ready", ""))
        return 2;
    int n = epoll_wait(e, &event, 1, 60000);
    return put("result", n < 0 && errno == EINTR ? "EINTR\n" : "something else\n") ? 2 : 0;
}
