// Threads that allocate, grow, shrink and free blocks of all sizes and know what is in each of
// them, in rounds, until the file `go` is there (or for $STEPS rounds). To be run with another
// allocator preloaded. What calloc gives must be zero: allocators rely on the kernel's zeros
// after madvise(MADV_DONTNEED) and in fresh mappings.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 4, BLOCKS = 600 };

struct block {
    unsigned char *at;
    size_t len;
    uint64_t seed;
};
struct thread {
    pthread_t id;
    uint64_t random, sum, allocated;
    struct block blocks[BLOCKS];
};
static struct thread threads[THREADS];
static pthread_barrier_t begin, end;
static int over;

static void fail(const char *what, const struct block *b, size_t i)
{
    fprintf(stderr, "%s: block %p of %zu bytes, byte %zu is %#x\n", what, (void *)b->at, b->len, i,
            b->at[i]);
    _exit(1);
}

static uint64_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

static unsigned char byte(uint64_t seed, size_t i)
{
    return (unsigned char)(seed + i * 131 + (i >> 8));
}

static void fill(struct block *b, size_t from)
{
    for (size_t i = from; i < b->len; i++)
        b->at[i] = byte(b->seed, i);
}

static void check(const struct block *b, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (b->at[i] != byte(b->seed, i))
            fail("a block has changed", b, i);
}

// Mostly small ones, some of many pages, a few that get mappings of their own.
static size_t some_size(uint64_t *random)
{
    uint64_t r = next(random) % 1000;
    if (r < 800)
        return 1 + next(random) % 500;
    if (r < 990)
        return 1 + next(random) % 20000;
    return 1 + next(random) % 3000000;
}

static void step(struct thread *t)
{
    struct block *b = &t->blocks[next(&t->random) % BLOCKS];
    uint64_t what = next(&t->random) % 100;
    size_t len = some_size(&t->random);
    t->sum = t->sum * 31 + len + what;
    if (b->at) {
        check(b, b->len);
        if (what < 30) {
            size_t old = b->len;
            b->at = realloc(b->at, len);
            if (!b->at)
                abort();
            b->len = len;
            check(b, old < len ? old : len);
            fill(b, old < len ? old : len);
            return;
        }
        free(b->at);
        b->at = NULL;
        return;
    }
    b->len = len;
    b->seed = next(&t->random);
    if (what < 50) {
        b->at = calloc(1, len);
        if (!b->at)
            abort();
        for (size_t i = 0; i < len; i++)
            if (b->at[i])
                fail("calloc gave what is not zero", b, i);
    } else if (what < 60) {
        if (posix_memalign((void **)&b->at, 4096, len))
            abort();
    } else {
        b->at = malloc(len);
        if (!b->at)
            abort();
    }
    fill(b, 0);
}

static void *run(void *arg)
{
    struct thread *t = arg;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (over)
            return NULL;
        for (int i = 0; i < 60; i++)
            step(t);
        pthread_barrier_wait(&end);
    }
}

static void put(const char *name, const char *mode, unsigned long a, unsigned long b)
{
    FILE *f = fopen(name, mode);
    if (!f || fprintf(f, "%lu %lu\n", a, b) < 0 || fclose(f))
        abort();
}

int main(void)
{
    if (!dlsym(RTLD_DEFAULT, "mallctl")) {
        fputs("the allocator was not preloaded\n", stderr);
        return 1;
    }
    const char *env = getenv("STEPS");
    unsigned long steps = env ? strtoul(env, NULL, 10) : 0, count = 0;
    pthread_barrier_init(&begin, NULL, THREADS + 1);
    pthread_barrier_init(&end, NULL, THREADS + 1);
    for (int i = 0; i < THREADS; i++) {
        threads[i].random = 88172645463325252u + i;
        if (pthread_create(&threads[i].id, NULL, run, &threads[i]))
            abort();
    }
    while (steps ? count != steps : access("go", F_OK) != 0) {
        count++;
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&end);
        if (count % 5 == 0)
            put("progress", "a", count, 0);
        usleep(2000);
    }
    over = 1;
    pthread_barrier_wait(&begin);
    unsigned long sum = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i].id, NULL);
        for (int k = 0; k < BLOCKS; k++)
            if (threads[i].blocks[k].at) {
                check(&threads[i].blocks[k], threads[i].blocks[k].len);
                sum += threads[i].blocks[k].len;
                free(threads[i].blocks[k].at);
            }
        sum = sum * 31 + threads[i].sum;
    }
    put("out", "w", sum, 0);
    put("count", "w", count, 0);
    return 0;
}
