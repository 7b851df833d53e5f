/*
 * soak: tasks that talk to random partners in every way PVM has, and check all
 * they hear. A message that is lost, doubled, reordered, damaged or taken for
 * somebody else's ends the run with a line that says so:
 *
 *     soak: OK n messages m bytes        or        soak: FAULT what, who, where
 *
 * The run is a series of phases. Within one, each task takes random steps (see
 * soak_task.c); at its end every message has been accounted for, the tasks meet
 * in barriers and collective calls, report to the master and are told to go on.
 */
#include "soak.h"

#include <time.h>

static const struct settings defaults = {.tasks = 6, .steps = 40, .max_size = 8 << 20, .stall = 60, .seed = 1};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Prints the verdict, ends every task, ends. */
static void fail(const char *text)
{
    printf("soak: FAULT %s\n", text);
    fflush(stdout);
    for (int i = 0; i < set.tasks; i++)
        pvm_kill(tids[i]);
    pvm_exit();
    exit(1);
}

static int rank_of(int tid)
{
    int rank = 0;
    while (rank < set.tasks && tids[rank] != tid)
        rank++;
    return rank;
}

/* The next message from a task with this tag; anything else that comes is news. */
static int hear(int tag, const char *heard, int phase)
{
    double limit = now() + set.stall;
    for (;;) {
        struct timeval second = {1, 0};
        int got = check(pvm_trecv(-1, -1, &second), "pvm_trecv"), got_tag, tid;
        if (got == 0) {
            char text[400];
            int at;
            if (now() < limit)
                continue;
            at = snprintf(text, sizeof text, "stalled in phase %d: nothing for %d s from ranks", phase, set.stall);
            for (int i = 0; i < set.tasks && at < (int)sizeof text - 20; i++)
                if (!heard[i])
                    at += snprintf(text + at, sizeof text - (size_t)at, " %d (t%x)", i, (unsigned)tids[i]);
            fail(text);
        }
        check(pvm_bufinfo(got, NULL, &got_tag, &tid), "pvm_bufinfo");
        if (got_tag == TAG_FAULT) {
            char text[1000];
            check(pvm_upkstr(text), "pvm_upkstr");
            fail(text);
        }
        if (got_tag == TAG_ENDED) {
            char text[100];
            check(pvm_upkint(&tid, 1, 1), "pvm_upkint");
            /* Its last message may be behind this notice, which the pvmd itself wrote. */
            if (tag == TAG_FINAL)
                continue;
            snprintf(text, sizeof text, "rank %d (t%x) has ended in phase %d", rank_of(tid), (unsigned)tid, phase);
            fail(text);
        }
        if (got_tag != tag || rank_of(tid) == set.tasks || heard[rank_of(tid)]) {
            char text[100];
            snprintf(text, sizeof text, "master got tag %d from t%x in phase %d", got_tag, (unsigned)tid, phase);
            fail(text);
        }
        return rank_of(tid);
    }
}

static void start(void)
{
    check(pvm_notify(PvmTaskExit, TAG_ENDED, set.tasks, tids), "pvm_notify");
    for (int i = 0; i < set.tasks; i++) {
        set.rank = i;
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_pkint((int *)&set, SETTINGS, 1), "pvm_pkint");
        check(pvm_pkint(tids, set.tasks, 1), "pvm_pkint");
        check(pvm_send(tids[i], TAG_START), "pvm_send");
    }
}

/* Everything one task says it sent to another, that one must say it got. */
static void compare(void)
{
    static int sent[MAX_TASKS][MAX_TASKS], got[MAX_TASKS][MAX_TASKS];
    char heard[MAX_TASKS] = {0}, text[200];
    int n = set.tasks;
    double messages = 0, bytes = 0;
    for (int i = 0; i < n; i++) {
        double said;
        int rank = hear(TAG_FINAL, heard, -1);
        heard[rank] = 1;
        check(pvm_upkint(sent[rank], n, 1), "pvm_upkint");
        check(pvm_upkint(got[rank], n, 1), "pvm_upkint");
        check(pvm_upkdouble(&said, 1, 1), "pvm_upkdouble");
        bytes += said;
    }
    for (int from = 0; from < n; from++)
        for (int to = 0; to < n; to++) {
            messages += got[to][from];
            if (sent[from][to] != got[to][from]) {
                snprintf(text, sizeof text, "rank %d sent %d messages to rank %d, which got %d", from,
                         sent[from][to], to, got[to][from]);
                fail(text);
            }
        }
    printf("soak: OK %.0f messages %.0f bytes\n", messages, bytes);
}

static void usage(void)
{
    fprintf(stderr, "usage: soak [-n tasks] [-t seconds | -m messages] [-x max_bytes] [-p steps_per_phase]\n"
                    "            [-q stall_seconds] [-s seed] [-d (direct routes)] [-v]\n");
    exit(2);
}

int main(int argc, char **argv)
{
    set = defaults;
    double seconds = 5, messages = 0;
    int opt, verbose = 0;
    if (is_worker(argc, argv)) {
        run_task();
        return 0;
    }
    while ((opt = getopt(argc, argv, "n:t:m:x:p:q:s:dv")) != -1)
        switch (opt) {
        case 'n': set.tasks = (int)number(optarg, 2, MAX_TASKS); break;
        case 't': seconds = (double)number(optarg, 0, 100000000); break;
        case 'm': messages = (double)number(optarg, 1, 1L << 40); break;
        case 'x': set.max_size = (int)number(optarg, 0, 64 << 20); break;
        case 'p': set.steps = (int)number(optarg, 1, 1000000); break;
        case 'q': set.stall = (int)number(optarg, 2, 100000); break;
        case 's': set.seed = (int)number(optarg, 0, 1 << 30); break;
        case 'd': set.direct = 1; break;
        case 'v': verbose = 1; break;
        default: usage();
        }
    set.context = check(pvm_newcontext(), "pvm_newcontext");
    spawn_workers(set.tasks, tids);
    start();

    double begin = now(), total = 0;
    for (int phase = 0, stop = 0; !stop; phase++) {
        char heard[MAX_TASKS] = {0};
        for (int i = 0; i < set.tasks; i++) {
            int said;
            int rank = hear(TAG_PHASE, heard, phase);
            heard[rank] = 1;
            check(pvm_upkint(&said, 1, 1), "pvm_upkint");
            total += said;
        }
        stop = messages > 0 ? total >= messages : now() - begin >= seconds;
        if (verbose)
            fprintf(stderr, "soak: phase %d, %.0f messages, %.1f s\n", phase, total, now() - begin);
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_pkint(&stop, 1, 1), "pvm_pkint");
        check(pvm_mcast(tids, set.tasks, TAG_GO), "pvm_mcast");
    }
    compare();
    pvm_exit();
    return 0;
}
