// The protocol between a self-checking test program and the harness in tests/programs.rs.
//
// A program is started in an empty directory of its own. It sets its state up, calls
// mist_ready() (which creates the file `ready`) and then mist_wait(), which returns when the
// file `go` exists. In between, the harness dumps and restores it. After that the program
// checks everything it can see of itself and calls mist_pass(), or one of the CHECKs wrote
// `FAIL: what, wanted, got`. The verdict is the first line of the file `result`; whoever
// writes it first wins, so children and threads may CHECK too.
//
// Directives for the harness are comments at the head of a program:
//   // mist: cflags -pthread          more arguments for cc
//   // mist: variants a b c           one test per variant, which is passed as argv[1]
//   // mist: tree                     dump with --tree
//   // mist: tcp-established          dump with --tcp-established; implies peer
//   // mist: peer                     $MIST_PEER is the port of a TCP peer outside
//   // mist: stdout                   stdout is a pipe to the harness, which expects "after"
//   // mist: user                     run the program as uid and gid 65534
//   // mist: setsid                   the program leads a session of its own
//   // mist: stopped                  the program is group-stopped while it waits
//   // mist: copied                   restore it, too, from what was dumped while it ran on
//   // mist: dumps N                  dump it N times while it goes on, not three times
//   // mist: removed NAME...          files here that are gone before the restore
//   // mist: replaced NAME...         files here that are others before the restore
//   // mist: refused TEXT             a dump has to fail with TEXT in its error, and to harm nobody
//   // mist: may-refuse TEXT          a dump may do so
//   // mist: moments TEXT             a dump may do so at some moments; then it is tried again
//   // mist: no-go-on REASON          leave this mode out; likewise no-lazy, no-twice, no-kill
#ifndef MIST_H
#define MIST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

// Absolute, so that programs may change their directory. A program that changes its root
// sets it to what the directory is called afterwards.
static char mist_dir[PATH_MAX];
static char mist_extra[4096]; // more lines for `result`
static int64_t mist_gaps[8];  // the longest pauses of mist_wait(), in microseconds, longest first

__attribute__((constructor)) static void mist_init(void)
{
    if (!getcwd(mist_dir, sizeof mist_dir))
        abort();
}

static UNUSED const char *mist_path(const char *name)
{
    static __thread char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", mist_dir, name);
    return path;
}

// Puts `text` under `name` in one step; a file that exists stays as it is.
static UNUSED int mist_put(const char *name, const char *text)
{
    char tmp[PATH_MAX + 64], to[PATH_MAX + 64];
    snprintf(to, sizeof to, "%s/%s", mist_dir, name);
    snprintf(tmp, sizeof tmp, "%s/.%s.%ld", mist_dir, name, syscall(SYS_gettid));
    // By hand and with raw calls: the program may have used up descriptors, or be low on stack.
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return -1;
    size_t len = strlen(text), at = 0;
    while (at < len) {
        ssize_t n = write(fd, text + at, len - at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        at += n;
    }
    close(fd);
    int r = link(tmp, to);
    unlink(tmp);
    return r;
}

__attribute__((noreturn, format(printf, 1, 2))) static UNUSED void mist_fail(const char *fmt, ...)
{
    char text[2048] = "FAIL: ";
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text + 6, sizeof text - 7, fmt, ap);
    va_end(ap);
    strcat(text, "\n");
    mist_put("result", text);
    fputs(text, stderr);
    _exit(1);
}

__attribute__((noreturn)) static UNUSED void mist_skip(const char *why)
{
    char text[512];
    snprintf(text, sizeof text, "SKIPPED: %s\n", why);
    mist_put("result", text);
    _exit(0);
}

__attribute__((noreturn)) static UNUSED void mist_pass(void)
{
    char text[8192];
    int n = snprintf(text, sizeof text, "PASS\n%sgaps", mist_extra);
    for (size_t i = 0; i < sizeof mist_gaps / sizeof *mist_gaps; i++)
        n += snprintf(text + n, sizeof text - n, " %lld", (long long)mist_gaps[i]);
    strcat(text, "\n");
    _exit(mist_put("result", text) == 0 ? 0 : 1);
}

// A step of the set-up: it has to work, or the test says nothing.
#define MUST(expr)                                                                               \
    ({                                                                                           \
        __typeof__(expr) mist_r = (expr);                                                        \
        if ((intptr_t)mist_r == -1)                                                              \
            mist_fail("%s:%d: set-up: %s: %s", __FILE_NAME__, __LINE__, #expr, strerror(errno)); \
        mist_r;                                                                                  \
    })

#define CHECK(what, wanted, got)                                                                 \
    do {                                                                                         \
        long long mist_w = (long long)(wanted), mist_g = (long long)(got);                       \
        if (mist_w != mist_g)                                                                    \
            mist_fail("%s (line %d), wanted %lld (%#llx), got %lld (%#llx)", (what), __LINE__,   \
                      mist_w, mist_w, mist_g, mist_g);                                           \
    } while (0)

#define CHECK_STR(what, wanted, got)                                                             \
    do {                                                                                         \
        const char *mist_w = (wanted), *mist_g = (got);                                          \
        if (strcmp(mist_w, mist_g))                                                              \
            mist_fail("%s (line %d), wanted \"%s\", got \"%s\"", (what), __LINE__, mist_w,       \
                      mist_g);                                                                   \
    } while (0)

#define CHECK_MEM(what, wanted, got, len)                                                        \
    do {                                                                                         \
        const unsigned char *mist_w = (const void *)(wanted), *mist_g = (const void *)(got);     \
        for (size_t mist_i = 0; mist_i < (size_t)(len); mist_i++)                                \
            if (mist_w[mist_i] != mist_g[mist_i])                                                \
                mist_fail("%s (line %d), byte %zu, wanted %#x, got %#x", (what), __LINE__,       \
                          mist_i, mist_w[mist_i], mist_g[mist_i]);                               \
    } while (0)

// A call that has to succeed after the restore.
#define CALL(expr)                                                                               \
    ({                                                                                           \
        __typeof__(expr) mist_r = (expr);                                                        \
        if ((intptr_t)mist_r == -1)                                                              \
            mist_fail("%s (line %d), wanted success, got %s", #expr, __LINE__, strerror(errno)); \
        mist_r;                                                                                  \
    })

// A call that has to fail with `err`.
#define CHECK_ERR(what, err, expr)                                                               \
    do {                                                                                         \
        errno = 0;                                                                               \
        long long mist_r = (long long)(expr);                                                    \
        if (mist_r != -1 || errno != (err))                                                      \
            mist_fail("%s (line %d), wanted -1 with %s, got %lld with %s", (what), __LINE__,     \
                      strerror(err), mist_r, strerror(errno));                                   \
    } while (0)

static UNUSED int64_t mist_clock_us(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}
static UNUSED int64_t mist_now(void)
{
    return mist_clock_us(CLOCK_MONOTONIC);
}

// Sleeps for `us` whatever signals come.
static UNUSED void mist_sleep(int64_t us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

// One turn of waiting: 2 ms. What it takes longer than that (the program was stopped, or was
// away) is noted in mist_gaps.
static UNUSED void mist_turn(void)
{
    int64_t before = mist_now();
    mist_sleep(2000);
    int64_t gap = mist_now() - before - 2000;
    for (size_t i = 0; i < sizeof mist_gaps / sizeof *mist_gaps; i++)
        if (gap > mist_gaps[i]) {
            int64_t t = mist_gaps[i];
            mist_gaps[i] = gap;
            gap = t;
        }
}

static UNUSED void mist_ready(void)
{
    if (mist_put("ready", "") < 0)
        mist_fail("set-up: cannot create ready: %s", strerror(errno));
}

static UNUSED int mist_gone_on(void)
{
    int saved = errno;
    int r = access(mist_path("go"), F_OK) == 0;
    errno = saved;
    return r;
}

static UNUSED void mist_wait(void)
{
    while (!mist_gone_on())
        mist_turn();
}

// Reports how long a timed call took and should have taken. kind: "relative" (time spent away
// does not count), "absolute" (it does). The harness judges, as it knows how often the program
// was away.
static UNUSED void mist_timed(const char *what, const char *kind, int64_t elapsed, int64_t wanted)
{
    size_t n = strlen(mist_extra);
    snprintf(mist_extra + n, sizeof mist_extra - n, "timed %s %s %lld %lld\n", what, kind,
             (long long)elapsed, (long long)wanted);
}

// Waits until task `tid` of process `pid` sleeps in a system call out of `nr`, `nr2`.
static UNUSED void mist_until_in(pid_t pid, pid_t tid, long nr, long nr2)
{
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/%d/task/%d/syscall", pid, tid);
    int seen = 0;
    for (int i = 0; i < 10000 && seen < 3; i++) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
        if (fd >= 0)
            close(fd);
        if (n > 0) {
            text[n] = 0;
            char *end;
            long got = strtol(text, &end, 10);
            seen = end != text && (got == nr || got == nr2) ? seen + 1 : 0;
        }
        mist_sleep(1000);
    }
    if (seen < 3)
        mist_fail("set-up: task %d never slept in system call %ld (see %s)", tid, nr, path);
}

// A pattern that differs in every page and every word.
static UNUSED uint64_t mist_mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
static UNUSED void mist_fill(void *at, size_t len, uint64_t seed)
{
    uint64_t *w = at;
    for (size_t i = 0; i < len / 8; i++)
        w[i] = mist_mix(seed + i);
}
static UNUSED void mist_check_fill(const char *what, const void *at, size_t len, uint64_t seed)
{
    const uint64_t *w = at;
    for (size_t i = 0; i < len / 8; i++)
        if (w[i] != mist_mix(seed + i))
            mist_fail("%s, byte %zu at %p, wanted %#llx, got %#llx", what, i * 8,
                      (const void *)(w + i), (unsigned long long)mist_mix(seed + i),
                      (unsigned long long)w[i]);
}
static UNUSED void mist_check_byte(const char *what, const void *at, size_t len, unsigned char byte)
{
    const unsigned char *b = at;
    for (size_t i = 0; i < len; i++)
        if (b[i] != byte)
            mist_fail("%s, byte %zu at %p, wanted %#x, got %#x", what, i, (const void *)(b + i),
                      byte, b[i]);
}

// F_GETFL without O_LARGEFILE, which glibc hides on 64-bit machines and the kernel shows.
static UNUSED int mist_getfl(int fd)
{
    return fcntl(fd, F_GETFL) & ~0100000;
}

// The text of a small file of /proc, cut at the end of `buf`.
static UNUSED size_t mist_slurp(const char *path, char *buf, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t n = 0;
    if (fd >= 0) {
        ssize_t r;
        while (n < size - 1 && (r = read(fd, buf + n, size - 1 - n)) > 0)
            n += r;
        close(fd);
    }
    buf[n] = 0;
    return n;
}

// What /proc/PID/status says after `key:`, without blanks around.
static UNUSED const char *mist_status(pid_t pid, const char *key)
{
    static char text[16384];
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    mist_slurp(path, text, sizeof text);
    size_t k = strlen(key);
    for (char *line = text; line && *line; line = strchr(line, '\n'), line += line != NULL)
        if (!strncmp(line, key, k) && line[k] == ':') {
            char *v = line + k + 1;
            while (*v == ' ' || *v == '\t')
                v++;
            v[strcspn(v, "\n")] = 0;
            return v;
        }
    return "";
}

// The line of /proc/self/smaps about the mapping at `addr` that begins with `key:`; with
// key NULL the permissions ("rw-p").
static UNUSED const char *mist_smaps(const void *addr, const char *key)
{
    static char found[512];
    char line[PATH_MAX + 128];
    FILE *f = fopen("/proc/self/smaps", "re");
    int inside = 0;
    found[0] = 0;
    while (f && fgets(line, sizeof line, f)) {
        unsigned long a, b;
        char perms[8];
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%lx-%lx %7s", &a, &b, perms) == 3) {
            if (inside)
                break;
            inside = (unsigned long)addr >= a && (unsigned long)addr < b;
            if (inside && !key) {
                strcpy(found, perms);
                break;
            }
        } else if (inside && key && !strncmp(line, key, strlen(key)) && line[strlen(key)] == ':') {
            char *v = line + strlen(key) + 1;
            while (*v == ' ')
                v++;
            snprintf(found, sizeof found, "%.500s", v);
            break;
        }
    }
    if (f)
        fclose(f);
    return found;
}

#endif
