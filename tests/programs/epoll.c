// epoll: data, events, edge-triggered and one-shot ones, an epoll inside an epoll, and a
// descriptor that was closed while its description lives on.
#include "mist.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

static void add(int ep, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event e = {events, {.u64 = data}};
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}
static uint64_t one(int ep)
{
    struct epoll_event e[8];
    int n = CALL(epoll_wait(ep, e, 8, 0));
    if (n > 1)
        mist_fail("epoll_wait, wanted at most one event, got %d", n);
    return n ? e[0].data.u64 : 0;
}

int main(void)
{
    int ep = MUST(epoll_create1(EPOLL_CLOEXEC)), inner = MUST(epoll_create1(0)), edge = MUST(epoll_create1(0)), dups = MUST(epoll_create1(0));
    int p[2], a = MUST(eventfd(0, EFD_NONBLOCK)), b = MUST(eventfd(0, EFD_NONBLOCK)), c = MUST(eventfd(0, EFD_NONBLOCK)), d = MUST(eventfd(0, EFD_NONBLOCK));
    uint64_t v = 1;
    MUST(pipe(p));
    add(ep, p[0], EPOLLIN | EPOLLRDHUP, 0xa1a1a1a1a1a1a1a1);
    add(inner, a, EPOLLIN, 0xb2b2b2b2b2b2b2b2);
    add(ep, inner, EPOLLIN, 0xc3c3c3c3c3c3c3c3);
    // Edge-triggered: this event was already taken, it must not come again.
    add(edge, b, EPOLLIN | EPOLLET, 0xd4);
    MUST(write(b, &v, 8));
    CHECK("set-up: the edge", 0xd4, one(edge));
    CHECK("set-up: no more edge", 0, one(edge));
    // One-shot: used up.
    int shot = MUST(epoll_create1(0));
    add(shot, c, EPOLLIN | EPOLLONESHOT, 0xe5);
    MUST(write(c, &v, 8));
    CHECK("set-up: the shot", 0xe5, one(shot));
    // Registered by a number that is now another descriptor's.
    int moved = MUST(dup(d));
    add(dups, d, EPOLLIN, 0xf6);
    close(d);
    int taken = MUST(eventfd(0, EFD_NONBLOCK));
    CHECK("set-up: the number is taken again", d, taken);
    add(dups, taken, EPOLLIN, 0x17);

    mist_ready();
    mist_wait();

    CHECK("cloexec", FD_CLOEXEC, fcntl(ep, F_GETFD));
    CHECK("nothing is ready", 0, one(ep));
    CALL(write(p[1], "x", 1));
    CHECK("the pipe", 0xa1a1a1a1a1a1a1a1, one(ep));
    char buf[8];
    CALL(read(p[0], buf, 8));
    CHECK("the pipe is empty again", 0, one(ep));
    CALL(write(a, &v, 8));
    CHECK("nested: outside", 0xc3c3c3c3c3c3c3c3, one(ep));
    CHECK("nested: inside", 0xb2b2b2b2b2b2b2b2, one(inner));
    CALL(read(a, &v, 8));
    CHECK("nested: quiet again", 0, one(ep));
    v = 1;
    CALL(write(b, &v, 8));
    CHECK("a new edge", 0xd4, one(edge));
    CHECK("and only once", 0, one(edge));
    CALL(write(c, &v, 8));
    CHECK("the shot is used up", 0, one(shot));
    struct epoll_event e = {EPOLLIN | EPOLLONESHOT, {.u64 = 0xe6}};
    CALL(epoll_ctl(shot, EPOLL_CTL_MOD, c, &e));
    CHECK("loaded again", 0xe6, one(shot));
    CALL(write(moved, &v, 8));
    CHECK("a description whose number is another's", 0xf6, one(dups));
    CALL(read(moved, &v, 8));
    v = 1;
    CALL(write(taken, &v, 8));
    CHECK("the number's new owner", 0x17, one(dups));
    CHECK_ERR("it is still registered", EEXIST, epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &e));
    CHECK_ERR("and no other", ENOENT, epoll_ctl(ep, EPOLL_CTL_DEL, p[1], &e));
    mist_pass();
}
