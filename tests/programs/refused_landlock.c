// Rules that a program gives itself: by all of its threads, or by one.
// mist: refused landlock_restrict_self
// mist: variants main thread
// mist: cflags -pthread
#include "mist.h"
#include <linux/landlock.h>
#include <pthread.h>

static int done[2];

static void restrict_self(void)
{
    struct landlock_ruleset_attr a = {.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_DIR};
    int rules = syscall(SYS_landlock_create_ruleset, &a, sizeof a, 0);
    if (rules < 0)
        mist_skip("this kernel has no Landlock, or none for us");
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(syscall(SYS_landlock_restrict_self, rules, 0));
    close(rules);
}

static void is_restricted(void)
{
    CHECK_ERR("mkdir", EACCES, mkdir(mist_path("forbidden"), 0777));
}

static void *thread(void *own)
{
    if (own)
        restrict_self();
    MUST(write(done[1], "x", 1));
    mist_wait();
    is_restricted();
    return NULL;
}

int main(int argc, char **argv)
{
    char c;
    pthread_t t;
    int own = argc > 1 && !strcmp(argv[1], "thread");
    MUST(pipe2(done, O_CLOEXEC));
    if (!own)
        restrict_self();
    pthread_create(&t, NULL, thread, own ? done : NULL);
    MUST(read(done[0], &c, 1));
    mist_ready();
    mist_wait();
    if (!own)
        is_restricted();
    pthread_join(t, NULL);
    mist_pass();
}
