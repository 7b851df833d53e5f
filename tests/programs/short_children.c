// Children that live for a moment, one after the other: dumped without them it has to be at a moment without one.
// mist: moments has children
#include "mist.h"

int main(void)
{
    mist_ready();
    for (int turn = 0; access(mist_path("go"), F_OK) != 0; turn++) {
        pid_t child = MUST(fork());
        int status = 0;
        if (child == 0) {
            usleep(100);
            _exit(turn & 127);
        }
        CHECK("the child", child, waitpid(child, &status, 0));
        CHECK("its status", turn & 127, WEXITSTATUS(status));
        // Long enough for a dump to find none.
        for (int i = 0; i < 20; i++)
            sched_yield();
        usleep(300);
    }
    mist_pass();
}
