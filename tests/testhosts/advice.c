/*
 * Changes advice and lock of its memory every few milliseconds, and looks before
 * that whether the kernel says of it what it last asked for: whoever moves it has to carry what
 * it asked for at the last moment.
 *
 *     advice FILE    spawns a task that does it until FILE is there, and says what came of it
 */
#define _GNU_SOURCE
#include <pvm3.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RESULT = 1, LENGTH = 2 << 20, PAGE = 4096 };

static char *area;

/* The flags of `area`. */
static void flags(char *out, size_t size)
{
    char line[512], begin[32];
    FILE *smaps = fopen("/proc/self/smaps", "r");
    int ours = 0;

    *out = 0;
    snprintf(begin, sizeof begin, "%lx-", (unsigned long)area);
    while (smaps && fgets(line, sizeof line, smaps)) {
        if (!strncmp(line, begin, strlen(begin)))
            ours = 1;
        else if (ours && !strncmp(line, "VmFlags:", 8)) {
            snprintf(out, size, "%s", line + 8);
            break;
        }
    }
    if (smaps)
        fclose(smaps);
}

static int is_as_asked(int want, char *said, size_t size)
{
    static const char *codes[] = { " dc ", " lo ", " dd ", " sr " };
    int i;

    flags(said, size);
    for (i = 0; i < 4; i++)
        if (!!strstr(said, codes[i]) != (want >> i & 1))
            return 0;
    return 1;
}

static void ask(int want)
{
    madvise(area, LENGTH, want & 1 ? MADV_DONTFORK : MADV_DOFORK);
    if (want & 2)
        mlock(area, LENGTH);
    else
        munlock(area, LENGTH);
    madvise(area, LENGTH, want & 4 ? MADV_DONTDUMP : MADV_DODUMP);
    madvise(area, LENGTH, want & 8 ? MADV_SEQUENTIAL : MADV_NORMAL);
}

static void change(const char *end, char *said, size_t size)
{
    int want = 0;

    /* Between pages that it cannot merge with, it is a mapping of its own whatever its flags are. */
    area = mmap(0, LENGTH + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    area += PAGE;
    mprotect(area, LENGTH, PROT_READ | PROT_WRITE);
    memset(area, 1, LENGTH);
    while (access(end, F_OK)) {
        ask(++want);
        /* Mostly it is found here. */
        usleep(5000);
        if (!is_as_asked(want, said, size))
            return;
    }
    snprintf(said, size, "as asked %d times", want);
}

int main(int argc, char **argv)
{
    char said[512];
    char *arguments[] = { argv[1], "task", 0 };
    int tid;

    if (pvm_mytid() < 0 || argc < 2)
        return 2;
    if (argc == 3) {
        change(argv[1], said, sizeof said);
        pvm_initsend(PvmDataDefault);
        pvm_pkstr(said);
        pvm_send(pvm_parent(), RESULT);
    } else {
        if (pvm_spawn(argv[0], arguments, PvmTaskDefault, "", 1, &tid) != 1)
            return 3;
        pvm_recv(tid, RESULT);
        pvm_upkstr(said);
        printf("advice: %s\n", said);
    }
    pvm_exit();
    return 0;
}
