// Signal dispositions, mask, alternate stack, and pending signals with their siginfo: of the
// process and of the thread, standard and queued.
#include "mist.h"

static volatile int handled;
static char alt[65536];
static void on_info(int sig, siginfo_t *si, void *ctx)
{
    (void)si, (void)ctx;
    handled = sig;
    char here;
    if (&here < alt || &here >= alt + sizeof alt)
        mist_fail("the handler did not run on the alternate stack");
}
static void on_plain(int sig)
{
    handled = sig;
}

int main(void)
{
    struct sigaction sa = {0}, got;
    stack_t ss = {.ss_sp = alt, .ss_size = sizeof alt}, ssgot;
    MUST(sigaltstack(&ss, NULL));
    sa.sa_sigaction = on_info;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigaddset(&sa.sa_mask, SIGUSR2);
    sigaddset(&sa.sa_mask, 40);
    MUST(sigaction(SIGUSR1, &sa, NULL));
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = on_plain;
    sa.sa_flags = SA_RESETHAND | SA_NODEFER;
    MUST(sigaction(SIGHUP, &sa, NULL));
    sa.sa_handler = SIG_IGN;
    sa.sa_flags = SA_NOCLDWAIT;
    MUST(sigaction(SIGCHLD, &sa, NULL));
    signal(SIGQUIT, SIG_IGN);

    sigset_t mask;
    sigemptyset(&mask);
    int blocked[] = {SIGUSR2, SIGTERM, 40, 41, 64};
    for (int i = 0; i < 5; i++)
        sigaddset(&mask, blocked[i]);
    MUST(sigprocmask(SIG_SETMASK, &mask, NULL));
    // Queued to the process, in order; with their values.
    for (int i = 0; i < 5; i++)
        MUST(sigqueue(getpid(), 40, (union sigval){.sival_int = 1000 + i}));
    MUST(sigqueue(getpid(), SIGTERM, (union sigval){.sival_ptr = (void *)0x123456789abc}));
    MUST(kill(getpid(), SIGUSR2));
    // And to this thread only.
    for (int i = 0; i < 3; i++) {
        siginfo_t si = {.si_signo = 41, .si_code = SI_QUEUE, .si_pid = 4242, .si_uid = 17};
        si.si_value.sival_int = 2000 + i;
        MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), 41, &si));
    }
    MUST(syscall(SYS_tgkill, getpid(), getpid(), 64));

    mist_ready();
    mist_wait();

    CALL(sigaction(SIGUSR1, NULL, &got));
    CHECK("SIGUSR1's handler", (intptr_t)on_info, (intptr_t)got.sa_sigaction);
    CHECK("SIGUSR1's flags", SA_SIGINFO | SA_ONSTACK | SA_RESTART, got.sa_flags & ~0x04000000);
    CHECK("SIGUSR1's mask", 1, sigismember(&got.sa_mask, SIGUSR2) && sigismember(&got.sa_mask, 40) && !sigismember(&got.sa_mask, 41));
    CALL(sigaction(SIGHUP, NULL, &got));
    CHECK("SIGHUP's flags", (int)(SA_RESETHAND | SA_NODEFER), got.sa_flags & ~0x04000000);
    CALL(sigaction(SIGCHLD, NULL, &got));
    CHECK("SIGCHLD is ignored", (intptr_t)SIG_IGN, (intptr_t)got.sa_handler);
    CHECK("SIGCHLD's flags", SA_NOCLDWAIT, got.sa_flags & ~0x04000000);
    CALL(sigaction(SIGQUIT, NULL, &got));
    CHECK("SIGQUIT is ignored", (intptr_t)SIG_IGN, (intptr_t)got.sa_handler);
    CALL(sigaction(SIGINT, NULL, &got));
    CHECK("SIGINT has its default", (intptr_t)SIG_DFL, (intptr_t)got.sa_handler);
    sigset_t now;
    CALL(sigprocmask(SIG_SETMASK, NULL, &now));
    for (int i = 1; i <= 64; i++)
        CHECK("the signal mask", sigismember(&mask, i), sigismember(&now, i));
    CALL(sigaltstack(NULL, &ssgot));
    CHECK("sigaltstack", (intptr_t)alt, (intptr_t)ssgot.ss_sp);
    CHECK("sigaltstack's size", sizeof alt, ssgot.ss_size);
    CHECK("sigaltstack's flags", 0, ssgot.ss_flags);

    CHECK_STR("SigPnd", "8000010000000000", mist_status(getpid(), "SigPnd"));
    CHECK_STR("ShdPnd", "0000008000004800", mist_status(getpid(), "ShdPnd"));
    struct timespec none = {0, 0};
    siginfo_t si;
    sigset_t one;
#define TAKE(sig)                                                                                \
    sigemptyset(&one);                                                                           \
    sigaddset(&one, sig);                                                                        \
    memset(&si, 0, sizeof si);                                                                   \
    CHECK("sigtimedwait", sig, CALL(sigtimedwait(&one, &si, &none)))
    for (int i = 0; i < 5; i++) {
        TAKE(40);
        CHECK("code of 40", SI_QUEUE, si.si_code);
        CHECK("value of 40", 1000 + i, si.si_value.sival_int);
        CHECK("sender of 40", getpid(), si.si_pid);
    }
    CHECK_ERR("no more of 40", EAGAIN, sigtimedwait(&one, &si, &none));
    TAKE(SIGTERM);
    CHECK("value of SIGTERM", 0x123456789abc, (intptr_t)si.si_value.sival_ptr);
    TAKE(SIGUSR2);
    CHECK("code of SIGUSR2", SI_USER, si.si_code);
    CHECK("sender of SIGUSR2", getpid(), si.si_pid);
    for (int i = 0; i < 3; i++) {
        TAKE(41);
        CHECK("value of 41", 2000 + i, si.si_value.sival_int);
        CHECK("pid of 41", 4242, si.si_pid);
        CHECK("uid of 41", 17, si.si_uid);
    }
    // The raw call: glibc makes SI_USER of SI_TKILL.
    sigemptyset(&one);
    sigaddset(&one, 64);
    CHECK("rt_sigtimedwait", 64, CALL(syscall(SYS_rt_sigtimedwait, &one, &si, &none, 8)));
    CHECK("code of 64", SI_TKILL, si.si_code);
    CALL(raise(SIGUSR1));
    CHECK("SIGUSR1 arrives", SIGUSR1, handled);
    CALL(raise(SIGHUP));
    CHECK("SIGHUP arrives", SIGHUP, handled);
    CALL(sigaction(SIGHUP, NULL, &got));
    CHECK("SIGHUP was reset", (intptr_t)SIG_DFL, (intptr_t)got.sa_handler);
    mist_pass();
}
