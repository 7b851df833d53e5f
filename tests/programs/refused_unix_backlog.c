// A unix connection from outside that nobody has accepted yet: refused, and left as it was.
// mist: refused not accepted yet
#include "mist.h"
#include <sys/un.h>

int main(void)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    char buf[16];
    int ends[2];
    MUST(pipe(ends));
    // The client lives in a process that is nobody's child here.
    if (!MUST(fork())) {
        if (!MUST(fork())) {
            int s = socket(AF_UNIX, SOCK_STREAM, 0);
            close(ends[1]);
            CALL(read(ends[0], buf, 1));
            CALL(connect(s, (void *)&a, sizeof a));
            CALL(send(s, "outside", 7, 0));
            mist_put("connected", "");
            CHECK("the answer", 2, recv(s, buf, sizeof buf, 0));
            _exit(0);
        }
        _exit(0);
    }
    int status;
    MUST(wait(&status));
    close(ends[0]);
    int l = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 5));
    close(ends[1]);
    while (access("connected", F_OK))
        mist_sleep(1000);

    mist_ready();
    mist_wait();

    int s = CALL(accept(l, NULL, NULL));
    CHECK("receive", 7, recv(s, buf, sizeof buf, 0));
    CHECK_MEM("receive", "outside", buf, 7);
    CHECK("answer", 2, send(s, "hi", 2, 0));
    mist_pass();
}
