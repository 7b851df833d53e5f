// Regular files: position, flags, append, modes, shared offsets of dup; directories mid-way
// through; umask and the current directory.
#include "mist.h"
#include <dirent.h>

static void readall(const char *name, char *buf, size_t size)
{
    mist_slurp(mist_path(name), buf, size);
}

int main(void)
{
    char buf[4096];
    umask(027);
    int rw = MUST(open("rw", O_RDWR | O_CREAT, 0644));
    MUST(write(rw, "0123456789", 10));
    MUST(lseek(rw, 4, SEEK_SET));
    int twin = MUST(dup(rw));
    int other = MUST(open("rw", O_RDONLY | O_CLOEXEC));
    MUST(lseek(other, 7, SEEK_SET));
    int app = MUST(open("log", O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK, 0600));
    MUST(write(app, "line 1\n", 7));
    int past = MUST(open("sparse", O_RDWR | O_CREAT | O_SYNC | O_NOATIME, 0600));
    MUST(lseek(past, 1 << 20, SEEK_SET));
    int high = MUST(fcntl(rw, F_DUPFD, 700));
    MUST(mkdir("dir", 0755));
    for (int i = 0; i < 40; i++) {
        snprintf(buf, sizeof buf, "dir/file%02d", i);
        close(MUST(open(buf, O_CREAT | O_WRONLY, 0600)));
    }
    int dir = MUST(open("dir", O_RDONLY | O_DIRECTORY));
    // A few entries at a time, so that we are in the middle.
    char names[64][32];
    int seen = 0;
    ssize_t n = MUST(syscall(SYS_getdents64, dir, buf, 200));
    for (ssize_t at = 0; at < n;) {
        struct dirent64 *d = (void *)(buf + at);
        strcpy(names[seen++], d->d_name);
        at += d->d_reclen;
    }
    CHECK("set-up: in the middle of the directory", 1, seen > 0 && seen < 20);
    MUST(chdir("dir"));

    mist_ready();
    mist_wait();

    CHECK("position", 4, lseek(rw, 0, SEEK_CUR));
    CHECK("read", 2, read(rw, buf, 2));
    CHECK_MEM("read", "45", buf, 2);
    CHECK("dup shares the position", 6, lseek(twin, 0, SEEK_CUR));
    CHECK("so does F_DUPFD", 6, lseek(high, 0, SEEK_CUR));
    CHECK("another description does not", 7, lseek(other, 0, SEEK_CUR));
    CHECK("write", 1, write(twin, "x", 1));
    CHECK("seen through the other", 1, pread(other, buf, 1, 6));
    CHECK("seen through the other", 'x', buf[0]);
    CHECK("flags of rw", O_RDWR, mist_getfl(rw));
    CHECK("flags of other", O_RDONLY, mist_getfl(other));
    CHECK_ERR("other is read-only", EBADF, write(other, "x", 1));
    CHECK("cloexec of other", FD_CLOEXEC, fcntl(other, F_GETFD));
    CHECK("cloexec of rw", 0, fcntl(rw, F_GETFD));
    CHECK("flags of app", O_WRONLY | O_APPEND | O_NONBLOCK, mist_getfl(app));
    CHECK("lseek of app", 0, lseek(app, 0, SEEK_SET));
    CHECK("append", 7, write(app, "line 2\n", 7));
    readall("log", buf, sizeof buf);
    CHECK_STR("log", "line 1\nline 2\n", buf);
    CHECK("flags of past", O_RDWR | O_SYNC | O_NOATIME, mist_getfl(past));
    CHECK("position past the end", 1 << 20, lseek(past, 0, SEEK_CUR));
    struct stat st;
    CALL(fstat(past, &st));
    CHECK("size of an empty file", 0, st.st_size);
    CALL(write(past, "z", 1));
    CALL(fstat(past, &st));
    CHECK("size after the write", (1 << 20) + 1, st.st_size);

    while ((n = CALL(syscall(SYS_getdents64, dir, buf, 200))) > 0)
        for (ssize_t at = 0; at < n;) {
            struct dirent64 *d = (void *)(buf + at);
            for (int i = 0; i < seen; i++)
                if (!strcmp(names[i], d->d_name))
                    mist_fail("readdir gave %s twice", d->d_name);
            if (seen == 64)
                mist_fail("readdir: too many entries");
            strcpy(names[seen++], d->d_name);
            at += d->d_reclen;
        }
    CHECK("entries seen in all", 42, seen);
    CHECK("umask", 027, umask(0));
    char cwd[PATH_MAX];
    CHECK_STR("cwd", mist_path("dir"), getcwd(cwd, sizeof cwd));
    CALL(access("file07", F_OK));
    mist_pass();
}
