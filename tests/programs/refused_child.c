// A child, and no --tree: refused, with the option's name.
// mist: refused --tree
#include "mist.h"

int main(void)
{
    pid_t child = MUST(fork());
    if (!child) {
        mist_wait();
        _exit(9);
    }
    mist_ready();
    mist_wait();
    int status;
    CHECK("waitpid", child, CALL(waitpid(child, &status, 0)));
    CHECK("exit code", 9, WEXITSTATUS(status));
    mist_pass();
}
