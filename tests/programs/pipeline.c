// A pipeline as a shell makes it: three children, each working all the time, data on its way.
// mist: tree
// mist: dumps 5
#include "mist.h"
#define TOTAL (256 * 1024)

int main(void)
{
    int a[2], b[2], status;
    MUST(pipe(a));
    MUST(pipe(b));
    pid_t first = MUST(fork());
    if (!first) {
        close(a[0]), close(b[0]), close(b[1]);
        for (uint32_t i = 0; i < TOTAL; i++) {
            if (i % 4096 == 0 && i < TOTAL / 2 && !mist_gone_on())
                mist_sleep(20000);
            if (write(a[1], &i, 4) != 4)
                mist_fail("the first of the pipeline: write: %s", strerror(errno));
        }
        _exit(1);
    }
    pid_t second = MUST(fork());
    if (!second) {
        close(a[1]), close(b[0]);
        uint32_t v, next = 0;
        FILE *in = fdopen(a[0], "r"), *out = fdopen(b[1], "w");
        while (fread(&v, 4, 1, in) == 1) {
            CHECK("a word in the middle of the pipeline", next, v);
            next++;
            v = mist_mix(v);
            if (fwrite(&v, 4, 1, out) != 1)
                mist_fail("the second of the pipeline: write: %s", strerror(errno));
        }
        CHECK("words in the middle", TOTAL, next);
        fclose(out);
        _exit(2);
    }
    close(a[0]), close(a[1]), close(b[1]);
    pid_t third = MUST(fork());
    if (!third) {
        uint32_t v, next = 0;
        FILE *in = fdopen(b[0], "r");
        while (fread(&v, 4, 1, in) == 1) {
            CHECK("a word at the end of the pipeline", (uint32_t)mist_mix(next), v);
            next++;
        }
        CHECK("words at the end", TOTAL, next);
        _exit(3);
    }
    close(b[0]);

    mist_ready();
    mist_wait();

    pid_t p[3] = {first, second, third};
    for (int i = 0; i < 3; i++) {
        CHECK("waitpid", p[i], CALL(waitpid(p[i], &status, 0)));
        CHECK("exit code", i + 1, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
    }
    mist_pass();
}
