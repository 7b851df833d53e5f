// A TCP connection to a peer outside, without --tcp-established: refused, with the option's name.
// mist: refused --tcp-established
// mist: peer
#include "mist.h"
#include <netinet/in.h>

int main(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(getenv("MIST_PEER"))), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int s = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(s, (void *)&a, sizeof a));
    mist_ready();
    mist_wait();
    char c = 'a';
    CHECK("send", 1, send(s, &c, 1, 0));
    CHECK("receive", 1, recv(s, &c, 1, 0));
    CHECK("the answer", 'b', c);
    mist_pass();
}
