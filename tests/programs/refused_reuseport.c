// A program that chooses among the sockets of a port.
// mist: refused SO_ATTACH_REUSEPORT_CBPF
#include "mist.h"
#include <linux/filter.h>
#include <netinet/in.h>

static int bound(struct sockaddr_in *a)
{
    int one = 1, s = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    socklen_t len = sizeof *a;
    MUST(setsockopt(s, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one));
    MUST(bind(s, (void *)a, sizeof *a));
    MUST(getsockname(s, (void *)a, &len));
    return s;
}

int main(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int first = bound(&a), second = bound(&a);
    struct sock_filter choose[] = {{BPF_RET | BPF_K, 0, 0, 1}};
    struct sock_fprog program = {1, choose};
    MUST(setsockopt(first, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof program));
    mist_ready();
    mist_wait();
    int from = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    for (int i = 0; i < 20; i++) {
        char c;
        CHECK("sendto", 1, CALL(sendto(from, "x", 1, 0, (void *)&a, sizeof a)));
        CHECK("what the second receives", 1, CALL(recv(second, &c, 1, 0)));
    }
    mist_pass();
}
