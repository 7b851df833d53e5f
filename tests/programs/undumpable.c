// PR_SET_DUMPABLE 0 stays so; its /proc files belong to root, which must not keep root's
// mistctl from saving it.
#include "mist.h"

int main(void)
{
    MUST(prctl(PR_SET_DUMPABLE, 0));
    char *m = malloc(100000);
    mist_fill(m, 100000, 5);

    mist_ready();
    mist_wait();

    CHECK("dumpable", 0, prctl(PR_GET_DUMPABLE));
    mist_check_fill("memory", m, 100000, 5);
    mist_pass();
}
