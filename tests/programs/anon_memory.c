// Private anonymous memory: content, holes, zero pages, and that it still behaves like
// anonymous memory afterwards (zeros after MADV_DONTNEED, mremap, mprotect, fork).
// mist: copied
#include "mist.h"
#define PAGE 4096ul
#define PAGES 2048ul

static int present(void *p)
{
    unsigned char v;
    CALL(mincore(p, PAGE, &v));
    return v & 1;
}

int main(void)
{
    // Every third page written, every third zero but touched, every third never touched.
    char *m = MUST(mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    MUST(madvise(m, PAGES * PAGE, MADV_NOHUGEPAGE));
    for (size_t i = 0; i < PAGES; i++) {
        if (i % 3 == 0)
            mist_fill(m + i * PAGE, PAGE, i * 512);
        if (i % 3 == 1)
            ((volatile char *)m)[i * PAGE] = 0;
    }
    char *ro = MUST(mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(ro, 16 * PAGE, 7);
    MUST(mprotect(ro, 16 * PAGE, PROT_READ));
    char *dense = MUST(mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(dense, 4 << 20, 99);
    char *heap = malloc(300000);
    memset(heap, 0x5a, 300000);

    mist_ready();
    mist_wait();

    for (size_t i = 0; i < PAGES; i++) {
        if (i % 3 == 2)
            CHECK("a page never touched is not populated", 0, present(m + i * PAGE));
        if (i % 3 == 0)
            mist_check_fill("pattern page", m + i * PAGE, PAGE, i * 512);
        else if (i % 3 == 1)
            mist_check_byte("zero page", m + i * PAGE, PAGE, 0);
    }
    for (size_t i = 2; i < PAGES; i += 3)
        mist_check_byte("hole", m + i * PAGE, PAGE, 0);
    mist_check_fill("read-only pages", ro, 16 * PAGE, 7);
    mist_check_fill("dense pages", dense, 4 << 20, 99);
    CHECK_STR("protection of the read-only pages", "r--p", mist_smaps(ro, NULL));
    CALL(mprotect(ro, 16 * PAGE, PROT_READ | PROT_WRITE));
    memset(ro, 1, 16 * PAGE);

    CALL(madvise(dense, 2 << 20, MADV_DONTNEED));
    mist_check_byte("zeros after MADV_DONTNEED", dense, 2 << 20, 0);
    mist_check_fill("beside MADV_DONTNEED", dense + (2 << 20), 2 << 20, 99 + (2 << 20) / 8);
    CALL(madvise(m, PAGES * PAGE, MADV_FREE));
    memset(m, 0x11, PAGES * PAGE);
    mist_check_byte("written after MADV_FREE", m, PAGES * PAGE, 0x11);

    // Growing a mapping past what was saved, and moving it.
    char *grown = CALL(mremap(dense, 4 << 20, 16 << 20, MREMAP_MAYMOVE));
    mist_check_byte("mremap: given back", grown, 2 << 20, 0);
    mist_check_fill("mremap: kept", grown + (2 << 20), 2 << 20, 99 + (2 << 20) / 8);
    mist_check_byte("mremap: new", grown + (4 << 20), 12 << 20, 0);

    mist_check_byte("heap", heap, 300000, 0x5a);
    heap = realloc(heap, 3000000);
    mist_check_byte("heap after realloc", heap, 300000, 0x5a);
    memset(heap, 0x5b, 3000000);
    free(heap);
    for (int i = 0; i < 2000; i++) {
        char *p = calloc(1, 1 + i * 37 % 9000);
        mist_check_byte("calloc", p, 1 + i * 37 % 9000, 0);
        memset(p, 0xee, 1 + i * 37 % 9000);
        if (i & 1)
            free(p);
    }

    // A fork sees the same and writes on its own.
    pid_t child = CALL(fork());
    if (!child) {
        mist_check_byte("the child's memory", m, PAGES * PAGE, 0x11);
        memset(m, 0x22, PAGES * PAGE);
        _exit(0);
    }
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 0, status);
    mist_check_byte("the parent's memory after the child wrote", m, PAGES * PAGE, 0x11);
    CALL(munmap(m, PAGES * PAGE));
    mist_pass();
}
