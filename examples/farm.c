/*
 * farm: counts primes with a master and workers, in jobs of very uneven size.
 *
 * Whoever is done gets the next job. A worker that is lost (its host died)
 * costs nothing but time: its job is given to another one. The result does not
 * depend on who did what.
 */
#include "example.h"

enum { TAG_JOB = 1, TAG_RESULT, TAG_LOST };

static long primes(long from, long to)
{
    long count = 0;
    for (long n = from < 2 ? 2 : from; n < to; n++) {
        long d = 2;
        while (d * d <= n && n % d)
            d++;
        count += d * d > n;
    }
    return count;
}

static void worker(void)
{
    int master = pvm_parent();
    for (;;) {
        int job;
        double range[2]; /* exact up to 2^53, and the same on every machine */
        check(pvm_recv(master, TAG_JOB), "pvm_recv");
        check(pvm_unpackf("%d %2lf", &job, range), "pvm_unpackf");
        if (job < 0)
            return;
        double count = (double)primes((long)range[0], (long)range[1]);
        check(pvm_packf("%+ %d %lf", PvmDataDefault, job, count), "pvm_packf");
        check(pvm_send(master, TAG_RESULT), "pvm_send");
    }
}

struct job {
    long from, to;
    int done;
};

/* Cuts 0..n into jobs: the random part makes some a hundred times longer. */
static void cut(struct job *jobs, int count, long n)
{
    uint64_t seed = 1, total = 0, so_far = 0;
    uint64_t *weight = grab((size_t)count * sizeof *weight);
    for (int i = 0; i < count; i++)
        total += weight[i] = 1 + next_random(&seed) % 10 * (next_random(&seed) % 10);
    for (int i = 0; i < count; i++) {
        jobs[i].from = (long)((double)n * so_far / total);
        so_far += weight[i];
        jobs[i].to = (long)((double)n * so_far / total);
        jobs[i].done = 0;
    }
    free(weight);
}

static void give(int tid, int job, const struct job *jobs)
{
    double range[2] = {0, 0};
    if (job >= 0) {
        range[0] = (double)jobs[job].from;
        range[1] = (double)jobs[job].to;
    }
    check(pvm_packf("%+ %d %2lf", PvmDataDefault, job, range), "pvm_packf");
    check(pvm_send(tid, TAG_JOB), "pvm_send");
}

/* The next job to give out: new ones first, then those whose worker was lost. */
static int pick(int *next, int count, int *lost, int *nlost)
{
    if (*next < count)
        return (*next)++;
    return *nlost > 0 ? lost[--*nlost] : -1;
}

int main(int argc, char **argv)
{
    long n = 1000000;
    int count = 60, workers = 4, opt;
    if (is_worker(argc, argv)) {
        worker();
        pvm_exit();
        return 0;
    }
    while ((opt = getopt(argc, argv, "n:j:w:")) != -1)
        switch (opt) {
        case 'n': n = number(optarg, 1, 1L << 50); break;
        case 'j': count = (int)number(optarg, 1, 100000); break;
        case 'w': workers = (int)number(optarg, 1, 100); break;
        default: fprintf(stderr, "usage: farm [-n below] [-j jobs] [-w workers]\n"); return 2;
        }
    struct job *jobs = grab((size_t)count * sizeof *jobs);
    int *lost = grab((size_t)count * sizeof *lost), nlost = 0;
    int tids[100], has[100], alive = workers, next = 0, done = 0;
    double total = 0;
    cut(jobs, count, n);
    spawn_workers(workers, tids);
    check(pvm_notify(PvmTaskExit, TAG_LOST, workers, tids), "pvm_notify");
    for (int w = 0; w < workers; w++) {
        has[w] = pick(&next, count, lost, &nlost);
        if (has[w] >= 0)
            give(tids[w], has[w], jobs);
    }
    while (done < count) {
        int tag, tid, w, job;
        double result;
        check(pvm_bufinfo(check(pvm_recv(-1, -1), "pvm_recv"), NULL, &tag, &tid), "pvm_bufinfo");
        if (tag == TAG_LOST) {
            /* The notice comes from the pvmd; its body says who ended. */
            check(pvm_upkint(&tid, 1, 1), "pvm_upkint");
            for (w = 0; w < workers && tids[w] != tid; w++)
                ;
            if (w == workers)
                continue;
            fprintf(stderr, "farm: worker %d (t%x) is lost\n", w, (unsigned)tid);
            tids[w] = 0;
            if (has[w] >= 0)
                lost[nlost++] = has[w];
            if (--alive == 0) {
                fprintf(stderr, "farm: no worker is left\n");
                pvm_exit();
                return 1;
            }
            /* Someone idle may take it now. */
            for (w = 0; w < workers && nlost > 0; w++)
                if (tids[w] && has[w] < 0)
                    give(tids[w], has[w] = pick(&next, count, lost, &nlost), jobs);
            continue;
        }
        check(pvm_unpackf("%d %lf", &job, &result), "pvm_unpackf");
        for (w = 0; w < workers && tids[w] != tid; w++)
            ;
        if (w == workers || has[w] != job || jobs[job].done) {
            printf("farm: FAULT job %d from t%x, which had none of that kind\n", job, (unsigned)tid);
            pvm_exit();
            return 1;
        }
        jobs[job].done = 1;
        done++;
        total += result;
        has[w] = pick(&next, count, lost, &nlost);
        if (has[w] >= 0)
            give(tid, has[w], jobs);
    }
    for (int w = 0; w < workers; w++)
        if (tids[w])
            give(tids[w], -1, jobs);
    pvm_exit();
    printf("farm: %.0f primes below %ld, %d jobs\n", total, n, count);
    return 0;
}
