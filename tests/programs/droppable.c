// Memory that the kernel may empty when it likes (MAP_DROPPABLE): getrandom(2) in the vDSO keeps its state there, and may
// not go on with it in two places.
#include "mist.h"
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif

// When the process began: a restored one began at its restore.
static unsigned long long began(void)
{
    char text[1024];
    mist_slurp("/proc/self/stat", text, sizeof text);
    char *at = strrchr(text, ')') + 2;
    for (int field = 3; field < 22; field++)
        at = strchr(at, ' ') + 1;
    return strtoull(at, NULL, 10);
}

int main(void)
{
    enum { SIZE = 16384 };
    unsigned char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        mist_skip("this kernel has no MAP_DROPPABLE");
    memset(p, 7, SIZE);
    unsigned long long then = began();

    mist_ready();
    mist_wait();

    CHECK("it may still be dropped", 1, strstr(mist_smaps(p, "VmFlags"), " dp") != NULL);
    mist_check_byte("its content", p, SIZE, began() == then ? 7 : 0);
    mist_pass();
}
