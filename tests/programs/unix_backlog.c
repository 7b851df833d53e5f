// Unix connections that nobody has accepted yet, with and without data in them. What is in them
// nobody can read before they are accepted.
// mist: variants empty data
// mist: may-refuse accepted
#include "mist.h"
#include <sys/un.h>

int main(int argc, char **argv)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    char buf[16];
    int data = argc > 1 && !strcmp(argv[1], "data");
    int l = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), c[2];
    MUST(bind(l, (void *)&a, sizeof a));
    MUST(listen(l, 5));
    for (int i = 0; i < 2; i++) {
        c[i] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
        MUST(connect(c[i], (void *)&a, sizeof a));
        snprintf(buf, sizeof buf, "client %d", i);
        if (data)
            MUST(send(c[i], buf, 8, 0));
    }

    mist_ready();
    mist_wait();

    for (int i = 0; i < 2; i++) {
        int s = CALL(accept(l, NULL, NULL));
        snprintf(buf, sizeof buf, "client %d", i);
        if (!data)
            CALL(send(c[i], buf, 8, 0));
        char got[16];
        CHECK("receive", 8, recv(s, got, sizeof got, MSG_DONTWAIT));
        CHECK_MEM("in the order of their connects", buf, got, 8);
        CHECK("answer", 2, send(s, "hi", 2, 0));
        CHECK("receive", 2, recv(c[i], got, sizeof got, MSG_DONTWAIT));
    }
    mist_pass();
}
