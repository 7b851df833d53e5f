// An edge-triggered event that nobody has taken yet is still there afterwards, and one that was
// taken does not come again (a spurious one would be legal; a lost one never).
#include "mist.h"
#include <sys/epoll.h>

int main(void)
{
    int ep = MUST(epoll_create1(0)), fresh[2], taken[2];
    struct epoll_event e = {EPOLLIN | EPOLLET, {.u64 = 1}}, got;
    MUST(pipe(fresh));
    MUST(pipe(taken));
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, taken[0], &e));
    MUST(write(taken[1], "abc", 3));
    CHECK("set-up", 1, epoll_wait(ep, &got, 1, 0));
    e.data.u64 = 2;
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fresh[0], &e));
    MUST(write(fresh[1], "x", 1));

    mist_ready();
    mist_wait();

    int seen[3] = {0};
    while (epoll_wait(ep, &got, 1, 0) > 0)
        seen[got.data.u64]++;
    CHECK("the edge that nobody took", 1, seen[2]);
    CALL(write(taken[1], "d", 1));
    CHECK("a new edge", 1, epoll_wait(ep, &got, 1, 0));
    CHECK("its data", 1, got.data.u64);
    mist_pass();
}
