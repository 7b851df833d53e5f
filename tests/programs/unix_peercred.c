// SO_PEERCRED names the process that made a pair, or connected, or listened: this one.
// mist: no-kill sockets are made again by mistctl, which is the peer then
// mist: no-twice sockets are made again by mistctl, which is the peer then
// mist: no-lazy sockets are made again by mistctl, which is the peer then
#include "mist.h"
#include <sys/un.h>

static void check(const char *what, int s)
{
    struct ucred cr;
    socklen_t n = sizeof cr;
    CALL(getsockopt(s, SOL_SOCKET, SO_PEERCRED, &cr, &n));
    CHECK(what, getpid(), cr.pid);
    CHECK(what, getuid(), cr.uid);
    CHECK(what, getgid(), cr.gid);
}

int main(void)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    int p[2], l = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), c = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, p));
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 5));
    MUST(connect(c, (void *)&a, sizeof a));
    int s = MUST(accept(l, NULL, NULL));

    mist_ready();
    mist_wait();

    check("the peer of one of a pair", p[0]);
    check("the peer of the other", p[1]);
    check("the peer of a client", c);
    check("the peer of a server", s);
    mist_pass();
}
