/*
 * ring: a token goes round a ring of tasks, and each adds to its checksum.
 *
 * The workers find each other with pvm_siblings(). Besides the hash the token
 * carries a load (-b bytes) that must arrive as it left; the hash depends on
 * the order of the tasks, so that a hop that is skipped, doubled or taken by the
 * wrong task shows. The master knows what must come out.
 */
#include "example.h"

enum { TAG_TOKEN = 1, TAG_START };

static uint64_t hop(uint64_t hash, int rank, int lap)
{
    int both[2] = {rank, lap};
    return fnv(hash, both, sizeof both);
}

static void pass(int tid, uint64_t hash, int lap, char *load, int size)
{
    int parts[3] = {(int)(uint32_t)(hash >> 32), (int)(uint32_t)hash, lap};
    check(pvm_initsend(PvmDataDefault), "pvm_initsend");
    check(pvm_pkint(parts, 3, 1), "pvm_pkint");
    check(pvm_pkbyte(load, size, 1), "pvm_pkbyte");
    check(pvm_send(tid, TAG_TOKEN), "pvm_send");
}

static uint64_t take(int tid, int *lap, char *load, int size)
{
    int parts[3];
    check(pvm_recv(tid, TAG_TOKEN), "pvm_recv");
    check(pvm_upkint(parts, 3, 1), "pvm_upkint");
    check(pvm_upkbyte(load, size, 1), "pvm_upkbyte");
    *lap = parts[2];
    return (uint64_t)(uint32_t)parts[0] << 32 | (uint32_t)parts[1];
}

static void fill(char *load, int size)
{
    for (int i = 0; i < size; i++)
        load[i] = (char)(i * 31 + i / 251);
}

static void worker(void)
{
    int master = pvm_parent(), mytid = pvm_mytid(), *tids, start[2], rank = 0;
    int tasks = check(pvm_siblings(&tids), "pvm_siblings");
    while (tids[rank] != mytid)
        rank++;
    check(pvm_recv(master, TAG_START), "pvm_recv");
    check(pvm_upkint(start, 2, 1), "pvm_upkint");
    int laps = start[0], size = start[1];
    char *load = grab((size_t)size), *expected = grab((size_t)size);
    fill(expected, size);
    /* The master sends the token to rank 0, and gets it from the last one. */
    for (int i = 0; i < laps; i++) {
        int lap, from = rank ? tids[rank - 1] : i ? tids[tasks - 1] : master;
        uint64_t hash = take(from, &lap, load, size);
        if (lap != i || memcmp(load, expected, (size_t)size)) {
            fprintf(stderr, "ring: FAULT task %d in lap %d got lap %d, load %s\n", rank, i, lap,
                    memcmp(load, expected, (size_t)size) ? "damaged" : "intact");
            pvm_exit();
            exit(1);
        }
        int last = rank == tasks - 1;
        pass(last ? i == laps - 1 ? master : tids[0] : tids[rank + 1], hop(hash, rank, i), i + last, load, size);
    }
}

int main(int argc, char **argv)
{
    int laps = 200, size = 100, tasks = 4, opt, lap, tids[100];
    if (is_worker(argc, argv)) {
        worker();
        pvm_exit();
        return 0;
    }
    while ((opt = getopt(argc, argv, "l:b:w:")) != -1)
        switch (opt) {
        case 'l': laps = (int)number(optarg, 1, 1000000000); break;
        case 'b': size = (int)number(optarg, 0, 1 << 24); break;
        case 'w': tasks = (int)number(optarg, 1, 100); break;
        default: fprintf(stderr, "usage: ring [-l laps] [-b bytes] [-w tasks]\n"); return 2;
        }
    spawn_workers(tasks, tids);
    int start[2] = {laps, size};
    check(pvm_initsend(PvmDataDefault), "pvm_initsend");
    check(pvm_pkint(start, 2, 1), "pvm_pkint");
    check(pvm_mcast(tids, tasks, TAG_START), "pvm_mcast");

    char *load = grab((size_t)size);
    fill(load, size);
    pass(tids[0], FNV_START, 0, load, size);
    uint64_t hash = take(tids[tasks - 1], &lap, load, size), expected = FNV_START;
    for (int i = 0; i < laps; i++)
        for (int rank = 0; rank < tasks; rank++)
            expected = hop(expected, rank, i);
    int right = hash == expected && lap == laps;
    pvm_exit();
    printf("ring: %s, %d tasks, %d laps, checksum %016llx\n", right ? "OK" : "FAULT", tasks, laps,
           (unsigned long long)hash);
    return !right;
}
