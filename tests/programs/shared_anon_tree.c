// MAP_SHARED anonymous memory stays shared between parent and child; private memory stays apart.
// mist: tree
#include "mist.h"
#define SIZE (128 * 4096)

int main(void)
{
    char *s = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    char *alone = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    char *p = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    volatile int *turn = (int *)s;
    mist_fill(s + 4096, SIZE - 4096, 41);
    mist_fill(alone, SIZE, 42);
    mist_fill(p, SIZE, 43);
    pid_t child = MUST(fork());
    if (!child) {
        munmap(alone, SIZE);
        mist_fill(p, SIZE, 44);
        *turn = 1;
        mist_wait();
        mist_check_fill("the child's private memory", p, SIZE, 44);
        mist_check_fill("the child's shared memory", s + 4096, SIZE - 4096, 41);
        CHECK("the child's parent", 1, getppid() > 1);
        memset(s + 4096, 0x12, 4096);
        *turn = 2;
        while (*turn != 3)
            mist_turn();
        mist_check_byte("the child sees the parent's write", s + 8192, 4096, 0x34);
        _exit(7);
    }
    while (*turn != 1)
        mist_turn();
    mist_ready();
    mist_wait();
    for (int i = 0; i < 5000 && *turn != 2; i++)
        mist_turn();
    CHECK("the child took its turn", 2, *turn);
    mist_check_byte("the parent sees the child's write", s + 4096, 4096, 0x12);
    memset(s + 8192, 0x34, 4096);
    *turn = 3;
    int status;
    CHECK("the child's pid", child, CALL(waitpid(-1, &status, 0)));
    CHECK("the child's exit code", 7, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    mist_check_fill("the parent's private memory", p, SIZE, 43);
    mist_check_fill("what the child gave back", alone, SIZE, 42);
    mist_check_fill("the rest of the shared memory", s + 12288, SIZE - 12288, 41 + 1024);
    mist_pass();
}
