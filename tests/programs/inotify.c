// inotify: watches keep their numbers and masks, new events come. (inotify_queued has events
// that wait.).
#include "mist.h"
#include <sys/inotify.h>

static char buf[4096];
static int next(int fd, char **name)
{
    static char *at;
    static ssize_t left;
    if (left <= 0) {
        left = CALL(read(fd, buf, sizeof buf));
        at = buf;
    }
    struct inotify_event *e = (void *)at;
    *name = e->len ? e->name : "";
    at += sizeof *e + e->len;
    left -= sizeof *e + e->len;
    return e->wd << 16 | (e->mask & 0xffff);
}

int main(void)
{
    char *name;
    MUST(mkdir("a", 0700));
    MUST(mkdir("b", 0700));
    close(MUST(open("file", O_CREAT | O_WRONLY, 0600)));
    int fd = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    int first = MUST(inotify_add_watch(fd, "a", IN_CREATE));
    int wb = MUST(inotify_add_watch(fd, "b", IN_CREATE | IN_DELETE | IN_MOVED_TO));
    int wf = MUST(inotify_add_watch(fd, "file", IN_MODIFY));
    // A hole in the numbers.
    MUST(inotify_rm_watch(fd, first));
    CHECK("set-up: ignored", first << 16 | IN_IGNORED, next(fd, &name));
    int wa = MUST(inotify_add_watch(fd, "a", IN_CREATE | IN_ONLYDIR));

    mist_ready();
    mist_wait();

    CHECK("flags", O_RDONLY | O_NONBLOCK, mist_getfl(fd));
    CHECK("cloexec", FD_CLOEXEC, fcntl(fd, F_GETFD));
    CHECK_ERR("no event yet", EAGAIN, read(fd, buf, sizeof buf));
    close(CALL(open("a/new", O_CREAT | O_WRONLY, 0600)));
    CHECK("an event of a", wa << 16 | IN_CREATE, next(fd, &name));
    CHECK_STR("its name", "new", name);
    close(CALL(open("b/new", O_CREAT | O_WRONLY, 0600)));
    CHECK("an event of b", wb << 16 | IN_CREATE, next(fd, &name));
    CALL(unlink("b/new"));
    CHECK("an event of b", wb << 16 | IN_DELETE, next(fd, &name));
    int f = CALL(open("file", O_WRONLY));
    CALL(write(f, "x", 1));
    CHECK("an event of a file", wf << 16 | IN_MODIFY, next(fd, &name));
    CHECK("the same file is the same watch", wf, inotify_add_watch(fd, "file", IN_MODIFY));
    CHECK("the next watch's number", wa + 1, inotify_add_watch(fd, ".", IN_DELETE));
    CALL(inotify_rm_watch(fd, wa));
    CHECK("removed", wa << 16 | IN_IGNORED, next(fd, &name));
    mist_pass();
}
