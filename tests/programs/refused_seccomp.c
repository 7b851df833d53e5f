// A seccomp filter: refused, by name, and nobody is harmed.
// mist: refused seccomp
#include "mist.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

int main(void)
{
    struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog p = {1, allow};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p) < 0)
        mist_skip("this kernel has no seccomp filters");
    mist_ready();
    mist_wait();
    CHECK("the filter", SECCOMP_MODE_FILTER, prctl(PR_GET_SECCOMP));
    mist_pass();
}
