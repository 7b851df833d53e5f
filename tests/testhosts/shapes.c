/*
 * Changes what its memory is while it goes from host to host: heap and mappings grow and shrink, are emptied, become
 * read-only and writable again, move, come and go. Knows of every page what it should hold, and looks.
 *
 *     shapes FILE    spawns a task that does it until FILE is there, and says what came of it
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pvm3.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RESULT = 1, PAGE = 4096, WORDS = PAGE / 8, AREAS = 5, MOST = 3072, SPARSE = 18000 };

static struct area {
    uint64_t *at;
    int pages;
    /* What each word of a page is; 0: nothing was ever written. */
    uint64_t wanted[MOST];
} areas[AREAS];

/* Much, in a mapping that is too large to be noted page by page. */
static uint64_t *sparse;

static uint64_t x = 88172645463325252u;

static unsigned chance(unsigned below)
{
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x % below;
}

static void fill(struct area *a, int from, int to)
{
    for (int i = from; i < to; i++) {
        /* Some are zeros that were written. */
        a->wanted[i] = chance(8) ? x : 0;
        for (int w = 0; w < WORDS; w++)
            a->at[(size_t)i * WORDS + w] = a->wanted[i];
    }
}

static int wrong(struct area *a)
{
    for (int i = 0; i < a->pages; i++)
        for (int w = 0; w < WORDS; w++)
            if (a->at[(size_t)i * WORDS + w] != a->wanted[i])
                return 1;
    return 0;
}

/* One area is a mapping of its own whatever lies beside it, by a flag that the others do not have. */
static int is_apart(struct area *a)
{
    return a == areas + 1;
}

static uint64_t *map(struct area *a, int pages)
{
    size_t len = (size_t)pages * PAGE;
    void *at = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (at != MAP_FAILED && is_apart(a))
        madvise(at, len, MADV_DONTDUMP);
    return at;
}

/* As mremap(2), also of what the kernel has in two mappings: it makes one of those that lie side by side, and cuts that
 * anywhere when a part becomes read-only and the parts are written to before they are alike again. */
static void *move(struct area *a, size_t old, size_t new)
{
    void *at = mremap(a->at, old, new, MREMAP_MAYMOVE);

    if (at != MAP_FAILED || errno != EFAULT || is_apart(a))
        return at;
    at = map(a, new / PAGE);
    if (at != MAP_FAILED) {
        memcpy(at, a->at, old < new ? old : new);
        munmap(a->at, old);
    }
    return at;
}

/* To so many pages; what is new is zero. */
static int resize(struct area *a, int pages)
{
    size_t old = (size_t)a->pages * PAGE, new = (size_t)pages * PAGE;

    mprotect(a->at, old, PROT_READ | PROT_WRITE);
    if (a == areas) {
        /* The heap's end: nobody else moves it while this runs. */
        if (sbrk((intptr_t)new - (intptr_t)old) == (void *)-1)
            return 1;
    } else {
        void *at = move(a, old, new);
        if (at == MAP_FAILED)
            return 1;
        a->at = at;
    }
    for (int i = a->pages; i < pages; i++)
        a->wanted[i] = 0;
    a->pages = pages;
    return 0;
}

/* Of what does not change only some pages. */
static int sparse_wrong(int pages)
{
    while (pages--) {
        size_t first = chance(SPARSE) * (size_t)WORDS;
        for (size_t i = first; i < first + WORDS; i++)
            if (sparse[i] != (i | 1))
                return 1;
    }
    return 0;
}

static const char *change(void)
{
    struct area *a = areas + chance(AREAS);
    int from = chance(a->pages), to = from + 1 + chance(a->pages - from);
    char *begin = (char *)a->at + (size_t)from * PAGE;
    size_t len = (size_t)(to - from) * PAGE;

    switch (chance(7)) {
    case 0:
        madvise(begin, len, MADV_DONTNEED);
        memset(a->wanted + from, 0, (to - from) * sizeof *a->wanted);
        break;
    case 1:
        if (resize(a, 256 + chance(MOST - 256)))
            return "no memory";
        break;
    case 2:
        mprotect(begin, len, PROT_READ);
        break;
    case 3:
        mprotect(a->at, (size_t)a->pages * PAGE, PROT_READ | PROT_WRITE);
        break;
    case 4:
        if (a == areas)
            break;
        munmap(a->at, (size_t)a->pages * PAGE);
        a->at = map(a, a->pages);
        memset(a->wanted, 0, sizeof a->wanted);
        break;
    default:
        mprotect(a->at, (size_t)a->pages * PAGE, PROT_READ | PROT_WRITE);
        fill(a, from, to);
    }
    return 0;
}

static void shift(const char *end, char *said, size_t size)
{
    unsigned long count = 0;

    sparse = mmap(0, 65ul << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    sparse += 3ul << 30 >> 3;
    for (size_t i = 0; i < SPARSE * WORDS; i++)
        sparse[i] = i | 1;
    /* It begins at a page. */
    sbrk(PAGE - (uintptr_t)sbrk(0) % PAGE);
    areas[0].at = sbrk(0);
    for (int i = 0; i < AREAS; i++) {
        struct area *a = areas + i;
        a->pages = 2048;
        if (i)
            a->at = map(a, a->pages);
        else
            sbrk((intptr_t)a->pages * PAGE);
        fill(a, 0, a->pages);
    }
    while (access(end, F_OK)) {
        const char *failed = change();
        for (int i = 0; !failed && i < AREAS; i++)
            if ((count % 16 == 0 || i == (int)(count % AREAS)) && wrong(areas + i))
                failed = "memory is not what it was";
        if (!failed && sparse_wrong(8))
            failed = "sparse memory is not what it was";
        if (failed) {
            snprintf(said, size, "%s, at change %lu", failed, count);
            return;
        }
        count++;
    }
    if (sparse_wrong(4 * SPARSE))
        snprintf(said, size, "sparse memory is not what it was");
    else
        snprintf(said, size, "all there after %lu changes", count);
}

int main(int argc, char **argv)
{
    char said[512];
    char *arguments[] = { argv[1], "task", 0 };
    int tid;

    if (pvm_mytid() < 0 || argc < 2)
        return 2;
    if (argc == 3) {
        shift(argv[1], said, sizeof said);
        pvm_initsend(PvmDataDefault);
        pvm_pkstr(said);
        pvm_send(pvm_parent(), RESULT);
    } else {
        if (pvm_spawn(argv[0], arguments, PvmTaskDefault, "", 1, &tid) != 1)
            return 3;
        pvm_recv(tid, RESULT);
        pvm_upkstr(said);
        printf("shapes: %s\n", said);
    }
    pvm_exit();
    return 0;
}
