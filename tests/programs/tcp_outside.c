// A TCP connection to a peer that knows of nothing: it sends back each byte plus one.
// mist: tcp-established
#include "mist.h"
#include <netinet/in.h>

static char out[100000], in[100000];
static void round_trip(int s, size_t len, int seed)
{
    mist_fill(out, len, seed);
    for (size_t at = 0; at < len;)
        at += CALL(send(s, out + at, len - at, 0));
    for (size_t at = 0; at < len;) {
        ssize_t r = CALL(recv(s, in + at, len - at, 0));
        if (!r)
            mist_fail("the connection, wanted %zu bytes, got an end-of-file after %zu", len, at);
        at += r;
    }
    for (size_t i = 0; i < len; i++)
        CHECK("a byte that came back", (unsigned char)(out[i] + 1), (unsigned char)in[i]);
}

int main(void)
{
    if (!getenv("MIST_PEER"))
        mist_fail("set-up: no MIST_PEER");
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(getenv("MIST_PEER"))), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int s = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(s, (void *)&a, sizeof a));
    round_trip(s, 50000, 1);
    // An answer that nobody has read yet.
    MUST(send(s, "unread", 6, 0));
    while (recv(s, in, 6, MSG_PEEK | MSG_DONTWAIT) != 6)
        mist_turn();

    mist_ready();
    mist_wait();

    CHECK("the unread answer", 6, recv(s, in, 6, MSG_WAITALL));
    CHECK_MEM("the unread answer", "vosfbe", in, 6);
    for (int i = 0; i < 10; i++)
        round_trip(s, 100000, i);
    CALL(shutdown(s, SHUT_WR));
    CHECK("end-of-file", 0, recv(s, in, 1, 0));
    mist_pass();
}
