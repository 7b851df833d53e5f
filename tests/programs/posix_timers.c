// POSIX timers: their ids (with gaps), what is left, interval, clock, signal and value,
// SIGEV_NONE, SIGEV_THREAD_ID; an absolute one; overruns of one whose signal is pending.
// mist: cflags -pthread -lrt
// mist: dumps 10
#include "mist.h"
#include <pthread.h>
#define THREAD_ID 4

// The raw calls, as ids are what the kernel calls them.
static int create(clockid_t c, int notify, int sig, int value, pid_t tid)
{
    struct sigevent e = {.sigev_notify = notify, .sigev_signo = sig, .sigev_value = {.sival_int = value}};
    e._sigev_un._tid = tid;
    int id = -1;
    MUST(syscall(SYS_timer_create, c, &e, &id));
    return id;
}
static void set(int id, int flags, int64_t first_us, int64_t interval_us)
{
    struct itimerspec s = {{interval_us / 1000000, interval_us % 1000000 * 1000}, {first_us / 1000000, first_us % 1000000 * 1000}};
    MUST(syscall(SYS_timer_settime, id, flags, &s, NULL));
}
static int64_t left(int id, int64_t *interval)
{
    struct itimerspec s;
    CALL(syscall(SYS_timer_gettime, id, &s));
    *interval = s.it_interval.tv_sec * 1000000ll + s.it_interval.tv_nsec / 1000;
    return s.it_value.tv_sec * 1000000ll + s.it_value.tv_nsec / 1000;
}

int main(void)
{
    sigset_t mask, one;
    sigemptyset(&mask);
    for (int s = 40; s < 50; s++)
        sigaddset(&mask, s);
    MUST(sigprocmask(SIG_BLOCK, &mask, NULL));
    int id[8];
    for (int i = 0; i < 8; i++)
        id[i] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    // Holes in the ids: what is made next does not fill them, a restore must not either.
    for (int i = 0; i < 8; i += 2)
        MUST(syscall(SYS_timer_delete, id[i]));
    int soon = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, 40, 1234, 0);
    int far = create(CLOCK_REALTIME, SIGEV_SIGNAL, 41, 5678, 0);
    int mine = create(CLOCK_MONOTONIC, THREAD_ID, 42, 99, syscall(SYS_gettid));
    int often = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, 43, 43, 0);
    int cpu = create(CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, 44, 44, 0);
    int idle = create(CLOCK_BOOTTIME, SIGEV_SIGNAL, 45, 45, 0);
    int abst = create(CLOCK_REALTIME, SIGEV_SIGNAL, 46, 46, 0);
    set(id[1], 0, 300000000, 1000);
    set(far, 0, 400000000, 7000000);
    set(mine, 0, 500000, 0);
    set(often, 0, 1000, 1000);
    set(cpu, 0, 100000000, 0);
    int64_t when = mist_clock_us(CLOCK_REALTIME) + 1000000;
    set(abst, TIMER_ABSTIME, when, 0);
    int64_t began = mist_now();
    set(soon, 0, 1000000, 250000);
    mist_sleep(20000); // `often` has fired and is pending

    mist_ready();
    mist_wait();

    siginfo_t si;
    struct timespec limit = {10, 0};
    int64_t interval;
#define TAKE(sig)                                                                                \
    sigemptyset(&one);                                                                           \
    sigaddset(&one, sig);                                                                        \
    memset(&si, 0, sizeof si);                                                                   \
    CHECK("sigtimedwait", sig, syscall(SYS_rt_sigtimedwait, &one, &si, &limit, 8))
    // Keeps an eye on the clock while it waits.
    while (mist_now() - began < 1500000) {
        sigset_t pending;
        CALL(sigpending(&pending));
        if (sigismember(&pending, 40))
            break;
        mist_turn();
    }
    TAKE(40);
    int64_t took = mist_now() - began;
    CHECK("code", SI_TIMER, si.si_code);
    CHECK("value", 1234, si.si_value.sival_int);
    CHECK("timer id in siginfo", soon, si.si_timerid);
    CHECK("not too early", 1, took >= 1000000);
    left(soon, &interval);
    CHECK("interval", 250000, interval);
    TAKE(40);
    CHECK("the second expiry, not too early", 1, mist_now() - began >= 1250000);
    TAKE(42);
    CHECK("value of the thread's timer", 99, si.si_value.sival_int);
    TAKE(43);
    CHECK("timer of the pending signal", often, si.si_timerid);
    CHECK("its value", 43, si.si_value.sival_int);
    // How many times a timer has already overrun nobody can ask; that it goes on counting one can.
    mist_sleep(50000);
    TAKE(43);
    if (si.si_overrun <= 10)
        mist_sleep(50000);
    TAKE(43);
    mist_sleep(50000);
    TAKE(43);
    CHECK("it counts overruns", 1, si.si_overrun > 10);
    CHECK("timer_getoverrun", si.si_overrun, CALL(syscall(SYS_timer_getoverrun, often)));
    TAKE(46);
    CHECK("an absolute time is a time", 1, mist_clock_us(CLOCK_REALTIME) >= when);
    int64_t l = left(far, &interval);
    CHECK("seconds left of the far one", 1, l > 370000000 && l <= 400000000);
    CHECK("its interval", 7000000, interval);
    l = left(id[1], &interval);
    CHECK("seconds left of a silent one", 1, l > 270000000 && l <= 300000000);
    l = left(cpu, &interval);
    CHECK("seconds left of the CPU's", 1, l > 90000000 && l <= 100000000);
    CHECK("an idle one", 0, left(idle, &interval));
    for (int i = 3; i < 8; i += 2)
        CHECK("an idle silent one", 0, left(id[i], &interval));
    for (int i = 0; i < 8; i += 2)
        CHECK_ERR("a deleted one", EINVAL, syscall(SYS_timer_gettime, id[i], &(struct itimerspec){0}));
    int next = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    CHECK("a new id is not an old one", 1, next != soon && next != far && next != mine && next != often && next != id[1]);
    (void)took;
    mist_pass();
}
