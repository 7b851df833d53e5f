// A process that forbids itself memory both writable and executable (PR_SET_MDWE).
#include "mist.h"
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

int main(void)
{
    char *text = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memcpy(text, "\xb8\x2a\0\0\0\xc3", 6);
    MUST(mprotect(text, 4096, PROT_READ | PROT_EXEC));
    if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) < 0)
        mist_skip("this kernel has no PR_SET_MDWE");

    mist_ready();
    mist_wait();

    CHECK("PR_GET_MDWE", PR_MDWE_REFUSE_EXEC_GAIN, prctl(PR_GET_MDWE, 0, 0, 0, 0));
    CHECK("code of our own", 42, ((int (*)(void))text)());
    CHECK_ERR("no new code", EACCES, mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_pass();
}
