// A thread that sleeps in a system call notices nothing: it returns exactly what it would have
// returned, no EINTR and no short count, and when it would have returned.
// The main thread makes the event happen after `go`; the variants that end in _timeout end by
// their time-out, those that end in _event have a time-out that does not come.
// mist: cflags -pthread -lrt
// mist: variants read_pipe read_eventfd read_inotify read_tty write_pipe write_tty send_unix send_tcp sendmsg_dgram
// mist: variants recv_unix recv_waitall_unix recv_waitall_tcp recv_rcvtimeo_timeout recv_rcvtimeo_event send_sndtimeo_timeout
// mist: variants recvmmsg_rcvtimeo_timeout connect_sndtimeo_event
// mist: variants read_rcvtimeo_timeout read_rcvtimeo_event recv_rcvtimeo_interrupted send_sndtimeo_event
// mist: variants accept_unix accept_tcp accept_rcvtimeo_timeout accept_rcvtimeo_event connect_unix connect_sndtimeo_timeout
// mist: variants poll poll_event poll_timeout ppoll_event ppoll_timeout select select_event select_timeout
// mist: variants pselect_event pselect_timeout epoll_wait epoll_wait_event epoll_wait_timeout epoll_pwait2_event epoll_pwait2_timeout
// mist: variants futex futex_event futex_timeout futex_bitset_timeout futex_realtime_timeout futex_lock_pi
// mist: variants nanosleep_timeout nanosleep_interrupted clock_nanosleep_timeout clock_nanosleep_abs_timeout clock_nanosleep_realtime_timeout
// mist: variants pause sigsuspend sigwaitinfo sigtimedwait_event sigtimedwait_timeout
// mist: variants semop semtimedop_event semtimedop_timeout msgrcv msgsnd mq_receive mq_timedreceive_event mq_timedreceive_timeout mq_send
// mist: variants flock ofd_lock io_getevents io_getevents_event io_getevents_timeout
// The last three hold an AIO context, whose ring the kernel gives to nobody else.
// mist: may-refuse asynchronous I/O
#include "mist.h"
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/un.h>
#include <termios.h>

#define WAIT_US 1000000ll // what a time-out that comes is
#define LONG_S 60         // and one that does not
#define MEGA (1 << 20)

// What the sleeping thread was told, and what became of it.
static const char *variant;
static volatile int done;
static volatile pid_t tid;
static volatile int64_t began, ended;
static volatile long result;
static volatile int error;
static pthread_t sleeper;
static volatile int handled;
// Descriptors, buffers and so on; each variant uses what it needs.
static int fd[2], fd2, fd3, id;
static char out[MEGA], in[MEGA + 4096];
static struct timespec rel = {WAIT_US / 1000000, WAIT_US % 1000000 * 1000}, lng = {LONG_S, 0}, rem;
static uint32_t word;
static aio_context_t aio;

static int is(const char *prefix)
{
    return !strncmp(variant, prefix, strlen(prefix));
}
static int ends(const char *suffix)
{
    size_t a = strlen(variant), b = strlen(suffix);
    return a >= b && !strcmp(variant + a - b, suffix);
}
static struct timespec at(clockid_t clock)
{
    int64_t t = mist_clock_us(clock) + WAIT_US;
    return (struct timespec){t / 1000000, t % 1000000 * 1000};
}
static struct timespec *limit(void)
{
    return ends("_timeout") ? &rel : ends("_event") ? &lng : NULL;
}
static void on_signal(int sig)
{
    (void)sig;
    handled++;
}

static void listener_unix(int backlog)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    fd[0] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(bind(fd[0], (void *)&a, sizeof a));
    MUST(listen(fd[0], backlog));
}
static int connect_unix(int s)
{
    struct sockaddr_un a = {AF_UNIX, "listener"};
    return connect(s, (void *)&a, sizeof a);
}
static void listener_tcp(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    fd[0] = MUST(socket(AF_INET, SOCK_STREAM, 0));
    int small = 32768;
    MUST(setsockopt(fd[0], SOL_SOCKET, SO_RCVBUF, &small, sizeof small));
    MUST(bind(fd[0], (void *)&a, sizeof a));
    MUST(listen(fd[0], 5));
}
static int connect_tcp(void)
{
    struct sockaddr_in a;
    socklen_t n = sizeof a;
    CALL(getsockname(fd[0], (void *)&a, &n));
    int s = CALL(socket(AF_INET, SOCK_STREAM, 0));
    CALL(connect(s, (void *)&a, n));
    return s;
}
static void pair_tcp(void)
{
    listener_tcp();
    int small = 32768, c = connect_tcp(), a = MUST(accept(fd[0], NULL, NULL));
    MUST(setsockopt(c, SOL_SOCKET, SO_SNDBUF, &small, sizeof small));
    close(fd[0]);
    fd[0] = c;
    fd[1] = a;
}

// Everything that has to exist before the thread goes to sleep. Gives the system call in which
// it will be seen.
static long set_up(void)
{
    mist_fill(out, MEGA, 5);
    if (is("read_pipe") || is("write_pipe"))
        return MUST(pipe(fd)), is("read") ? SYS_read : SYS_write;
    if (is("read_eventfd") || is("poll") || is("ppoll") || is("select") || is("pselect") || is("epoll") || is("io_getevents")) {
        fd[0] = MUST(eventfd(0, 0));
        if (is("epoll")) {
            struct epoll_event e = {EPOLLIN, {.u64 = 0x1122334455667788}};
            fd2 = MUST(epoll_create1(0));
            MUST(epoll_ctl(fd2, EPOLL_CTL_ADD, fd[0], &e));
        }
        if (is("io_getevents"))
            MUST(syscall(SYS_io_setup, 8, &aio));
        return is("read") ? SYS_read : is("poll") ? SYS_poll : is("ppoll") ? SYS_ppoll : is("select") ? SYS_select
               : is("pselect") ? SYS_pselect6 : is("epoll_pwait2") ? SYS_epoll_pwait2 : is("epoll") ? SYS_epoll_wait : SYS_io_getevents;
    }
    if (is("read_inotify")) {
        MUST(mkdir("watched", 0700));
        fd[0] = MUST(inotify_init1(0));
        MUST(inotify_add_watch(fd[0], "watched", IN_CREATE));
        return SYS_read;
    }
    if (ends("_tty")) {
        fd[0] = MUST(posix_openpt(O_RDWR | O_NOCTTY));
        MUST(grantpt(fd[0]));
        MUST(unlockpt(fd[0]));
        fd[1] = MUST(open(ptsname(fd[0]), O_RDWR | O_NOCTTY));
        struct termios t;
        MUST(tcgetattr(fd[1], &t));
        cfmakeraw(&t);
        MUST(tcsetattr(fd[1], TCSANOW, &t));
        return is("read") ? SYS_read : SYS_write;
    }
    if (ends("_tcp") && !is("accept"))
        return pair_tcp(), is("recv") ? SYS_recvfrom : SYS_sendto;
    if (is("recv") || is("send_") || is("read_rcvtimeo")) {
        MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
        struct timeval t = {ends("_timeout") ? rel.tv_sec : LONG_S, 0};
        if (is("recv_rcvtimeo") || is("recvmmsg") || is("read"))
            MUST(setsockopt(fd[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
        if (is("send_sndtimeo")) {
            MUST(setsockopt(fd[0], SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t));
            while (send(fd[0], out, 4096, MSG_DONTWAIT) > 0)
                id++;
        }
        if (is("recvmmsg"))
            return SYS_recvmmsg;
        return is("read") ? SYS_read : is("recv") ? SYS_recvfrom : SYS_sendto;
    }
    if (is("sendmsg_dgram")) {
        MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, fd));
        while (send(fd[0], "full", 4, MSG_DONTWAIT) > 0)
            id++;
        return SYS_sendmsg;
    }
    if (is("accept_tcp"))
        return listener_tcp(), SYS_accept;
    if (is("accept")) {
        listener_unix(5);
        struct timeval t = {ends("_timeout") ? rel.tv_sec : LONG_S, 0};
        if (is("accept_rcvtimeo"))
            MUST(setsockopt(fd[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
        return SYS_accept;
    }
    if (is("connect")) {
        listener_unix(0);
        fd2 = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
        MUST(connect_unix(fd2));
        fd[1] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
        struct timeval t = {ends("_timeout") ? rel.tv_sec : LONG_S, 0};
        if (is("connect_sndtimeo"))
            MUST(setsockopt(fd[1], SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t));
        return SYS_connect;
    }
    if (is("futex_lock_pi"))
        word = syscall(SYS_gettid); // taken by the main thread
    if (is("futex"))
        return SYS_futex;
    if (is("nanosleep"))
        return SYS_clock_nanosleep; // what glibc calls; the raw nanosleep is the second choice
    if (is("clock_nanosleep"))
        return SYS_clock_nanosleep;
    if (is("pause"))
        return SYS_pause;
    if (is("sigsuspend"))
        return SYS_rt_sigsuspend;
    if (is("sigwaitinfo") || is("sigtimedwait"))
        return SYS_rt_sigtimedwait;
    if (is("sem")) {
        id = MUST(semget(IPC_PRIVATE, 1, 0600));
        return is("semop") ? SYS_semop : SYS_semtimedop;
    }
    if (is("msg")) {
        id = MUST(msgget(IPC_PRIVATE, 0600));
        struct { long type; char text[4096]; } m = {1, "filler"};
        if (is("msgsnd"))
            while (msgsnd(id, &m, sizeof m.text, IPC_NOWAIT) == 0)
                fd2++;
        return is("msgrcv") ? SYS_msgrcv : SYS_msgsnd;
    }
    if (is("mq")) {
        struct mq_attr a = {.mq_maxmsg = 2, .mq_msgsize = 64};
        fd[0] = MUST(mq_open("/mist", O_RDWR | O_CREAT | O_EXCL, 0600, &a));
        if (is("mq_send")) {
            MUST(mq_send(fd[0], "a", 1, 0));
            MUST(mq_send(fd[0], "b", 1, 0));
        }
        return is("mq_send") ? SYS_mq_timedsend : SYS_mq_timedreceive;
    }
    if (is("flock") || is("ofd_lock")) {
        fd[0] = MUST(open("locked", O_RDWR | O_CREAT, 0600));
        fd[1] = MUST(open("locked", O_RDWR));
        struct flock l = {.l_type = F_WRLCK, .l_len = 100};
        if (is("flock"))
            MUST(flock(fd[0], LOCK_EX));
        else
            MUST(fcntl(fd[0], F_OFD_SETLK, &l));
        return is("flock") ? SYS_flock : SYS_fcntl;
    }
    mist_fail("set-up: unknown variant %s", variant);
}

// The call itself.
static long call(void)
{
    struct pollfd p = {fd[0], POLLIN, 0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd[0], &set);
    struct timeval tv = {ends("_timeout") ? rel.tv_sec : LONG_S, 0};
    int ms = ends("_timeout") ? WAIT_US / 1000 : ends("_event") ? LONG_S * 1000 : -1;
    struct epoll_event e;
    sigset_t s;
    long r;
    sigemptyset(&s);
    if (is("read"))
        return read(fd[ends("_tty")], in, sizeof in);
    if (is("write_pipe"))
        return write(fd[1], out, MEGA);
    if (is("write_tty"))
        return write(fd[1], out, 100000);
    if (is("send_sndtimeo"))
        return send(fd[0], out, 100000, 0);
    if (is("send_"))
        return send(fd[0], out, MEGA, 0);
    if (is("sendmsg")) {
        struct iovec v[2] = {{"mes", 3}, {"sage", 4}};
        struct msghdr m = {.msg_iov = v, .msg_iovlen = 2};
        return sendmsg(fd[0], &m, 0);
    }
    if (is("recv_waitall"))
        return recv(fd[0], in, 100000, MSG_WAITALL);
    if (is("recvmmsg")) {
        struct mmsghdr m = {{NULL, 0, &(struct iovec){in, sizeof in}, 1, NULL, 0, 0}, 0};
        return recvmmsg(fd[0], &m, 1, 0, NULL);
    }
    if (is("recv"))
        return recv(fd[0], in, sizeof in, 0);
    if (is("accept"))
        return fd3 = accept(fd[0], NULL, NULL), fd3 >= 0 ? 0 : -1;
    if (is("connect"))
        return connect_unix(fd[1]);
    if (is("poll")) {
        r = syscall(SYS_poll, &p, 1, ms);
        return r == 1 && p.revents != POLLIN ? -100 : r;
    }
    if (is("ppoll")) {
        struct timespec t = *limit();
        r = syscall(SYS_ppoll, &p, 1, &t, &s, 8);
        rem = t;
        return r == 1 && p.revents != POLLIN ? -100 : r;
    }
    if (is("select")) {
        // The raw call: glibc's would be pselect6.
        r = syscall(SYS_select, fd[0] + 1, &set, NULL, NULL, limit() ? &tv : NULL);
        rem = (struct timespec){tv.tv_sec, tv.tv_usec * 1000};
        return r == 1 && !FD_ISSET(fd[0], &set) ? -100 : r;
    }
    if (is("pselect")) {
        struct timespec t = *limit();
        struct { sigset_t *s; size_t n; } mask = {&s, 8};
        r = syscall(SYS_pselect6, fd[0] + 1, &set, NULL, NULL, &t, &mask);
        rem = t;
        return r == 1 && !FD_ISSET(fd[0], &set) ? -100 : r;
    }
    if (is("epoll_pwait2")) {
        r = syscall(SYS_epoll_pwait2, fd2, &e, 1, limit(), NULL, 8);
        return r == 1 && e.data.u64 != 0x1122334455667788 ? -100 : r;
    }
    if (is("epoll")) {
        r = syscall(SYS_epoll_wait, fd2, &e, 1, ms);
        return r == 1 && e.data.u64 != 0x1122334455667788 ? -100 : r;
    }
    if (is("futex_bitset_timeout")) {
        struct timespec t = at(CLOCK_MONOTONIC);
        return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    }
    if (is("futex_realtime_timeout")) {
        struct timespec t = at(CLOCK_REALTIME);
        return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME, 0, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    }
    if (is("futex_lock_pi"))
        return syscall(SYS_futex, &word, FUTEX_LOCK_PI_PRIVATE, 0, NULL, NULL, 0);
    if (is("futex"))
        return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, limit(), NULL, 0);
    if (is("nanosleep_interrupted"))
        return syscall(SYS_nanosleep, &lng, &rem);
    if (is("nanosleep"))
        return syscall(SYS_nanosleep, &rel, &rem);
    if (is("clock_nanosleep_abs") || is("clock_nanosleep_realtime")) {
        clockid_t c = is("clock_nanosleep_abs") ? CLOCK_MONOTONIC : CLOCK_REALTIME;
        struct timespec t = at(c);
        return syscall(SYS_clock_nanosleep, c, TIMER_ABSTIME, &t, NULL);
    }
    if (is("clock_nanosleep"))
        return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &rel, &rem);
    if (is("pause"))
        return syscall(SYS_pause);
    if (is("sigsuspend"))
        return syscall(SYS_rt_sigsuspend, &s, 8);
    if (is("sigwaitinfo") || is("sigtimedwait")) {
        siginfo_t si = {0};
        sigaddset(&s, 40);
        r = syscall(SYS_rt_sigtimedwait, &s, &si, limit(), 8);
        return r == 40 && si.si_value.sival_int != 4711 ? -100 : r;
    }
    if (is("sem")) {
        struct sembuf b = {0, -1, 0};
        return limit() ? syscall(SYS_semtimedop, id, &b, 1, limit()) : syscall(SYS_semop, id, &b, 1);
    }
    if (is("msgrcv"))
        return msgrcv(id, in, 64, 3, 0);
    if (is("msgsnd")) {
        struct { long type; char text[4096]; } m = {7, "the one that waited"};
        return msgsnd(id, &m, sizeof m.text, 0);
    }
    if (is("mq_send"))
        return mq_send(fd[0], "waited", 6, 0);
    if (is("mq_receive"))
        return mq_receive(fd[0], in, 64, NULL);
    if (is("mq_timedreceive")) {
        struct timespec t = at(CLOCK_REALTIME);
        if (ends("_event"))
            t.tv_sec += LONG_S;
        return mq_timedreceive(fd[0], in, 64, NULL, &t);
    }
    if (is("flock"))
        return flock(fd[1], LOCK_EX);
    if (is("ofd_lock")) {
        struct flock l = {.l_type = F_WRLCK, .l_len = 10};
        return fcntl(fd[1], F_OFD_SETLKW, &l);
    }
    if (is("io_getevents")) {
        struct io_event ev;
        r = syscall(SYS_io_getevents, aio, 1, 1, &ev, limit());
        return r == 1 && ev.data != 0x77 ? -100 : r;
    }
    return -101;
}

static void read_all(int from, size_t len)
{
    for (size_t got = 0; got < len;)
        got += CALL(read(from, in + got, len - got));
    CHECK_MEM("what the reader got", out, in, len);
}

// Makes the event happen; gives what the call has to return.
static long trigger(void)
{
    uint64_t one = 1;
    if (is("pause") || is("sigsuspend") || ends("_interrupted")) {
        CHECK("handlers run before the signal", 0, handled);
        CHECK("pthread_kill", 0, pthread_kill(sleeper, SIGUSR1));
        return -1;
    }
    if (is("read_pipe") || is("read_rcvtimeo"))
        return CALL(write(fd[1], "hello", 5));
    if (is("read_inotify")) {
        close(CALL(open("watched/new", O_CREAT | O_WRONLY, 0600)));
        return sizeof(struct inotify_event) + 16;
    }
    if (is("read_tty"))
        return CALL(write(fd[0], "typed", 5));
    if (is("write_tty"))
        return read_all(fd[0], 100000), 100000;
    if (is("write_pipe"))
        return read_all(fd[0], MEGA), MEGA;
    if (is("send_sndtimeo")) {
        for (int i = 0; i < id; i++)
            read_all(fd[1], 4096);
        return read_all(fd[1], 100000), 100000;
    }
    if (is("send_"))
        return read_all(fd[1], MEGA), MEGA;
    if (is("sendmsg_dgram")) {
        for (int i = 0; i < id; i++)
            CHECK("datagrams before ours", 4, recv(fd[1], in, sizeof in, 0));
        CHECK("our datagram", 7, recv(fd[1], in, sizeof in, 0));
        CHECK_MEM("our datagram", "message", in, 7);
        return 7;
    }
    if (is("recv_waitall"))
        return CALL(send(fd[1], out + 1000, 50000, 0)), mist_sleep(20000), CALL(send(fd[1], out + 51000, 49000, 0)), 100000;
    if (is("recv"))
        return CALL(send(fd[1], out, 777, 0));
    if (is("accept"))
        return is("accept_tcp") ? connect_tcp() : connect_unix(fd[1] = CALL(socket(AF_UNIX, SOCK_STREAM, 0))), 0;
    if (is("connect"))
        return CALL(accept(fd[0], NULL, NULL)), CALL(fd3 = accept(fd[0], NULL, NULL)), 0;
    if (is("futex_lock_pi"))
        return CALL(syscall(SYS_futex, &word, FUTEX_UNLOCK_PI_PRIVATE, 0, NULL, NULL, 0)), 0;
    if (is("futex")) {
        // Right after a stop of any kind, SIGSTOP's too, the thread may still be on its way back
        // to sleep; a program of this kind changes the word first, but then the result differs.
        int woken = 0;
        for (int i = 0; i < 1000 && !woken; i++, mist_sleep(woken ? 0 : 2000))
            woken = CALL(syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0));
        CHECK("threads woken", 1, woken);
        return 0;
    }
    if (is("sig")) {
        CHECK("pthread_sigqueue", 0, pthread_sigqueue(sleeper, 40, (union sigval){.sival_int = 4711}));
        return 40;
    }
    if (is("sem")) {
        struct sembuf b = {0, 1, 0};
        return CALL(semop(id, &b, 1));
    }
    if (is("msgrcv")) {
        struct { long type; char text[10]; } other = {2, "not this"}, m = {3, "message"};
        CALL(msgsnd(id, &other, 10, 0));
        return CALL(msgsnd(id, &m, 10, 0)), 10;
    }
    if (is("msgsnd")) {
        for (int i = 0; i < fd2; i++)
            CHECK("messages before ours", 4096, msgrcv(id, in, 4096, 1, 0));
        return 0;
    }
    if (is("mq_send")) {
        CHECK("mq_receive", 1, mq_receive(fd[0], in, 64, NULL));
        return 0;
    }
    if (is("mq"))
        return CALL(mq_send(fd[0], "eleven char", 11, 0)), 11;
    if (is("flock"))
        return CALL(flock(fd[0], LOCK_UN));
    if (is("ofd_lock")) {
        struct flock l = {.l_type = F_UNLCK};
        return CALL(fcntl(fd[0], F_OFD_SETLK, &l));
    }
    if (is("io_getevents")) {
        struct iocb cb = {.aio_data = 0x77, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (uintptr_t)in, .aio_nbytes = 10}, *cbs = &cb;
        cb.aio_fildes = CALL(open("/proc/self/exe", O_RDONLY));
        CHECK("io_submit", 1, syscall(SYS_io_submit, aio, 1, &cbs));
        return 1;
    }
    // All that wait for an eventfd.
    CALL(write(fd[0], &one, 8));
    return is("read") ? 8 : 1;
}

static void *sleep_in_call(void *arg)
{
    (void)arg;
    sigset_t s;
    sigfillset(&s);
    if (is("pause") || ends("_interrupted"))
        sigdelset(&s, SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &s, NULL);
    tid = syscall(SYS_gettid);
    began = mist_now();
    errno = 0;
    long r = call();
    int e = errno;
    ended = mist_now();
    result = r;
    error = r < 0 ? e : 0;
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        mist_fail("set-up: which variant?");
    variant = argv[1];
    struct sigaction sa = {.sa_handler = on_signal};
    MUST(sigaction(SIGUSR1, &sa, NULL));
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, 40);
    sigprocmask(SIG_BLOCK, &s, NULL);
    long nr = set_up();
    pthread_create(&sleeper, NULL, sleep_in_call, NULL);
    while (!tid)
        mist_sleep(1000);
    mist_until_in(getpid(), tid, nr, is("nanosleep") ? SYS_nanosleep : nr);
    // The first part is there before it sleeps again.
    if (is("recv_waitall")) {
        MUST(send(fd[1], out, 1000, 0));
        mist_until_in(getpid(), tid, nr, nr);
    }

    mist_ready();
    mist_wait();

    long wanted;
    int wanted_error = 0;
    if (ends("_timeout")) {
        wanted = 0;
        if (is("read_rcvtimeo") || is("recv") || is("send") || is("accept") || is("connect") || is("sig") || is("sem"))
            wanted = -1, wanted_error = EAGAIN;
        if (is("futex") || is("mq"))
            wanted = -1, wanted_error = ETIMEDOUT;
    } else {
        if (done)
            mist_fail("%s returned before anything happened, wanted: still asleep, got %ld (%s) after %lld us", variant,
                      (long)result, strerror(error), (long long)(ended - began));
        wanted = trigger();
        if (wanted < 0)
            wanted_error = EINTR;
    }
    for (int i = 0; i < 10000 && !done; i++)
        mist_turn();
    if (!done)
        mist_fail("%s never returned", variant);
    pthread_join(sleeper, NULL);
    if (ended - began < WAIT_US && ends("_timeout"))
        mist_fail("%s returned %ld (%s) too early, wanted %lld us, got %lld us", variant, (long)result, strerror(error),
                  (long long)WAIT_US, (long long)(ended - began));
    CHECK("what the call returned", wanted, result);
    CHECK("its errno", wanted_error, error);
    CHECK("signal handlers run", is("pause") || is("sigsuspend") || ends("_interrupted"), handled);

    int absolute = is("clock_nanosleep_abs") || is("clock_nanosleep_realtime") || is("futex_bitset") || is("futex_realtime") || is("mq");
    if (ends("_timeout"))
        mist_timed(variant, absolute ? "absolute" : "relative", ended - began, WAIT_US);
    if (is("nanosleep_interrupted"))
        mist_timed(variant, "relative", ended - began, LONG_S * 1000000ll - (rem.tv_sec * 1000000ll + rem.tv_nsec / 1000));
    // These say what was left.
    if ((is("ppoll") || is("select") || is("pselect")) && ends("_timeout"))
        CHECK("time left", 0, rem.tv_sec * 1000000000ll + rem.tv_nsec);
    if ((is("ppoll") || is("select") || is("pselect")) && ends("_event"))
        mist_timed(variant, "relative", ended - began, LONG_S * 1000000ll - (rem.tv_sec * 1000000ll + rem.tv_nsec / 1000));
    if (is("recv"))
        CHECK_MEM("what was received", out, in, result > 0 ? result : 0);
    if (is("futex_lock_pi"))
        CHECK("the owner of the lock", tid, word & FUTEX_TID_MASK);
    if (is("mq_send")) {
        CHECK("the message before", 1, mq_receive(fd[0], in, 64, NULL));
        CHECK("the message", 6, mq_receive(fd[0], in, 64, NULL));
    }
    if (is("connect_unix")) {
        CALL(write(fd[1], "abc", 3));
        CHECK("through the new connection", 3, read(fd3, in, sizeof in));
    }
    if (is("sem"))
        semctl(id, 0, IPC_RMID);
    if (is("msg"))
        msgctl(id, IPC_RMID, NULL);
    if (is("mq"))
        mq_unlink("/mist");
    mist_pass();
}
