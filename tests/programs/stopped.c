// A program that is stopped (SIGSTOP) is stopped afterwards, too, until SIGCONT comes; its
// handler for SIGCONT runs once.
// mist: stopped
#include "mist.h"

static volatile sig_atomic_t continued;
static void on_cont(int sig)
{
    (void)sig;
    continued++;
}

int main(void)
{
    signal(SIGCONT, on_cont);
    mist_ready();
    raise(SIGSTOP);
    mist_wait();
    CHECK("SIGCONT handlers run", 1, continued);
    mist_pass();
}
