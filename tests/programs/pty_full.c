// A pty that holds all it can, in every mode: what stands in it comes back whole, in both directions, and no byte
// is treated twice or not at all.
// mist: variants raw odd dense echo lines lines_full packet stopped_program stopped_char
#include "mist.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

#define MOST 200000
static int m, s;
static struct termios t;
static unsigned char out[MOST], in[MOST];

// Writes `size` bytes a call until no more go in; how many did.
static size_t fill(int fd, size_t size, uint64_t seed)
{
    size_t n = 0;
    ssize_t r;
    mist_fill(out, sizeof out, seed);
    for (int quiet = 0; n + size <= sizeof out && quiet < 20; quiet++)
        if ((r = write(fd, out + n, size)) > 0) {
            n += r;
            quiet = 0;
        } else {
            mist_sleep(1000);
        }
    return n;
}

// Reads all that comes within a while.
static size_t drain(int fd)
{
    size_t n = 0;
    struct pollfd p = {fd, POLLIN, 0};
    while (n < sizeof in && poll(&p, 1, n ? 100 : 1000) == 1) {
        ssize_t r = read(fd, in + n, sizeof in - n);
        if (r <= 0)
            break;
        n += r;
    }
    return n;
}

static void check_all(const char *what, int fd, size_t wanted, uint64_t seed)
{
    mist_fill(out, sizeof out, seed);
    size_t got = drain(fd);
    CHECK_MEM(what, out, in, got < wanted ? got : wanted);
    CHECK(what, wanted, got);
}

static void set(tcflag_t lflag, tcflag_t iflag)
{
    cfmakeraw(&t);
    t.c_lflag |= lflag;
    t.c_iflag |= iflag;
    MUST(tcsetattr(s, TCSANOW, &t));
}

static void line(const char *wanted)
{
    char buf[64] = "";
    struct pollfd p = {s, POLLIN, 0};
    CALL(poll(&p, 1, 1000));
    CHECK("length of a line", strlen(wanted), read(s, buf, sizeof buf - 1));
    CHECK_STR("a line", wanted, buf);
}

int main(int argc, char **argv)
{
    const char *v = argc == 2 ? argv[1] : "";
#define IS(x) (!strcmp(v, x))
    m = MUST(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK));
    MUST(grantpt(m));
    MUST(unlockpt(m));
    s = MUST(open(ptsname(m), O_RDWR | O_NOCTTY | O_NONBLOCK));
    MUST(tcgetattr(s, &t));
    size_t to_slave = 0, to_master = 0;
    int lines = 0, part = 0, on = 1;
    char text[64];

    if (IS("raw") || IS("odd") || IS("dense")) {
        set(0, 0);
        // Leaves the kernel with many small buffers to fill again.
        if (IS("dense"))
            for (int fd = m, i = 0; i < 2; i++, fd = s) {
                fill(fd, 256, 9);
                drain(fd == m ? s : m);
            }
        size_t size = IS("raw") ? 8192 : IS("odd") ? 7 : 1792;
        to_slave = fill(m, size, 1);
        to_master = fill(s, size, 2);
        if (IS("dense")) {
            to_slave += fill(m, 1, 1);
            to_master += fill(s, 1, 2);
        }
    } else if (IS("echo")) {
        // What is echoed finds no room and stays with the terminal.
        set(ICANON | ECHO | ECHOCTL, 0);
        to_master = fill(s, 512, 2);
        MUST(write(m, "typed\n\033x\n", 9));
    } else if (IS("lines")) {
        set(ICANON | IEXTEN, IXON);
        // Ends of file, alone and behind half a line; special characters that are quoted.
        MUST(write(m, "one\ntw\004\004\026\177a\026\004\n\026\003\026\021\n\000\nhalf\026\025", 27));
    } else if (IS("lines_full")) {
        // The kernel makes newlines of carriage returns when it comes to them, which it has not yet.
        set(ICANON, ICRNL);
        for (int quiet = 0; quiet < 20; quiet++) {
            sprintf(text, "line %05d\r", lines);
            ssize_t n = write(m, text + part, 11 - part);
            if (n > 0)
                part = (part + n) % 11, lines += part == 0, quiet = 0;
            else
                mist_sleep(1000);
        }
    } else if (IS("packet")) {
        set(0, IXON);
        MUST(ioctl(m, TIOCPKT, &on));
        MUST(tcflush(s, TCOFLUSH)); // TIOCPKT_FLUSHWRITE
        cfmakeraw(&t);
        MUST(tcsetattr(s, TCSANOW, &t)); // TIOCPKT_NOSTOP
        to_master = fill(s, 512, 2);
        MUST(write(m, "in", 2));
    } else {
        set(0, IXON);
        MUST(write(s, "before", 6));
        if (IS("stopped_program"))
            MUST(tcflow(s, TCOOFF));
        else
            MUST(write(m, "\023", 1));
        mist_sleep(20000);
        CHECK_ERR("set-up: output stands", EAGAIN, write(s, "x", 1));
        MUST(write(m, "in", 2));
    }
    mist_sleep(20000);

    mist_ready();
    mist_wait();

    if (IS("raw") || IS("odd")) {
        check_all("to the slave", s, to_slave, 1);
        check_all("to the master", m, to_master, 2);
    } else if (IS("dense")) {
        CHECK("to the slave", to_slave, drain(s));
        CHECK("to the master", to_master, drain(m));
    } else if (IS("echo")) {
        size_t got = drain(m);
        mist_fill(out, sizeof out, 2);
        memcpy(out + to_master, "typed\n^[x\n", 10);
        // A terminal that nobody touches keeps what it echoes until there is more of it.
        if (got < to_master + 10) {
            CALL(write(m, "\n", 1));
            struct pollfd p = {m, POLLIN, 0};
            CALL(poll(&p, 1, 1000));
            ssize_t more = read(m, in + got, sizeof in - got);
            got += more > 0 ? more - 1 : 0;
        }
        CHECK("output and echo", to_master + 10, got);
        CHECK_MEM("output and echo", out, in, got);
        line("typed\n");
        line("\033x\n");
    } else if (IS("lines")) {
        line("one\n");
        line("tw");
        line("");
        line("\177a\004\n");
        line("\003\021\n");
        char c[8] = "x";
        CHECK("a line with a zero", 2, read(s, c, sizeof c));
        CHECK_MEM("a line with a zero", "\0\n", c, 2);
        CHECK_ERR("half a line", EAGAIN, read(s, text, sizeof text));
        CALL(write(m, "\b\177\n", 3));
        line("half\025\n");
    } else if (IS("lines_full")) {
        for (int i = 0; i <= lines; i++) {
            sprintf(text, "line %05d\r", i);
            if (i == lines)
                CALL(write(m, text + part, 11 - part));
            text[10] = '\n';
            line(text);
        }
        CHECK_ERR("all lines", EAGAIN, read(s, text, sizeof text));
    } else if (IS("packet")) {
        char c[8];
        CHECK("a packet with a state", 1, read(m, c, sizeof c));
        CHECK("the state", TIOCPKT_FLUSHWRITE | TIOCPKT_NOSTOP, c[0]);
        CALL(ioctl(m, TIOCPKT, &on));
        on = 0;
        CALL(ioctl(m, TIOCPKT, &on));
        check_all("to the master", m, to_master, 2);
        CHECK("to the slave", 2, read(s, c, sizeof c));
    } else {
        CHECK("what was written before", 6, drain(m));
        CHECK_ERR("output stands", EAGAIN, write(s, "x", 1));
        CHECK("to the slave", 2, read(s, in, 8));
        if (IS("stopped_program"))
            CALL(tcflow(s, TCOON));
        else
            CALL(write(m, "\021", 1));
        // A worker of the kernel does it.
        CALL(poll(&(struct pollfd){s, POLLOUT, 0}, 1, 10000));
        CHECK("output goes on", 1, write(s, "x", 1));
        CHECK("output goes on", 1, drain(m));
        CHECK("nothing else came in", -1, read(s, in, 8));
    }
    mist_pass();
}
