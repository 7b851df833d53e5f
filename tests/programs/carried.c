// The image holds the program and its libraries: it restores where they are gone or different.
// Between dump and restore the harness removes or replaces what the directives name.
// mist: removed self lib-gone
// mist: replaced lib-other
#include "mist.h"

static void copy(const char *from, const char *to)
{
    static char buf[1 << 20];
    int a = MUST(open(from, O_RDONLY)), b = MUST(open(to, O_WRONLY | O_CREAT | O_EXCL, 0755));
    for (ssize_t n; (n = MUST(read(a, buf, sizeof buf))) > 0;)
        MUST(write(b, buf, n));
    close(a);
    close(b);
}
// A library as a dynamic linker maps it: code and data, the data partly written.
static char *map(const char *name, int seed)
{
    char page[8192];
    mist_fill(page, sizeof page, seed);
    memcpy(page, "\xb8\x2a\0\0\0\xc3", 6); // mov eax, 42; ret
    int fd = MUST(open(name, O_RDWR | O_CREAT | O_EXCL, 0755));
    MUST(write(fd, page, sizeof page));
    close(fd);
    fd = MUST(open(name, O_RDONLY));
    char *m = MUST(mmap(NULL, 8192, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0));
    MUST(mmap(m + 4096, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 4096));
    close(fd);
    return m;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        copy("/proc/self/exe", "self");
        execl("./self", argv[0], "again", (char *)NULL);
        mist_fail("set-up: exec: %s", strerror(errno));
    }
    char *gone = map("lib-gone", 41), *other = map("lib-other", 42);

    mist_ready();
    mist_wait();

    CHECK("code of a library", 42, ((int (*)(void))gone)());
    CHECK("code of another", 42, ((int (*)(void))other)());
    mist_check_fill("data of a library", gone + 4096, 4096, 41 + 512);
    mist_check_fill("data of another", other + 4096, 4096, 42 + 512);
    char exe[PATH_MAX];
    ssize_t n = CALL(readlink("/proc/self/exe", exe, sizeof exe - 1));
    exe[n] = 0;
    int fd = CALL(open("/proc/self/exe", O_RDONLY));
    char magic[4];
    CHECK("the program can be read", 4, read(fd, magic, 4));
    CHECK_MEM("and is one", "\177ELF", magic, 4);
    mist_pass();
}
