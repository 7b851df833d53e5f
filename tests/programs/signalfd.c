// signalfd: its mask, a signal that is pending for it, and one that comes later.
#include "mist.h"
#include <poll.h>
#include <sys/signalfd.h>

int main(void)
{
    sigset_t a, b;
    sigemptyset(&a);
    sigaddset(&a, SIGUSR1);
    sigaddset(&a, 45);
    sigemptyset(&b);
    sigaddset(&b, SIGUSR2);
    sigset_t both = a;
    sigaddset(&both, SIGUSR2);
    MUST(sigprocmask(SIG_BLOCK, &both, NULL));
    int fa = MUST(signalfd(-1, &a, SFD_NONBLOCK | SFD_CLOEXEC));
    int fb = MUST(signalfd(-1, &b, SFD_NONBLOCK));
    MUST(sigqueue(getpid(), 45, (union sigval){.sival_int = 31}));
    MUST(sigqueue(getpid(), 45, (union sigval){.sival_int = 32}));

    mist_ready();
    mist_wait();

    struct signalfd_siginfo si;
    struct pollfd p[2] = {{fa, POLLIN, 0}, {fb, POLLIN, 0}};
    CALL(poll(p, 2, 0));
    CHECK("the first is readable", POLLIN, p[0].revents);
    CHECK("the second is not", 0, p[1].revents);
    for (int i = 31; i <= 32; i++) {
        CHECK("read", sizeof si, read(fa, &si, sizeof si));
        CHECK("signal", 45, si.ssi_signo);
        CHECK("value", i, si.ssi_int);
        CHECK("sender", getpid(), si.ssi_pid);
    }
    CALL(kill(getpid(), SIGUSR2));
    CHECK_ERR("not for the first", EAGAIN, read(fa, &si, sizeof si));
    CHECK("for the second", sizeof si, read(fb, &si, sizeof si));
    CHECK("signal", SIGUSR2, si.ssi_signo);
    CALL(kill(getpid(), SIGUSR1));
    CHECK_ERR("not for the second", EAGAIN, read(fb, &si, sizeof si));
    CHECK("for the first", sizeof si, read(fa, &si, sizeof si));
    CHECK("flags", O_RDWR | O_NONBLOCK, mist_getfl(fa));
    CHECK("cloexec", FD_CLOEXEC, fcntl(fa, F_GETFD));
    mist_pass();
}
