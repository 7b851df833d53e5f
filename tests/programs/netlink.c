// Netlink sockets: bound, in a group, and used before and after; those that daemons keep for audit, and for devices.
#include "mist.h"
#include <linux/netlink.h>
#include <linux/rtnetlink.h>

static int links(int s, int seq)
{
    struct { struct nlmsghdr h; struct rtgenmsg g; } q = {{.nlmsg_len = NLMSG_LENGTH(sizeof(struct rtgenmsg)), .nlmsg_type = RTM_GETLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP, .nlmsg_seq = seq}, {AF_UNSPEC}};
    static char buf[65536];
    int n = 0;
    CALL(send(s, &q, q.h.nlmsg_len, 0));
    for (;;) {
        ssize_t len = CALL(recv(s, buf, sizeof buf, 0));
        for (struct nlmsghdr *h = (void *)buf; NLMSG_OK(h, len); h = NLMSG_NEXT(h, len)) {
            if (h->nlmsg_type == NLMSG_DONE)
                return n;
            CHECK("type of an answer", RTM_NEWLINK, h->nlmsg_type);
            CHECK("sequence of an answer", seq, h->nlmsg_seq);
            n++;
        }
    }
}

int main(void)
{
    int s = MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
    struct sockaddr_nl a = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK}, got;
    MUST(bind(s, (void *)&a, sizeof a));
    socklen_t n = sizeof got;
    MUST(getsockname(s, (void *)&a, &n));
    int before = links(s, 1);
    int unbound = MUST(socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK, NETLINK_ROUTE));
    int audit = socket(AF_NETLINK, SOCK_RAW, NETLINK_AUDIT); // not in every kernel
    int events = MUST(socket(AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT));
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK, .nl_groups = 1};
    MUST(bind(events, (void *)&kernel, sizeof kernel));

    mist_ready();
    mist_wait();

    n = sizeof got;
    CALL(getsockname(s, (void *)&got, &n));
    CHECK("port id", a.nl_pid, got.nl_pid);
    CHECK("groups", RTMGRP_LINK, got.nl_groups);
    CHECK("links", before, links(s, 2));
    CHECK("cloexec", FD_CLOEXEC, fcntl(s, F_GETFD));
    fcntl(unbound, F_SETFL, 0);
    CHECK("links by the unbound one", before, links(unbound, 3));
    n = sizeof got;
    CALL(getsockname(events, (void *)&got, &n));
    CHECK("groups of the one for devices", 1, got.nl_groups);
    int protocol = 0;
    n = sizeof protocol;
    if (audit >= 0) {
        CALL(getsockopt(audit, SOL_SOCKET, SO_PROTOCOL, &protocol, &n));
        CHECK("the one for audit", NETLINK_AUDIT, protocol);
    }
    mist_pass();
}
