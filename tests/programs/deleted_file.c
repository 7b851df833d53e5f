// Deleted files: open, mapped shared and private, open twice through one description and
// through two; and a deleted directory as the current one is left out on purpose.
// mist: copied
#include "mist.h"
#define PAGE 4096ul

int main(void)
{
    static char buf[32 * PAGE];
    mist_fill(buf, sizeof buf, 21);
    int fd = MUST(open("gone", O_RDWR | O_CREAT, 0640));
    CHECK("set-up", sizeof buf, write(fd, buf, sizeof buf));
    MUST(lseek(fd, 5 * PAGE + 10, SEEK_SET));
    int twin = MUST(dup(fd));
    int other = MUST(open("gone", O_RDONLY));
    MUST(unlink("gone"));
    char *priv = MUST(mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    memset(priv + PAGE, 3, PAGE);
    char *shared = MUST(mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 8 * PAGE));
    // One that only a mapping keeps.
    int m = MUST(open("mapped", O_RDWR | O_CREAT, 0600));
    MUST(write(m, buf, 4 * PAGE));
    char *alone = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0));
    MUST(unlink("mapped"));
    close(m);
    // A name that was taken again by another file: the open one is still the old one.
    int old = MUST(open("replaced", O_RDWR | O_CREAT, 0600));
    MUST(write(old, "old", 3));
    MUST(unlink("replaced"));
    int new = MUST(open("replaced", O_RDWR | O_CREAT, 0600));
    MUST(write(new, "newer", 5));
    int tmp = MUST(open(".", O_RDWR | O_TMPFILE, 0600));
    MUST(write(tmp, "nameless", 8));

    mist_ready();
    mist_wait();

    struct stat st, st2;
    CALL(fstat(fd, &st));
    CHECK("links", 0, st.st_nlink);
    CHECK("size", sizeof buf, st.st_size);
    CHECK("mode", 0640, st.st_mode & 07777);
    CALL(fstat(other, &st2));
    CHECK("two descriptions, one file", st.st_ino, st2.st_ino);
    CHECK_ERR("it has no name", ENOENT, access("gone", F_OK));
    CHECK("position", 5 * PAGE + 10, lseek(twin, 0, SEEK_CUR));
    CHECK("position of the other", 0, lseek(other, 0, SEEK_CUR));
    static char now[32 * PAGE];
    CHECK("content", sizeof now, pread(fd, now, sizeof now, 0));
    CHECK_MEM("content", buf, now, sizeof now);
    mist_check_fill("private", priv, PAGE, 21);
    mist_check_byte("private, written", priv + PAGE, PAGE, 3);
    mist_check_fill("shared", shared, 8 * PAGE, 21 + 8 * 512);
    memset(shared, 0x66, PAGE);
    CHECK("read", PAGE, pread(other, now, PAGE, 8 * PAGE));
    mist_check_byte("a write through the mapping", now, PAGE, 0x66);
    CALL(madvise(priv + PAGE, PAGE, MADV_DONTNEED));
    mist_check_fill("private after MADV_DONTNEED", priv + PAGE, PAGE, 21 + 512);
    mist_check_fill("kept by a mapping alone", alone, 4 * PAGE, 21);
    CHECK("the old file", 3, pread(old, now, 10, 0));
    CHECK_MEM("the old file", "old", now, 3);
    CHECK("the new file", 5, pread(new, now, 10, 0));
    CALL(stat("replaced", &st));
    CALL(fstat(new, &st2));
    CHECK("the new file has the name", st.st_ino, st2.st_ino);
    CHECK("a nameless file", 8, pread(tmp, now, 10, 0));
    CHECK_MEM("a nameless file", "nameless", now, 8);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", tmp);
    CALL(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    mist_pass();
}
