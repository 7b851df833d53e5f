// TCP connections that wait to be accepted, both ends here.
// What is in them nobody can read before they are accepted.
// mist: may-refuse not accepted yet
#include "mist.h"
#include <netinet/in.h>

int main(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t n = sizeof a;
    char buf[16];
    int l = MUST(socket(AF_INET, SOCK_STREAM, 0)), c[3];
    MUST(bind(l, (void *)&a, n));
    MUST(listen(l, 5));
    MUST(getsockname(l, (void *)&a, &n));
    for (int i = 0; i < 3; i++) {
        c[i] = MUST(socket(AF_INET, SOCK_STREAM, 0));
        MUST(connect(c[i], (void *)&a, n));
        snprintf(buf, sizeof buf, "client %d", i);
        MUST(send(c[i], buf, 8, 0));
    }

    mist_ready();
    mist_wait();

    for (int i = 0; i < 3; i++) {
        int s = CALL(accept(l, NULL, NULL));
        CHECK("receive", 8, recv(s, buf, sizeof buf, MSG_WAITALL | MSG_DONTWAIT));
        int who = buf[7] - '0';
        CHECK("who it is", 1, who >= 0 && who < 3);
        CHECK("send", 2, send(s, "hi", 2, 0));
        CHECK("receive", 2, recv(c[who], buf, 2, MSG_WAITALL));
    }
    mist_pass();
}
