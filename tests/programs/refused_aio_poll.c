// A request of asynchronous I/O that waits for something that may never come: refused by name, and it goes on waiting.
// mist: refused IOCB_CMD_POLL
#include "mist.h"
#include <linux/aio_abi.h>
#include <poll.h>

int main(void)
{
    aio_context_t ctx = 0;
    if (syscall(SYS_io_setup, 4, &ctx) < 0)
        mist_skip("this kernel has no asynchronous I/O");
    int p[2];
    MUST(pipe(p));
    struct iocb io = {.aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = p[0], .aio_buf = POLLIN, .aio_data = 5}, *list = &io;
    CHECK("io_submit", 1, MUST(syscall(SYS_io_submit, ctx, 1, &list)));
    mist_ready();
    mist_wait();
    MUST(write(p[1], "x", 1));
    struct io_event e = {0};
    CHECK("io_getevents", 1, CALL(syscall(SYS_io_getevents, ctx, 1, 1, &e, NULL)));
    CHECK("what it waited for", 5, e.data);
    mist_pass();
}
