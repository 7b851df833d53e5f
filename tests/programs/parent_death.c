// Signals at a parent's end (PR_SET_PDEATHSIG): a child of the tree keeps its own. The program itself is not ended by
// the mistctl that restores it and leaves.
// mist: tree
#include "mist.h"

int main(void)
{
    MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
    int report[2];
    MUST(pipe(report));
    pid_t middle = MUST(fork());
    if (!middle) {
        pid_t child = MUST(fork());
        if (!child) {
            MUST(prctl(PR_SET_PDEATHSIG, SIGUSR1));
            sigset_t set;
            sigemptyset(&set);
            sigaddset(&set, SIGUSR1);
            sigprocmask(SIG_BLOCK, &set, NULL);
            MUST(write(report[1], "r", 1));
            int signal = sigwaitinfo(&set, NULL);
            _exit(write(report[1], signal == SIGUSR1 ? "y" : "n", 1) != 1);
        }
        mist_wait();
        _exit(0);
    }
    char c = 0;
    MUST(read(report[0], &c, 1));
    mist_ready();
    mist_wait();
    int status;
    CHECK("waitpid", middle, CALL(waitpid(middle, &status, 0)));
    CHECK("read", 1, CALL(read(report[0], &c, 1)));
    CHECK("the child's signal", 'y', c);
    mist_pass();
}
