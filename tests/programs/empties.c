// Messages without bytes that the program has peeked at, as an earlier dump would have: who walks a queue does not see them.
// Their senders are named, and the first has a descriptor with it.
// mist: copied
#include "mist.h"

static const char *const texts[] = {"", "one", "", "", "two", ""};
enum { COUNT = sizeof texts / sizeof *texts };

static void pass(int s, const char *text, int fd)
{
    char room[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec v = {(void *)text, strlen(text)};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = room;
        m.msg_controllen = sizeof room;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    MUST(sendmsg(s, &m, 0));
}

int main(void)
{
    static const int kinds[] = {SOCK_SEQPACKET, SOCK_DGRAM};
    int s[2][2], on = 1, off = -1;
    char buf[16];
    int f = MUST(open("file", O_RDWR | O_CREAT, 0600));
    for (int k = 0; k < 2; k++) {
        MUST(socketpair(AF_UNIX, kinds[k] | SOCK_NONBLOCK, 0, s[k]));
        MUST(setsockopt(s[k][0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
        for (int i = 0; i < COUNT; i++)
            pass(s[k][1], texts[i], i ? -1 : f);
        int at = 0;
        MUST(setsockopt(s[k][0], SOL_SOCKET, SO_PEEK_OFF, &at, sizeof at));
        for (int i = 0; i < COUNT; i++)
            MUST(recv(s[k][0], buf, sizeof buf, MSG_PEEK));
        CHECK_ERR("set-up: all are peeked at", EAGAIN, recv(s[k][0], buf, sizeof buf, MSG_PEEK));
        MUST(setsockopt(s[k][0], SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off));
    }
    MUST(lseek(f, 3, SEEK_SET));

    mist_ready();
    mist_wait();

    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < COUNT; i++) {
            char control[256];
            struct iovec v = {buf, sizeof buf};
            struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
            CHECK("a message", strlen(texts[i]), CALL(recvmsg(s[k][0], &m, 0)));
            CHECK_MEM("a message", texts[i], buf, strlen(texts[i]));
            int sender = 0, fd = -1;
            for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
                if (c->cmsg_type == SCM_RIGHTS)
                    memcpy(&fd, CMSG_DATA(c), sizeof fd);
                else if (c->cmsg_type == SCM_CREDENTIALS)
                    sender = ((struct ucred *)CMSG_DATA(c))->pid;
            CHECK("its sender", getpid(), sender);
            CHECK("a descriptor with it", i == 0, fd >= 0);
            if (fd >= 0)
                CHECK("its position", 3, lseek(fd, 0, SEEK_CUR));
        }
        CHECK_ERR("no more", EAGAIN, recv(s[k][0], buf, sizeof buf, 0));
    }
    mist_pass();
}
