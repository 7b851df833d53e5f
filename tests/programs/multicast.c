// Multicast: groups joined, by interface and by source, and the interface that is sent by.
#include "mist.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>

static struct sockaddr_storage group(const char *text)
{
    struct sockaddr_storage all = {0};
    struct sockaddr_in *v4 = (void *)&all;
    struct sockaddr_in6 *v6 = (void *)&all;
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1)
        v4->sin_family = AF_INET;
    else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1)
        v6->sin6_family = AF_INET6;
    return all;
}
static int arrives(int from, int to, const struct sockaddr_in *at)
{
    char b[8];
    struct pollfd p = {to, POLLIN, 0};
    return sendto(from, "hello", 5, 0, (const void *)at, sizeof *at) == 5 && poll(&p, 1, 2000) == 1 &&
           recv(to, b, sizeof b, 0) == 5;
}
static int filter(int s, int level, const char *text, uint32_t *mode, uint32_t *sources)
{
    struct group_filter f = {.gf_interface = 1, .gf_group = group(text), .gf_numsrc = 1};
    socklen_t len = sizeof f;
    int r = getsockopt(s, level, MCAST_MSFILTER, &f, &len);
    *mode = f.gf_fmode;
    *sources = f.gf_numsrc;
    return r;
}

int main(void)
{
    int s = MUST(socket(AF_INET, SOCK_DGRAM, 0)), by = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t len = sizeof at;
    MUST(bind(s, (void *)&at, sizeof at));
    MUST(getsockname(s, (void *)&at, &len));
    struct ip_mreqn lo = {.imr_multiaddr.s_addr = inet_addr("239.1.2.3"), .imr_ifindex = 1};
    MUST(setsockopt(s, IPPROTO_IP, IP_ADD_MEMBERSHIP, &lo, sizeof lo));
    MUST(setsockopt(by, IPPROTO_IP, IP_MULTICAST_IF, &lo, sizeof lo));
    at.sin_addr = lo.imr_multiaddr;
    if (!arrives(by, s, &at))
        mist_skip("no multicast on the loopback interface");
    // From one source only; from all but one.
    struct group_source_req only = {1, group("232.1.2.3"), group("127.0.0.1")};
    MUST(setsockopt(s, IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, &only, sizeof only));
    struct group_req any = {1, group("239.4.5.6")};
    MUST(setsockopt(s, IPPROTO_IP, MCAST_JOIN_GROUP, &any, sizeof any));
    struct group_source_req but = {1, group("239.4.5.6"), group("127.0.0.9")};
    MUST(setsockopt(s, IPPROTO_IP, MCAST_BLOCK_SOURCE, &but, sizeof but));
    int s6 = socket(AF_INET6, SOCK_DGRAM, 0);
    struct ipv6_mreq lo6 = {.ipv6mr_interface = 1};
    inet_pton(AF_INET6, "ff02::1234", &lo6.ipv6mr_multiaddr);
    int v6 = setsockopt(s6, IPPROTO_IPV6, IPV6_JOIN_GROUP, &lo6, sizeof lo6) == 0;

    mist_ready();
    mist_wait();

    uint32_t mode, sources;
    CHECK("a datagram to the group arrives", 1, arrives(by, s, &at));
    CALL(filter(s, IPPROTO_IP, "239.1.2.3", &mode, &sources));
    CHECK("from everybody", MCAST_EXCLUDE, mode);
    CHECK("but nobody", 0, sources);
    CALL(filter(s, IPPROTO_IP, "232.1.2.3", &mode, &sources));
    CHECK("from one source", MCAST_INCLUDE, mode);
    CHECK("and no other", 1, sources);
    CALL(filter(s, IPPROTO_IP, "239.4.5.6", &mode, &sources));
    CHECK("from all sources", MCAST_EXCLUDE, mode);
    CHECK("but one", 1, sources);
    CALL(setsockopt(s, IPPROTO_IP, IP_DROP_MEMBERSHIP, &lo, sizeof lo));
    if (v6)
        CALL(setsockopt(s6, IPPROTO_IPV6, IPV6_LEAVE_GROUP, &lo6, sizeof lo6));
    mist_pass();
}
