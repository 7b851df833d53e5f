// Many POSIX timers: each goes on with what it had left.
#include "mist.h"

enum { COUNT = 1500 };
static timer_t timers[COUNT];

int main(void)
{
    for (int i = 0; i < COUNT; i++) {
        struct sigevent event = {.sigev_notify = SIGEV_NONE};
        struct itimerspec spec = {{7, i}, {1000 + i, 0}};
        MUST(timer_create(CLOCK_MONOTONIC, &event, &timers[i]));
        MUST(timer_settime(timers[i], 0, &spec, NULL));
    }

    mist_ready();
    mist_wait();

    for (int i = 0; i < COUNT; i++) {
        struct itimerspec spec;
        char what[64];
        CALL(timer_gettime(timers[i], &spec));
        snprintf(what, sizeof what, "timer %d goes on", i);
        CHECK(what, 1, spec.it_value.tv_sec > 900 + i && spec.it_value.tv_sec <= 1000 + i);
        snprintf(what, sizeof what, "the interval of timer %d", i);
        CHECK(what, i, spec.it_interval.tv_nsec);
    }
    mist_pass();
}
