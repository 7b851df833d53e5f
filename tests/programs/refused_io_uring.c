// io_uring in use: refused, by name, and nobody is harmed.
// mist: refused io_uring
#include "mist.h"

int main(void)
{
    struct { uint32_t v[30]; } params = {{0}};
    int fd = syscall(425 /* io_uring_setup */, 4, &params);
    if (fd < 0)
        mist_skip("io_uring is not available here");
    mist_ready();
    mist_wait();
    CHECK("it is still there", 0, CALL(fcntl(fd, F_GETFD)) & ~FD_CLOEXEC);
    mist_pass();
}
