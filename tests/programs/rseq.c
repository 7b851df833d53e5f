// Restartable sequences: registered as before, and a thread stopped inside of a critical
// section commits only on the CPU on which it began. Threads run the section all the time.
// mist: cflags -pthread
// mist: dumps 40
#include "mist.h"
#include <pthread.h>
#include <sys/rseq.h>
#define N 2

struct cs {
    uint32_t version, flags;
    uint64_t start, len, abort_ip;
} __attribute__((aligned(32)));
static struct cs cs[N];
static volatile uint64_t commits[N], aborts[N], wrong[N];
static volatile int stop;

static struct rseq *area(void)
{
    return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

static void *loop(void *arg)
{
    long me = (long)arg;
    struct rseq *r = area();
    while (!stop) {
        uint32_t first, last;
        uint64_t ab = 0;
        // Long sections (about 0.1 ms), so that a stop falls into one. Both looks at the CPU are inside: who is moved
        // right behind has committed on the one where it began.
        asm volatile("lea 1f(%%rip),%%rax; mov %%rax,8(%[cs]); lea 2f(%%rip),%%rdx; sub %%rax,%%rdx;"
                     "mov %%rdx,16(%[cs]); lea 3f(%%rip),%%rdx; mov %%rdx,24(%[cs]); mov %[cs],8(%[r]);"
                     "1: mov 4(%[r]),%[first]; mov $100000,%%rcx; 5: dec %%rcx; jnz 5b; mov 4(%[r]),%[last];"
                     "2: jmp 4f; .long 0x53053053; 3: mov $1,%[ab]; 4: movq $0,8(%[r]);"
                     : [first] "=&r"(first), [last] "=&r"(last), [ab] "+&r"(ab)
                     : [cs] "r"(&cs[me]), [r] "r"(r)
                     : "rax", "rcx", "rdx", "memory", "cc");
        if (ab)
            aborts[me]++;
        else {
            commits[me]++;
            if (first != last)
                wrong[me]++;
        }
        // Move between the CPUs now and then, and leave room for others.
        if (commits[me] % 16 == 0)
            mist_sleep(200);
    }
    return NULL;
}

int main(void)
{
    if (!__rseq_size)
        mist_skip("this C library has not registered rseq");
    pthread_t t[N];
    for (long i = 0; i < N; i++)
        if (pthread_create(&t[i], NULL, loop, (void *)i))
            mist_fail("set-up: pthread_create");
    while (!commits[0] || !commits[1])
        mist_turn();

    mist_ready();
    mist_wait();

    uint64_t c0 = commits[0], c1 = commits[1];
    for (int i = 0; i < 5000 && (commits[0] < c0 + 20 || commits[1] < c1 + 20); i++)
        mist_turn();
    CHECK("both threads go on committing", 1, commits[0] >= c0 + 20 && commits[1] >= c1 + 20);
    stop = 1;
    for (int i = 0; i < N; i++)
        pthread_join(t[i], NULL);
    CHECK("commits on another CPU, thread 0", 0, wrong[0]);
    CHECK("commits on another CPU, thread 1", 0, wrong[1]);
    // Still registered: a second registration is refused, and the kernel keeps cpu_id current.
    CHECK_ERR("rseq is registered", EBUSY, syscall(SYS_rseq, area(), 32, 0, 0x53053053));
    CHECK("cpu_id", 1, area()->cpu_id < 4096);
    cpu_set_t cpus;
    CALL(sched_getaffinity(0, sizeof cpus, &cpus));
    for (int c = 0; c < CPU_SETSIZE; c++)
        if (CPU_ISSET(c, &cpus)) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(c, &one);
            CALL(sched_setaffinity(0, sizeof one, &one));
            CHECK("cpu_id after a move", c, *(volatile uint32_t *)&area()->cpu_id);
        }
    mist_pass();
}
