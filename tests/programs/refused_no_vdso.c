// A program that has unmapped its vDSO, as valgrind does.
// mist: refused has no vDSO
#include "mist.h"
#include <sys/auxv.h>

int main(void)
{
    uintptr_t at = getauxval(AT_SYSINFO_EHDR);
    char line[256];
    unsigned long a, b;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx", &a, &b) == 2 && a == at)
            MUST(munmap((void *)a, b - a));
    // libc keeps pointers into it: nothing that asks for the time may be called from here on.
    mist_ready();
    while (!mist_gone_on())
        mist_sleep(2000);
    mist_pass();
}
