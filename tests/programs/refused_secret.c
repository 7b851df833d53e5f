// Memory that nobody else can read (memfd_secret).
// mist: refused memfd_secret
#include "mist.h"

int main(void)
{
    int fd = syscall(447, 0);
    if (fd < 0)
        mist_skip("this kernel has no memfd_secret");
    MUST(ftruncate(fd, 4096));
    char *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        mist_fail("mmap: %s", strerror(errno));
    at[0] = 7;
    close(fd);
    mist_ready();
    mist_wait();
    CHECK("what it holds", 7, at[0]);
    mist_pass();
}
