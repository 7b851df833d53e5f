// Memory that changes in every way there is, all the time: written, mapped, unmapped, moved, grown with brk, given
// back, protected, shared with children for a while. A model in the program itself (a number for each page)
// says what must be there.
// mist: dumps 12
// mist: variants plain forks
// mist: moments has children
#include "mist.h"

#define PAGES 512
#define P 4096
#define AREAS 24

struct area {
    unsigned char *at;
    int pages;
    uint32_t seed[PAGES]; // 0: a page of zeros
};

static struct area areas[AREAS];
static uint64_t state = 88172645463325252ULL;
static long steps;
// A private mapping of a file: its background is not zero.
static char data_page[8 * P] __attribute__((aligned(P))) = {[0 ... 8 * P - 1] = 1};
static char data_value[8] = {1, 1, 1, 1, 1, 1, 1, 1};

static uint32_t rnd(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}
static void fill(struct area *a, int page)
{
    uint32_t seed = rnd(8) ? rnd(1u << 30) + 1 : 0;
    uint32_t *w = (uint32_t *)(a->at + (size_t)page * P);
    for (int i = 0; i < P / 4; i++)
        w[i] = seed ? seed + i : 0;
    a->seed[page] = seed;
}
static void check(struct area *a)
{
    for (int p = 0; p < a->pages; p++) {
        uint32_t *w = (uint32_t *)(a->at + (size_t)p * P);
        for (int i = 0; i < P / 4; i++)
            if (w[i] != (a->seed[p] ? a->seed[p] + i : 0))
                mist_fail("area at %p, page %d, word %d, wanted %#x, got %#x (step %ld)", a->at, p, i,
                          a->seed[p] ? a->seed[p] + i : 0, w[i], steps);
    }
}
static void make(struct area *a)
{
    a->pages = 1 + rnd(PAGES - 1);
    a->at = mmap(NULL, (size_t)a->pages * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST((intptr_t)a->at);
    memset(a->seed, 0, sizeof a->seed);
}
static void step(void)
{
    struct area *a = &areas[rnd(AREAS)];
    unsigned char *moved;
    int page, n;
    steps++;
    if (!a->at) {
        make(a);
        return;
    }
    page = rnd(a->pages);
    switch (rnd(16)) {
    case 0: // away with it
        check(a);
        MUST(munmap(a->at, (size_t)a->pages * P));
        a->at = NULL;
        break;
    case 1: // moved, and perhaps longer
        n = a->pages + rnd(PAGES - a->pages + 1);
        moved = mremap(a->at, (size_t)a->pages * P, (size_t)n * P, MREMAP_MAYMOVE);
        // What was mapped over a part may be a mapping of its own, and both cannot be moved at once.
        if (moved == MAP_FAILED && errno == EFAULT)
            break;
        MUST((intptr_t)moved);
        a->at = moved;
        memset(a->seed + a->pages, 0, (n - a->pages) * sizeof *a->seed);
        a->pages = n;
        break;
    case 2: // shorter
        n = 1 + rnd(a->pages);
        if (n < a->pages)
            MUST(munmap(a->at + (size_t)n * P, (size_t)(a->pages - n) * P));
        memset(a->seed + n, 0, (a->pages - n) * sizeof *a->seed);
        a->pages = n;
        break;
    case 3: // given back
        n = 1 + rnd(a->pages - page);
        MUST(madvise(a->at + (size_t)page * P, (size_t)n * P, MADV_DONTNEED));
        memset(a->seed + page, 0, n * sizeof *a->seed);
        break;
    case 4: // mapped over
        n = 1 + rnd(a->pages - page);
        MUST((intptr_t)mmap(a->at + (size_t)page * P, (size_t)n * P, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
        memset(a->seed + page, 0, n * sizeof *a->seed);
        break;
    case 5: // not to be read for a while
        MUST(mprotect(a->at, (size_t)a->pages * P, PROT_NONE));
        if (rnd(2))
            sched_yield();
        MUST(mprotect(a->at, (size_t)a->pages * P, PROT_READ | PROT_WRITE));
        break;
    case 6: // only read: the zero page
        check(a);
        break;
    default:
        for (n = 1 + rnd(8); n > 0; n--)
            fill(a, rnd(a->pages));
    }
}

static unsigned char *heap;
static size_t heap_len;
static void grow(void)
{
    unsigned char *end = sbrk(3 * P);
    MUST((intptr_t)end);
    CHECK("the heap's end", (intptr_t)(heap + heap_len), (intptr_t)end);
    for (size_t i = 0; i < 3 * P; i++)
        end[i] = (heap_len + i) * 7 + (i >> 8);
    heap_len += 3 * P;
}
static void check_heap(void)
{
    for (size_t at = 0; at < heap_len; at += 3 * P)
        for (size_t i = 0; i < 3 * P; i++)
            if (heap[at + i] != (unsigned char)((at + i) * 7 + (i >> 8)))
                mist_fail("heap at %zu, wanted %d, got %d", at + i, (unsigned char)((at + i) * 7 + (i >> 8)),
                          heap[at + i]);
}

int main(int argc, char **argv)
{
    int forks = argc > 1 && !strcmp(argv[1], "forks");
    heap = MUST(sbrk(0));
    heap = (unsigned char *)(((uintptr_t)heap + P - 1) & ~(uintptr_t)(P - 1));
    MUST(brk(heap));
    for (int i = 0; i < 2000; i++)
        step();
    mist_ready();
    for (int turn = 0; access(mist_path("go"), F_OK) != 0; turn++) {
        for (int i = 0; i < 50; i++)
            step();
        if (turn % 16 == 0 && heap_len < (8u << 20))
            grow();
        // Zeros over what the program's file has there.
        memset(data_page + (turn % 8) * P, turn / 8 & 1 ? turn & 127 : 0, P);
        data_value[turn % 8] = turn / 8 & 1 ? turn & 127 : 0;
        if (forks && turn % 8 == 0) {
            pid_t child = fork();
            if (child == 0) {
                // It writes to its own copy.
                for (int i = 0; i < AREAS; i++)
                    if (areas[i].at)
                        areas[i].at[0] ^= 1;
                _exit(0);
            }
            MUST(child);
            int status;
            CHECK("the child", child, waitpid(child, &status, 0));
        }
        if (turn % 64 == 0)
            for (int i = 0; i < AREAS; i++)
                if (areas[i].at)
                    check(&areas[i]);
    }
    for (int i = 0; i < AREAS; i++)
        if (areas[i].at)
            check(&areas[i]);
    for (int i = 0; i < 8 * P; i++)
        CHECK("the program's data", data_value[i / P], data_page[i]);
    check_heap();
    mist_pass();
}
