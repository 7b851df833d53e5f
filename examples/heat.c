/*
 * heat: diffusion of heat on a square plate, by Jacobi's method.
 *
 * The plate's rows are dealt out in blocks; in every step each worker sends its
 * first and last row to its neighbours and takes theirs. Every cell is
 * computed by the same operations in the same order whoever computes it, so the
 * checksum over all cells' bits is the same for any number of workers, on any
 * hosts; with -w 0 the master computes alone, without PVM, for comparison.
 */
#include "example.h"

enum { TAG_START = 1, TAG_UP, TAG_DOWN, TAG_RESULT };

/* One step for the cells of rows 1..rows; rows 0 and rows+1 are the borders. */
static void step(const double *old, double *new, int rows, int n)
{
    for (int r = 1; r <= rows; r++) {
        const double *row = old + (size_t)r * n;
        double *out = new + (size_t)r * n;
        out[0] = row[0];
        out[n - 1] = row[n - 1];
        for (int c = 1; c < n - 1; c++)
            out[c] = row[c] + 0.2 * (row[c - n] + row[c + n] + row[c - 1] + row[c + 1] - 4 * row[c]);
    }
}

/* The plate at the beginning: one hot edge and some hot spots inside. */
static double initial(int r, int c, int n)
{
    if (r == 0)
        return 100.0;
    return (r * 7 + c * 13) % 97 == 0 ? 50.0 * r / n : 0.0;
}

/*
 * Rows first..first+rows-1 of the n by n plate, of which the outermost never
 * change; returned with one border row on each side.
 */
static double *solve(int n, int steps, int first, int rows, int above, int below)
{
    size_t cells = (size_t)(rows + 2) * n;
    double *old = grab(cells * sizeof *old), *new = grab(cells * sizeof *new);
    for (int r = 0; r < rows + 2; r++)
        for (int c = 0; c < n; c++)
            old[(size_t)r * n + c] = initial(first + r - 1, c, n);
    memcpy(new, old, cells * sizeof *new);

    for (int s = 0; s < steps; s++) {
        if (above) {
            check(pvm_psend(above, TAG_UP, (char *)(old + n), n, PVM_DOUBLE), "pvm_psend");
        }
        if (below) {
            check(pvm_initsend(PvmDataRaw), "pvm_initsend");
            check(pvm_pkdouble(old + (size_t)rows * n, n, 1), "pvm_pkdouble");
            check(pvm_send(below, TAG_DOWN), "pvm_send");
            /* The row from below is the one that neighbour sends up. */
            check(pvm_precv(below, TAG_UP, (char *)(old + (size_t)(rows + 1) * n), n, PVM_DOUBLE, NULL,
                            NULL, NULL),
                  "pvm_precv");
        }
        if (above) {
            check(pvm_recv(above, TAG_DOWN), "pvm_recv");
            check(pvm_upkdouble(old, n, 1), "pvm_upkdouble");
        }
        step(old, new, rows, n);
        double *swap = old;
        old = new;
        new = swap;
    }
    free(new);
    return old;
}

static void worker(void)
{
    int n, steps, first, rows, above, below, master = pvm_parent();
    check(pvm_recv(master, TAG_START), "pvm_recv");
    check(pvm_upkint(&n, 1, 1), "pvm_upkint");
    check(pvm_upkint(&steps, 1, 1), "pvm_upkint");
    check(pvm_upkint(&first, 1, 1), "pvm_upkint");
    check(pvm_upkint(&rows, 1, 1), "pvm_upkint");
    check(pvm_upkint(&above, 1, 1), "pvm_upkint");
    check(pvm_upkint(&below, 1, 1), "pvm_upkint");
    double *plate = solve(n, steps, first, rows, above, below);
    check(pvm_initsend(PvmDataDefault), "pvm_initsend");
    check(pvm_pkdouble(plate + n, rows * n, 1), "pvm_pkdouble");
    check(pvm_send(master, TAG_RESULT), "pvm_send");
    free(plate);
}

int main(int argc, char **argv)
{
    int n = 256, steps = 200, workers = 4, opt;
    if (is_worker(argc, argv)) {
        worker();
        pvm_exit();
        return 0;
    }
    while ((opt = getopt(argc, argv, "n:s:w:")) != -1)
        switch (opt) {
        case 'n': n = (int)number(optarg, 4, 20000); break;
        case 's': steps = (int)number(optarg, 0, 100000000); break;
        case 'w': workers = (int)number(optarg, 0, 100); break;
        default: fprintf(stderr, "usage: heat [-n size] [-s steps] [-w workers]\n"); return 2;
        }
    int inner = n - 2; /* rows 0 and n-1 never change */
    if (workers > inner)
        workers = inner;

    uint64_t sum = FNV_START;
    if (workers == 0) {
        double *plate = solve(n, steps, 1, inner, 0, 0);
        sum = fnv(sum, plate + n, (size_t)inner * n * sizeof *plate);
        free(plate);
    } else {
        int tids[100];
        spawn_workers(workers, tids);
        for (int w = 0; w < workers; w++) {
            int first = 1 + (int)((long)inner * w / workers);
            int rows = 1 + (int)((long)inner * (w + 1) / workers) - first;
            int above = w > 0 ? tids[w - 1] : 0, below = w + 1 < workers ? tids[w + 1] : 0;
            int start[] = {n, steps, first, rows, above, below};
            check(pvm_initsend(PvmDataDefault), "pvm_initsend");
            check(pvm_pkint(start, 6, 1), "pvm_pkint");
            check(pvm_send(tids[w], TAG_START), "pvm_send");
        }
        double *block = grab((size_t)(inner / workers + 1) * n * sizeof *block);
        for (int w = 0; w < workers; w++) {
            int rows = (int)((long)inner * (w + 1) / workers - (long)inner * w / workers);
            check(pvm_recv(tids[w], TAG_RESULT), "pvm_recv");
            check(pvm_upkdouble(block, rows * n, 1), "pvm_upkdouble");
            sum = fnv(sum, block, (size_t)rows * n * sizeof *block);
        }
        free(block);
        pvm_exit();
    }
    printf("heat: %dx%d, %d steps, checksum %016llx\n", n, n, steps, (unsigned long long)sum);
    return 0;
}
