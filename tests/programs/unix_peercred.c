// SO_PEERCRED names the process that made a pair, or connected, or listened.
// mist: tree
#include "mist.h"
#include <sys/un.h>
#include <grp.h>

static struct ucred get(int s)
{
    struct ucred cr;
    socklen_t n = sizeof cr;
    CALL(getsockopt(s, SOL_SOCKET, SO_PEERCRED, &cr, &n));
    return cr;
}

static void check(const char *what, struct ucred wanted, int s)
{
    struct ucred cr = get(s);
    CHECK(what, wanted.pid, cr.pid);
    CHECK(what, wanted.uid, cr.uid);
    CHECK(what, wanted.gid, cr.gid);
}

static void check_groups(const char *what, int s)
{
    gid_t g[8];
    socklen_t n = sizeof g;
    CALL(getsockopt(s, SOL_SOCKET, SO_PEERGROUPS, g, &n));
    CHECK(what, 2 * sizeof *g, n);
    CHECK(what, 11, g[0]);
    CHECK(what, 12, g[1]);
}

int main(void)
{
    struct sockaddr_un path = {AF_UNIX, "listener"}, gone = {AF_UNIX, "gone"};
    struct sockaddr_un abstract = {AF_UNIX, "\0mist peercred"};
    int p[2], d[2], quiet[2];
    int l = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), la = MUST(socket(AF_UNIX, SOCK_SEQPACKET, 0));
    int lg = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), w = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    int mine = MUST(socket(AF_UNIX, SOCK_STREAM, 0)), hers = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, p));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, d));
    MUST(bind(l, (void *)&path, sizeof path));
    MUST(chmod("listener", 0777));
    MUST(listen(l, 5));
    MUST(bind(la, (void *)&abstract, sizeof abstract));
    MUST(listen(la, 5));
    MUST(bind(lg, (void *)&gone, sizeof gone));
    MUST(listen(lg, 5));
    MUST(connect(mine, (void *)&path, sizeof path));
    int served = MUST(accept(l, NULL, NULL));

    // A child under another user connects, too.
    MUST(pipe(quiet));
    MUST(chmod("gone", 0777));
    pid_t child = MUST(fork());
    if (child == 0) {
        gid_t groups[] = {11, 12};
        MUST(setgroups(2, groups));
        MUST(setresgid(4000, 4001, 4002));
        MUST(setresuid(3000, 3001, 3002));
        int a = MUST(socket(AF_UNIX, SOCK_SEQPACKET, 0));
        MUST(connect(hers, (void *)&path, sizeof path));
        MUST(connect(a, (void *)&abstract, sizeof abstract));
        MUST(connect(w, (void *)&gone, sizeof gone));
        MUST(write(quiet[1], "x", 1));
        mist_wait();
        // Its parent asks the sockets while this lives, and after.
        mist_sleep(1000);
        _exit(9);
    }
    char byte;
    MUST(read(quiet[0], &byte, 1));
    int of_hers = MUST(accept(l, NULL, NULL)), of_a = MUST(accept(la, NULL, NULL));
    int of_w = MUST(accept(lg, NULL, NULL));
    close(lg);
    unlink("gone");
    struct ucred own = {getpid(), geteuid(), getegid()}, child_s = {child, 3001, 4001};
    mist_ready();
    mist_wait();

    check("the peer of one of a pair", own, p[0]);
    check("the peer of the other", own, p[1]);
    check("the peer of a datagram socket", own, d[0]);
    check("a listener", own, l);
    check("a listener without a path", own, la);
    check("the peer of a client", own, mine);
    check("the peer of a server", own, served);
    check("the peer of the child", own, hers);
    check("the child as a peer", child_s, of_hers);
    check_groups("the child's groups", of_hers);
    check("the child as a peer, abstract", child_s, of_a);
    check("the child as a peer, its listener gone", child_s, of_w);
    check("the peer of the child, its listener gone", own, w);

    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 9 << 8, status);
    check("the dead child as a peer", child_s, of_hers);
    mist_pass();
}
