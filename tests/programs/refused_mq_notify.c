// mist: refused mq_notify
// mist: cflags -lrt
#include "mist.h"
#include <mqueue.h>

int main(void)
{
    char name[64];
    snprintf(name, sizeof name, "/mist-notify-%lld", (long long)mist_clock_us(CLOCK_REALTIME));
    mqd_t q = mq_open(name, O_WRONLY | O_CREAT | O_EXCL, 0600, NULL);
    if (q < 0 && errno == ENOSYS)
        mist_skip("this kernel has no POSIX message queues");
    MUST(q);
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1, .sigev_value.sival_int = 77};
    MUST(mq_notify(q, &event));
    mist_ready();
    mist_wait();
    siginfo_t got;
    CALL(mq_send(q, "x", 1, 0));
    CALL(sigwaitinfo(&usr1, &got));
    CHECK("its value", 77, got.si_value.sival_int);
    mq_unlink(name);
    mist_pass();
}
