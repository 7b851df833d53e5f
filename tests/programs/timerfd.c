// timerfds: what is left, interval, clock, expiries not yet read, absolute ones, a stopped one.
#include "mist.h"
#include <poll.h>
#include <sys/timerfd.h>

static int make(clockid_t c, int flags, int64_t first_us, int64_t interval_us)
{
    int fd = MUST(timerfd_create(c, TFD_NONBLOCK));
    struct itimerspec s = {{interval_us / 1000000, interval_us % 1000000 * 1000}, {first_us / 1000000, first_us % 1000000 * 1000}};
    MUST(timerfd_settime(fd, flags, &s, NULL));
    return fd;
}
static int64_t left(int fd, int64_t *interval)
{
    struct itimerspec s;
    CALL(timerfd_gettime(fd, &s));
    *interval = s.it_interval.tv_sec * 1000000ll + s.it_interval.tv_nsec / 1000;
    return s.it_value.tv_sec * 1000000ll + s.it_value.tv_nsec / 1000;
}
static void wait_readable(int fd)
{
    struct pollfd p = {fd, POLLIN, 0};
    for (int i = 0; i < 5000 && poll(&p, 1, 0) == 0; i++)
        mist_turn();
    CHECK("readable", POLLIN, p.revents);
}

int main(void)
{
    uint64_t n;
    int far = make(CLOCK_MONOTONIC, 0, 500000000, 3000000);
    int idle = make(CLOCK_BOOTTIME, 0, 0, 0);
    // Fired some times, never read: the count has to be kept.
    int past = make(CLOCK_MONOTONIC, 0, 1000, 0);
    int64_t when = mist_clock_us(CLOCK_REALTIME) + 1000000;
    int abst = make(CLOCK_REALTIME, TFD_TIMER_ABSTIME, when, 0);
    int often = make(CLOCK_MONOTONIC, 0, 1000, 1000);
    mist_sleep(30000);
    int64_t began = mist_now();
    int soon = make(CLOCK_MONOTONIC, 0, 1000000, 200000);

    mist_ready();
    mist_wait();

    while (mist_now() - began < 1000000) {
        struct pollfd p = {soon, POLLIN, 0};
        if (poll(&p, 1, 0))
            break;
        mist_turn();
    }
    wait_readable(soon);
    int64_t took = mist_now() - began, interval;
    CHECK("not too early", 1, took >= 1000000);
    CHECK("read", 8, read(soon, &n, 8));
    CHECK("at least one expiry", 1, n >= 1);
    left(soon, &interval);
    CHECK("interval", 200000, interval);
    wait_readable(soon);
    CHECK("read of one that fired before", 8, read(past, &n, 8));
    CHECK("its count", 1, n);
    CHECK_ERR("it does not fire again", EAGAIN, read(past, &n, 8));
    CHECK("read of one that fires often", 8, read(often, &n, 8));
    CHECK("its count", 1, n >= 30);
    wait_readable(often);
    wait_readable(abst);
    CHECK("a time is a time", 1, mist_clock_us(CLOCK_REALTIME) >= when);
    int64_t l = left(far, &interval);
    CHECK("microseconds left of the far one", 1, l > 470000000 && l <= 500000000);
    CHECK("its interval", 3000000, interval);
    CHECK_ERR("it did not fire", EAGAIN, read(far, &n, 8));
    CHECK("an idle one", 0, left(idle, &interval));
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", idle);
    mist_slurp(path, text, sizeof text);
    CHECK("the idle one's clock", 1, strstr(text, "clockid: 7") != NULL);
    mist_pass();
}
