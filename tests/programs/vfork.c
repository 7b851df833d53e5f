// A parent in vfork, whose child takes its time: a dump of the tree waits or refuses, but
// harms nobody; the parent sees only its child's end.
// mist: tree
// mist: may-refuse vfork
#include "mist.h"

int main(void)
{
    static char *argv[] = {"/bin/sh", "-c", "while [ ! -e go ]; do sleep 0.01; done; exit 66", NULL};
    pid_t watcher = MUST(fork());
    if (!watcher) {
        // The parent sleeps uninterruptibly: somebody else has to say that it is so.
        pid_t parent = getppid();
        while (mist_status(parent, "State")[0] != 'D')
            mist_turn();
        mist_ready();
        _exit(0);
    }
    pid_t child = vfork();
    if (!child) {
        // In the parent's memory: raw calls only.
        while (access("go", F_OK)) {
            struct timespec t = {0, 2000000};
            nanosleep(&t, NULL);
        }
        execv(argv[0], argv);
        _exit(127);
    }
    int status;
    CHECK("waitpid", child, CALL(waitpid(child, &status, 0)));
    CHECK("exit code", 66, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    CHECK("the watcher", watcher, CALL(waitpid(watcher, &status, 0)));
    mist_pass();
}
