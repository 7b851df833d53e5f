// A thread that is cancelled (pthread_cancel) in a call that was broken off, with what is to be cleaned up.
// mist: variants recv send epoll
#include "mist.h"
#include <pthread.h>
#include <sys/epoll.h>

static int s[2], cleaned, tid;
static const char *how;
static char much[8 << 20];

static void clean(void *by)
{
    cleaned += *(int *)by;
}

static void *thread(void *unused)
{
    (void)unused;
    int outer = 1, inner = 10;
    pthread_cleanup_push(clean, &outer);
    pthread_cleanup_push(clean, &inner);
    __atomic_store_n(&tid, syscall(SYS_gettid), __ATOMIC_RELEASE);
    if (!strcmp(how, "recv")) {
        recv(s[0], much, sizeof much, MSG_WAITALL);
    } else if (!strcmp(how, "send")) {
        send(s[0], much, sizeof much, 0);
    } else {
        struct epoll_event e;
        int ep = MUST(epoll_create1(EPOLL_CLOEXEC));
        epoll_wait(ep, &e, 1, 3600000);
    }
    pthread_testcancel();
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return NULL;
}

int main(int argc, char **argv)
{
    how = argc > 1 ? argv[1] : "recv";
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s));
    MUST(send(s[1], much, 1000, 0));
    pthread_t t;
    MUST(pthread_create(&t, NULL, thread, NULL));
    while (!__atomic_load_n(&tid, __ATOMIC_ACQUIRE))
        mist_sleep(1000);
    long nr = !strcmp(how, "recv") ? SYS_recvfrom : !strcmp(how, "send") ? SYS_sendto : SYS_epoll_wait;
    mist_until_in(getpid(), tid, nr, SYS_epoll_pwait);
    mist_ready();
    mist_wait();
    MUST(pthread_cancel(t));
    void *end;
    MUST(pthread_join(t, &end));
    CHECK("it was cancelled", (intptr_t)PTHREAD_CANCELED, (intptr_t)end);
    CHECK("what was cleaned up", 11, cleaned);
    mist_pass();
}
