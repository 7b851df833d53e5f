// A directory with an owner, as one has that was watched once (F_NOTIFY), is carried when nobody watches it.
#include "mist.h"

int main(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGIO);
    sigprocmask(SIG_BLOCK, &set, NULL);
    MUST(mkdir(mist_path("watched"), 0777));
    int dir = MUST(open(mist_path("watched"), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fcntl(dir, F_NOTIFY, DN_CREATE) < 0)
        mist_skip("this kernel has no dnotify");
    // Once only.
    close(MUST(open(mist_path("watched/new"), O_CREAT | O_WRONLY | O_CLOEXEC, 0666)));
    siginfo_t info;
    MUST(sigwaitinfo(&set, &info));
    mist_ready();
    mist_wait();
    CHECK("its owner", getpid(), fcntl(dir, F_GETOWN));
    mist_pass();
}
