// Timers that expire while the program is being saved: each of a hundred, of which one expires every millisecond, is
// started again by its own signal, and so stands still for ever when one signal of it is lost. None comes twice.
#include "mist.h"

enum { TIMERS = 100, PERIOD_MS = 100 };

static timer_t timers[TIMERS];
static volatile int running[TIMERS], fired[TIMERS], twice;

static void start(int i)
{
    struct itimerspec t = {.it_value = {0, PERIOD_MS * 1000000L}};
    running[i] = 1;
    timer_settime(timers[i], 0, &t, NULL);
}

static void on_signal(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    int i = info->si_value.sival_int;
    twice += !running[i];
    fired[i]++;
    start(i);
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(sigaction(SIGRTMIN, &action, NULL));
    for (int i = 0; i < TIMERS; i++) {
        struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = i};
        MUST(timer_create(CLOCK_MONOTONIC, &event, &timers[i]));
    }
    for (int i = 0; i < TIMERS; i++) {
        mist_sleep(1000);
        start(i);
    }
    mist_ready();
    mist_wait();
    int before[TIMERS];
    for (int i = 0; i < TIMERS; i++)
        before[i] = fired[i];
    mist_sleep(5 * PERIOD_MS * 1000);
    for (int i = 0; i < TIMERS; i++) {
        char what[64];
        snprintf(what, sizeof what, "timer %d goes on", i);
        CHECK(what, 1, fired[i] > before[i]);
    }
    CHECK("signals that came twice", 0, twice);
    mist_pass();
}
