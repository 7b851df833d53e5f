// A session leader with a pty of its own as controlling terminal: /dev/tty works, the
// foreground group is kept, a signal character arrives.
// mist: setsid
#include "mist.h"
#include <sys/ioctl.h>
#include <termios.h>

static volatile sig_atomic_t interrupted;
static void on_int(int sig)
{
    (void)sig;
    interrupted++;
}

int main(void)
{
    CHECK("set-up: session leader", getpid(), getsid(0));
    int m = MUST(posix_openpt(O_RDWR | O_NOCTTY));
    MUST(grantpt(m));
    MUST(unlockpt(m));
    int s = MUST(open(ptsname(m), O_RDWR | O_NOCTTY));
    MUST(ioctl(s, TIOCSCTTY, 0));
    CHECK("set-up: foreground group", getpgrp(), tcgetpgrp(s));
    int tty = MUST(open("/dev/tty", O_RDWR));
    signal(SIGINT, on_int);
    signal(SIGHUP, SIG_IGN);

    mist_ready();
    mist_wait();

    CHECK("session", getpid(), getsid(0));
    CHECK("foreground group", getpgrp(), CALL(tcgetpgrp(s)));
    CHECK("session of the terminal", getsid(0), CALL(tcgetsid(s)));
    int again = CALL(open("/dev/tty", O_RDWR));
    CALL(write(again, "x", 1));
    CALL(write(tty, "y", 1));
    char buf[16];
    CHECK("through /dev/tty", 1, read(m, buf, 1));
    CHECK("through /dev/tty", 'x', buf[0]);
    CHECK("through the old one", 1, read(m, buf, 1));
    CHECK("through the old one", 'y', buf[0]);
    CALL(write(m, "\003", 1));
    for (int i = 0; i < 1000 && !interrupted; i++)
        mist_turn();
    CHECK("SIGINT out of a ^C", 1, interrupted);
    mist_pass();
}
