// The current directory was deleted: of one process with all above it, of the other alone, and that name was taken
// again by another directory.
// mist: tree
#include "mist.h"

static void check(void)
{
    char cwd[4096];
    struct stat st;
    CHECK_ERR("getcwd", ENOENT, getcwd(cwd, sizeof cwd) ? 0 : -1);
    CALL(stat(".", &st));
    CHECK("links", 0, st.st_nlink);
    CHECK_ERR("a file in it", ENOENT, open("file", O_RDWR | O_CREAT, 0600));
}

int main(void)
{
    MUST(mkdir("above", 0755));
    MUST(mkdir("above/below", 0755));
    MUST(mkdir("again", 0755));
    int go[2], ready[2];
    MUST(pipe(go));
    MUST(pipe(ready));
    pid_t child = MUST(fork());
    if (!child) {
        close(go[1]);
        MUST(chdir("above/below"));
        MUST(rmdir("../below"));
        MUST(rmdir(mist_path("above")));
        MUST(write(ready[1], "", 1));
        char byte;
        while (read(go[0], &byte, 1) < 0)
            CHECK("errno", EINTR, errno);
        check();
        _exit(66);
    }
    close(go[0]);
    MUST(chdir("again"));
    MUST(rmdir("../again"));
    MUST(mkdir(mist_path("again"), 0755));
    char byte;
    MUST(read(ready[0], &byte, 1));
    mist_ready();
    mist_wait();
    check();
    CALL(write(go[1], "", 1));
    int status;
    CHECK("waitpid", child, CALL(waitpid(child, &status, 0)));
    CHECK("exit code", 66, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    CHECK("the other directory stays", 0, access(mist_path("again"), F_OK));
    mist_pass();
}
