// Mapped files with names that are no text: with bytes that are not UTF-8, with a newline, with what the kernel writes
// for a newline, and with each of these where the name is gone. They have their content, and those that are mapped
// shared and have a name still are the file.
#include "mist.h"

static const char *names[] = {"bytes \xff\xfe", "new\nline", "no\\012newline", "gone \xff", "gone\nline", "plain"};
#define COUNT (sizeof names / sizeof *names)
static unsigned char *private[COUNT], *shared[COUNT];

static int gone(size_t i)
{
    return !strncmp(names[i], "gone", 4);
}

// A name that is not UTF-8 an image cannot have, so such a file is not mapped shared.
static int is_shared(size_t i)
{
    return gone(i) || !strchr(names[i], '\xff');
}

int main(void)
{
    char cwd[4096], path[8192];
    CHECK("getcwd", 1, getcwd(cwd, sizeof cwd) != NULL);
    for (size_t i = 0; i < COUNT; i++) {
        snprintf(path, sizeof path, "%s/%s", cwd, names[i]);
        int fd = MUST(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600));
        MUST(ftruncate(fd, 8192));
        CHECK("written", 5, pwrite(fd, "page0", 5, 0));
        CHECK("written", 5, pwrite(fd, "page1", 5, 4096));
        private[i] = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        CHECK("mmap", 1, private[i] != MAP_FAILED);
        private[i][4096] = 'P';
        if (is_shared(i)) {
            shared[i] = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            CHECK("mmap", 1, shared[i] != MAP_FAILED);
        }
        close(fd);
        if (gone(i))
            MUST(unlink(path));
    }

    mist_ready();
    mist_wait();

    for (size_t i = 0; i < COUNT; i++) {
        CHECK_MEM(names[i], "page0", private[i], 5);
        CHECK_MEM(names[i], "Page1", private[i] + 4096, 5);
        if (!is_shared(i))
            continue;
        CHECK_MEM(names[i], "page1", shared[i] + 4096, 5);
        shared[i][0] = 'S';
        CHECK_MEM(names[i], "Sage0", shared[i], 5);
        if (gone(i))
            continue;
        unsigned char c;
        snprintf(path, sizeof path, "%s/%s", cwd, names[i]);
        int fd = MUST(open(path, O_RDONLY));
        CHECK("read", 1, pread(fd, &c, 1, 0));
        CHECK(names[i], 'S', c);
        close(fd);
    }
    mist_pass();
}
