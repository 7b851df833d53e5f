// A connect that was refused: its error, read or not, and that the socket connects again.
// mist: variants unread read connect
#include "mist.h"
#include <netinet/in.h>
#include <poll.h>

static int name(int s, struct sockaddr_in *a)
{
    socklen_t len = sizeof *a;
    *a = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    MUST(bind(s, (void *)a, sizeof *a));
    return MUST(getsockname(s, (void *)a, &len));
}

static int error(int s)
{
    int e = -1;
    socklen_t len = sizeof e;
    CALL(getsockopt(s, SOL_SOCKET, SO_ERROR, &e, &len));
    return e;
}

static int events(int s)
{
    struct pollfd p = {s, POLLIN | POLLOUT | POLLRDHUP, 0};
    CALL(poll(&p, 1, 0));
    return p.revents;
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "unread";
    struct sockaddr_in nobody, somebody;
    int deaf = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    name(deaf, &nobody);
    int listener = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    name(listener, &somebody);
    MUST(listen(listener, 1));
    int s = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    CHECK_ERR("connect", EINPROGRESS, connect(s, (void *)&nobody, sizeof nobody));
    struct pollfd p = {s, POLLOUT, 0};
    MUST(poll(&p, 1, 10000));
    if (!strcmp(how, "read"))
        CHECK("its error", ECONNREFUSED, error(s));
    int before = events(s);
    mist_ready();
    mist_wait();
    CHECK("what poll says", before, events(s));
    if (!strcmp(how, "connect")) {
        CHECK_ERR("connect again", ECONNREFUSED, connect(s, (void *)&somebody, sizeof somebody));
    } else {
        CHECK("its error", strcmp(how, "read") ? ECONNREFUSED : 0, error(s));
        CHECK("and then", 0, error(s));
        char c;
        CHECK("what it receives", 0, recv(s, &c, 1, 0));
        CHECK_ERR("connect again", ECONNABORTED, connect(s, (void *)&somebody, sizeof somebody));
    }
    if (connect(s, (void *)&somebody, sizeof somebody) < 0)
        CHECK("connect once more", EINPROGRESS, errno);
    int other = CALL(accept(listener, NULL, NULL));
    CHECK("send", 1, CALL(send(other, "x", 1, 0)));
    p.events = POLLIN;
    CHECK("poll", 1, poll(&p, 1, 10000));
    char c = 0;
    CHECK("recv", 1, CALL(recv(s, &c, 1, 0)));
    mist_pass();
}
