// A user at his limit of processes: no copy can be made of his program, which is saved while it stands.
// mist: user
// mist: no-rounds its writes cannot be followed, which takes a child too
#include "mist.h"
#include <sys/resource.h>

int main(void)
{
    struct rlimit none = {1, 1}, limit;
    MUST(setrlimit(RLIMIT_NPROC, &none));
    char *m = MUST(mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(m, 1 << 20, 82);
    CHECK_ERR("a child", EAGAIN, fork());

    mist_ready();
    mist_wait();

    mist_check_fill("memory", m, 1 << 20, 82);
    MUST(getrlimit(RLIMIT_NPROC, &limit));
    CHECK("limit", 1, limit.rlim_cur);
    CHECK_ERR("a child afterwards", EAGAIN, fork());
    CHECK("a subreaper", 0, ({ int is = 7; MUST(prctl(PR_GET_CHILD_SUBREAPER, &is)); is; }));
    CHECK_ERR("children", ECHILD, waitpid(-1, NULL, WNOHANG | __WALL));
    mist_pass();
}
