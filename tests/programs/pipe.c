// Pipes with bytes in them: both ends inside, packet mode, sizes, flags, and end-of-file.
#include "mist.h"
#include <poll.h>
#include <sys/ioctl.h>

int main(void)
{
    int plain[2], packet[2], big[2], nowriter[2], noreader[2], full[2], shared;
    char buf[70000];
    MUST(pipe(plain));
    MUST(write(plain[1], "hello, pipe", 11));
    MUST(pipe2(packet, O_DIRECT | O_NONBLOCK));
    MUST(write(packet[1], "one", 3));
    MUST(write(packet[1], "second", 6));
    MUST(write(packet[1], "iii", 3));
    MUST(pipe2(big, O_CLOEXEC));
    MUST(fcntl(big[1], F_SETPIPE_SZ, 1 << 20));
    char *mega = malloc(1 << 20);
    mist_fill(mega, 1 << 20, 11);
    CHECK("set-up: big pipe", 1000000, write(big[1], mega, 1000000));
    MUST(pipe(nowriter));
    MUST(write(nowriter[1], "rest", 4));
    MUST(close(nowriter[1]));
    MUST(pipe(noreader));
    MUST(close(noreader[0]));
    MUST(pipe2(full, O_NONBLOCK));
    while (write(full[1], mega, 4096) > 0)
        ;
    // Half-read first page: the data do not begin at a page's start.
    MUST(read(full[0], buf, 1000));
    shared = MUST(dup(plain[1]));
    signal(SIGPIPE, SIG_IGN);

    mist_ready();
    mist_wait();

    int n = 0;
    CALL(ioctl(plain[0], FIONREAD, &n));
    CHECK("bytes in the pipe", 11, n);
    CHECK("write through the twin", 1, write(shared, "!", 1));
    CHECK("read", 12, read(plain[0], buf, sizeof buf));
    CHECK_MEM("content", "hello, pipe!", buf, 12);
    CHECK("first packet", 3, read(packet[0], buf, sizeof buf));
    CHECK("second packet", 6, read(packet[0], buf, sizeof buf));
    CHECK_MEM("second packet", "second", buf, 6);
    CHECK("third packet", 3, read(packet[0], buf, sizeof buf));
    CHECK_ERR("no more packets", EAGAIN, read(packet[0], buf, sizeof buf));
    CHECK("O_DIRECT", O_DIRECT | O_NONBLOCK | O_WRONLY, mist_getfl(packet[1]));
    CHECK("write a packet", 2, write(packet[1], "ab", 2));
    CHECK("write a packet", 2, write(packet[1], "cd", 2));
    CHECK("packets stay apart", 2, read(packet[0], buf, sizeof buf));
    CHECK("pipe size", 1 << 20, fcntl(big[0], F_GETPIPE_SZ));
    CHECK("cloexec", FD_CLOEXEC, fcntl(big[0], F_GETFD));
    CALL(ioctl(big[0], FIONREAD, &n));
    CHECK("bytes in the big pipe", 1000000, n);
    char *back = malloc(1 << 20);
    for (int at = 0; at < 1000000;)
        at += CALL(read(big[0], back + at, 1000000 - at));
    CHECK_MEM("big pipe", mega, back, 1000000);
    CHECK("rest of a pipe without writers", 4, read(nowriter[0], buf, sizeof buf));
    CHECK_MEM("rest", "rest", buf, 4);
    CHECK("end-of-file", 0, read(nowriter[0], buf, sizeof buf));
    CHECK_ERR("no readers", EPIPE, write(noreader[1], "x", 1));
    CALL(ioctl(full[0], FIONREAD, &n));
    CHECK("bytes in the full pipe", 64536, n);
    struct pollfd p = {full[1], POLLOUT, 0};
    CHECK("the full pipe is not writable", 0, poll(&p, 1, 0));
    CHECK("read of the full pipe", 64536, read(full[0], buf, sizeof buf));
    CHECK_MEM("full pipe, first", mega + 1000, buf, 3096);
    for (int i = 0; i < 15; i++)
        CHECK_MEM("full pipe", mega, buf + 3096 + i * 4096, 4096);
    // The ends still belong together: closing the writers gives an end-of-file.
    close(plain[1]);
    close(shared);
    CHECK("end-of-file after closing", 0, read(plain[0], buf, sizeof buf));
    mist_pass();
}
