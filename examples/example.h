/*
 * What the examples share. Each of them is one program: started by hand it is
 * the master, which spawns itself with "worker" as its first argument.
 */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <pvm3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Ends the task, loudly, when a PVM call failed; else gives back its result. */
static inline int check(int result, const char *call)
{
    if (result < 0) {
        fprintf(stderr, "t%x: ", (unsigned)pvm_mytid());
        pvm_perror((char *)call);
        pvm_exit();
        exit(1);
    }
    return result;
}

/* malloc that does not fail. */
static inline void *grab(size_t size)
{
    void *p = malloc(size ? size : 1);
    if (!p) {
        fprintf(stderr, "out of memory for %zu bytes\n", size);
        pvm_exit();
        exit(1);
    }
    return p;
}

static inline int is_worker(int argc, char **argv)
{
    return argc > 1 && strcmp(argv[1], "worker") == 0;
}

/*
 * Spawns n workers of this very program, wherever PVM likes. The path is
 * absolute: the examples need not be installed for PVM to find them, if all
 * hosts see the same files.
 */
static inline void spawn_workers(int n, int *tids)
{
    static char self[4096];
    char *args[] = {"worker", NULL};
    ssize_t len = readlink("/proc/self/exe", self, sizeof self - 1);
    if (len < 0) {
        perror("/proc/self/exe");
        pvm_exit();
        exit(1);
    }
    self[len] = 0;
    if (check(pvm_spawn(self, args, PvmTaskDefault, "", n, tids), "pvm_spawn") < n) {
        for (int i = 0; i < n; i++)
            if (tids[i] < 0)
                fprintf(stderr, "worker %d was not spawned: PVM error %d\n", i, tids[i]);
        pvm_exit();
        exit(1);
    }
}

/* FNV-1a, 64 bits: start with FNV_START, feed it piece by piece. */
#define FNV_START UINT64_C(0xcbf29ce484222325)
static inline uint64_t fnv(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return hash;
}

/* A small good generator (splitmix64), so that results need no libc's rand. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* The number after an option, within bounds. */
static inline long number(const char *text, long low, long high)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || end == text || value < low || value > high) {
        fprintf(stderr, "'%s' is no number from %ld to %ld\n", text, low, high);
        exit(2);
    }
    return value;
}

#endif
