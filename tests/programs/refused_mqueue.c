// A POSIX message queue whose name is gone: it would take its messages out to save them, and
// nobody could put it back under no name.
// mist: cflags -lrt
// mist: refused mq_unlink
#include "mist.h"
#include <mqueue.h>

int main(void)
{
    struct mq_attr a = {.mq_maxmsg = 3, .mq_msgsize = 100};
    mqd_t q = mq_open("/mist-gone", O_RDWR | O_CREAT | O_EXCL, 0600, &a);
    if (q < 0 && errno == ENOSYS)
        mist_skip("this kernel has no POSIX message queues");
    MUST(q);
    MUST(mq_send(q, "deleted", 7, 2));
    MUST(mq_unlink("/mist-gone"));

    mist_ready();
    mist_wait();

    char buf[100];
    unsigned prio;
    CHECK("its message", 7, mq_receive(q, buf, 100, &prio));
    CHECK("its priority", 2, prio);
    mist_pass();
}
