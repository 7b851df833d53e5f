// FIFOs with a name: bytes inside, opened for both, for reading and for writing.
#include "mist.h"
#include <sys/ioctl.h>

int main(void)
{
    MUST(mkfifo("fifo", 0600));
    int both = MUST(open("fifo", O_RDWR | O_NONBLOCK));
    int rd = MUST(open("fifo", O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    int wr = MUST(open("fifo", O_WRONLY));
    close(both);
    MUST(write(wr, "in the fifo", 11));
    MUST(mkfifo("gone", 0600));
    int g = MUST(open("gone", O_RDWR));
    MUST(write(g, "deleted", 7));
    MUST(unlink("gone"));

    mist_ready();
    mist_wait();

    char buf[64];
    int n;
    CALL(ioctl(rd, FIONREAD, &n));
    CHECK("bytes", 11, n);
    CHECK("write", 4, write(wr, "more", 4));
    CHECK("read", 15, read(rd, buf, sizeof buf));
    CHECK_MEM("content", "in the fifomore", buf, 15);
    CHECK_ERR("empty", EAGAIN, read(rd, buf, sizeof buf));
    CHECK("flags", O_RDONLY | O_NONBLOCK, mist_getfl(rd));
    CHECK("cloexec", FD_CLOEXEC, fcntl(rd, F_GETFD));
    // It is still the one with the name.
    int third = CALL(open("fifo", O_WRONLY | O_NONBLOCK));
    CHECK("write by name", 2, write(third, "ok", 2));
    CHECK("read", 2, read(rd, buf, sizeof buf));
    close(wr);
    close(third);
    CHECK("end-of-file", 0, read(rd, buf, sizeof buf));
    CHECK("a deleted fifo", 7, read(g, buf, sizeof buf));
    CHECK_MEM("a deleted fifo", "deleted", buf, 7);
    mist_pass();
}
