// Pages of hugetlbfs: in a memfd, shared without a file, in a System V segment, private, and a private view of a memfd.
// They are taken from what the system may hand out beyond its pool, which this raises (vm.nr_overcommit_hugepages).
// mist: variants memfd anonymous sysv private view
// mist: copied
#include "mist.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#define HUGE (2ul << 20)
#define WANTED 256
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif
#ifndef SHM_HUGE_2MB
#define SHM_HUGE_2MB (21 << 26)
#endif

static void allow(void)
{
    const char *path = "/proc/sys/vm/nr_overcommit_hugepages";
    char text[32];
    mist_slurp(path, text, sizeof text);
    if (atoi(text) >= WANTED)
        return;
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, "256", 3) != 3)
        mist_skip("needs huge pages, and the right to set vm.nr_overcommit_hugepages");
    close(fd);
}

int main(int argc, char **argv)
{
    const char *v = argc == 2 ? argv[1] : "";
#define IS(x) (!strcmp(v, x))
    allow();
    int fd = -1, id = -1, rw = PROT_READ | PROT_WRITE;
    char *m, *view = NULL;
    if (IS("memfd") || IS("view")) {
        fd = memfd_create("huge", MFD_HUGETLB | MFD_HUGE_2MB | MFD_ALLOW_SEALING);
        if (fd < 0)
            mist_skip("needs huge pages of 2 MiB");
        MUST(ftruncate(fd, 4 * HUGE));
        MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
        m = mmap(NULL, 4 * HUGE, rw, MAP_SHARED, fd, 0);
        if (IS("view"))
            view = mmap(NULL, 2 * HUGE, rw, MAP_PRIVATE, fd, HUGE);
    } else if (IS("sysv")) {
        id = shmget(IPC_PRIVATE, 4 * HUGE, SHM_HUGETLB | SHM_HUGE_2MB | 0600);
        m = id < 0 ? MAP_FAILED : shmat(id, NULL, 0);
    } else {
        m = mmap(NULL, 4 * HUGE, rw, (IS("private") ? MAP_PRIVATE : MAP_SHARED) | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    }
    if (m == MAP_FAILED || view == MAP_FAILED)
        mist_skip("no huge pages are to be had here (see /proc/meminfo)");
    mist_fill(m, HUGE, 71);
    mist_fill(m + 2 * HUGE, HUGE, 72);
    if (view)
        mist_fill(view, HUGE, 73);

    mist_ready();
    mist_wait();

    mist_check_fill("content", m, HUGE, 71);
    mist_check_byte("a hole", m + HUGE, HUGE, 0);
    mist_check_fill("content behind it", m + 2 * HUGE, HUGE, 72);
    CHECK("still huge pages", 1, strstr(mist_smaps(m, "VmFlags"), "ht") != NULL);
    CHECK_STR("their size", "2048 kB", mist_smaps(m, "KernelPageSize"));
    if (view) {
        mist_check_fill("a page of its own", view, HUGE, 73);
        mist_check_fill("a page it shares", view + HUGE, HUGE, 72);
        CHECK("huge as well", 1, strstr(mist_smaps(view, "VmFlags"), "ht") != NULL);
    }
    if (fd >= 0) {
        struct stat st;
        CALL(fstat(fd, &st));
        CHECK("size", 4 * HUGE, st.st_size);
        CHECK("block size", HUGE, st.st_blksize);
        CHECK("seals", F_SEAL_SHRINK, fcntl(fd, F_GET_SEALS));
        char *again = CALL(mmap(NULL, HUGE, rw, MAP_SHARED, fd, 0));
        memset(again, 5, 100);
        mist_check_byte("one memory", m, 100, 5);
    }
    if (id >= 0) {
        char *again = CALL(shmat(id, NULL, 0));
        memset(again, 5, 100);
        mist_check_byte("one memory", m, 100, 5);
        CALL(shmctl(id, IPC_RMID, NULL));
    }
    memset(m + 3 * HUGE, 1, HUGE);
    mist_pass();
}
