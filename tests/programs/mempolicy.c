// On which nodes memory is to be (set_mempolicy, mbind): of threads, and of mappings.
// mist: variants threads mappings
#include "mist.h"
#include <linux/mempolicy.h>
#include <pthread.h>

#define LEN (8 * 4096)

static int how(void *at)
{
    int mode = -1;
    unsigned long nodes[16] = {0};
    CALL(syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof nodes, at, at ? MPOL_F_ADDR : 0));
    return mode << 8 | (nodes[0] & 0xff);
}

static void *other(void *done)
{
    unsigned long node = 1;
    MUST(syscall(SYS_set_mempolicy, MPOL_INTERLEAVE | MPOL_F_STATIC_NODES, &node, 8));
    int before = how(NULL);
    __atomic_store_n((int *)done, 1, __ATOMIC_RELEASE);
    mist_wait();
    CHECK("the other thread's", before, how(NULL));
    return NULL;
}

int main(int argc, char **argv)
{
    int mode;
    if (syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 0) < 0)
        mist_skip("this kernel knows no nodes");
    unsigned long node = 1;
    if (argc > 1 && !strcmp(argv[1], "threads")) {
        int done = 0;
        pthread_t thread;
        MUST(pthread_create(&thread, NULL, other, &done));
        while (!__atomic_load_n(&done, __ATOMIC_ACQUIRE))
            mist_sleep(1000);
        MUST(syscall(SYS_set_mempolicy, MPOL_BIND, &node, 8));
        int before = how(NULL);
        mist_ready();
        mist_wait();
        CHECK("the main thread's", before, how(NULL));
        MUST(pthread_join(thread, NULL));
        mist_pass();
    }
    int protections = PROT_READ | PROT_WRITE, private = MAP_PRIVATE | MAP_ANONYMOUS;
    char *plain = MUST(mmap(NULL, LEN, protections, private, -1, 0));
    char *bound = MUST(mmap(NULL, LEN, protections, private, -1, 0));
    char *shared = MUST(mmap(NULL, LEN, protections, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    MUST(syscall(SYS_mbind, bound, LEN, MPOL_BIND | MPOL_F_RELATIVE_NODES, &node, 8, 0));
    MUST(syscall(SYS_mbind, bound + LEN / 2, LEN / 2, MPOL_PREFERRED, &node, 8, 0));
    MUST(syscall(SYS_mbind, shared, LEN, MPOL_INTERLEAVE, &node, 8, 0));
    memset(bound, 1, LEN);
    char *places[] = {plain, bound, bound + LEN / 2, shared};
    int before[4];
    for (int i = 0; i < 4; i++)
        before[i] = how(places[i]);
    mist_ready();
    mist_wait();
    for (int i = 0; i < 4; i++)
        CHECK("that of a mapping", before[i], how(places[i]));
    mist_pass();
}
