// The end of what is closed is seen at once, whoever looked at it a moment ago: the other ends of pipes and
// sockets that live for microseconds, while the program is dumped again and again.
// mist: dumps 24
// mist: variants pipe socket
#include "mist.h"
#include <sys/socket.h>

int main(int argc, char **argv)
{
    int socket = argc > 1 && !strcmp(argv[1], "socket");
    mist_ready();
    for (long turn = 0;; turn++) {
        int fd[2];
        char buf[8];
        if (socket)
            MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
        else
            MUST(pipe(fd));
        MUST(fcntl(fd[0], F_SETFL, O_NONBLOCK));
        MUST(write(fd[1], "byte", 4));
        sched_yield();
        MUST(close(fd[1]));
        CHECK("what stood in it", 4, read(fd[0], buf, sizeof buf));
        CHECK("end-of-file", 0, read(fd[0], buf, sizeof buf));
        MUST(close(fd[0]));
        if (turn % 64 == 0 && access(mist_path("go"), F_OK) == 0)
            break;
    }
    mist_pass();
}
