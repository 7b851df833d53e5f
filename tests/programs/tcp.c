// TCP over IPv4 and IPv6, both ends here: listening, established with both queues full of data,
// options, half-closed both ways, waiting to be accepted.
// mist: variants v4 v6
#include "mist.h"
#include <netinet/in.h>
#include <netinet/tcp.h>

static int six;
static socklen_t loopback(struct sockaddr_storage *a, int port)
{
    memset(a, 0, sizeof *a);
    if (six) {
        struct sockaddr_in6 *s = (void *)a;
        s->sin6_family = AF_INET6;
        s->sin6_addr = in6addr_loopback;
        s->sin6_port = htons(port);
        return sizeof *s;
    }
    struct sockaddr_in *s = (void *)a;
    s->sin_family = AF_INET;
    s->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    s->sin_port = htons(port);
    return sizeof *s;
}
static int port_of(int s)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    CALL(getsockname(s, (void *)&a, &n));
    return ntohs(six ? ((struct sockaddr_in6 *)&a)->sin6_port : ((struct sockaddr_in *)&a)->sin_port);
}
static int client(int port)
{
    struct sockaddr_storage a;
    socklen_t n = loopback(&a, port);
    int s = CALL(socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0));
    CALL(connect(s, (void *)&a, n));
    return s;
}
static int opt(int s, int level, int what)
{
    int v = -1;
    socklen_t n = sizeof v;
    CALL(getsockopt(s, level, what, &v, &n));
    return v;
}
static void setopt(int s, int level, int what, int v)
{
    MUST(setsockopt(s, level, what, &v, sizeof v));
}
static void expect(const char *what, int s, const char *data, size_t len)
{
    static char buf[1 << 20];
    for (size_t at = 0; at < len;) {
        ssize_t r = CALL(recv(s, buf + at, len - at, 0));
        if (r == 0)
            mist_fail("%s, wanted %zu bytes, got an end-of-file after %zu", what, len, at);
        at += r;
    }
    CHECK_MEM(what, data, buf, len);
}

static char big[400000];

int main(int argc, char **argv)
{
    six = argc > 1 && !strcmp(argv[1], "v6");
    struct sockaddr_storage a;
    mist_fill(big, sizeof big, 17);
    int l = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    if (l < 0 && errno == EAFNOSUPPORT)
        mist_skip("this kernel has no IPv6");
    socklen_t n = loopback(&a, 0);
    setopt(l, SOL_SOCKET, SO_REUSEADDR, 1);
    MUST(bind(l, (void *)&a, n));
    MUST(listen(l, 9));
    setopt(l, IPPROTO_TCP, TCP_DEFER_ACCEPT, 0);
    int port = port_of(l);
    signal(SIGPIPE, SIG_IGN);

    // Data both ways, more than the receiver takes: some of it waits at the sender.
    int c = client(port), s = MUST(accept(l, NULL, NULL));
    MUST(send(c, "to the server", 13, 0));
    fcntl(s, F_SETFL, O_NONBLOCK);
    size_t sent = 0;
    for (ssize_t r; sent < sizeof big && (r = send(s, big + sent, sizeof big - sent, 0)) > 0;)
        sent += r;
    setopt(c, IPPROTO_TCP, TCP_NODELAY, 1);
    setopt(c, SOL_SOCKET, SO_KEEPALIVE, 1);
    setopt(c, IPPROTO_TCP, TCP_KEEPIDLE, 123);
    setopt(c, IPPROTO_TCP, TCP_KEEPINTVL, 45);
    setopt(c, IPPROTO_TCP, TCP_KEEPCNT, 6);
    setopt(c, IPPROTO_TCP, TCP_USER_TIMEOUT, 98765);
    setopt(s, SOL_SOCKET, SO_RCVBUF, 150000);
    setopt(s, SOL_SOCKET, SO_SNDBUF, 160000);
    struct linger lg = {1, 0}, gotlg;
    // Another pair, half-closed by the client, and one half-closed by the server.
    int hc = client(port), hs = MUST(accept(l, NULL, NULL));
    MUST(send(hc, "request", 7, 0));
    MUST(shutdown(hc, SHUT_WR));
    int gc = client(port), gs = MUST(accept(l, NULL, NULL));
    MUST(send(gs, "all of it", 9, 0));
    MUST(shutdown(gs, SHUT_WR));
    MUST(setsockopt(gc, SOL_SOCKET, SO_LINGER, &lg, sizeof lg));
    // Quiet, and closed by one side altogether.
    int qc = client(port), qs = MUST(accept(l, NULL, NULL));
    // A bound one that does not listen, an idle one.
    int bound = MUST(socket(six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    n = loopback(&a, 0);
    MUST(bind(bound, (void *)&a, n));
    int bport = port_of(bound);
    int idle = MUST(socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0));
    int cport = port_of(c);

    mist_ready();
    mist_wait();

    CHECK("listener's port", port, port_of(l));
    CHECK("it listens", 1, opt(l, SOL_SOCKET, SO_ACCEPTCONN));
    CHECK("SO_REUSEADDR", 1, opt(l, SOL_SOCKET, SO_REUSEADDR));
    CHECK("client's port", cport, port_of(c));
    CHECK("server's port", port, port_of(s));
    expect("what the server had not read", s, "to the server", 13);
    expect("what the client had not read", c, big, sent);
    CHECK_ERR("and no more", EAGAIN, recv(c, big, 1, MSG_DONTWAIT));
    CHECK("client sends", 3, send(c, "abc", 3, 0));
    fcntl(s, F_SETFL, 0);
    expect("server receives", s, "abc", 3);
    CHECK("server sends", 4, send(s, "defg", 4, 0));
    expect("client receives", c, "defg", 4);
    CHECK("TCP_NODELAY", 1, opt(c, IPPROTO_TCP, TCP_NODELAY));
    CHECK("SO_KEEPALIVE", 1, opt(c, SOL_SOCKET, SO_KEEPALIVE));
    CHECK("TCP_KEEPIDLE", 123, opt(c, IPPROTO_TCP, TCP_KEEPIDLE));
    CHECK("TCP_KEEPINTVL", 45, opt(c, IPPROTO_TCP, TCP_KEEPINTVL));
    CHECK("TCP_KEEPCNT", 6, opt(c, IPPROTO_TCP, TCP_KEEPCNT));
    CHECK("TCP_USER_TIMEOUT", 98765, opt(c, IPPROTO_TCP, TCP_USER_TIMEOUT));
    CHECK("SO_RCVBUF", 300000, opt(s, SOL_SOCKET, SO_RCVBUF));
    CHECK("SO_SNDBUF", 320000, opt(s, SOL_SOCKET, SO_SNDBUF));
    struct tcp_info ti;
    n = sizeof ti;
    CALL(getsockopt(c, IPPROTO_TCP, TCP_INFO, &ti, &n));
    CHECK("established", TCP_ESTABLISHED, ti.tcpi_state);
    CHECK("not in repair mode", 0, opt(c, IPPROTO_TCP, 19 /* TCP_REPAIR */));

    expect("request of the half-closed", hs, "request", 7);
    CHECK("end-of-file after the request", 0, recv(hs, big, 1, 0));
    CHECK_ERR("the client sends no more", EPIPE, send(hc, "x", 1, 0));
    CHECK("the answer", 6, send(hs, "answer", 6, 0));
    expect("the answer", hc, "answer", 6);
    close(hs);
    CHECK("end-of-file after the answer", 0, recv(hc, big, 1, 0));
    expect("what came before the server's shutdown", gc, "all of it", 9);
    CHECK("end-of-file after the shutdown", 0, recv(gc, big, 1, 0));
    CHECK("the client may still send", 2, send(gc, "ok", 2, 0));
    expect("the client may still send", gs, "ok", 2);
    n = sizeof gotlg;
    CALL(getsockopt(gc, SOL_SOCKET, SO_LINGER, &gotlg, &n));
    CHECK("SO_LINGER", 1, gotlg.l_onoff);
    close(qc);
    CHECK("a quiet one sees the end", 0, recv(qs, big, 1, 0));

    CHECK("the bound one's port", bport, port_of(bound));
    CHECK("it does not listen", 0, opt(bound, SOL_SOCKET, SO_ACCEPTCONN));
    CHECK("cloexec", FD_CLOEXEC, fcntl(bound, F_GETFD));
    CALL(listen(bound, 1));
    n = loopback(&a, port);
    CALL(connect(idle, (void *)&a, n));
    int s2 = CALL(accept(l, NULL, NULL));
    CHECK("a new connection", 3, send(idle, "new", 3, 0));
    expect("a new connection", s2, "new", 3);
    mist_pass();
}
