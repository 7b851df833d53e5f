// File locks: flock (shared, exclusive, across dup), POSIX record locks, OFD locks.
#include "mist.h"
#include <sys/file.h>

// Whether another process could lock these bytes for writing: what a child sees.
static int posix_free(const char *name, off_t at, off_t len)
{
    pid_t child = CALL(fork());
    if (!child) {
        int fd = open(name, O_RDWR);
        struct flock l = {.l_type = F_WRLCK, .l_start = at, .l_len = len};
        _exit(fcntl(fd, F_SETLK, &l) == 0);
    }
    int status;
    CALL(waitpid(child, &status, 0));
    return WEXITSTATUS(status);
}
static int try(int fd, int how)
{
    int r = flock(fd, how | LOCK_NB);
    if (r == 0)
        flock(fd, LOCK_UN);
    return r == 0;
}

int main(void)
{
    int ex = MUST(open("ex", O_RDWR | O_CREAT, 0600)), ex2 = MUST(open("ex", O_RDWR)), exdup = MUST(dup(ex));
    int sh = MUST(open("sh", O_RDWR | O_CREAT, 0600)), sh2 = MUST(open("sh", O_RDWR));
    MUST(flock(ex, LOCK_EX));
    MUST(flock(sh, LOCK_SH));
    MUST(flock(sh2, LOCK_SH));
    int rec = MUST(open("rec", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(rec, 1000));
    struct flock l = {.l_type = F_WRLCK, .l_start = 100, .l_len = 50}, r = {.l_type = F_RDLCK, .l_start = 300, .l_len = 0};
    MUST(fcntl(rec, F_SETLK, &l));
    MUST(fcntl(rec, F_SETLK, &r));
    int ofd = MUST(open("ofd", O_RDWR | O_CREAT, 0600)), ofd2 = MUST(open("ofd", O_RDWR));
    struct flock o = {.l_type = F_WRLCK, .l_start = 10, .l_len = 10}, o2 = {.l_type = F_RDLCK, .l_start = 50, .l_len = 5};
    MUST(fcntl(ofd, F_OFD_SETLK, &o));
    MUST(fcntl(ofd, F_OFD_SETLK, &o2));
    MUST(fcntl(ofd2, F_OFD_SETLK, &o2));

    mist_ready();
    mist_wait();

    CHECK("the exclusive lock holds", 0, try(ex2, LOCK_SH));
    CALL(flock(exdup, LOCK_UN)); // through the other descriptor of the same description
    CHECK("and is given back through dup", 1, try(ex2, LOCK_EX));
    CHECK("two shared locks hold", 0, try(MUST(open("sh", O_RDWR)), LOCK_EX));
    CALL(flock(sh, LOCK_UN));
    CHECK("one shared lock holds", 0, try(MUST(open("sh", O_RDWR)), LOCK_EX));
    CALL(flock(sh2, LOCK_UN));
    CHECK("no shared lock is left", 1, try(MUST(open("sh", O_RDWR)), LOCK_EX));
    CHECK("the record lock holds", 0, posix_free("rec", 149, 1));
    CHECK("not beside it", 1, posix_free("rec", 150, 10));
    CHECK("not before it", 1, posix_free("rec", 0, 100));
    CHECK("the read lock holds to the end", 0, posix_free("rec", 100000, 1));
    l.l_type = F_UNLCK;
    CALL(fcntl(rec, F_SETLK, &l));
    CHECK("the record lock can be given back", 1, posix_free("rec", 100, 50));
    struct flock w = {.l_type = F_WRLCK, .l_start = 15, .l_len = 1};
    CHECK_ERR("the OFD lock holds", EAGAIN, fcntl(ofd2, F_OFD_SETLK, &w));
    w.l_start = 50;
    CHECK_ERR("a shared OFD lock holds", EAGAIN, fcntl(ofd2, F_OFD_SETLK, &w));
    CHECK_ERR("against the other too", EAGAIN, fcntl(ofd, F_OFD_SETLK, &w));
    w.l_start = 20;
    CALL(fcntl(ofd2, F_OFD_SETLK, &w));
    close(ofd);
    w.l_start = 10;
    CALL(fcntl(ofd2, F_OFD_SETLK, &w));
    mist_pass();
}
