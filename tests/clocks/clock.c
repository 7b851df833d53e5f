// Notes CLOCK_MONOTONIC, says it is ready, waits for the file "go", and notes the clock again. Reads it
// through the vDSO and by system call: both must tell the same.
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double by(int call) {
    struct timespec t;
    if (call)
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    else
        clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(void) {
    double before = by(0);
    FILE *f = fopen("ready", "w");
    if (!f || fclose(f))
        return 2;
    while (access("go", F_OK)) {
        struct timespec t = {0, 2000000};
        nanosleep(&t, NULL);
    }
    double vdso = by(0), call = by(1);
    f = fopen("result.tmp", "w");
    if (!f)
        return 2;
    fprintf(f, "%.6f %.6f %.6f\n", before, vdso, call);
    if (fclose(f) || rename("result.tmp", "result"))
        return 2;
    return 0;
}
