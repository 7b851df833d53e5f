// The policy for broken memory (PR_MCE_KILL).
#include "mist.h"

int main(void)
{
    if (prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0) < 0)
        mist_skip("this kernel has no PR_MCE_KILL");
    mist_ready();
    mist_wait();
    CHECK("PR_MCE_KILL_GET", PR_MCE_KILL_EARLY, prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
    mist_pass();
}
