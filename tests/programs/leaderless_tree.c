// A child whose first thread has ended, waited for by its parent. A grandchild that dies with the
// thread that made it lives on.
// mist: tree
// mist: cflags -pthread
#include "mist.h"
#include <pthread.h>

static pid_t leader;

static void *rest(void *arg)
{
    (void)arg;
    while (mist_status(leader, "State")[0] != 'Z')
        mist_turn();
    pid_t grandchild = MUST(fork());
    if (grandchild == 0) {
        MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
        mist_ready();
        while (!mist_gone_on())
            mist_turn();
        _exit(4);
    }
    int status;
    CALL(waitpid(grandchild, &status, 0));
    CHECK("the grandchild's status", 4 << 8, status);
    syscall(SYS_exit, 3);
    return NULL;
}

int main(void)
{
    pthread_t t;
    pid_t child = MUST(fork());
    if (child == 0) {
        leader = getpid();
        pthread_create(&t, NULL, rest, NULL);
        syscall(SYS_exit, 7);
    }
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 3 << 8, status);
    CHECK("gone on", 1, mist_gone_on());
    mist_pass();
}
