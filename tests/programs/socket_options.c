// Options that few programs set: each as it was set, or a kernel without it.
#include "mist.h"
#include <netinet/in.h>

enum { LEN = 64 };
static struct option {
    int family, type, level, name;
    const char *what;
    socklen_t len;
    unsigned char value[LEN], before[LEN];
    int fd, there;
} options[] = {
#define INT(n) 4, {(n) & 0xff, (n) >> 8 & 0xff, (n) >> 16 & 0xff, (n) >> 24 & 0xff}
    {AF_INET, SOCK_DGRAM, SOL_SOCKET, SO_TIMESTAMPING, "SO_TIMESTAMPING", INT(0x418)},
    {AF_INET, SOCK_DGRAM, SOL_SOCKET, SO_INCOMING_CPU, "SO_INCOMING_CPU", INT(1)},
    {AF_INET, SOCK_STREAM, SOL_SOCKET, 74, "SO_TXREHASH", INT(0)},
    {AF_INET, SOCK_DGRAM, SOL_SOCKET, 75, "SO_RCVMARK", INT(1)},
    {AF_INET, SOCK_DGRAM, SOL_SOCKET, 82, "SO_RCVPRIORITY", INT(1)},
    {AF_UNIX, SOCK_STREAM, SOL_SOCKET, 83, "SO_PASSRIGHTS", INT(0)},
    {AF_INET, SOCK_DGRAM, IPPROTO_IP, 4, "IP_OPTIONS", 4, {0x94, 4}},
    {AF_INET, SOCK_DGRAM, IPPROTO_IP, 33, "IP_MULTICAST_TTL", INT(7)},
    {AF_INET6, SOCK_DGRAM, IPPROTO_IPV6, 2, "IPV6_2292PKTINFO", INT(1)},
    {AF_INET6, SOCK_DGRAM, IPPROTO_IPV6, 8, "IPV6_2292HOPLIMIT", INT(1)},
    {AF_INET6, SOCK_DGRAM, IPPROTO_IPV6, 30, "IPV6_ROUTER_ALERT_ISOLATE", INT(1)},
    {AF_INET6, SOCK_DGRAM, IPPROTO_IPV6, 54, "IPV6_HOPOPTS", 8, {0, 0, 5, 2, 0, 0, 1, 0}},
    {AF_INET6, SOCK_DGRAM, IPPROTO_IPV6, 60, "IPV6_RECVPATHMTU", INT(1)},
    {AF_INET6, SOCK_RAW, IPPROTO_IPV6, 7, "IPV6_CHECKSUM", INT(2)},
    {AF_INET, SOCK_STREAM, IPPROTO_TCP, 10, "TCP_WINDOW_CLAMP", INT(4096)},
    {AF_INET, SOCK_STREAM, IPPROTO_TCP, 44, "TCP_RTO_MAX_MS", INT(5000)},
    {AF_INET, SOCK_STREAM, IPPROTO_TCP, 45, "TCP_RTO_MIN_US", INT(5000)},
    {AF_INET, SOCK_STREAM, IPPROTO_TCP, 46, "TCP_DELACK_MAX_US", INT(5000)},
};
enum { COUNT = sizeof options / sizeof *options };

static int get(const struct option *o, unsigned char *value, socklen_t *len)
{
    *len = LEN;
    memset(value, 0, LEN);
    return getsockopt(o->fd, o->level, o->name, value, len);
}

int main(void)
{
    socklen_t len;
    for (struct option *o = options; o < options + COUNT; o++) {
        int raw = o->type == SOCK_RAW ? IPPROTO_UDP : 0;
        o->fd = socket(o->family, o->type, raw);
        o->there = o->fd >= 0 && setsockopt(o->fd, o->level, o->name, o->value, o->len) == 0 &&
                   get(o, o->before, &len) == 0;
        if (o->there)
            o->len = len;
    }

    mist_ready();
    mist_wait();

    for (struct option *o = options; o < options + COUNT; o++) {
        unsigned char value[LEN];
        if (!o->there)
            continue;
        CALL(get(o, value, &len));
        CHECK(o->what, o->len, len);
        CHECK_MEM(o->what, o->before, value, len);
    }
    mist_pass();
}
