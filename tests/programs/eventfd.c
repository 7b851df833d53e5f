// eventfd: counter, semaphore mode, flags; one shared by dup.
#include "mist.h"
#include <poll.h>
#include <sys/eventfd.h>

int main(void)
{
    int plain = MUST(eventfd(41, EFD_NONBLOCK));
    int sem = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC));
    int empty = MUST(eventfd(0, EFD_NONBLOCK));
    int full = MUST(eventfd(0, EFD_NONBLOCK));
    int twin = MUST(dup(plain));
    uint64_t v = UINT64_MAX - 1;
    MUST(write(full, &v, 8));
    v = 1;
    MUST(write(plain, &v, 8));

    mist_ready();
    mist_wait();

    struct pollfd p[] = {{plain, POLLIN | POLLOUT, 0}, {sem, POLLIN, 0}, {empty, POLLIN, 0}, {full, POLLIN | POLLOUT, 0}};
    CALL(poll(p, 4, 0));
    CHECK("plain is readable and writable", POLLIN | POLLOUT, p[0].revents);
    CHECK("sem is readable", POLLIN, p[1].revents);
    CHECK("empty is not readable", 0, p[2].revents);
    CHECK("full is not writable", POLLIN, p[3].revents);
    v = 0;
    CHECK("read of plain's twin", 8, read(twin, &v, 8));
    CHECK("plain's counter", 42, v);
    CHECK_ERR("plain is empty through dup", EAGAIN, read(plain, &v, 8));
    for (int i = 0; i < 3; i++) {
        CHECK("read of sem", 8, read(sem, &v, 8));
        CHECK("sem counts by one", 1, v);
    }
    CHECK_ERR("sem is used up", EAGAIN, read(sem, &v, 8));
    CHECK_ERR("empty", EAGAIN, read(empty, &v, 8));
    v = 1;
    CHECK_ERR("full", EAGAIN, write(full, &v, 8));
    CHECK("read of full", 8, read(full, &v, 8));
    CHECK("full's counter", UINT64_MAX - 1, v);
    CHECK("plain's flags", O_RDWR | O_NONBLOCK, mist_getfl(plain));
    CHECK("plain is not close-on-exec", 0, fcntl(plain, F_GETFD));
    CHECK("sem is close-on-exec", FD_CLOEXEC, fcntl(sem, F_GETFD));
    mist_pass();
}
