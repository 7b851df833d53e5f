// Pairs of unix sockets with data queued both ways: stream, dgram, seqpacket; options, shutdown,
// a pair whose other end is closed, and descriptors in flight.
#include "mist.h"
#include <poll.h>
#include <sys/eventfd.h>

static void pass_fd(int s, int fd, const char *text)
{
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec v = {(void *)text, strlen(text)};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    MUST(sendmsg(s, &m, 0));
}

int main(void)
{
    char buf[300000], big[200000];
    int st[2], dg[2], sp[2], half[2], orphan[2], fly[2], v, on = 1;
    socklen_t n;
    mist_fill(big, sizeof big, 91);
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, st));
    MUST(send(st[0], "to one", 6, 0));
    v = 400000;
    MUST(setsockopt(st[1], SOL_SOCKET, SO_SNDBUF, &v, sizeof v));
    CHECK("set-up", sizeof big / 2, send(st[1], big, sizeof big / 2, 0));
    MUST(recv(st[0], buf, 1000, 0)); // not from the start of a buffer
    MUST(setsockopt(st[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, dg));
    MUST(send(dg[0], "first", 5, 0));
    MUST(send(dg[0], "", 0, 0));
    MUST(send(dg[0], "third one", 9, 0));
    MUST(send(dg[1], "back", 4, 0));
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sp));
    MUST(send(sp[1], "ab", 2, 0));
    MUST(send(sp[1], "cdef", 4, 0));
    struct timeval tv = {3, 250000};
    MUST(setsockopt(sp[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv));
    n = sizeof tv; // the kernel rounds it to its ticks
    MUST(getsockopt(sp[0], SOL_SOCKET, SO_RCVTIMEO, &tv, &n));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, half));
    MUST(send(half[0], "last words", 10, 0));
    MUST(shutdown(half[0], SHUT_WR));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, orphan));
    MUST(send(orphan[1], "will", 4, 0));
    close(orphan[1]);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fly));
    int e = MUST(eventfd(5, 0)), f = MUST(open("file", O_RDWR | O_CREAT, 0600));
    MUST(write(f, "abcdef", 6));
    MUST(lseek(f, 2, SEEK_SET));
    pass_fd(fly[0], e, "an eventfd");
    pass_fd(fly[0], f, "a file");
    close(e); // now only on its way
    signal(SIGPIPE, SIG_IGN);

    mist_ready();
    mist_wait();

    CHECK("stream", 6, recv(st[1], buf, sizeof buf, 0));
    CHECK_MEM("stream", "to one", buf, 6);
    size_t got = 0;
    for (ssize_t r; got < sizeof big && (r = recv(st[0], buf + got, sizeof buf - got, 0)) > 0;)
        got += r;
    CHECK("bytes of the stream's other direction", sizeof big / 2 - 1000, got);
    CHECK_MEM("the stream's other direction", big + 1000, buf, got);
    CHECK_ERR("no more", EAGAIN, recv(st[0], buf, 1, 0));
    CHECK("stream goes on", 3, send(st[0], "abc", 3, 0));
    CHECK("stream goes on", 3, recv(st[1], buf, sizeof buf, 0));
    n = sizeof v;
    CALL(getsockopt(st[0], SOL_SOCKET, SO_PASSCRED, &v, &n));
    CHECK("SO_PASSCRED", 1, v);
    CALL(getsockopt(st[1], SOL_SOCKET, SO_SNDBUF, &v, &n));
    CHECK("SO_SNDBUF", 1, v >= 400000);
    CHECK("non-blocking", O_RDWR | O_NONBLOCK, mist_getfl(st[0]));

    CHECK("first datagram", 5, recv(dg[1], buf, sizeof buf, 0));
    CHECK_MEM("first datagram", "first", buf, 5);
    CHECK("an empty datagram", 0, recv(dg[1], buf, sizeof buf, 0));
    CHECK("third datagram", 9, recv(dg[1], buf, sizeof buf, 0));
    CHECK("the datagram back", 4, recv(dg[0], buf, sizeof buf, 0));
    CHECK("dgram goes on", 2, send(dg[1], "xy", 2, 0));
    CHECK("dgram goes on", 2, recv(dg[0], buf, sizeof buf, 0));
    CHECK("cloexec", FD_CLOEXEC, fcntl(dg[0], F_GETFD));

    CHECK("first packet", 2, recv(sp[0], buf, sizeof buf, 0));
    CHECK("second packet", 4, recv(sp[0], buf, sizeof buf, 0));
    CHECK_MEM("second packet", "cdef", buf, 4);
    struct timeval gottv;
    n = sizeof gottv;
    CALL(getsockopt(sp[0], SOL_SOCKET, SO_RCVTIMEO, &gottv, &n));
    CHECK("SO_RCVTIMEO", tv.tv_sec * 1000000 + tv.tv_usec, gottv.tv_sec * 1000000 + gottv.tv_usec);
    n = sizeof v;
    CALL(getsockopt(sp[0], SOL_SOCKET, SO_TYPE, &v, &n));
    CHECK("SO_TYPE", SOCK_SEQPACKET, v);

    CHECK("before the shutdown", 10, recv(half[1], buf, sizeof buf, 0));
    CHECK("end-of-file after it", 0, recv(half[1], buf, sizeof buf, 0));
    CHECK_ERR("no sending after it", EPIPE, send(half[0], "x", 1, 0));
    CHECK("the other direction is open", 2, send(half[1], "ok", 2, 0));
    CHECK("the other direction is open", 2, recv(half[0], buf, sizeof buf, 0));
    CHECK("from an end that was closed", 4, recv(orphan[0], buf, sizeof buf, 0));
    CHECK("its end-of-file", 0, recv(orphan[0], buf, sizeof buf, 0));
    CHECK_ERR("sending to it", EPIPE, send(orphan[0], "x", 1, 0));

    for (int i = 0; i < 2; i++) {
        char room[CMSG_SPACE(sizeof(int))];
        struct iovec io = {buf, sizeof buf};
        struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
        ssize_t r = CALL(recvmsg(fly[1], &m, 0));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        CHECK("a descriptor in flight", 1, c && c->cmsg_type == SCM_RIGHTS);
        int fd;
        memcpy(&fd, CMSG_DATA(c), sizeof fd);
        CHECK("the text with it", i ? 6 : 10, r);
        if (i == 0) {
            uint64_t count;
            CHECK("the eventfd in flight", 8, read(fd, &count, 8));
            CHECK("its counter", 5, count);
        } else {
            CHECK("the file's position", 2, lseek(fd, 0, SEEK_CUR));
            CALL(lseek(fd, 4, SEEK_SET));
            CHECK("it is the same description", 4, lseek(f, 0, SEEK_CUR));
        }
    }
    mist_pass();
}
