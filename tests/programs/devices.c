// Device nodes: null, zero, full, random, urandom; and the mappings that /dev/zero gives.
#include "mist.h"

int main(void)
{
    char buf[64] = "x";
    int null = MUST(open("/dev/null", O_RDWR | O_APPEND)), zero = MUST(open("/dev/zero", O_RDWR | O_CLOEXEC));
    int full = MUST(open("/dev/full", O_WRONLY)), rnd = MUST(open("/dev/random", O_RDONLY | O_NONBLOCK)), urnd = MUST(open("/dev/urandom", O_RDONLY));
    char *m = MUST(mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0));
    memset(m, 7, 4096);
    char *s = MUST(mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, zero, 0));
    memset(s, 8, 4096);

    mist_ready();
    mist_wait();

    CHECK("write to null", 64, write(null, buf, 64));
    CHECK("read of null", 0, read(null, buf, 64));
    CHECK("flags of null", O_RDWR | O_APPEND, mist_getfl(null));
    CHECK("read of zero", 64, read(zero, buf, 64));
    mist_check_byte("zero", buf, 64, 0);
    CHECK("cloexec of zero", FD_CLOEXEC, fcntl(zero, F_GETFD));
    CHECK_ERR("full", ENOSPC, write(full, buf, 1));
    CHECK("random", 64, read(rnd, buf, 64));
    CHECK("urandom", 64, read(urnd, buf, 64));
    mist_check_byte("a private mapping of zero", m, 4096, 7);
    mist_check_byte("not written", m + 4096, 61440, 0);
    mist_check_byte("a shared mapping of zero", s, 4096, 8);
    mist_check_byte("not written", s + 4096, 61440, 0);
    struct stat st;
    CALL(fstat(null, &st));
    CHECK("device number", 0x103, st.st_rdev);
    mist_pass();
}
