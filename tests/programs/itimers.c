// Interval timers: what is left of each, their intervals, and that they go on firing.
#include "mist.h"

static volatile sig_atomic_t fired[3];
static volatile int64_t first;
static void on_alarm(int sig)
{
    if (sig == SIGALRM && !first)
        first = mist_now();
    fired[sig == SIGALRM ? 0 : sig == SIGVTALRM ? 1 : 2]++;
}
static int64_t us(struct timeval t)
{
    return t.tv_sec * 1000000ll + t.tv_usec;
}

int main(void)
{
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &sa, NULL);
    sigaction(SIGVTALRM, &sa, NULL);
    sigaction(SIGPROF, &sa, NULL);
    // Real: comes once in 1.2 s, then every 50 ms. Virtual and profiling: far away.
    struct itimerval real = {{0, 50000}, {1, 200000}}, virt = {{0, 30000}, {100, 0}}, prof = {{7, 5}, {200, 0}}, got;
    MUST(setitimer(ITIMER_VIRTUAL, &virt, NULL));
    MUST(setitimer(ITIMER_PROF, &prof, NULL));
    int64_t began = mist_now();
    MUST(setitimer(ITIMER_REAL, &real, NULL));

    mist_ready();
    mist_wait();

    CALL(getitimer(ITIMER_VIRTUAL, &got));
    CHECK("interval of ITIMER_VIRTUAL", 30000, us(got.it_interval));
    CHECK("ITIMER_VIRTUAL, microseconds left", 1, us(got.it_value) > 95000000 && us(got.it_value) <= 100100000);
    CALL(getitimer(ITIMER_PROF, &got));
    CHECK("interval of ITIMER_PROF", 7000005, us(got.it_interval));
    CHECK("ITIMER_PROF, microseconds left", 1, us(got.it_value) > 195000000 && us(got.it_value) <= 200100000);
    for (int i = 0; i < 5000 && !fired[0]; i++)
        mist_turn();
    int64_t took = first - began;
    CHECK("ITIMER_REAL fires", 1, fired[0] > 0);
    CHECK("ITIMER_REAL fires not too early", 1, took >= 1200000);
    mist_timed("ITIMER_REAL", "relative", took, 1200000);
    for (int i = 0; i < 5000 && fired[0] < 5; i++)
        mist_turn();
    CHECK("ITIMER_REAL goes on", 1, fired[0] >= 5);
    CALL(getitimer(ITIMER_REAL, &got));
    CHECK("interval of ITIMER_REAL", 50000, us(got.it_interval));
    // Now let the virtual one come soon, and burn some time.
    virt.it_value = (struct timeval){0, 20000};
    CALL(setitimer(ITIMER_VIRTUAL, &virt, NULL));
    int64_t until = mist_now() + 5000000;
    while (!fired[1] && mist_now() < until)
        ;
    CHECK("ITIMER_VIRTUAL fires", 1, fired[1] > 0);
    CHECK("ITIMER_PROF did not fire", 0, fired[2]);
    mist_pass();
}
