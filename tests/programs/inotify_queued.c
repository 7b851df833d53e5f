// inotify events that wait to be read stay in place while the program goes on.
// mist: no-kill the kernel lets nobody put inotify events back
// mist: no-twice the kernel lets nobody put inotify events back
// mist: no-lazy the kernel lets nobody put inotify events back
#include "mist.h"
#include <sys/inotify.h>

int main(void)
{
    char buf[4096];
    MUST(mkdir("a", 0700));
    int fd = MUST(inotify_init1(IN_NONBLOCK));
    int wd = MUST(inotify_add_watch(fd, "a", IN_CREATE));
    close(MUST(open("a/waiting", O_CREAT | O_WRONLY, 0600)));

    mist_ready();
    mist_wait();

    struct inotify_event *e = (void *)buf;
    CHECK("one event", sizeof *e + 16, read(fd, buf, sizeof buf));
    CHECK("its watch", wd, e->wd);
    CHECK("its mask", IN_CREATE, e->mask);
    CHECK_STR("its name", "waiting", e->name);
    CHECK_ERR("and no other", EAGAIN, read(fd, buf, sizeof buf));
    mist_pass();
}
