// Sleeps once in a system call and shows when that ended, by its time-out or, where the name ends in _event, because
// of what another thread or a child does after the same time: late CALL FILE START
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
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 700
#define TICK_NS 100000
#define MUCH (1 << 20)
static volatile int64_t *shown;
static const char *name;
static int fd, fd2, pair[2];
static uint32_t word;
static struct sockaddr_in to;
static int64_t start;

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

static char much[MUCH];
static pthread_t sleeper;
static struct sockaddr_un address = {.sun_family = AF_UNIX};
static void on_signal(int sig)
{
    (void)sig;
}

static void set_up_event(void)
{
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &sa, NULL);
    sleeper = pthread_self();
    snprintf(address.sun_path + 1, 50, "late-%d", getpid());
    fd = eventfd(0, 0);
    if (is("read_event") || is("write_event"))
        pipe(pair);
    if (is("send_event") || is("recv_waitall_event"))
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    if (is("recv_waitall_event"))
        send(pair[1], much, 1000, 0);
    if (is("accept_event") || is("connect_event")) {
        pair[0] = socket(AF_UNIX, SOCK_STREAM, 0);
        fd2 = socket(AF_UNIX, SOCK_STREAM, 0);
        if (bind(pair[0], (void *)&address, sizeof address) < 0 || listen(pair[0], 0) < 0)
            fail("listen");
        pair[1] = socket(AF_UNIX, SOCK_STREAM, 0);
        if (is("connect_event"))
            connect(pair[1], (void *)&address, sizeof address);
    }
    if (is("epoll_wait_event")) {
        struct epoll_event e = {.events = EPOLLIN};
        fd2 = epoll_create1(0);
        epoll_ctl(fd2, EPOLL_CTL_ADD, fd, &e);
    }
    if (is("semop_event"))
        fd2 = semget(IPC_PRIVATE, 1, 0600);
    if (is("msgrcv_event"))
        fd2 = msgget(IPC_PRIVATE, 0600);
    if (is("flock_event")) {
        char path[] = "/dev/shm/late-XXXXXX";
        pair[0] = mkstemp(path);
        pair[1] = open(path, O_RDWR);
        unlink(path);
        flock(pair[0], LOCK_EX);
    }
}

// What a call that ends in _event waits for.
static void *event(void *arg)
{
    struct timespec t = spec(*(int64_t *)arg + WAIT_MS * 1000000ll - now(CLOCK_MONOTONIC));
    uint64_t one = 1;
    struct { long type; char text[8]; } m = {3, "message"};
    nanosleep(&t, NULL);
    if (is("read_event"))
        write(pair[1], "hello", 5);
    else if (is("write_event") || is("send_event"))
        for (size_t got = 0; got < MUCH;)
            got += read(pair[is("send_event")], much, MUCH - got);
    else if (is("recv_waitall_event"))
        send(pair[1], much, 3000, 0);
    else if (is("accept_event"))
        connect(fd2, (void *)&address, sizeof address);
    else if (is("connect_event"))
        accept(pair[0], NULL, NULL);
    else if (is("semop_event"))
        semop(fd2, &(struct sembuf){0, 1, 0}, 1);
    else if (is("msgrcv_event"))
        msgsnd(fd2, &m, sizeof m.text, 0);
    else if (is("flock_event"))
        flock(pair[0], LOCK_UN);
    else if (is("futex_event"))
        syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    else if (is("sigwaitinfo_event"))
        pthread_kill(sleeper, 40);
    else if (is("pause_event") || is("sigsuspend_event"))
        pthread_kill(sleeper, SIGUSR1);
    else
        write(fd, &one, sizeof one);
    return NULL;
}

static long call_event(void)
{
    struct pollfd p = {fd, POLLIN, 0};
    struct epoll_event e;
    struct { long type; char text[8]; } m;
    sigset_t s;
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    sigemptyset(&s);
    if (is("read_event"))
        return read(pair[0], much, MUCH);
    if (is("write_event"))
        return write(pair[1], much, MUCH);
    if (is("send_event"))
        return send(pair[0], much, MUCH, 0);
    if (is("recv_waitall_event"))
        return recv(pair[0], much, 4000, MSG_WAITALL);
    if (is("accept_event"))
        return accept(pair[0], NULL, NULL) >= 0 ? 0 : -1;
    if (is("connect_event"))
        return connect(fd2, (void *)&address, sizeof address);
    if (is("poll_event"))
        return syscall(SYS_poll, &p, 1, -1);
    if (is("ppoll_event"))
        return syscall(SYS_ppoll, &p, 1, NULL, NULL, 8);
    if (is("select_event"))
        return syscall(SYS_select, fd + 1, &set, NULL, NULL, NULL);
    if (is("epoll_wait_event"))
        return syscall(SYS_epoll_wait, fd2, &e, 1, -1);
    if (is("semop_event"))
        return semop(fd2, &(struct sembuf){0, -1, 0}, 1);
    if (is("msgrcv_event"))
        return msgrcv(fd2, &m, sizeof m.text, 3, 0);
    if (is("flock_event"))
        return flock(pair[1], LOCK_EX);
    if (is("futex_event"))
        return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    if (is("pause_event"))
        return pause();
    if (is("sigsuspend_event"))
        return sigsuspend(&s);
    sigaddset(&s, 40);
    if (is("sigwaitinfo_event"))
        return sigwaitinfo(&s, NULL);
    struct timespec t = spec(WAIT_MS * 1000000ll);
    if (is("wait4_event")) {
        int status;
        pid_t child = fork();
        if (!child) {
            nanosleep(&t, NULL);
            _exit(7);
        }
        return wait4(child, &status, 0, NULL) == child ? WEXITSTATUS(status) : -1;
    }
    if (is("vfork_event")) {
        if (!vfork()) {
            syscall(SYS_nanosleep, &t, NULL);
            _exit(7);
        }
        return 0;
    }
    fail("late: unknown call");
    return 0;
}

static void *beside(void *arg)
{
    char b[8];
    struct timespec t = spec(start + 40000000);
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    recv((int)(intptr_t)arg, b, sizeof b, 0);
    return NULL;
}

static void wait_beside(int sock)
{
    pthread_t thread;
    pthread_create(&thread, NULL, beside, (void *)(intptr_t)sock);
}

// A listener that takes nobody any more, and one who is about to connect to it.
static void set_up_tcp(void)
{
    socklen_t n = sizeof to;
    int other;
    fd2 = socket(AF_INET, SOCK_STREAM, 0);
    to = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd2, (void *)&to, sizeof to) < 0 || listen(fd2, 0) < 0 || getsockname(fd2, (void *)&to, &n) < 0)
        fail("listen");
    other = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(other, (void *)&to, sizeof to) < 0)
        fail("connect");
    pair[0] = socket(AF_INET, SOCK_STREAM, 0);
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
        if (is("recv_high_rcvtimeo"))
            pair[0] = fcntl(pair[0], F_DUPFD, 700);
        if (is("connect_tcp_sndtimeo")) {
            set_up_tcp();
            setsockopt(pair[0], SOL_SOCKET, option, &tv, sizeof tv);
            return;
        }
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
        while ((is("send_sndtimeo") || is("writev_sndtimeo")) && send(pair[0], full, sizeof full, MSG_DONTWAIT) > 0)
            ;
        // A part of what is to come.
        if (is("recv_waitall_rcvtimeo"))
            send(pair[1], "a", 1, 0);
        // Others that wait too: for the same socket a little longer, or for one each.
        if (is("recv_shared_rcvtimeo"))
            wait_beside(pair[0]);
        for (int i = 0; i < 40 && is("recv_many_rcvtimeo"); i++) {
            int other[2];
            socketpair(AF_UNIX, SOCK_STREAM, 0, other);
            setsockopt(other[0], SOL_SOCKET, option, &tv, sizeof tv);
            wait_beside(other[0]);
        }
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
    struct iovec io = {buf, sizeof buf};
    struct mmsghdr m = {.msg_hdr = {.msg_iov = &io, .msg_iovlen = 1}};
    if (is("readv_rcvtimeo"))
        return readv(pair[0], &io, 1);
    if (is("writev_sndtimeo"))
        return writev(pair[0], &io, 1);
    if (is("recvmmsg_rcvtimeo"))
        return recvmmsg(pair[0], &m, 1, 0, NULL);
    if (is("connect_tcp_sndtimeo"))
        return connect(pair[0], (void *)&to, sizeof to);
    if (is("recv_rcvtimeo") || is("recv_high_rcvtimeo") || is("recv_shared_rcvtimeo") || is("recv_many_rcvtimeo"))
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
    int by_event = strstr(name, "_event") != NULL;
    start = atoll(argv[3]);
    if (by_event)
        set_up_event();
    else
        set_up();
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    sigprocmask(SIG_BLOCK, &s, NULL);
    sched_setscheduler(0, SCHED_FIFO, &first);
    pthread_create(&thread, NULL, tick, NULL);
    pthread_setschedparam(thread, SCHED_FIFO, &second);
    struct timespec when = spec(start);
    int by_thread = by_event && !is("wait4_event") && !is("vfork_event");
    if (by_thread) {
        pthread_create(&thread, NULL, event, &start);
        pthread_setschedparam(thread, SCHED_FIFO, &first);
    }
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL);
    shown[2] = 0;
    shown[3] = WAIT_MS * 1000000ll;
    // What another thread does is due then, whenever we come to wait for it.
    shown[0] = by_thread ? start : now(CLOCK_MONOTONIC);
    errno = 0;
    long r = by_event ? call_event() : call();
    int64_t ended = now(CLOCK_MONOTONIC);
    shown[4] = r;
    shown[5] = errno;
    shown[1] = ended;
    if (is("msgrcv_event"))
        msgctl(fd2, IPC_RMID, NULL);
    // Long enough that a dump which waits for the end of a vfork finds it.
    if (is("vfork_event"))
        sleep(1);
    if (is("semtimedop") || is("semop_event"))
        semctl(fd2, 0, IPC_RMID);
    if (is("mq_timedreceive")) {
        char path[32];
        snprintf(path, sizeof path, "/late-%d", getpid());
        mq_unlink(path);
    }
    return 0;
}
