// Bytes on their way through a pty: raw in both directions; canonical with a finished line and
// half a one.
#include "mist.h"
#include <termios.h>

static void make(int *m, int *s)
{
    *m = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK));
    MUST(grantpt(*m));
    MUST(unlockpt(*m));
    *s = MUST(open(ptsname(*m), O_RDWR | O_NOCTTY | O_NONBLOCK));
}

int main(void)
{
    struct termios t;
    int m, s, m2, s2;
    make(&m, &s);
    MUST(tcgetattr(s, &t));
    cfmakeraw(&t);
    MUST(tcsetattr(s, TCSANOW, &t));
    MUST(write(m, "to the slave", 12));
    MUST(write(s, "to the\nmaster", 13));
    make(&m2, &s2);
    MUST(tcgetattr(s2, &t));
    t.c_lflag &= ~ECHO;
    MUST(tcsetattr(s2, TCSANOW, &t));
    MUST(write(m2, "a line\nhalf a", 13));
    mist_sleep(20000);

    mist_ready();
    mist_wait();

    char buf[64];
    CHECK("bytes for the slave", 12, read(s, buf, sizeof buf));
    CHECK_MEM("bytes for the slave", "to the slave", buf, 12);
    CHECK("bytes for the master", 13, read(m, buf, sizeof buf));
    CHECK_MEM("bytes for the master", "to the\nmaster", buf, 13);
    CHECK("a finished line", 7, read(s2, buf, sizeof buf));
    CHECK_MEM("a finished line", "a line\n", buf, 7);
    CHECK_ERR("half a line", EAGAIN, read(s2, buf, sizeof buf));
    CALL(write(m2, " line\n", 6));
    mist_sleep(20000);
    CHECK("the other half", 12, read(s2, buf, sizeof buf));
    CHECK_MEM("the other half", "half a line\n", buf, 12);
    CHECK_ERR("no echo", EAGAIN, read(m2, buf, sizeof buf));
    mist_pass();
}
