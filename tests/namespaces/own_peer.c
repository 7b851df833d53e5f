// Makes a pair of sockets, waits for SIGUSR1, and ends with 0 if it is its own peer, whatever its pid is; else with what is
// different.
#define _GNU_SOURCE
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    struct ucred cr;
    socklen_t n = sizeof cr;
    int p[2], got;
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, SIGUSR1);
    sigprocmask(SIG_BLOCK, &s, NULL);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, p) < 0)
        return 2;
    sigwait(&s, &got);
    if (getsockopt(p[0], SOL_SOCKET, SO_PEERCRED, &cr, &n) < 0)
        return 2;
    return cr.pid != getpid() ? 3 : cr.uid != getuid() ? 4 : cr.gid != getgid() ? 5 : 0;
}
