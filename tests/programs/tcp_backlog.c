// TCP connections that wait to be accepted, both ends here, in the order of their connects; the last client may be
// gone.
// mist: variants empty data full closed shut v6
// mist: may-refuse hold data
#include "mist.h"
#include <netinet/in.h>
#include <poll.h>

#define CLIENTS 3
#define MOST (16 << 20)
static char out[MOST], in[MOST];

int main(int argc, char **argv)
{
    const char *v = argc > 1 ? argv[1] : "";
#define IS(x) (!strcmp(v, x))
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}}, from = {0};
    void *a = IS("v6") ? (void *)&a6 : (void *)&a4;
    socklen_t n = IS("v6") ? sizeof a6 : sizeof a4;
    int family = IS("v6") ? AF_INET6 : AF_INET;
    int l = MUST(socket(family, SOCK_STREAM, 0)), c[CLIENTS];
    size_t len[CLIENTS];
    uint16_t port[CLIENTS] = {0};
    MUST(bind(l, a, n));
    MUST(listen(l, 5));
    MUST(getsockname(l, a, &n));
    for (int i = 0; i < CLIENTS; i++) {
        c[i] = MUST(socket(family, SOCK_STREAM, 0));
        MUST(connect(c[i], a, n));
        if (family == AF_INET) {
            socklen_t size = sizeof from;
            MUST(getsockname(c[i], (void *)&from, &size));
            port[i] = from.sin_port;
        }
        mist_fill(out, sizeof out, i);
        len[i] = IS("empty") ? 0 : 10000;
        if (len[i])
            CHECK("set-up: send", len[i], send(c[i], out, len[i], 0));
        // More than the listener's side takes: the rest stays with the client.
        if (IS("full") && i == 1)
            for (ssize_t r; len[i] < MOST && (r = send(c[i], out + len[i], MOST - len[i], MSG_DONTWAIT)) > 0; mist_sleep(20000))
                len[i] += r;
    }
    if (IS("closed"))
        close(c[CLIENTS - 1]);
    if (IS("shut"))
        MUST(shutdown(c[1], SHUT_WR));
    mist_sleep(50000);

    mist_ready();
    mist_wait();

    for (int i = 0; i < CLIENTS; i++) {
        socklen_t size = sizeof from;
        int s = CALL(accept(l, family == AF_INET ? (void *)&from : NULL, &size)), gone = IS("closed") && i == CLIENTS - 1;
        if (family == AF_INET && !gone)
            CHECK("the client's port", port[i], from.sin_port);
        mist_fill(out, sizeof out, i);
        size_t got = 0;
        struct pollfd p = {s, POLLIN, 0};
        // What found no room is sent again after a while only.
        while (got < len[i] && poll(&p, 1, 20000) == 1)
            got += CALL(recv(s, in + got, len[i] - got, 0));
        CHECK("receive", len[i], got);
        CHECK_MEM("in the order of their connects", out, in, len[i]);
        if (gone || (IS("shut") && i == 1))
            CHECK("end of the connection", 0, recv(s, in, sizeof in, 0));
        else
            CHECK_ERR("nothing more", EAGAIN, recv(s, in, sizeof in, MSG_DONTWAIT));
        if (gone)
            continue;
        CHECK("send", 2, send(s, "hi", 2, 0));
        CHECK("receive", 2, recv(c[i], in, 2, MSG_WAITALL));
        if (IS("shut") && i == 1)
            continue;
        CHECK("from the client", 5, send(c[i], "again", 5, 0));
        CHECK("from the client", 5, recv(s, in, 5, MSG_WAITALL));
    }
    CALL(fcntl(l, F_SETFL, O_NONBLOCK));
    CHECK_ERR("no more connections", EAGAIN, accept(l, NULL, NULL));
    mist_pass();
}
