// A connection from outside that nobody has accepted yet: refused, and left as it was.
// mist: variants tcp unix
// mist: refused not accepted yet
#include "mist.h"
#include <netinet/in.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
    int tcp = argc > 1 && !strcmp(argv[1], "tcp"), ends[2], status;
    struct sockaddr_in of_tcp = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_un of_unix = {AF_UNIX, "listener"};
    struct sockaddr *a = tcp ? (void *)&of_tcp : (void *)&of_unix;
    socklen_t n = tcp ? sizeof of_tcp : sizeof of_unix;
    char buf[16];
    int l = MUST(socket(a->sa_family, SOCK_STREAM, 0));
    MUST(bind(l, a, n));
    if (tcp)
        MUST(getsockname(l, a, &n));
    MUST(pipe(ends));
    // The client lives in a process that is nobody's child here.
    if (!MUST(fork())) {
        if (!MUST(fork())) {
            int s = socket(a->sa_family, SOCK_STREAM, 0);
            close(ends[1]);
            close(l);
            CALL(read(ends[0], buf, 1));
            CALL(connect(s, a, n));
            CALL(send(s, "outside", 7, 0));
            mist_put("connected", "");
            CHECK("the answer", 2, recv(s, buf, sizeof buf, 0));
            _exit(0);
        }
        _exit(0);
    }
    MUST(wait(&status));
    close(ends[0]);
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
