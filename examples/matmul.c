/*
 * matmul: powers of a matrix by a group of workers, with barriers, broadcasts,
 * a reduction and a gather of libgpvm3.
 *
 * Each worker owns a stripe of rows of A and of P = A^k. In every round each in
 * turn broadcasts its stripe of A to the group, everyone multiplies, and a
 * barrier ends the round. All arithmetic is modulo a prime: the result is exact
 * and the same for any number of workers; -w 0 computes it without PVM.
 */
#include "example.h"

#define PRIME 1000003

enum { TAG_START = 1, TAG_RESULT, TAG_REDUCE, TAG_GATHER, TAG_STRIPE };

static void fill(int *rows, int first, int count, int n)
{
    for (int r = 0; r < count; r++)
        for (int c = 0; c < n; c++)
            rows[(size_t)r * n + c] = (int)(((long)(first + r) * 7919 + (long)c * 104729 + 17) % PRIME);
}

/* out += P[.., from..from+depth) * stripe, all modulo PRIME */
static void multiply(int *out, const int *p, int rows, const int *stripe, int from, int depth, int n)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < n; c++) {
            uint64_t sum = (uint64_t)out[(size_t)r * n + c];
            for (int k = 0; k < depth; k++)
                sum += (uint64_t)p[(size_t)r * n + from + k] * (uint64_t)stripe[(size_t)k * n + c] % PRIME;
            out[(size_t)r * n + c] = (int)(sum % PRIME);
        }
}

static void worker(void)
{
    int start[3], master = pvm_parent();
    char group[64];
    check(pvm_recv(master, TAG_START), "pvm_recv");
    check(pvm_upkint(start, 3, 1), "pvm_upkint");
    int n = start[0], rounds = start[1], workers = start[2], rows = n / workers;
    snprintf(group, sizeof group, "matmul.%x", (unsigned)master);
    /* The instance number, not the order of spawning, says whose stripe is whose. */
    int me = check(pvm_joingroup(group), "pvm_joingroup");
    /* Everyone is a member before anyone broadcasts; frozen, nobody asks the group server again. */
    check(pvm_freezegroup(group, workers), "pvm_freezegroup");

    size_t bytes = (size_t)rows * n * sizeof(int);
    int *a = grab(bytes), *p = grab(bytes), *out = grab(bytes), *other = grab(bytes);
    fill(a, me * rows, rows, n);
    memcpy(p, a, bytes);
    for (int round = 0; round < rounds; round++) {
        memset(out, 0, bytes);
        for (int turn = 0; turn < workers; turn++) {
            int tag = TAG_STRIPE + turn;
            const int *stripe = a;
            if (turn == me) {
                check(pvm_initsend(PvmDataInPlace), "pvm_initsend");
                check(pvm_pkint(a, rows * n, 1), "pvm_pkint");
                check(pvm_bcast(group, tag), "pvm_bcast");
            } else {
                check(pvm_recv(pvm_gettid(group, turn), tag), "pvm_recv");
                check(pvm_upkint(other, rows * n, 1), "pvm_upkint");
                stripe = other;
            }
            multiply(out, p, rows, stripe, turn * rows, rows, n);
        }
        int *swap = p;
        p = out;
        out = swap;
        check(pvm_barrier(group, workers), "pvm_barrier");
    }

    /* The trace of the result: each worker's part of the diagonal, added up at instance 0. */
    int trace = 0, *all = me ? NULL : grab(bytes * (size_t)workers);
    for (int r = 0; r < rows; r++)
        trace = (trace + p[(size_t)r * n + me * rows + r]) % PRIME;
    check(pvm_reduce(PvmSum, &trace, 1, PVM_INT, TAG_REDUCE, group, 0), "pvm_reduce");
    check(pvm_gather(all, p, rows * n, PVM_INT, TAG_GATHER, group, 0), "pvm_gather");
    if (me == 0) {
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_pkint(&trace, 1, 1), "pvm_pkint");
        check(pvm_pkint(all, n * n, 1), "pvm_pkint");
        check(pvm_send(master, TAG_RESULT), "pvm_send");
    }
    /* Leaving before all are through would take members from under the gather. */
    check(pvm_barrier(group, workers), "pvm_barrier");
    check(pvm_lvgroup(group), "pvm_lvgroup");
    free(a);
    free(p);
    free(out);
    free(other);
    free(all);
}

static int alone(int *all, int n, int rounds)
{
    size_t bytes = (size_t)n * n * sizeof(int);
    int *a = grab(bytes), *out = grab(bytes), trace = 0;
    fill(a, 0, n, n);
    memcpy(all, a, bytes);
    for (int round = 0; round < rounds; round++) {
        memset(out, 0, bytes);
        multiply(out, all, n, a, 0, n, n);
        memcpy(all, out, bytes);
    }
    for (int r = 0; r < n; r++)
        trace = (trace + all[(size_t)r * n + r]) % PRIME;
    free(a);
    free(out);
    return trace;
}

int main(int argc, char **argv)
{
    int n = 120, rounds = 20, workers = 4, trace, opt, tids[100];
    if (is_worker(argc, argv)) {
        worker();
        pvm_exit();
        return 0;
    }
    while ((opt = getopt(argc, argv, "n:r:w:")) != -1)
        switch (opt) {
        case 'n': n = (int)number(optarg, 1, 10000); break;
        case 'r': rounds = (int)number(optarg, 0, 100000000); break;
        case 'w': workers = (int)number(optarg, 0, 100); break;
        default: fprintf(stderr, "usage: matmul [-n size] [-r rounds] [-w workers]\n"); return 2;
        }
    if (workers && n % workers) {
        fprintf(stderr, "matmul: %d rows do not go into %d equal stripes\n", n, workers);
        return 2;
    }
    int *all = grab((size_t)n * n * sizeof *all);
    if (workers == 0) {
        trace = alone(all, n, rounds);
    } else {
        int start[3] = {n, rounds, workers};
        spawn_workers(workers, tids);
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_pkint(start, 3, 1), "pvm_pkint");
        check(pvm_mcast(tids, workers, TAG_START), "pvm_mcast");
        check(pvm_recv(-1, TAG_RESULT), "pvm_recv");
        check(pvm_upkint(&trace, 1, 1), "pvm_upkint");
        check(pvm_upkint(all, n * n, 1), "pvm_upkint");
        trace %= PRIME;
        pvm_exit();
    }
    printf("matmul: %dx%d, %d rounds, trace %d, checksum %016llx\n", n, n, rounds, trace,
           (unsigned long long)fnv(FNV_START, all, (size_t)n * n * sizeof *all));
    free(all);
    return 0;
}
