// Thousands of descriptors of few inodes: some shared by dup and with a child, some only alike.
// mist: tree
// mist: dumps 2
#include "mist.h"
#include <sys/eventfd.h>
#include <sys/resource.h>
#define N 700

static int event[N], twin[N], null[N], turn[2];

static void in_child(void)
{
    char byte;
    uint64_t got;
    MUST(read(turn[0], &byte, 1));
    for (int i = 0; i < N; i++) {
        if (read(event[i], &got, 8) != 8 || got != 10000u + i)
            _exit(1);
    }
    _exit(7);
}

int main(void)
{
    struct rlimit room = {4000, 4000};
    MUST(setrlimit(RLIMIT_NOFILE, &room));
    MUST(pipe(turn));
    for (int i = 0; i < N; i++) {
        event[i] = MUST(eventfd(1 + i, EFD_NONBLOCK));
        null[i] = MUST(open("/dev/null", O_RDWR | (i % 3 ? 0 : O_CLOEXEC)));
    }
    // From the other end, so that numbers and descriptions are in different orders.
    for (int i = 0; i < N; i++)
        twin[i] = i % 2 ? MUST(dup(event[N - 1 - i])) : MUST(eventfd(5000 + i, EFD_NONBLOCK));
    pid_t child = MUST(fork());
    if (child == 0)
        in_child();

    mist_ready();
    mist_wait();

    uint64_t got, value;
    for (int i = 0; i < N; i++) {
        CHECK("a twin", 8, read(twin[i], &got, 8));
        CHECK("its value", i % 2 ? N - i : 5000 + i, got);
        if (i % 2)
            CHECK_ERR("taken through the other descriptor", EAGAIN, read(event[N - 1 - i], &got, 8));
        CHECK("close-on-exec", i % 3 ? 0 : FD_CLOEXEC, fcntl(null[i], F_GETFD));
    }
    for (int i = 0; i < N; i += 50) {
        CALL(fcntl(null[i], F_SETFL, O_APPEND));
        CHECK("flags of one that is only alike", 0, mist_getfl(null[i + 1]) & O_APPEND);
    }
    for (int i = 0; i < N; i++) {
        if (read(event[i], &got, 8) == 8)
            CHECK("what nobody has taken", 1 + i, got);
        value = 10000 + i;
        CHECK("write", 8, write(event[i], &value, 8));
    }
    MUST(write(turn[1], "x", 1));
    int status;
    CHECK("the child", child, waitpid(child, &status, 0));
    CHECK("what it found in those it shares", 7, WEXITSTATUS(status));
    mist_pass();
}
