// A POSIX timer that is set to a time of day is due then, however long the program was away; one that is set for a while,
// by the same clock, is not.
// mist: cflags -lrt
#include "mist.h"

static int64_t left(timer_t t)
{
    struct itimerspec s;
    CALL(timer_gettime(t, &s));
    return s.it_value.tv_sec * 1000000ll + s.it_value.tv_nsec / 1000;
}

int main(void)
{
    timer_t at, in;
    struct sigevent event = {.sigev_notify = SIGEV_NONE};
    struct sigevent signals = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    timer_t often;
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN);
    MUST(sigprocmask(SIG_BLOCK, &mask, NULL));
    MUST(timer_create(CLOCK_REALTIME, &signals, &often));
    MUST(timer_create(CLOCK_REALTIME, &event, &at));
    MUST(timer_create(CLOCK_REALTIME, &event, &in));
    int64_t due = mist_clock_us(CLOCK_REALTIME) + 1000000000;
    struct itimerspec s = {{0, 0}, {due / 1000000, due % 1000000 * 1000}};
    MUST(timer_settime(at, TIMER_ABSTIME, &s, NULL));
    // This one has expired, and goes on by its interval.
    s.it_value.tv_sec -= 1001;
    s.it_interval.tv_sec = 1500;
    MUST(timer_settime(often, TIMER_ABSTIME, &s, NULL));
    s.it_interval.tv_sec = 0;
    int64_t began = mist_now();
    s.it_value.tv_sec = 1000;
    s.it_value.tv_nsec = 0;
    MUST(timer_settime(in, 0, &s, NULL));

    mist_ready();
    mist_wait();

    // Between two looks at the clock, in microseconds.
    int64_t before = mist_clock_us(CLOCK_REALTIME), rest = left(at), after = mist_clock_us(CLOCK_REALTIME);
    CHECK("not early", 1, after + rest >= due - 2);
    CHECK("not late by the absence", 1, before + rest <= due + 2);
    siginfo_t info;
    struct timespec none = {0, 0};
    CHECK("one that has expired", SIGRTMIN, sigtimedwait(&mask, &info, &none));
    CHECK_ERR("has expired once", EAGAIN, sigtimedwait(&mask, &info, &none));
    before = mist_clock_us(CLOCK_REALTIME), rest = left(often), after = mist_clock_us(CLOCK_REALTIME);
    CHECK("the next time is not early", 1, after + rest >= due + 499000000 - 2);
    CHECK("nor late", 1, before + rest <= due + 499000000 + 2);
    mist_timed("for a while", "relative", mist_now() - began, 1000000000 - left(in));
    mist_pass();
}
