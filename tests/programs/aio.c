// Contexts of asynchronous I/O (io_setup): their ids, what was not read yet, in order, and that they go on.
// mist: variants idle unread wrapped many waiting
#include "mist.h"
#include <linux/aio_abi.h>
#include <pthread.h>

struct ring {
    unsigned id, nr, head, tail, magic, compat, incompat, header;
    struct io_event events[];
};

static int file;
static uint64_t submitted, taken;

// Writes the number of the request at its place in the file.
static void submit(aio_context_t ctx, int n)
{
    for (int i = 0; i < n; i++) {
        uint64_t number = submitted++;
        struct iocb io = {.aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = file, .aio_data = number, .aio_nbytes = 1 + number % 8, .aio_buf = (uintptr_t)&number, .aio_offset = number % 100 * 8};
        struct iocb *list = &io;
        CHECK("io_submit", 1, CALL(syscall(SYS_io_submit, ctx, 1, &list)));
    }
}

static void take(aio_context_t ctx, int n)
{
    for (int i = 0; i < n; i++) {
        struct io_event e = {0};
        struct timespec none = {0};
        CHECK("io_getevents", 1, CALL(syscall(SYS_io_getevents, ctx, 1, 1, &e, &none)));
        CHECK("its number", taken, e.data);
        CHECK("its result", 1 + taken % 8, e.res);
        taken++;
    }
}

static void none_left(aio_context_t ctx)
{
    struct io_event e;
    struct timespec none = {0};
    CHECK("no more events", 0, CALL(syscall(SYS_io_getevents, ctx, 0, 1, &e, &none)));
}

static aio_context_t setup(unsigned nr)
{
    aio_context_t ctx = 0;
    if (syscall(SYS_io_setup, nr, &ctx) < 0)
        mist_skip("this kernel has no asynchronous I/O");
    return ctx;
}

static void *wait_for_one(void *ctx)
{
    struct io_event e = {0};
    CHECK("io_getevents that waited", 1, CALL(syscall(SYS_io_getevents, *(aio_context_t *)ctx, 1, 1, &e, NULL)));
    CHECK("what it waited for", 4711, e.data);
    return NULL;
}

static int is(int argc, char **argv, const char *name)
{
    return argc > 1 && !strcmp(argv[1], name);
}

int main(int argc, char **argv)
{
    file = MUST(open("file", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    aio_context_t gone = setup(8), ctx = setup(is(argc, argv, "many") ? 3000 : 1), other = setup(200);
    // The numbers that the kernel gives contexts have a gap.
    MUST(syscall(SYS_io_destroy, gone));
    const struct ring *r = (void *)ctx, *o = (void *)other;
    unsigned nr = r->nr, other_nr = o->nr;
    pthread_t thread;
    int unread = 0;
    if (is(argc, argv, "unread"))
        submit(ctx, unread = 7);
    if (is(argc, argv, "wrapped")) {
        for (unsigned i = 0; i < nr - 3; i++) {
            submit(ctx, 1);
            take(ctx, 1);
        }
        submit(ctx, unread = 20);
        CHECK("it has gone round", 1, r->tail < r->head);
    }
    if (is(argc, argv, "many")) {
        submit(ctx, 2900);
        take(ctx, 100);
        unread = 2800;
    }
    if (is(argc, argv, "waiting")) {
        MUST(pthread_create(&thread, NULL, wait_for_one, &other));
        mist_sleep(20000);
    }
    unsigned head = r->head, tail = r->tail;
    mist_ready();
    mist_wait();
    CHECK("events of a ring", nr, r->nr);
    CHECK("of the other", other_nr, o->nr);
    CHECK("head", head, r->head);
    CHECK("tail", tail, r->tail);
    // As many as fit beside those that were not read.
    int more = nr / 2 > (unsigned)unread ? nr / 2 - unread : 0;
    submit(ctx, more);
    take(ctx, unread + more);
    none_left(ctx);
    // All the way round, several times.
    for (unsigned i = 0; i < 5 * nr / 8; i++) {
        submit(ctx, 8);
        take(ctx, 8);
    }
    none_left(ctx);
    none_left(other);
    if (is(argc, argv, "waiting")) {
        struct iocb io = {.aio_lio_opcode = IOCB_CMD_FSYNC, .aio_fildes = file, .aio_data = 4711}, *list = &io;
        CHECK("io_submit", 1, CALL(syscall(SYS_io_submit, other, 1, &list)));
        MUST(pthread_join(thread, NULL));
    }
    CALL(syscall(SYS_io_destroy, ctx));
    CALL(syscall(SYS_io_destroy, other));
    aio_context_t again = 0;
    CALL(syscall(SYS_io_setup, 16, &again));
    submit(again, 1);
    take(again, 1);
    mist_pass();
}
