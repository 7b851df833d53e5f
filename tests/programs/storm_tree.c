// Children that come and go while the tree is saved: each is waited for exactly once.
// mist: tree
// mist: dumps 30
#include "mist.h"

int main(void)
{
    long n = 0;
    mist_ready();
    for (int after = 0; after < 50; n++) {
        after += mist_gone_on();
        pid_t c = fork();
        if (c < 0)
            mist_fail("fork, wanted a child, got %s", strerror(errno));
        if (!c) {
            if (n % 2)
                mist_sleep(2000);
            _exit(n % 100);
        }
        int status = -1;
        pid_t w = waitpid(-1, &status, __WALL);
        if (w != c)
            mist_fail("waitpid, wanted %d, got %d with status %#x (%s)", c, w, status, strerror(errno));
        CHECK("exit code", n % 100, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
        CHECK("no other child", -1, waitpid(-1, &status, WNOHANG | __WALL));
    }
    mist_pass();
}
