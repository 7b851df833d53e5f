// memfds: content, holes, size, seals, position; mapped twice, and one that only a mapping holds.
// mist: copied
#include "mist.h"
#define PAGE 4096ul

int main(void)
{
    int fd = MUST(memfd_create("first", MFD_ALLOW_SEALING | MFD_CLOEXEC));
    MUST(ftruncate(fd, 100 * PAGE + 123));
    char *a = MUST(mmap(NULL, 100 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    char *b = MUST(mmap(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 5 * PAGE));
    char *p = MUST(mmap(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 5 * PAGE));
    for (int i = 0; i < 100; i += 5)
        mist_fill(a + i * PAGE, PAGE, i);
    memset(p, 9, PAGE);
    MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW));
    MUST(lseek(fd, 4321, SEEK_SET));
    int sealed = MUST(memfd_create("sealed", MFD_ALLOW_SEALING));
    MUST(write(sealed, "for ever", 8));
    MUST(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
    int gone = MUST(memfd_create("only mapped", 0));
    MUST(ftruncate(gone, 4 * PAGE));
    char *m = MUST(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0));
    mist_fill(m, 4 * PAGE, 8);
    close(gone);

    mist_ready();
    mist_wait();

    struct stat st;
    CALL(fstat(fd, &st));
    CHECK("size", 100 * PAGE + 123, st.st_size);
    CHECK("holes take no space", 1, st.st_blocks * 512 < (blkcnt_t)(40 * PAGE));
    CHECK("position", 4321, lseek(fd, 0, SEEK_CUR));
    CHECK("cloexec", FD_CLOEXEC, fcntl(fd, F_GETFD));
    CHECK("seals", F_SEAL_GROW, fcntl(fd, F_GET_SEALS));
    CHECK("all seals", F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, fcntl(sealed, F_GET_SEALS));
    for (int i = 0; i < 100; i++)
        if (i % 5 == 0)
            mist_check_fill("content", a + i * PAGE, PAGE, i);
        else
            mist_check_byte("hole", a + i * PAGE, PAGE, 0);
    mist_check_byte("private copy", p, PAGE, 9);
    mist_check_fill("private, not written", p + 5 * PAGE, PAGE, 10);
    memset(b, 0x55, PAGE);
    mist_check_byte("both mappings are one", a + 5 * PAGE, PAGE, 0x55);
    char buf[16];
    CHECK("and the descriptor's", 16, pread(fd, buf, 16, 5 * PAGE));
    mist_check_byte("through the descriptor", buf, 16, 0x55);
    CHECK_ERR("sealed against growing", EPERM, ftruncate(fd, 200 * PAGE));
    CHECK_ERR("sealed against writing", EPERM, write(sealed, "x", 1));
    CHECK("sealed content", 8, pread(sealed, buf, 16, 0));
    CHECK_MEM("sealed content", "for ever", buf, 8);
    char link[64];
    ssize_t n = CALL(readlink(({ static char l[32]; snprintf(l, 32, "/proc/self/fd/%d", fd); l; }), link, 63));
    link[n] = 0;
    CHECK_STR("its name", "/memfd:first (deleted)", link);
    mist_check_fill("one that only a mapping holds", m, 4 * PAGE, 8);
    CALL(mremap(m, 4 * PAGE, 2 * PAGE, 0));
    mist_pass();
}
