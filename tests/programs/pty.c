// A pty pair: termios, window size, the slave opened twice. (pty_queued has bytes on their way.)
#include "mist.h"
#include <pty.h>
#include <sys/ioctl.h>
#include <termios.h>

static void check_termios(const char *what, const struct termios *a, const struct termios *b)
{
    CHECK(what, a->c_iflag, b->c_iflag);
    CHECK(what, a->c_oflag, b->c_oflag);
    CHECK(what, a->c_cflag, b->c_cflag);
    CHECK(what, a->c_lflag, b->c_lflag);
    CHECK_MEM(what, a->c_cc, b->c_cc, 19);
}

int main(void)
{
    int m = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK));
    MUST(grantpt(m));
    MUST(unlockpt(m));
    char name[64];
    strcpy(name, ptsname(m));
    int s = MUST(open(name, O_RDWR | O_NOCTTY | O_NONBLOCK));
    int s2 = MUST(open(name, O_RDONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC));
    struct termios t, got;
    MUST(tcgetattr(s, &t));
    cfmakeraw(&t);
    t.c_oflag |= OPOST | ONLCR;
    t.c_cc[VINTR] = 7;
    t.c_cc[VMIN] = 3;
    cfsetspeed(&t, B115200);
    MUST(tcsetattr(s, TCSANOW, &t));
    struct winsize w = {43, 132, 1000, 2000}, gotw;
    MUST(ioctl(m, TIOCSWINSZ, &w));
    // A second pair, canonical.
    int m2 = MUST(posix_openpt(O_RDWR | O_NOCTTY)), s3;
    MUST(grantpt(m2));
    MUST(unlockpt(m2));
    s3 = MUST(open(ptsname(m2), O_RDWR | O_NOCTTY | O_NONBLOCK));
    struct termios t2;
    MUST(tcgetattr(s3, &t2));
    t2.c_lflag &= ~ECHO;
    MUST(tcsetattr(s3, TCSANOW, &t2));
    MUST(tcgetattr(s3, &t2));
    MUST(tcgetattr(s, &t));

    mist_ready();
    mist_wait();

    char buf[256];
    CHECK_STR("name", name, ptsname(m) ? ptsname(m) : strerror(errno));
    CALL(tcgetattr(s, &got));
    check_termios("termios", &t, &got);
    CHECK("speed", B115200, cfgetospeed(&got));
    CALL(ioctl(s, TIOCGWINSZ, &gotw));
    CHECK_MEM("window size", &w, &gotw, sizeof w);
    CHECK("write on", 5, write(m, "again", 5));
    mist_sleep(10000);
    CHECK("read on", 5, read(s, buf, sizeof buf));
    CALL(write(s, "out\n", 4));
    mist_sleep(10000);
    CHECK("the other way", 5, read(m, buf, sizeof buf));
    CHECK_MEM("the other way, newlines made so", "out\r\n", buf, 5);
    CHECK("flags", O_RDWR | O_NONBLOCK, mist_getfl(s) & ~O_NOCTTY);
    CHECK("cloexec", FD_CLOEXEC, fcntl(s2, F_GETFD));
    CALL(tcgetattr(s3, &got));
    check_termios("termios of the canonical pair", &t2, &got);
    CALL(write(m2, "a line\n", 7));
    mist_sleep(10000);
    CHECK("a line", 7, read(s3, buf, sizeof buf));
    CHECK_MEM("a line", "a line\n", buf, 7);
    // The ends belong together.
    close(s);
    close(s2);
    CHECK_ERR("hang-up", EIO, read(m, buf, sizeof buf));
    mist_pass();
}
