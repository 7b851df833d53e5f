// Many threads in timed calls whose ends lie close together, so that one may be taken for another. No call may end
// before its time, whatever is done to the program, few long after it while the program ran, and none with anything
// but its time-out. It counts its turns in the file `turns`.
#include "../programs/mist.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>

#define THREADS 24
#define PATIENT 12 // and so many more whose calls last for many stops
#define ALL (THREADS + PATIENT)
#define KINDS 12

static volatile uint64_t *turns; // one counter for every fourth thread
static volatile int stop;
static int set;
static pthread_barrier_t ready; // all descriptors are there

// When the program ran: a thread notes it that wakes by the clock, which no stop makes late.
#define PULSES (1 << 16)
static volatile int64_t pulses[PULSES];
static volatile uint64_t pulsed;
static void *pulse(void *arg)
{
    (void)arg;
    while (!stop) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        t.tv_nsec += 1000000;
        if (t.tv_nsec >= 1000000000)
            t.tv_sec++, t.tv_nsec -= 1000000000;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
        pulses[pulsed % PULSES] = mist_now();
        __atomic_fetch_add(&pulsed, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

// Late by much, in which the program ran often: nobody kept it from ending. Who may not read the kernel's memory
// estimates when a call is to end, by a clock that on a virtual machine does not count what is taken from that. A call
// that a stop finds still asleep past its end waits its whole time again, lest it be taken for another; that is rare.
static int64_t much = 150000;
static volatile long all, late;
static void in_time(const char *name, long me, int64_t us, int64_t before)
{
    int64_t now = mist_now(), due = before + us;
    uint64_t last = pulsed, ran = 0;
    while (ran < last && ran < PULSES && pulses[(last - 1 - ran) % PULSES] > due)
        ran++;
    long n = __atomic_add_fetch(&all, 1, __ATOMIC_SEQ_CST);
    if (now - due < much || (int64_t)ran < much / 2500)
        return;
    long m = __atomic_add_fetch(&late, 1, __ATOMIC_SEQ_CST);
    if (m > 6 && 4 * m > n)
        mist_fail("%ld of %ld calls ended late; %s of %lld us in thread %ld, over after %lld us, in which the program ran %llu times",
                  m, n, name, (long long)us, me, (long long)(now - before), (unsigned long long)ran);
}

static void *sleeps(void *arg)
{
    static const char *const names[KINDS] = {"epoll_wait", "sigtimedwait", "semtimedop", "ppoll", "select", "pselect", "poll",
                                             "futex", "nanosleep", "clock_nanosleep", "epoll_pwait2", "nanosleep without rest"};
    long me = (long)arg;
    uint32_t word = 0;
    int ep = MUST(epoll_create1(0));
    struct epoll_event e;
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    pthread_barrier_wait(&ready);
    for (uint64_t n = 0; !stop; n++) {
        // Times that lie close together, among those of other threads and of the calls before.
        int64_t us = 3000 + 1000 * (int64_t)(mist_mix(n * ALL + me) % 13);
        if (me >= THREADS)
            us += 900000;
        int kind = (me + n) % KINDS;
        // While it waits for a signal its mask is another.
        if (me >= THREADS && kind == 1)
            kind = 0;
        struct timespec t = {0, us * 1000}, rem;
        struct timeval tv = {0, us};
        long wanted = 0, r;
        int error = 0;
        errno = 0;
        int64_t before = mist_now();
        switch (kind) {
        case 0: r = syscall(SYS_epoll_wait, ep, &e, 1, us / 1000); break;
        case 1: r = syscall(SYS_rt_sigtimedwait, &s, NULL, &t, 8); wanted = -1; error = EAGAIN; break;
        case 2: r = syscall(SYS_semtimedop, set, &(struct sembuf){me % 4, -1, 0}, 1, &t); wanted = -1; error = EAGAIN; break;
        case 3: r = syscall(SYS_ppoll, NULL, 0, &t, NULL, 8); break;
        case 4: r = syscall(SYS_select, 0, NULL, NULL, NULL, &tv); break;
        case 5: r = syscall(SYS_pselect6, 0, NULL, NULL, NULL, &t, NULL); break;
        case 6: r = syscall(SYS_poll, NULL, 0, us / 1000); break;
        case 7: r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0); wanted = -1; error = ETIMEDOUT; break;
        case 8: r = syscall(SYS_nanosleep, &t, &t); break;
        case 9: r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, &rem); break;
        case 10: r = syscall(SYS_epoll_pwait2, ep, &e, 1, &t, NULL, 8); break;
        default: r = syscall(SYS_nanosleep, &t, NULL); break;
        }
        int got = r < 0 ? errno : 0;
        int64_t took = mist_now() - before;
        if (r != wanted || got != error)
            mist_fail("%s of thread %ld, wanted %ld (%s), got %ld (%s)", names[kind], me, wanted, strerror(error), r, strerror(got));
        if (took < us)
            mist_fail("%s of %lld us in thread %ld, over after %lld us", names[kind], (long long)us, me, (long long)took);
        if (me >= THREADS)
            in_time(names[kind], me, us, before);
        __atomic_fetch_add(&turns[me % 4], 1, __ATOMIC_RELAXED);
    }
    close(ep);
    return NULL;
}

// Two waits in turn that differ in their time-outs only and end at once, since another thread sees to that: a stop
// that comes between two of them, or before the second has gone to sleep, must not give it the time of the first.
#define PAIRS 2
#define SLOW 401 // more operations: it takes longer to begin
static void *takes(void *arg)
{
    struct sembuf all[SLOW];
    int mine = 4 + 2 * (int)(long)arg;
    // Their sum is -1, and the last cannot be done before the other thread has given one.
    for (int i = 0; i < SLOW; i++)
        all[i] = (struct sembuf){mine, i == SLOW - 1 ? -1 : i % 2 ? -1 : 1, 0};
    for (uint64_t n = 0; !stop; n++) {
        int64_t us = n % 2 ? 100000 : 2000;
        struct timespec t = {0, us * 1000};
        int64_t before = mist_now();
        long r = syscall(SYS_semtimedop, set, all, SLOW, &t);
        int64_t took = mist_now() - before;
        if (r < 0 && errno != EAGAIN)
            mist_fail("semtimedop, got %s", strerror(errno));
        if (r < 0 && took < us)
            mist_fail("semtimedop of %lld us, over after %lld us", (long long)us, (long long)took);
        if (r == 0)
            CALL(semop(set, &(struct sembuf){mine + 1, 1, 0}, 1));
    }
    return NULL;
}
static void *gives(void *arg)
{
    int its = 4 + 2 * (int)(long)arg;
    for (uint64_t n = 0; !stop; n++) {
        struct timespec t = {0, 20000000};
        // Others want to run, too.
        if (n % 8 == 0)
            mist_sleep(1000);
        CALL(semop(set, &(struct sembuf){its, 1, 0}, 1));
        if (syscall(SYS_semtimedop, set, &(struct sembuf){its + 1, -1, 0}, 1, &t) < 0 && errno != EAGAIN)
            mist_fail("semtimedop for an answer, got %s", strerror(errno));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "estimated"))
        much = 600000;
    int fd = MUST(open("turns", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(fd, 4096));
    turns = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
    set = MUST(semget(IPC_PRIVATE, 4 + 2 * PAIRS, 0600));
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    MUST(sigprocmask(SIG_BLOCK, &s, NULL));
    pthread_barrier_init(&ready, NULL, ALL);
    pthread_t t[ALL + 2 * PAIRS + 1];
    if (pthread_create(&t[ALL + 2 * PAIRS], NULL, pulse, NULL))
        mist_fail("set-up: pthread_create");
    for (long i = 0; i < ALL + 2 * PAIRS; i++) {
        long more = i - ALL;
        if (pthread_create(&t[i], NULL, more < 0 ? sleeps : more % 2 ? takes : gives, (void *)(more < 0 ? i : more / 2)))
            mist_fail("set-up: pthread_create");
    }
    while (!turns[0] || !turns[1] || !turns[2] || !turns[3])
        mist_turn();
    mist_ready();
    mist_wait();
    stop = 1;
    for (int i = 0; i < ALL + 2 * PAIRS + 1; i++)
        pthread_join(t[i], NULL);
    MUST(semctl(set, 0, IPC_RMID));
    mist_pass();
}
