// Names that are not UTF-8: the kernel cuts them at 15 bytes, within a letter too.
// mist: cflags -pthread
// mist: copied
#include "mist.h"
#include <pthread.h>

static const char full[] = "\xd1\x80\xd0\xb0\xd1\x81\xd1\x87\xd1\x91\xd1\x82\xd1\x87\xd0\xb8\xd0\xba", cut[] = "\xd1\x80\xd0\xb0\xd1\x81\xd1\x87\xd1\x91\xd1\x82\xd1\x87\xd0\n";

static volatile int up, go;
static void check(void)
{
    char text[64], path[64];
    snprintf(path, sizeof path, "/proc/self/task/%ld/comm", syscall(SYS_gettid));
    mist_slurp(path, text, sizeof text);
    CHECK_STR("a name", cut, text);
}
static void *thread(void *arg)
{
    MUST(prctl(PR_SET_NAME, full));
    up = 1;
    while (!go)
        mist_sleep(1000);
    check();
    return arg;
}

int main(void)
{
    pthread_t t;
    MUST(prctl(PR_SET_NAME, full));
    pthread_create(&t, NULL, thread, NULL);
    while (!up)
        mist_sleep(1000);
    mist_ready();
    mist_wait();
    check();
    go = 1;
    pthread_join(t, NULL);
    mist_pass();
}
