// Memory that is of several kinds becomes one mapping again, and grows as a whole: the kernel has to know still that it was one.
// mist: copied
#include "mist.h"
#define PAGE 4096ul
#define PARTS 16ul

// Parts that are of another kind meanwhile.
static const struct {
    size_t first, count;
    int prot;
} cuts[] = {{3, 1, PROT_READ}, {5, 2, PROT_NONE}, {9, 1, PROT_READ | PROT_EXEC}, {12, 2, PROT_READ}};

static char *make(size_t len, unsigned seed)
{
    size_t part = len / PARTS;
    char *at = MUST(mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    // The last part is never written.
    mist_fill(at, len - part, seed);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++)
        MUST(mprotect(at + cuts[i].first * part, cuts[i].count * part, cuts[i].prot));
    // What is mapped next does not join it.
    MUST(mmap(NULL, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    return at;
}

static void check(char *at, size_t len, unsigned seed)
{
    CALL(mprotect(at, len, PROT_READ | PROT_WRITE));
    char *grown = mremap(at, len, 2 * len, MREMAP_MAYMOVE);
    if (grown == MAP_FAILED)
        mist_fail("mremap of all %zu bytes: %s", len, strerror(errno));
    mist_check_fill("its content", grown, len - len / PARTS, seed);
    CHECK("what is behind", 0, grown[2 * len - 1]);
}

int main(void)
{
    const size_t small = PARTS * PAGE, large = 48ul << 20;
    char *a = make(small, 61), *b = make(large, 62), *c = make(small, 63);

    mist_ready();
    mist_wait();
    check(a, small, 61);
    check(b, large, 62);
    check(c, small, 63);
    mist_pass();
}
