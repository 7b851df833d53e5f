// A connect that nobody answered, and whose error was not read yet: it is one that failed, and the socket connects again.
#include "mist.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>

static int listening(struct sockaddr_in *a)
{
    socklen_t len = sizeof *a;
    *a = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int s = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(bind(s, (void *)a, sizeof *a));
    MUST(getsockname(s, (void *)a, &len));
    MUST(listen(s, 0));
    return s;
}

static int connecting(const struct sockaddr_in *to, unsigned patience)
{
    int s = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    MUST(setsockopt(s, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience, sizeof patience));
    CHECK_ERR("connect", EINPROGRESS, connect(s, (void *)to, sizeof *to));
    return s;
}

int main(void)
{
    struct sockaddr_in full, free;
    int deaf = listening(&full), listener = listening(&free);
    // It has no room for another.
    int first = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(connect(first, (void *)&full, sizeof full));
    int s = connecting(&full, 1);
    struct pollfd p = {s, POLLOUT, 0};
    MUST(poll(&p, 1, 20000));
    CHECK("what poll says", POLLOUT | POLLERR | POLLHUP, p.revents);
    close(MUST(accept(deaf, NULL, NULL)));
    close(first);
    close(deaf);
    mist_ready();
    mist_wait();
    CHECK("what poll says", 1, poll(&p, 1, 0));
    CHECK("which is", POLLOUT | POLLERR | POLLHUP, p.revents);
    int e = -1;
    socklen_t len = sizeof e;
    CALL(getsockopt(s, SOL_SOCKET, SO_ERROR, &e, &len));
    if (e != ETIMEDOUT && e != ECONNREFUSED)
        mist_fail("its error: %s", strerror(e));
    CHECK_ERR("connect again", ECONNABORTED, connect(s, (void *)&free, sizeof free));
    if (connect(s, (void *)&free, sizeof free) < 0)
        CHECK("connect once more", EINPROGRESS, errno);
    CALL(accept(listener, NULL, NULL));
    mist_pass();
}
