// pidfds: of oneself, and of a child that ends afterwards.
// mist: tree
#include "mist.h"
#include <poll.h>

int main(void)
{
    pid_t child = MUST(fork());
    if (!child) {
        mist_wait();
        _exit(23);
    }
    int self = MUST(syscall(SYS_pidfd_open, getpid(), 0));
    int kid = MUST(syscall(SYS_pidfd_open, child, O_NONBLOCK));
    // One of a process that is gone.
    pid_t brief = MUST(fork());
    if (!brief)
        _exit(0);
    int dead = MUST(syscall(SYS_pidfd_open, brief, 0));
    MUST(waitpid(brief, NULL, 0));

    mist_ready();
    mist_wait();

    CALL(syscall(SYS_pidfd_send_signal, self, 0, NULL, 0));
    struct pollfd p = {kid, POLLIN, 0};
    CHECK("the child's end", 1, CALL(poll(&p, 1, 10000)));
    siginfo_t si = {0};
    CALL(waitid(P_PIDFD, kid, &si, WEXITED));
    CHECK("the child's pid", child, si.si_pid);
    CHECK("its exit code", 23, si.si_status);
    CHECK("flags", O_NONBLOCK, mist_getfl(kid) & O_NONBLOCK);
    CHECK("cloexec", FD_CLOEXEC, fcntl(kid, F_GETFD));
    CHECK_ERR("a dead process's", ESRCH, syscall(SYS_pidfd_send_signal, dead, 0, NULL, 0));
    mist_pass();
}
