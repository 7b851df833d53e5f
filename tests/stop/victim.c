// A busy program that notices when anything happens to it: a running checksum, restartable
// sequences, a storm of SIGALRM, children that come and go, sleeps with a time-out, and more
// through a pipe than it holds. It counts its turns in the file `turns`.
#include "../programs/mist.h"
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/rseq.h>

#define WORDS (1 << 14)
#define BULK (200 * 1024)

static volatile uint64_t *turns; // one counter a thread
// mistctl is killed: in the moment between the kernel's stop and its first act, a call may show it.
static int lenient;
static volatile int stop;
static volatile sig_atomic_t alarms;
static uint64_t sums[2][WORDS];

static void on_alarm(int sig)
{
    (void)sig;
    alarms++;
}

// Two arrays that must stay the same, worked on in turn.
static void *checksum(void *arg)
{
    (void)arg;
    for (uint64_t n = 0; !stop; n++) {
        for (int which = 0; which < 2; which++)
            for (int i = 0; i < WORDS; i++)
                sums[which][i] = mist_mix(sums[which][i] + n + i);
        for (int i = 0; i < WORDS; i++)
            if (sums[0][i] != sums[1][i])
                mist_fail("checksum, word %d in turn %llu, wanted %#llx, got %#llx", i, (unsigned long long)n,
                          (unsigned long long)sums[0][i], (unsigned long long)sums[1][i]);
        turns[0]++;
        mist_sleep(500);
    }
    return NULL;
}

static struct {
    uint32_t version, flags;
    uint64_t start, len, abort_ip;
} cs __attribute__((aligned(32)));

static void *sequences(void *arg)
{
    struct rseq *r = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    (void)arg;
    while (!stop) {
        uint32_t cpu0, cpu1;
        uint64_t ab = 0;
        asm volatile("lea 1f(%%rip),%%rax; mov %%rax,8(%[cs]); lea 2f(%%rip),%%rdx; sub %%rax,%%rdx;"
                     "mov %%rdx,16(%[cs]); lea 3f(%%rip),%%rdx; mov %%rdx,24(%[cs]); mov %[cs],8(%[r]);"
                     "1: mov 4(%[r]),%[cpu]; mov $200000,%%rcx; 5: dec %%rcx; jnz 5b; mov 4(%[r]),%[end];"
                     "2: jmp 4f; .long 0x53053053; 3: mov $1,%[ab]; 4: movq $0,8(%[r]);"
                     : [cpu] "=&r"(cpu0), [end] "=&r"(cpu1), [ab] "+&r"(ab)
                     : [cs] "r"(&cs), [r] "r"(r)
                     : "rax", "rcx", "rdx", "memory", "cc");
        // What is not aborted ends on the CPU on which it began.
        if (!ab && cpu0 != cpu1)
            mist_fail("a commit on CPU %u of what began on %u", cpu1, cpu0);
        turns[1]++;
        if (turns[1] % 8 == 0)
            mist_sleep(300);
    }
    return NULL;
}

static void *sleeps(void *arg)
{
    int ep = MUST(epoll_create1(0));
    struct epoll_event e;
    (void)arg;
    while (!stop) {
        int64_t before = mist_now();
        long r = syscall(SYS_epoll_wait, ep, &e, 1, 15);
        if (lenient && r < 0 && errno == EINTR) {
            turns[6]++;
            continue;
        }
        CHECK("epoll_wait", 0, r);
        if (mist_now() - before < 15000)
            mist_fail("epoll_wait of 15 ms, over after %lld us", (long long)(mist_now() - before));
        struct timespec t = {0, 15000000};
        sigset_t s;
        sigemptyset(&s);
        sigaddset(&s, 40);
        r = syscall(SYS_rt_sigtimedwait, &s, NULL, &t, 8);
        if (lenient && r < 0 && errno == EINTR)
            turns[6]++;
        else if (r != -1 || errno != EAGAIN)
            mist_fail("sigtimedwait, wanted EAGAIN, got %ld with %s", r, strerror(errno));
        turns[2]++;
    }
    return NULL;
}

static int bulk[2];
static unsigned char out[BULK], in[BULK];
static void *writes(void *arg)
{
    (void)arg;
    while (!stop) {
        size_t at = write(bulk[1], out, BULK);
        while (lenient && at > 0 && at < BULK) {
            turns[6]++;
            ssize_t n = write(bulk[1], out + at, BULK - at);
            if (n <= 0)
                mist_fail("a write to a full pipe, got %s", strerror(errno));
            at += n;
        }
        CHECK("a write to a full pipe", BULK, at);
        turns[3]++;
    }
    close(bulk[1]);
    return NULL;
}
static void *reads(void *arg)
{
    (void)arg;
    for (;;) {
        size_t got = 0;
        while (got < BULK) {
            ssize_t n = read(bulk[0], in + got, BULK - got < 5000 ? BULK - got : 5000);
            if (n < 0)
                mist_fail("read from a pipe, got %s", strerror(errno));
            if (n == 0 && got == 0)
                return NULL;
            got += n;
            mist_sleep(100);
        }
        CHECK_MEM("what came through the pipe", out, in, BULK);
    }
}

static void *children(void *arg)
{
    (void)arg;
    for (long n = 0; !stop; n++) {
        pid_t c = fork();
        if (c < 0)
            mist_fail("fork, got %s", strerror(errno));
        if (!c) {
            if (n % 2)
                mist_sleep(1000);
            _exit(n % 100);
        }
        int status = -1;
        pid_t w = waitpid(-1, &status, __WALL);
        if (w != c)
            mist_fail("waitpid, wanted %d, got %d with status %#x (%s)", c, w, status, strerror(errno));
        CHECK("exit code", n % 100, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
        CHECK_ERR("no other child", ECHILD, waitpid(-1, &status, WNOHANG | __WALL));
        turns[4]++;
        mist_sleep(3000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    int fd = MUST(open("turns", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(fd, 4096));
    turns = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    close(fd);
    mist_fill(sums[0], sizeof sums[0], 3);
    mist_fill(sums[1], sizeof sums[1], 3);
    mist_fill(out, sizeof out, 9);
    MUST(pipe(bulk));
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGALRM, &sa, NULL));
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    sigaddset(&s, SIGALRM);
    // Only the main thread takes alarms: elsewhere they would end sleeps, as they should.
    MUST(sigprocmask(SIG_BLOCK, &s, NULL));
    void *(*all[])(void *) = {checksum, sequences, sleeps, writes, reads, children};
    pthread_t t[6];
    // Without children the program may be dumped alone.
    int n = argc > 1 ? 5 : 6;
    lenient = argc > 1 && !strcmp(argv[1], "lenient");
    for (int i = 0; i < n; i++)
        if (pthread_create(&t[i], NULL, all[i], NULL))
            mist_fail("set-up: pthread_create");
    sigdelset(&s, 40);
    MUST(sigprocmask(SIG_UNBLOCK, &s, NULL));
    struct itimerval it = {{0, 2000}, {0, 2000}};
    MUST(setitimer(ITIMER_REAL, &it, NULL));
    while (!turns[0] || !turns[1] || !turns[2] || !turns[3] || (n == 6 && !turns[4]) || !alarms)
        mist_turn();
    mist_ready();
    int64_t last = alarms;
    while (!mist_gone_on()) {
        for (int i = 0; i < 500 && !mist_gone_on(); i++)
            mist_turn();
        if (alarms == last)
            mist_fail("no alarm in 500 turns");
        last = alarms;
        turns[5]++;
    }
    stop = 1;
    for (int i = 0; i < n; i++)
        pthread_join(t[i], NULL);
    mist_pass();
}
