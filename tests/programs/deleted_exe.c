// A program whose own file is deleted while it runs.
#include "mist.h"

int main(int argc, char **argv)
{
    static char buf[1 << 20];
    if (argc < 2) {
        int a = MUST(open("/proc/self/exe", O_RDONLY)), b = MUST(open("self", O_WRONLY | O_CREAT | O_EXCL, 0755));
        for (ssize_t n; (n = MUST(read(a, buf, sizeof buf))) > 0;)
            MUST(write(b, buf, n));
        close(a);
        close(b);
        execl("./self", argv[0], "again", (char *)NULL);
        mist_fail("set-up: exec: %s", strerror(errno));
    }
    MUST(unlink("self"));
    struct stat before, after;
    MUST(stat("/proc/self/exe", &before));

    mist_ready();
    mist_wait();

    CALL(stat("/proc/self/exe", &after));
    CHECK("its size", before.st_size, after.st_size);
    int fd = CALL(open("/proc/self/exe", O_RDONLY));
    CHECK("it can be read", 1, read(fd, buf, sizeof buf) > 1000);
    CHECK_MEM("and is one", "\177ELF", buf, 4);
    CHECK_ERR("it has no name", ENOENT, access("self", F_OK));
    // It can be run again.
    pid_t child = CALL(fork());
    if (!child) {
        char *args[] = {argv[0], NULL};
        CALL(chdir("/"));
        execv("/bin/true", args);
        _exit(1);
    }
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("a child's status", 0, status);
    mist_pass();
}
