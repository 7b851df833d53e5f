// The first thread has ended, the others go on: /proc/PID shows a zombie that leads living
// threads.
// mist: cflags -pthread
// mist: may-refuse main thread
#include "mist.h"
#include <pthread.h>

static void *rest(void *arg)
{
    pid_t leader = getpid();
    (void)arg;
    while (mist_status(leader, "State")[0] != 'Z')
        mist_turn();
    mist_ready();
    mist_wait();
    CHECK("pid", leader, getpid());
    CHECK("tid", 1, syscall(SYS_gettid) != leader);
    mist_pass();
}

int main(void)
{
    pthread_t t;
    pthread_create(&t, NULL, rest, NULL);
    pthread_exit(NULL);
}
