// inotify events that wait to be read stay in place while the program goes on. A restored one finds that some were
// lost, and its watches at work.
#include "mist.h"
#include <sys/inotify.h>

// Field 22 of /proc/self/stat: a restored process is a new one.
static unsigned long long started(void)
{
    char stat[1024];
    unsigned long long at = 0;
    int fd = MUST(open("/proc/self/stat", O_RDONLY));
    stat[MUST(read(fd, stat, sizeof stat - 1))] = 0;
    close(fd);
    char *field = strrchr(stat, ')');
    for (int i = 2; field && i < 22; i++)
        field = strchr(field + 1, ' ');
    if (!field || sscanf(field, "%llu", &at) != 1)
        mist_fail("no start time in %s", stat);
    return at;
}

int main(void)
{
    char buf[4096];
    struct inotify_event *e = (void *)buf;
    MUST(mkdir("a", 0700));
    int fd = MUST(inotify_init1(IN_NONBLOCK));
    int wd = MUST(inotify_add_watch(fd, "a", IN_CREATE));
    close(MUST(open("a/waiting", O_CREAT | O_WRONLY, 0600)));
    unsigned long long before = started();

    mist_ready();
    mist_wait();

    if (started() == before) {
        CHECK("one event", sizeof *e + 16, read(fd, buf, sizeof buf));
        CHECK("its watch", wd, e->wd);
        CHECK("its mask", IN_CREATE, e->mask);
        CHECK_STR("its name", "waiting", e->name);
    } else {
        CHECK("one event", sizeof *e, read(fd, buf, sizeof buf));
        CHECK("of no watch", -1, e->wd);
        CHECK("that some were lost", IN_Q_OVERFLOW, e->mask);
    }
    CHECK_ERR("and no other", EAGAIN, read(fd, buf, sizeof buf));
    close(MUST(open("a/new", O_CREAT | O_WRONLY, 0600)));
    CHECK("a new event", sizeof *e + 16, read(fd, buf, sizeof buf));
    CHECK("its watch", wd, e->wd);
    CHECK_STR("its name", "new", e->name);
    mist_pass();
}
