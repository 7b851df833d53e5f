// brk and the stack grow as before, a second MAP_GROWSDOWN mapping too.
// mist: copied
#include "mist.h"

static int deep(int n)
{
    volatile char frame[4096];
    memset((char *)frame, n, sizeof frame);
    int r = n ? deep(n - 1) : 0;
    return r + (frame[100] == (char)n);
}

int main(void)
{
    volatile uint64_t on_stack[4096];
    for (int i = 0; i < 4096; i++)
        on_stack[i] = mist_mix(i);
    char *start = sbrk(0);
    char *mine = MUST(sbrk(1 << 20));
    mist_fill(mine, 1 << 20, 3);
    // A stack of our own, 64 KiB mapped, with room below for it to grow.
    char *room = MUST(mmap(NULL, 16 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    MUST(munmap(room, 16 << 20));
    char *down = MUST(mmap(room + (16 << 20) - 65536, 65536, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0));
    mist_fill(down, 65536, 4);

    mist_ready();
    mist_wait();

    for (int i = 0; i < 4096; i++)
        CHECK("a word on the stack", mist_mix(i), on_stack[i]);
    CHECK("the stack grows to 6 MiB", 1500, deep(1499));
    CHECK("the break", (intptr_t)start + (1 << 20), (intptr_t)sbrk(0));
    mist_check_fill("the heap", mine, 1 << 20, 3);
    char *more = CALL(sbrk(8 << 20));
    CHECK("where brk grows", (intptr_t)start + (1 << 20), (intptr_t)more);
    mist_check_byte("new heap", more, 8 << 20, 0);
    memset(more, 1, 8 << 20);
    CALL(brk(more));
    CALL(sbrk(1 << 20));
    mist_check_byte("heap given back and taken again", more, 1 << 20, 0);

    mist_check_fill("MAP_GROWSDOWN", down, 65536, 4);
    CHECK("MAP_GROWSDOWN is still growing", 1, strstr(mist_smaps(down, "VmFlags"), "gd") != NULL);
    // Page by page: the kernel lets it grow on any fault just below.
    for (int i = 1; i <= 64; i++)
        ((volatile char *)down)[-4096 * i] = i;
    for (int i = 1; i <= 64; i++)
        CHECK("a grown page", i, down[-4096 * i]);
    char text[64];
    mist_slurp("/proc/self/maps", text, sizeof text);
    CHECK("[stack] in maps", 1, *mist_smaps((void *)on_stack, "VmFlags") != 0);
    CHECK("the stack is growing", 1, strstr(mist_smaps((void *)on_stack, "VmFlags"), "gd") != NULL);
    mist_pass();
}
