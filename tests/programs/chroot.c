// A changed root directory, with the current directory below it.
#include "mist.h"

int main(void)
{
    if (geteuid())
        mist_skip("needs root");
    MUST(mkdir("jail", 0755));
    MUST(mkdir("jail/sub", 0755));
    int out = MUST(open("outside", O_RDWR | O_CREAT, 0600));
    MUST(write(out, "outside", 7));
    // The protocol's files have to be reachable from inside: links go both ways.
    int dir = MUST(open(".", O_RDONLY | O_DIRECTORY));
    MUST(chroot("jail"));
    MUST(chdir("/sub"));
    int in = MUST(open("/file", O_RDWR | O_CREAT, 0600));
    MUST(write(in, "in", 2));
    // Through a descriptor of the outer directory.
    snprintf(mist_dir, sizeof mist_dir, "/proc/self/fd/%d", dir);
    int r = openat(dir, "ready", O_CREAT | O_WRONLY, 0600);
    close(MUST(r));

    while (faccessat(dir, "go", F_OK, 0) < 0)
        mist_turn();

    char cwd[64], buf[16];
    const char *verdict = "PASS\ngaps 0\n";
    if (!getcwd(cwd, sizeof cwd) || strcmp(cwd, "/sub"))
        verdict = "FAIL: cwd, wanted /sub, got something else\n";
    else if (access("/file", F_OK))
        verdict = "FAIL: /file, wanted the one inside, got none\n";
    else if (access("/etc", F_OK) == 0)
        verdict = "FAIL: /etc, wanted none inside, got one\n";
    else if (pread(out, buf, 16, 0) != 7 || pread(in, buf, 16, 0) != 2)
        verdict = "FAIL: descriptors, wanted both files, got others\n";
    int f = openat(dir, "result", O_CREAT | O_EXCL | O_WRONLY, 0600);
    int ok = write(f, verdict, strlen(verdict)) > 0 && verdict[0] == 'P';
    _exit(!ok);
}
