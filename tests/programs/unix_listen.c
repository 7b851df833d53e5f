// Listening unix sockets, with a path and abstract, that accept afterwards; accepted
// connections; bound datagram sockets.
#include "mist.h"
#include <stddef.h>
#include <sys/un.h>

static socklen_t name(struct sockaddr_un *a, const char *text, int abstract)
{
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    memcpy(a->sun_path + abstract, text, strlen(text));
    return offsetof(struct sockaddr_un, sun_path) + abstract + strlen(text) + !abstract;
}
static int listening(int type, const char *text, int abstract, int backlog)
{
    struct sockaddr_un a;
    socklen_t n = name(&a, text, abstract);
    int s = MUST(socket(AF_UNIX, type, 0));
    MUST(bind(s, (void *)&a, n));
    if (backlog)
        MUST(listen(s, backlog));
    return s;
}
static int client(int type, const char *text, int abstract)
{
    struct sockaddr_un a;
    socklen_t n = name(&a, text, abstract);
    int s = CALL(socket(AF_UNIX, type, 0));
    CALL(connect(s, (void *)&a, n));
    return s;
}
static void talk(int a, int b)
{
    char buf[16];
    CHECK("send", 5, send(a, "hello", 5, 0));
    CHECK("receive", 5, recv(b, buf, sizeof buf, 0));
    CHECK("send back", 3, send(b, "yes", 3, 0));
    CHECK("receive back", 3, recv(a, buf, sizeof buf, 0));
}

int main(void)
{
    char buf[64];
    int path = listening(SOCK_STREAM, "path", 0, 7), abst = listening(SOCK_STREAM, "mist-abstract", 1, 8);
    int seq = listening(SOCK_SEQPACKET, "seq", 0, 1), dg = listening(SOCK_DGRAM, "dg", 0, 0), from = listening(SOCK_DGRAM, "from", 0, 0);
    MUST(chmod("path", 0640));
    int gone = listening(SOCK_STREAM, "gone", 0, 3);
    MUST(unlink("gone"));
    // One that was accepted, both ends here, with the listener's name.
    int c = client(SOCK_STREAM, "mist-abstract", 1), a = MUST(accept(abst, NULL, NULL));
    MUST(send(c, "queued", 6, 0));
    struct sockaddr_un to;
    socklen_t n = name(&to, "dg", 0);
    MUST(sendto(from, "from a name", 11, 0, (void *)&to, n));
    // A bound socket, neither listening nor connected, and one connected to it.
    int cdg = client(SOCK_DGRAM, "dg", 0);
    MUST(chdir("/"));

    mist_ready();
    mist_wait();

    CALL(chdir(mist_dir));
    struct stat st;
    CALL(stat("path", &st));
    CHECK("mode of the path", 0640, st.st_mode & 07777);
    int late = client(SOCK_STREAM, "path", 0);
    talk(late, CALL(accept(path, NULL, NULL)));
    CHECK("queued in an accepted one", 6, recv(a, buf, sizeof buf, 0));
    talk(a, c);
    int later = client(SOCK_STREAM, "mist-abstract", 1);
    talk(later, CALL(accept(abst, NULL, NULL)));
    struct sockaddr_un peer;
    socklen_t pn = sizeof peer;
    CALL(getpeername(c, (void *)&peer, &pn));
    CHECK("the peer's name", offsetof(struct sockaddr_un, sun_path) + 14, pn);
    CHECK_MEM("the peer's name", "\0mist-abstract", peer.sun_path, 14);
    int q = client(SOCK_SEQPACKET, "seq", 0);
    talk(q, CALL(accept(seq, NULL, NULL)));
    pn = sizeof peer;
    CHECK("a datagram", 11, recvfrom(dg, buf, sizeof buf, 0, (void *)&peer, &pn));
    CHECK_STR("its sender", "from", peer.sun_path);
    CHECK("send by connection", 3, send(cdg, "abc", 3, 0));
    CHECK("receive", 3, recv(dg, buf, sizeof buf, 0));
    n = name(&to, "from", 0);
    CHECK("send by name", 2, sendto(dg, "re", 2, 0, (void *)&to, n));
    CHECK("receive by name", 2, recv(from, buf, sizeof buf, 0));
    int v;
    n = sizeof v;
    CALL(getsockopt(gone, SOL_SOCKET, SO_ACCEPTCONN, &v, &n));
    CHECK("one whose path is gone listens on", 1, v);
    CHECK_ERR("its path is gone", ENOENT, access("gone", F_OK));
    mist_pass();
}
