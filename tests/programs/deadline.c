// Scheduled by deadlines: such a process may have no child, and so no copy.
// mist: no-rounds its writes cannot be followed, which takes a child too
#include "mist.h"

struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

int main(void) {
    struct attributes wanted = {
        .size = 48, .policy = 6, .runtime = 5000000, .deadline = 50000000, .period = 50000000};
    if (syscall(SYS_sched_setattr, 0, &wanted, 0) < 0)
        mist_skip("SCHED_DEADLINE is not allowed here");
    char *memory = malloc(1 << 20);
    memset(memory, 7, 1 << 20);
    mist_ready();
    mist_wait();
    struct attributes got = {0};
    CALL(syscall(SYS_sched_getattr, 0, &got, sizeof got, 0));
    CHECK("policy", 6, got.policy);
    CHECK("runtime", 5000000, got.runtime);
    CHECK("deadline", 50000000, got.deadline);
    CHECK("period", 50000000, got.period);
    for (int i = 0; i < 1 << 20; i++)
        CHECK("memory", 7, memory[i]);
    mist_pass();
}
