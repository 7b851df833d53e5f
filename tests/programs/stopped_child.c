// A shell's jobs: children in groups of their own, stopped by what a terminal's keys and its owner send, and one by
// SIGSTOP. Their parent is told by which signal each is stopped, and they go on by SIGCONT only.
// mist: tree
#include "mist.h"

static const int signals[] = {SIGTSTP, SIGTTIN, SIGTTOU, SIGSTOP};
enum { COUNT = sizeof signals / sizeof *signals };

int main(void)
{
    pid_t child[COUNT];
    int status;
    for (int i = 0; i < COUNT; i++) {
        if (!(child[i] = MUST(fork()))) {
            sigset_t all;
            sigfillset(&all);
            sigdelset(&all, signals[i]);
            MUST(setpgid(0, 0));
            // A signal that waits is not what it is stopped by.
            MUST(sigprocmask(SIG_SETMASK, &all, NULL));
            MUST(kill(getpid(), SIGUSR1));
            MUST(kill(getpid(), signals[i]));
            MUST(sigpending(&all));
            CHECK("SIGUSR1 waits", 1, sigismember(&all, SIGUSR1));
            _exit(10 + i);
        }
        CHECK("the child", child[i], MUST(waitpid(child[i], &status, WUNTRACED)));
        CHECK("stopped by", signals[i], WIFSTOPPED(status) ? WSTOPSIG(status) : -1);
    }
    mist_ready();
    mist_wait();
    for (int i = 0; i < COUNT; i++) {
        // Let go a moment after us it may still be on its way there.
        char path[64], state = 0;
        snprintf(path, sizeof path, "/proc/%d/stat", child[i]);
        while (state != 'T') {
            FILE *f = fopen(path, "r");
            CHECK("its state", 1, f && fscanf(f, "%*d %*s %c", &state) == 1);
            fclose(f);
            CHECK("it has not gone on", 0, state == 'Z');
        }
        // Told once more when it was restored.
        pid_t told = MUST(waitpid(child[i], &status, WUNTRACED | WNOHANG));
        if (told)
            CHECK("still stopped by", signals[i], WIFSTOPPED(status) ? WSTOPSIG(status) : -1);
        MUST(kill(child[i], SIGCONT));
        CHECK("the child again", child[i], MUST(waitpid(child[i], &status, 0)));
        CHECK("its end", 10 + i, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    }
    mist_pass();
}
