// Descriptions that parent and child share by fork: a file's position, a pipe, an eventfd, and
// an epoll made before the fork.
// mist: tree
#include "mist.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

int main(void)
{
    int f = MUST(open("file", O_RDWR | O_CREAT, 0600)), own, p[2], e = MUST(eventfd(0, 0)), ep = MUST(epoll_create1(0)), turn[2];
    MUST(write(f, "0123456789", 10));
    MUST(lseek(f, 2, SEEK_SET));
    MUST(pipe(p));
    MUST(pipe(turn));
    struct epoll_event ev = {EPOLLIN, {.u64 = 5}};
    MUST(epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &ev));
    char x;
    pid_t child = MUST(fork());
    own = MUST(open("file", O_RDONLY)); // one each
    if (!child) {
        close(p[0]);
        MUST(lseek(own, 9, SEEK_SET));
        MUST(write(turn[1], "r", 1));
        mist_wait();
        CALL(read(turn[0], &x, 1));
        CHECK("the child sees the parent's seek", 6, lseek(f, 0, SEEK_CUR));
        CHECK("the child's own", 9, lseek(own, 0, SEEK_CUR));
        CALL(write(p[1], "x", 1));
        uint64_t v;
        CALL(read(e, &v, 8));
        CHECK("the eventfd", 3, v);
        _exit(0);
    }
    MUST(lseek(own, 1, SEEK_SET));
    MUST(read(turn[0], &x, 1));

    mist_ready();
    mist_wait();

    CHECK("position", 2, lseek(f, 0, SEEK_CUR));
    CHECK("the parent's own", 1, lseek(own, 0, SEEK_CUR));
    CALL(lseek(f, 6, SEEK_SET));
    CALL(write(turn[1], "g", 1));
    CHECK("the pipe in the epoll", 1, epoll_wait(ep, &ev, 1, 10000));
    CHECK("its data", 5, ev.data.u64);
    uint64_t v = 3;
    CALL(write(e, &v, 8));
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 0, status);
    close(p[1]);
    CALL(read(p[0], &x, 1));
    CHECK("end-of-file once the child's end is gone", 0, read(p[0], &x, 1));
    mist_pass();
}
