// Unix connections that nobody has accepted yet, with and without data in them, in the order of their connects;
// the last client may be gone.
// mist: variants empty data large seqpacket closed shut passcred
// mist: may-refuse holds data
#include "mist.h"
#include <sys/un.h>

#define CLIENTS 3
static char out[60000], in[70000];

int main(int argc, char **argv)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    const char *v = argc > 1 ? argv[1] : "";
#define IS(x) (!strcmp(v, x))
    int kind = IS("seqpacket") ? SOCK_SEQPACKET : SOCK_STREAM, on = 1;
    int l = MUST(socket(AF_UNIX, kind, 0)), c[CLIENTS];
    size_t len = IS("empty") ? 0 : IS("large") ? sizeof out : 9;
    if (IS("passcred"))
        MUST(setsockopt(l, SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 5));
    for (int i = 0; i < CLIENTS; i++) {
        c[i] = MUST(socket(AF_UNIX, kind, 0));
        MUST(connect(c[i], (void *)&a, sizeof a));
        mist_fill(out, sizeof out, i);
        // In pieces, which a stream does not show.
        if (len)
            CHECK("set-up: send", len / 3, send(c[i], out, len / 3, 0));
        if (len)
            CHECK("set-up: send", len - len / 3, send(c[i], out + len / 3, len - len / 3, 0));
    }
    if (IS("closed"))
        close(c[CLIENTS - 1]);
    if (IS("shut"))
        MUST(shutdown(c[1], SHUT_WR));

    mist_ready();
    mist_wait();

    for (int i = 0; i < CLIENTS; i++) {
        int s = CALL(accept(l, NULL, NULL)), gone = IS("closed") && i == CLIENTS - 1;
        mist_fill(out, sizeof out, i);
        if (IS("passcred")) {
            char control[64];
            struct iovec io = {in, 3};
            struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
            CHECK("receive with credentials", 3, recvmsg(s, &m, MSG_DONTWAIT));
            struct cmsghdr *h = CMSG_FIRSTHDR(&m);
            CHECK("credentials", 1, h && h->cmsg_type == SCM_CREDENTIALS);
            CHECK("user", geteuid(), ((struct ucred *)CMSG_DATA(h))->uid);
            CHECK("the rest", 6, recv(s, in, sizeof in, MSG_DONTWAIT));
            continue;
        }
        if (kind == SOCK_SEQPACKET) {
            CHECK("first message", 3, recv(s, in, sizeof in, MSG_DONTWAIT));
            CHECK_MEM("first message", out, in, 3);
            CHECK("second message", 6, recv(s, in, sizeof in, MSG_DONTWAIT));
            CHECK_MEM("second message", out + 3, in, 6);
        } else if (len) {
            CHECK("receive", len, recv(s, in, len, MSG_DONTWAIT | MSG_WAITALL));
            CHECK_MEM("in the order of their connects", out, in, len);
        }
        if (gone || (IS("shut") && i == 1))
            CHECK("end of the connection", 0, recv(s, in, sizeof in, 0));
        else
            CHECK_ERR("nothing more", EAGAIN, recv(s, in, sizeof in, MSG_DONTWAIT));
        if (gone)
            continue;
        CHECK("answer", 2, send(s, "hi", 2, 0));
        CHECK("receive", 2, recv(c[i], in, sizeof in, MSG_DONTWAIT));
        if (IS("shut") && i == 1)
            continue;
        CHECK("from the client", 5, send(c[i], "again", 5, 0));
        CHECK("from the client", 5, recv(s, in, sizeof in, MSG_DONTWAIT));
    }
    CHECK("non-blocking", 0, fcntl(l, F_SETFL, O_NONBLOCK));
    CHECK_ERR("no more connections", EAGAIN, accept(l, NULL, NULL));
    mist_pass();
}
