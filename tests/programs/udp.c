// UDP over IPv4 and IPv6: bound, connected, with datagrams that wait, and options.
// mist: variants v4 v6
#include "mist.h"
#include <netinet/in.h>
#include <netinet/ip.h>

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

int main(int argc, char **argv)
{
    six = argc > 1 && !strcmp(argv[1], "v6");
    struct sockaddr_storage a, from;
    char buf[70000], big[60000];
    int on = 1, v;
    mist_fill(big, sizeof big, 3);
    int family = six ? AF_INET6 : AF_INET;
    int bound = socket(family, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    if (bound < 0 && errno == EAFNOSUPPORT)
        mist_skip("this kernel has no IPv6");
    socklen_t n = loopback(&a, 0);
    MUST(setsockopt(bound, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
    MUST(bind(bound, (void *)&a, n));
    int port = port_of(bound);
    v = 262144;
    MUST(setsockopt(bound, SOL_SOCKET, SO_RCVBUF, &v, sizeof v));
    MUST(setsockopt(bound, SOL_SOCKET, SO_BROADCAST, &on, sizeof on));
    int con = MUST(socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    n = loopback(&a, port);
    MUST(connect(con, (void *)&a, n));
    int cport = port_of(con);
    // Neither bound nor connected.
    int idle = MUST(socket(family, SOCK_DGRAM, 0));
    v = 77;
    MUST(setsockopt(idle, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_UNICAST_HOPS : IP_TTL, &v, sizeof v));
    MUST(send(con, "waiting", 7, 0));
    MUST(send(con, big, sizeof big, 0));
    MUST(send(con, "", 0, 0));

    mist_ready();
    mist_wait();

    CHECK("port", port, port_of(bound));
    CHECK("the connected one's port", cport, port_of(con));
    socklen_t fn = sizeof from;
    CHECK("a datagram that waited", 7, recvfrom(bound, buf, sizeof buf, 0, (void *)&from, &fn));
    CHECK_MEM("a datagram that waited", "waiting", buf, 7);
    CHECK("its sender's port", cport, ntohs(six ? ((struct sockaddr_in6 *)&from)->sin6_port : ((struct sockaddr_in *)&from)->sin_port));
    CHECK("a big one", sizeof big, recv(bound, buf, sizeof buf, 0));
    CHECK_MEM("a big one", big, buf, sizeof big);
    CHECK("an empty one", 0, recv(bound, buf, sizeof buf, 0));
    CHECK_ERR("no more", EAGAIN, recv(bound, buf, sizeof buf, 0));
    CHECK("connected sends", 3, send(con, "abc", 3, 0));
    fn = sizeof from;
    CHECK("bound receives", 3, recvfrom(bound, buf, sizeof buf, 0, (void *)&from, &fn));
    CHECK("bound answers", 2, sendto(bound, "ok", 2, 0, (void *)&from, fn));
    CHECK("connected receives", 2, recv(con, buf, sizeof buf, 0));
    n = sizeof v;
    CALL(getsockopt(bound, SOL_SOCKET, SO_RCVBUF, &v, &n));
    CHECK("SO_RCVBUF", 1, v >= 262144);
    CALL(getsockopt(bound, SOL_SOCKET, SO_BROADCAST, &v, &n));
    CHECK("SO_BROADCAST", 1, v);
    CALL(getsockopt(bound, SOL_SOCKET, SO_REUSEADDR, &v, &n));
    CHECK("SO_REUSEADDR", 1, v);
    CALL(getsockopt(idle, six ? IPPROTO_IPV6 : IPPROTO_IP, six ? IPV6_UNICAST_HOPS : IP_TTL, &v, &n));
    CHECK("time to live", 77, v);
    CHECK("cloexec", FD_CLOEXEC, fcntl(con, F_GETFD));
    // Only its peer reaches a connected one.
    n = loopback(&a, cport);
    CALL(sendto(idle, "stray", 5, 0, (void *)&a, n));
    CHECK_ERR("a stranger does not", EAGAIN, recv(con, buf, sizeof buf, MSG_DONTWAIT));
    mist_pass();
}
