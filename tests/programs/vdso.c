// The vDSO works, and clocks do not go back; getcpu and time, too. A thread reads clocks all
// the time, so that stops fall into the vDSO.
// mist: cflags -pthread
// mist: dumps 20
#include "mist.h"
#include <pthread.h>
#include <sys/auxv.h>

static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME, CLOCK_MONOTONIC_COARSE, CLOCK_MONOTONIC_RAW, CLOCK_TAI};
#define N (int)(sizeof clocks / sizeof *clocks)
static volatile int stop;
static volatile long readings;

static void *reader(void *arg)
{
    (void)arg;
    int64_t last[N] = {0};
    while (!stop) {
        for (int k = 0; k < 2000; k++)
            for (int i = 0; i < N; i++) {
                struct timespec t;
                if (clock_gettime(clocks[i], &t))
                    mist_fail("clock_gettime(%d): %s", clocks[i], strerror(errno));
                int64_t now = t.tv_sec * 1000000000ll + t.tv_nsec;
                if (now < last[i])
                    mist_fail("clock %d went back, wanted at least %lld, got %lld", clocks[i], (long long)last[i], (long long)now);
                last[i] = now;
            }
        readings++;
        mist_sleep(500);
    }
    return NULL;
}

int main(void)
{
    unsigned long vdso = getauxval(AT_SYSINFO_EHDR);
    pthread_t t;
    pthread_create(&t, NULL, reader, NULL);
    while (!readings)
        mist_turn();

    mist_ready();
    mist_wait();

    long so_far = readings;
    for (int i = 0; i < 5000 && readings < so_far + 5; i++)
        mist_turn();
    stop = 1;
    pthread_join(t, NULL);
    CHECK("the reader goes on", 1, readings >= so_far + 5);
    CHECK("AT_SYSINFO_EHDR", vdso, getauxval(AT_SYSINFO_EHDR));
    CHECK_MEM("the vDSO is there", "\177ELF", (void *)vdso, 4);
    CHECK_STR("its permissions", "r-xp", mist_smaps((void *)vdso, NULL));
    // The vDSO and the kernel tell the same time.
    for (int i = 0; i < N; i++) {
        struct timespec a, b, c;
        CALL(syscall(SYS_clock_gettime, clocks[i], &a));
        CALL(clock_gettime(clocks[i], &b));
        CALL(syscall(SYS_clock_gettime, clocks[i], &c));
        int64_t x = a.tv_sec * 1000000000ll + a.tv_nsec, y = b.tv_sec * 1000000000ll + b.tv_nsec, z = c.tv_sec * 1000000000ll + c.tv_nsec;
        if (y < x || y > z)
            mist_fail("clock %d in the vDSO, wanted %lld to %lld, got %lld", clocks[i], (long long)x, (long long)z, (long long)y);
    }
    unsigned cpu, node;
    CALL(getcpu(&cpu, &node));
    CHECK("getcpu", 1, cpu < 4096);
    time_t now = time(NULL);
    CHECK("time", 1, now > 1600000000 && llabs((long long)now - CALL(syscall(SYS_time, NULL))) <= 1);
    mist_pass();
}
