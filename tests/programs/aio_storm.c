// Requests of asynchronous I/O are under way at every moment; none is lost, and none comes twice.
// mist: dumps 10
#include "mist.h"
#include <linux/aio_abi.h>

#define DEPTH 8
#define SIZE 65536

int main(void)
{
    aio_context_t ctx = 0;
    if (syscall(SYS_io_setup, DEPTH, &ctx) < 0)
        mist_skip("this kernel has no asynchronous I/O");
    // Past the page cache a write is under way for a while, where the file system can do that.
    int file = open("file", O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (file < 0)
        file = MUST(open("file", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    char *buffer = MUST(mmap(NULL, DEPTH * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memset(buffer, 0x5a, DEPTH * SIZE);
    struct iocb io[DEPTH];
    long under_way[DEPTH] = {0}, count = 0;
    for (int turn = 0; turn < DEPTH || !mist_gone_on(); turn++) {
        for (int i = 0; i < DEPTH; i++) {
            if (under_way[i])
                continue;
            under_way[i] = ++count;
            memset(&io[i], 0, sizeof io[i]);
            io[i].aio_fildes = file;
            io[i].aio_data = count << 8 | i;
            if (count % 4) {
                io[i].aio_lio_opcode = IOCB_CMD_PWRITE;
                io[i].aio_buf = (uintptr_t)buffer + i * SIZE;
                io[i].aio_nbytes = SIZE;
                io[i].aio_offset = i * SIZE;
            } else {
                io[i].aio_lio_opcode = IOCB_CMD_FDSYNC;
            }
            struct iocb *list = &io[i];
            CHECK("io_submit", 1, CALL(syscall(SYS_io_submit, ctx, 1, &list)));
        }
        if (turn == DEPTH)
            mist_ready();
        struct io_event e[DEPTH];
        int n = CALL(syscall(SYS_io_getevents, ctx, 1, DEPTH, e, NULL));
        for (int k = 0; k < n; k++) {
            int i = e[k].data & 0xff;
            CHECK("the request that is over", under_way[i], e[k].data >> 8);
            CHECK("its result", under_way[i] % 4 ? SIZE : 0, e[k].res);
            under_way[i] = 0;
        }
    }
    mist_pass();
}
