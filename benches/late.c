// Sleeps once in a system call with a time-out and shows when that ended: late CALL FILE START
// START is when to call (CLOCK_MONOTONIC, nanoseconds), so that two of them call in the same tick of the kernel's
// clock, of which one is left alone. FILE shows eight words: began, ended, the time the program was away, the
// time-out, result, errno, beat, system call. A second thread notices when the program is away; both have a
// priority above all others where that is allowed, so that others' load shows less.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 700
#define TICK_NS 100000
static volatile int64_t *shown;
static const char *name;
static int fd, fd2, pair[2];
static uint32_t word;

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}
static struct timespec spec(int64_t ns)
{
    return (struct timespec){ns / 1000000000, ns % 1000000000};
}
static int is(const char *what)
{
    return !strcmp(name, what);
}
static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void *tick(void *arg)
{
    struct timespec t = {0, TICK_NS};
    int64_t last = now(CLOCK_MONOTONIC);
    (void)arg;
    for (;;) {
        nanosleep(&t, NULL);
        int64_t n = now(CLOCK_MONOTONIC);
        // The longest pause is the one it was away in.
        if (n - last - TICK_NS > shown[2])
            shown[2] = n - last - TICK_NS;
        shown[6] = last = n;
    }
    return NULL;
}

static void set_up(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct timeval tv = {0, WAIT_MS * 1000};
    char full[4096] = "";
    snprintf(a.sun_path + 1, 50, "late-%d", getpid());
    if (strstr(name, "rcvtimeo") || strstr(name, "sndtimeo")) {
        int option = strstr(name, "rcvtimeo") ? SO_RCVTIMEO : SO_SNDTIMEO;
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
        if (is("accept_rcvtimeo") || is("connect_sndtimeo")) {
            pair[0] = socket(AF_UNIX, SOCK_STREAM, 0);
            if (bind(pair[0], (void *)&a, sizeof a) < 0 || listen(pair[0], 0) < 0)
                fail("listen");
        }
        if (is("connect_sndtimeo")) {
            fd2 = socket(AF_UNIX, SOCK_STREAM, 0);
            connect(fd2, (void *)&a, sizeof a);
            pair[0] = socket(AF_UNIX, SOCK_STREAM, 0);
        }
        setsockopt(pair[0], SOL_SOCKET, option, &tv, sizeof tv);
        while (is("send_sndtimeo") && send(pair[0], full, sizeof full, MSG_DONTWAIT) > 0)
            ;
        return;
    }
    fd = eventfd(0, 0);
    if (strstr(name, "epoll")) {
        struct epoll_event e = {.events = EPOLLIN};
        fd2 = epoll_create1(0);
        epoll_ctl(fd2, EPOLL_CTL_ADD, fd, &e);
    }
    if (is("semtimedop"))
        fd2 = semget(IPC_PRIVATE, 1, 0600);
    if (is("mq_timedreceive")) {
        struct mq_attr q = {.mq_maxmsg = 1, .mq_msgsize = 8};
        char path[32];
        snprintf(path, sizeof path, "/late-%d", getpid());
        if ((fd2 = mq_open(path, O_RDWR | O_CREAT, 0600, &q)) < 0)
            fail("mq_open");
    }
}

static long call(void)
{
    struct timespec t = spec(WAIT_MS * 1000000ll), rem;
    struct timeval tv = {0, WAIT_MS * 1000};
    struct pollfd p = {fd, POLLIN, 0};
    struct epoll_event e;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    char buf[8192];
    sigset_t s;
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    sigemptyset(&s);
    sigaddset(&s, 40);
    snprintf(a.sun_path + 1, 50, "late-%d", getpid());
    if (is("poll"))
        return syscall(SYS_poll, &p, 1, WAIT_MS);
    if (is("ppoll"))
        return syscall(SYS_ppoll, &p, 1, &t, NULL, 8);
    if (is("select"))
        return syscall(SYS_select, fd + 1, &set, NULL, NULL, &tv);
    if (is("pselect"))
        return syscall(SYS_pselect6, fd + 1, &set, NULL, NULL, &t, NULL);
    if (is("epoll_wait"))
        return syscall(SYS_epoll_wait, fd2, &e, 1, WAIT_MS);
    if (is("epoll_pwait2"))
        return syscall(SYS_epoll_pwait2, fd2, &e, 1, &t, NULL, 8);
    if (is("futex"))
        return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
    if (is("nanosleep"))
        return syscall(SYS_nanosleep, &t, &rem);
    if (is("clock_nanosleep"))
        return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
    if (is("sigtimedwait"))
        return syscall(SYS_rt_sigtimedwait, &s, NULL, &t, 8);
    if (is("semtimedop"))
        return syscall(SYS_semtimedop, fd2, &(struct sembuf){0, -1, 0}, 1, &t);
    if (is("recv_rcvtimeo"))
        return recv(pair[0], buf, sizeof buf, 0);
    if (is("recv_waitall_rcvtimeo"))
        return recv(pair[0], buf, sizeof buf, MSG_WAITALL);
    if (is("send_sndtimeo"))
        return send(pair[0], buf, sizeof buf, 0);
    if (is("accept_rcvtimeo"))
        return accept(pair[0], NULL, NULL);
    if (is("connect_sndtimeo"))
        return connect(pair[0], (void *)&a, sizeof a);
    // Absolute ones.
    if (is("futex_bitset")) {
        t = spec(now(CLOCK_MONOTONIC) + WAIT_MS * 1000000ll);
        return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    }
    if (is("clock_nanosleep_abs")) {
        t = spec(now(CLOCK_MONOTONIC) + WAIT_MS * 1000000ll);
        return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    }
    if (is("mq_timedreceive")) {
        t = spec(now(CLOCK_REALTIME) + WAIT_MS * 1000000ll);
        return mq_timedreceive(fd2, buf, sizeof buf, NULL, &t);
    }
    fail("late: unknown call");
    return 0;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    struct sched_param first = {2}, second = {1};
    if (argc != 4)
        return 2;
    name = argv[1];
    int file = open(argv[2], O_RDWR);
    shown = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || shown == MAP_FAILED)
        fail(argv[2]);
    set_up();
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    sigprocmask(SIG_BLOCK, &s, NULL);
    sched_setscheduler(0, SCHED_FIFO, &first);
    pthread_create(&thread, NULL, tick, NULL);
    pthread_setschedparam(thread, SCHED_FIFO, &second);
    struct timespec start = spec(atoll(argv[3]));
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &start, NULL);
    shown[2] = 0;
    shown[3] = WAIT_MS * 1000000ll;
    shown[0] = now(CLOCK_MONOTONIC);
    errno = 0;
    long r = call();
    int64_t ended = now(CLOCK_MONOTONIC);
    shown[4] = r;
    shown[5] = errno;
    shown[1] = ended;
    if (is("semtimedop"))
        semctl(fd2, 0, IPC_RMID);
    if (is("mq_timedreceive")) {
        char path[32];
        snprintf(path, sizeof path, "/late-%d", getpid());
        mq_unlink(path);
    }
    return 0;
}
