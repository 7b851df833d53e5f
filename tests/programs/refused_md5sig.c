// Keys of signed segments: of a socket that listens, and of one that nothing was done with yet.
// mist: refused TCP_MD5SIG
// mist: variants listening unused
#include "mist.h"
#include <netinet/in.h>
#include <netinet/tcp.h>

int main(int argc, char **argv)
{
    int s = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct tcp_md5sig sig = {.tcpm_keylen = 6, .tcpm_key = "secret"};
    memcpy(&sig.tcpm_addr, &a, sizeof a);
    if (setsockopt(s, IPPROTO_TCP, TCP_MD5SIG, &sig, sizeof sig) < 0)
        mist_skip("this kernel does not sign segments");
    int listens = argc > 1 && !strcmp(argv[1], "listening");
    if (listens)
        MUST(listen(s, 1));
    mist_ready();
    mist_wait();
    if (!listens)
        CALL(listen(s, 1));
    socklen_t len = sizeof a;
    CALL(getsockname(s, (void *)&a, &len));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int c = CALL(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    // Nobody answers who does not sign.
    CHECK_ERR("connect", EINPROGRESS, connect(c, (void *)&a, len));
    close(c);
    c = CALL(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CALL(setsockopt(c, IPPROTO_TCP, TCP_MD5SIG, &sig, sizeof sig));
    CALL(connect(c, (void *)&a, len));
    mist_pass();
}
