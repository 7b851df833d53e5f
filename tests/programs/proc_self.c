// What /proc shows of a process: arguments, environment, auxv, exe, comm, maps, and the
// positions of the heap and of the stack.
#include "mist.h"

static size_t slurp(const char *name, char *buf, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/%s", name);
    return mist_slurp(path, buf, size);
}

// Fields 26 to 28 and 45 to 51 of stat: where code, stack, data, brk, arguments and environment are.
static void positions(char *out, size_t size)
{
    char text[4096];
    slurp("stat", text, sizeof text);
    char *p = strrchr(text, ')');
    int field = 2;
    size_t n = 0;
    for (char *w = strtok(p + 1, " "); w; w = strtok(NULL, " ")) {
        field++;
        if ((field >= 26 && field <= 28) || (field >= 45 && field <= 51))
            n += snprintf(out + n, size - n, "%d:%s ", field, w);
    }
}

// Addresses, permissions, offsets and names of every mapping, in order; neighbours of one kind
// as one, as the kernel may merge what it kept apart for reasons of its own.
static void maps(char *out, size_t size)
{
    char line[1024];
    char last[64 + 512] = "";
    unsigned long start = 0, end = 0, next = 0;
    size_t n = 0;
    FILE *f = fopen("/proc/self/maps", "re");
    while (fgets(line, sizeof line, f)) {
        char range[64], perms[8], offset[32], dev[16], ino[32], name[512] = "";
        sscanf(line, "%63s %7s %31s %15s %31s %511[^\n]", range, perms, offset, dev, ino, name);
        if (strstr(name, "[stack]") || strstr(name, "[heap]"))
            continue; // they grow
        unsigned long a, b, o = strtoul(offset, NULL, 16);
        sscanf(range, "%lx-%lx", &a, &b);
        char kind[64 + 512];
        snprintf(kind, sizeof kind, "%s %s", perms, name);
        if (a != end || strcmp(kind, last) || (name[0] == '/' && o != next)) {
            if (end)
                n += snprintf(out + n, size - n, "%lx-%lx %s\n", start, end, last);
            start = a;
            if (name[0] == '/')
                n += snprintf(out + n, size - n, "from %lx: ", o);
        }
        end = b;
        next = o + (b - a);
        strcpy(last, kind);
    }
    snprintf(out + n, size - n, "%lx-%lx %s\n", start, end, last);
    fclose(f);
}

static char before[6][65536], after[6][65536];
static size_t len[2][6];
static void look(char buf[6][65536], size_t *len)
{
    len[0] = slurp("cmdline", buf[0], 65536);
    len[1] = slurp("environ", buf[1], 65536);
    len[2] = slurp("auxv", buf[2], 65536);
    ssize_t n = readlink("/proc/self/exe", buf[3], 65535);
    buf[3][len[3] = n < 0 ? 0 : n] = 0;
    positions(buf[4], 65536);
    len[4] = strlen(buf[4]);
    maps(buf[5], 65536);
    len[5] = strlen(buf[5]);
}

int main(int argc, char **argv)
{
    (void)argc;
    // Once for nothing: stdio takes its memory.
    look(after, len[1]);
    look(before, len[0]);
    CHECK("set-up: environment", 1, getenv("MIST_MARK") != NULL);

    mist_ready();
    mist_wait();

    look(after, len[1]);
    static const char *const what[] = {"cmdline", "environ", "auxv", "exe", "positions in stat", "maps"};
    for (int i = 0; i < 6; i++) {
        if (i >= 3 && strcmp(before[i], after[i]))
            fprintf(stderr, "%s before:\n%s\nafter:\n%s\n", what[i], before[i], after[i]);
        CHECK(what[i], len[0][i], len[1][i]);
        CHECK_MEM(what[i], before[i], after[i], len[0][i]);
    }
    CHECK_STR("MIST_MARK", "of this program", getenv("MIST_MARK"));
    // /proc/self/cmdline follows the memory of the arguments.
    argv[0][0] = '#';
    slurp("cmdline", after[0], 65536);
    CHECK("cmdline follows argv", '#', after[0][0]);
    mist_pass();
}
