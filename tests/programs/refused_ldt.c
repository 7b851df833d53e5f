// mist: refused local descriptor table
#include "mist.h"
#include <asm/ldt.h>

int main(void)
{
    struct user_desc d = {.entry_number = 3, .base_addr = 0x12340000, .limit = 0xfff, .seg_32bit = 1, .useable = 1};
    if (syscall(SYS_modify_ldt, 1, &d, sizeof d) < 0)
        mist_skip("this kernel has no modify_ldt");
    char before[64] = {0}, after[64] = {0};
    long len = MUST(syscall(SYS_modify_ldt, 0, before, sizeof before));
    mist_ready();
    mist_wait();
    CHECK("its length", len, syscall(SYS_modify_ldt, 0, after, sizeof after));
    CHECK_MEM("its entries", before, after, sizeof after);
    mist_pass();
}
