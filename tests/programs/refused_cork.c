// A datagram that was begun and not sent yet.
// mist: refused waits for the rest
#include "mist.h"
#include <netinet/in.h>

int main(void)
{
    int to = MUST(socket(AF_INET, SOCK_DGRAM, 0)), from = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    MUST(bind(to, (void *)&a, sizeof a));
    MUST(getsockname(to, (void *)&a, &len));
    MUST(connect(from, (void *)&a, len));
    MUST(send(from, "first", 5, MSG_MORE));
    mist_ready();
    mist_wait();
    char b[32] = {0};
    CALL(send(from, " second", 7, 0));
    CALL(recv(to, b, sizeof b, 0));
    CHECK_STR("one datagram", "first second", b);
    mist_pass();
}
