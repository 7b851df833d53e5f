// Mappings of files: private ones with pages of their own, shared ones that write through,
// executable ones, and a mapping that reaches past the end of its file.
// mist: copied
#include "mist.h"
#include <setjmp.h>
#define PAGE 4096ul
static sigjmp_buf after;
static void on_bus(int sig)
{
    siglongjmp(after, sig);
}

int main(void)
{
    static char buf[64 * PAGE];
    mist_fill(buf, sizeof buf, 1);
    int fd = MUST(open("data", O_RDWR | O_CREAT, 0600));
    CHECK("set-up", sizeof buf, write(fd, buf, sizeof buf));
    char *priv = MUST(mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    for (int i = 0; i < 64; i += 4)
        mist_fill(priv + i * PAGE, PAGE, 1000 + i);
    char *part = MUST(mmap(NULL, 8 * PAGE, PROT_READ, MAP_PRIVATE, fd, 16 * PAGE));
    char *shared = MUST(mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    char *ro = MUST(mmap(NULL, 4 * PAGE, PROT_READ, MAP_SHARED, fd, 0));
    close(fd); // the mappings alone keep the file
    mist_fill(shared + 63 * PAGE, PAGE, 77);
    // Half a page of file, four pages of mapping.
    fd = MUST(open("short", O_RDWR | O_CREAT, 0600));
    MUST(write(fd, buf, 2048));
    char *past = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    past[3000] = 'x';
    int rd = MUST(open("data", O_RDONLY));
    char *shrd = MUST(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, rd, 0));
    char *text = MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    memcpy(text, "\xb8\x2a\0\0\0\xc3", 6); // mov eax, 42; ret
    MUST(mprotect(text, PAGE, PROT_READ | PROT_EXEC));

    mist_ready();
    mist_wait();

    for (int i = 0; i < 63; i++)
        mist_check_fill(i % 4 ? "private, not written" : "private, written", priv + i * PAGE, PAGE, i % 4 ? 1 + i * 512u : 1000u + i);
    mist_check_fill("private with an offset", part, 8 * PAGE, 1 + 16 * 512);
    mist_check_fill("shared", shared + 63 * PAGE, PAGE, 77);
    mist_check_fill("private sees the file's new page", priv + 63 * PAGE, PAGE, 77);
    CHECK("past the end of the file", 'x', past[3000]);
    CHECK_MEM("before the end of the file", buf, past, 2048);
    signal(SIGBUS, on_bus);
    if (sigsetjmp(after, 1) == 0) {
        volatile char c = past[2 * PAGE];
        mist_fail("a page past the end of the file, wanted SIGBUS, got %d", c);
    }
    // Private pages given back show the file again; shared writes reach it.
    CALL(madvise(priv, PAGE, MADV_DONTNEED));
    mist_check_fill("private after MADV_DONTNEED", priv, PAGE, 1);
    memset(shared + PAGE, 0x33, PAGE);
    static char now[64 * PAGE];
    int again = CALL(open("data", O_RDWR));
    CHECK("read", sizeof now, read(again, now, sizeof now));
    mist_check_byte("the file after a shared write", now + PAGE, PAGE, 0x33);
    mist_check_byte("private sees it too", priv + PAGE, PAGE, 0x33);
    memset(now, 0x44, PAGE);
    CALL(pwrite(again, now, PAGE, 0));
    mist_check_byte("a read-only shared mapping sees a write", ro, PAGE, 0x44);
    mist_check_byte("and so does another", shrd, PAGE, 0x44);
    CHECK_ERR("a shared mapping of a read-only descriptor stays so", EACCES, mprotect(shrd, PAGE, PROT_READ | PROT_WRITE));
    CHECK_STR("permissions of a shared mapping", "rw-s", mist_smaps(shared, NULL));
    CHECK_STR("permissions of a private mapping", "rw-p", mist_smaps(priv, NULL));
    CHECK_STR("permissions of a read-only mapping", "r--s", mist_smaps(ro, NULL));
    CHECK("a read-only shared mapping may be made writable", 0, mprotect(ro, PAGE, PROT_READ | PROT_WRITE));
    CHECK("code of our own", 42, ((int (*)(void))text)());
    mist_pass();
}
