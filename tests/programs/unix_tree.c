// A unix connection between parent and child, with data on its way, and a listener that both
// have.
// mist: tree
#include "mist.h"
#include <sys/un.h>

int main(void)
{
    struct sockaddr_un a = {AF_UNIX, "server"};
    char buf[64];
    int l = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), ready[2];
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 5));
    MUST(pipe(ready));
    pid_t child = MUST(fork());
    if (!child) {
        int s = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
        MUST(connect(s, (void *)&a, sizeof a));
        MUST(send(s, "from the child", 14, 0));
        MUST(write(ready[1], "r", 1));
        mist_wait();
        CHECK("the child receives", 15, recv(s, buf, 15, MSG_WAITALL));
        CHECK_MEM("the child receives", "from the parent", buf, 15);
        CHECK("the child answers", 3, send(s, "bye", 3, 0));
        _exit(0);
    }
    int s = MUST(accept(l, NULL, NULL));
    MUST(read(ready[0], buf, 1));
    MUST(send(s, "from the parent", 15, 0));

    mist_ready();
    mist_wait();

    CHECK("the parent receives", 14, recv(s, buf, 14, MSG_WAITALL));
    CHECK_MEM("the parent receives", "from the child", buf, 14);
    CHECK("the answer", 3, recv(s, buf, 3, MSG_WAITALL));
    CHECK("end-of-file when the child is gone", 0, recv(s, buf, 3, 0));
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 0, status);
    mist_pass();
}
