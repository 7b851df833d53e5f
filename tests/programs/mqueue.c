// POSIX message queues: messages with priorities that wait, attributes, flags.
// mist: cflags -lrt
#include "mist.h"
#include <mqueue.h>

int main(void)
{
    struct mq_attr a = {.mq_maxmsg = 6, .mq_msgsize = 100}, got;
    mqd_t q = mq_open("/mist-queue", O_RDWR | O_CREAT | O_EXCL | O_NONBLOCK, 0640, &a);
    if (q < 0 && errno == ENOSYS)
        mist_skip("this kernel has no POSIX message queues");
    MUST(q);
    mqd_t rd = MUST(mq_open("/mist-queue", O_RDONLY));
    MUST(mq_send(q, "low", 3, 1));
    MUST(mq_send(q, "high", 4, 9));
    MUST(mq_send(q, "low again", 9, 1));

    mist_ready();
    mist_wait();

    char buf[100];
    unsigned prio;
    CALL(mq_getattr(q, &got));
    CHECK("most messages", 6, got.mq_maxmsg);
    CHECK("largest message", 100, got.mq_msgsize);
    CHECK("messages", 3, got.mq_curmsgs);
    CHECK("non-blocking", O_NONBLOCK, got.mq_flags);
    CHECK("highest first", 4, mq_receive(rd, buf, 100, &prio));
    CHECK("its priority", 9, prio);
    CHECK("then the older one", 3, mq_receive(rd, buf, 100, &prio));
    CHECK("its priority", 1, prio);
    CHECK("then the newer one", 9, mq_receive(q, buf, 100, &prio));
    CHECK_MEM("then the newer one", "low again", buf, 9);
    CHECK_ERR("no more", EAGAIN, mq_receive(q, buf, 100, NULL));
    CHECK_ERR("read-only", EBADF, mq_send(rd, "x", 1, 0));
    mqd_t again = CALL(mq_open("/mist-queue", O_WRONLY));
    CALL(mq_send(again, "by name", 7, 0));
    CHECK("it is the one with the name", 7, mq_receive(q, buf, 100, NULL));
    CALL(mq_unlink("/mist-queue"));
    mist_pass();
}
