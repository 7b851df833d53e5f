// O_PATH descriptors of a file, a directory, a symbolic link and a FIFO.
#include "mist.h"

int main(void)
{
    char buf[64];
    int f = MUST(open("file", O_RDWR | O_CREAT, 0600));
    MUST(write(f, "hello", 5));
    close(f);
    MUST(mkdir("dir", 0700));
    MUST(mkdir("dir/sub", 0700));
    MUST(symlink("nowhere", "link"));
    MUST(mkfifo("fifo", 0600));
    int pf = MUST(open("file", O_PATH)), pd = MUST(open("dir", O_PATH | O_CLOEXEC)), pl = MUST(open("link", O_PATH | O_NOFOLLOW)), pp = MUST(open("fifo", O_PATH));

    mist_ready();
    mist_wait();

    CHECK_ERR("no reading", EBADF, read(pf, buf, 1));
    struct stat st;
    CALL(fstat(pf, &st));
    CHECK("size", 5, st.st_size);
    snprintf(buf, sizeof buf, "/proc/self/fd/%d", pf);
    f = CALL(open(buf, O_RDONLY));
    CHECK("through /proc", 5, read(f, buf, sizeof buf));
    CALL(faccessat(pd, "sub", F_OK, 0));
    CHECK("cloexec", FD_CLOEXEC, fcntl(pd, F_GETFD));
    CALL(fchdir(pd));
    CALL(access("sub", F_OK));
    CHECK("the link itself", 7, CALL(readlinkat(pl, "", buf, sizeof buf)));
    CHECK_MEM("the link itself", "nowhere", buf, 7);
    CALL(fstat(pp, &st));
    CHECK("the fifo", 1, S_ISFIFO(st.st_mode));
    CHECK("O_PATH", O_PATH, mist_getfl(pf) & O_PATH);
    CHECK("O_PATH of a link", O_PATH, mist_getfl(pl) & O_PATH);
    mist_pass();
}
