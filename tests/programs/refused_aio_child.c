// A child has the rings of its parent's asynchronous I/O mapped, and no contexts: refused by name.
// mist: refused ring of asynchronous I/O
// mist: tree
#include "mist.h"
#include <linux/aio_abi.h>

int main(void)
{
    aio_context_t ctx = 0;
    if (syscall(SYS_io_setup, 4, &ctx) < 0)
        mist_skip("this kernel has no asynchronous I/O");
    pid_t child = MUST(fork());
    if (!child) {
        mist_wait();
        struct io_event e;
        struct timespec none = {0};
        _exit(syscall(SYS_io_getevents, ctx, 0, 1, &e, &none) == -1 && errno == EINVAL ? 0 : 1);
    }
    mist_ready();
    mist_wait();
    int status;
    CHECK("its child", child, CALL(waitpid(child, &status, 0)));
    CHECK("its status", 0, status);
    mist_pass();
}
