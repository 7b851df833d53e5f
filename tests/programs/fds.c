// The descriptor table itself: sparse numbers, many of them, close-on-exec, descriptions shared
// by dup, F_SETOWN and F_SETSIG, and that close-on-exec closes on exec.
#include "mist.h"

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "after-exec")) {
        // The directory is found through our own current one, as before.
        CHECK_ERR("close-on-exec", EBADF, fcntl(400, F_GETFD));
        CHECK("not close-on-exec", 0, CALL(fcntl(401, F_GETFD)));
        mist_pass();
    }
    char name[32];
    for (int i = 0; i < 300; i++) {
        snprintf(name, sizeof name, "file%d", i % 10);
        int fd = MUST(open(name, O_RDWR | O_CREAT | (i % 2 ? O_CLOEXEC : 0), 0600));
        MUST(lseek(fd, i, SEEK_SET));
        MUST(dup3(fd, 1000 - i, i % 3 ? O_CLOEXEC : 0));
        if (i % 4 == 0)
            close(fd);
    }
    MUST(dup3(1, 400, O_CLOEXEC));
    MUST(dup2(1, 401));
    int p[2];
    MUST(pipe(p));
    MUST(fcntl(p[0], F_SETOWN, getpid()));
    MUST(fcntl(p[0], F_SETSIG, 44));
    MUST(fcntl(p[0], F_SETFL, O_ASYNC | O_NONBLOCK));
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 44);
    sigprocmask(SIG_BLOCK, &s, NULL);
    static int flags[1100];
    for (int fd = 0; fd < 1100; fd++)
        flags[fd] = fcntl(fd, F_GETFD);

    mist_ready();
    mist_wait();

    for (int fd = 0; fd < 1100; fd++)
        if (flags[fd] != fcntl(fd, F_GETFD))
            mist_fail("flags of descriptor %d, wanted %d, got %d", fd, flags[fd], fcntl(fd, F_GETFD));
    for (int i = 0; i < 300; i++)
        CHECK("position", i, lseek(1000 - i, 0, SEEK_CUR));
    CALL(lseek(999, 5555, SEEK_SET));
    CHECK("F_GETOWN", getpid(), fcntl(p[0], F_GETOWN));
    CHECK("F_GETSIG", 44, fcntl(p[0], F_GETSIG));
    CALL(write(p[1], "x", 1));
    siginfo_t si;
    struct timespec limit = {2, 0};
    CHECK("O_ASYNC", 44, syscall(SYS_rt_sigtimedwait, &s, &si, &limit, 8));
    CHECK("O_ASYNC's descriptor", p[0], si.si_fd);
    CHECK("dup and original are one", 5555, ({ int fd = -1; for (int k = 3; k < 400; k++) if (fcntl(k, F_GETFD) >= 0 && lseek(k, 0, SEEK_CUR) == 5555) fd = k; lseek(fd, 0, SEEK_CUR); }));
    (void)argv;
    CALL(chdir(mist_dir));
    CALL(execl("/proc/self/exe", argv[0], "after-exec", (char *)NULL));
}
