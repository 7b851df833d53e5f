// A message that nobody has read yet names its sender (SO_PASSCRED), who lives on under another user.
// mist: tree
#include "mist.h"

int main(void)
{
    int one = 1, d[2], quiet[2];
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, d));
    MUST(setsockopt(d[0], SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
    MUST(pipe(quiet));
    pid_t child = MUST(fork());
    if (child == 0) {
        MUST(setresgid(4000, 4001, 4002));
        MUST(setresuid(3000, 3001, 3002));
        MUST(send(d[1], "hello", 5, 0));
        MUST(write(quiet[1], "x", 1));
        mist_wait();
        _exit(9);
    }
    char byte;
    MUST(read(quiet[0], &byte, 1));

    mist_ready();
    mist_wait();

    char text[8], control[256];
    struct iovec v = {text, sizeof text};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    CHECK("the message", 5, CALL(recvmsg(d[0], &m, 0)));
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    CHECK("its credentials", 1, c && c->cmsg_type == SCM_CREDENTIALS);
    struct ucred *from = (void *)CMSG_DATA(c);
    CHECK("its sender", child, from->pid);
    CHECK("its sender's user", 3000, from->uid);
    CHECK("its sender's group", 4000, from->gid);
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 9 << 8, status);
    mist_pass();
}
