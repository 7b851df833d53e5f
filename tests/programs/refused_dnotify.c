// A directory that the program is told of when it changes, the old way.
// mist: refused F_NOTIFY
#include "mist.h"

int main(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &set, NULL);
    MUST(mkdir(mist_path("watched"), 0777));
    int dir = MUST(open(mist_path("watched"), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    MUST(fcntl(dir, F_SETSIG, SIGRTMIN));
    if (fcntl(dir, F_NOTIFY, DN_CREATE | DN_MULTISHOT) < 0)
        mist_skip("this kernel has no dnotify");
    mist_ready();
    mist_wait();
    close(CALL(open(mist_path("watched/new"), O_CREAT | O_WRONLY | O_CLOEXEC, 0666)));
    siginfo_t info;
    CHECK("the signal", SIGRTMIN, CALL(sigwaitinfo(&set, &info)));
    CHECK("of", dir, info.si_fd);
    mist_pass();
}
