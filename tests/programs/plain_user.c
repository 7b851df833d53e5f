// A program of an ordinary user comes back as that user's, with files of its own.
// mist: user
#include "mist.h"

int main(void)
{
    int fd = MUST(open("mine", O_RDWR | O_CREAT, 0600));
    MUST(write(fd, "secret", 6));
    char *m = MUST(mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mist_fill(m, 1 << 20, 81);

    mist_ready();
    mist_wait();

    CHECK("uid", 65534, getuid());
    CHECK("euid", 65534, geteuid());
    CHECK("gid", 65534, getgid());
    CHECK_STR("effective capabilities", "0000000000000000", mist_status(getpid(), "CapEff"));
    CHECK_STR("permitted capabilities", "0000000000000000", mist_status(getpid(), "CapPrm"));
    CHECK_STR("groups", "", mist_status(getpid(), "Groups"));
    mist_check_fill("memory", m, 1 << 20, 81);
    char buf[8];
    CHECK("its file", 6, pread(fd, buf, 8, 0));
    CHECK_ERR("another's file", EACCES, open("/etc/shadow", O_RDONLY));
    CHECK("it may look at itself", 1, prctl(PR_GET_DUMPABLE));
    mist_pass();
}
