// A program that gets its own system calls as signals: those that a dump makes in it would be, too.
// mist: refused PR_SET_SYSCALL_USER_DISPATCH
#include "mist.h"

static volatile char blocked; // SYSCALL_DISPATCH_FILTER_ALLOW
static volatile int caught;

static void on_call(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info, (void)context;
    blocked = 0;
    caught++;
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO};
    MUST(sigaction(SIGSYS, &action, NULL));
    if (prctl(59, 1, 0, 0, &blocked) < 0)
        mist_skip("this kernel has no PR_SET_SYSCALL_USER_DISPATCH");
    mist_ready();
    mist_wait();
    CHECK("none was taken for its own", 0, caught);
    blocked = 1;
    syscall(SYS_getppid);
    CHECK("its own is", 1, caught);
    mist_pass();
}
