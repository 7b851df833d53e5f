// Processes that have one descriptor table, one current directory, or one memory: a restore would give each its own.
// mist: tree
// mist: variants descriptors directory memory thread
// mist: refused which cannot be carried
// mist: cflags -pthread
#include "mist.h"
#include <pthread.h>

static char stack[65536];
static int own_directory;

static int child(void *unused)
{
    (void)unused;
    mist_wait();
    close(77);
    chdir("/");
    _exit(7);
}

static void *thread(void *unused)
{
    MUST(unshare(CLONE_FS));
    MUST(chdir("/"));
    __atomic_store_n(&own_directory, 1, __ATOMIC_SEQ_CST);
    mist_wait();
    return unused;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    MUST(dup2(1, 77));
    if (!strcmp(what, "thread")) {
        pthread_t t;
        pthread_create(&t, NULL, thread, NULL);
        while (!__atomic_load_n(&own_directory, __ATOMIC_SEQ_CST))
            mist_turn();
        mist_ready();
        mist_wait();
        pthread_join(t, NULL);
        mist_pass();
    }
    int flags = !strcmp(what, "descriptors") ? CLONE_FILES : !strcmp(what, "directory") ? CLONE_FS : CLONE_VM;
    pid_t pid = MUST(clone(child, stack + sizeof stack - 64, flags | SIGCHLD, NULL));
    mist_ready();
    mist_wait();
    int status;
    CHECK("waitpid", pid, CALL(waitpid(pid, &status, 0)));
    CHECK("its end", 7, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    CHECK("the descriptor is there", flags == CLONE_FILES ? -1 : 0, fcntl(77, F_GETFD) < 0 ? -1 : 0);
    mist_pass();
}
