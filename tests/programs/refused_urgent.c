// An urgent byte that has come and was not read.
// mist: refused urgent byte
// mist: variants unix tcp
#include "mist.h"
#include <netinet/in.h>
#include <poll.h>

static void tcp_pair(int s[2])
{
    int l = MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 1));
    MUST(getsockname(l, (void *)&a, &len));
    s[0] = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(s[0], (void *)&a, len));
    s[1] = MUST(accept(l, NULL, NULL));
    close(l);
}

int main(int argc, char **argv)
{
    int s[2];
    if (argc > 1 && !strcmp(argv[1], "tcp"))
        tcp_pair(s);
    else
        MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s));
    MUST(send(s[0], "ab", 2, 0));
    if (send(s[0], "X", 1, MSG_OOB) < 0)
        mist_skip("no urgent bytes here");
    MUST(send(s[0], "cd", 2, 0));
    struct pollfd p = {s[1], POLLPRI, 0};
    MUST(poll(&p, 1, -1));
    mist_ready();
    mist_wait();
    char b[8] = {0};
    CHECK("the urgent byte", 1, recv(s[1], b, 1, MSG_OOB));
    CHECK_STR("what it is", "X", b);
    memset(b, 0, sizeof b);
    CALL(recv(s[1], b, sizeof b, 0));
    CHECK_STR("before it", "ab", b);
    memset(b, 0, sizeof b);
    CALL(recv(s[1], b, sizeof b, 0));
    CHECK_STR("behind it", "cd", b);
    mist_pass();
}
