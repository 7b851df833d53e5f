// A family: groups, sessions, an orphan that was adopted, zombies with their statuses, a
// grandchild, and children that end and are waited for afterwards.
// mist: tree
#include "mist.h"

// Everyone notes who he is, and later looks whether he still is.
struct who { pid_t pid, ppid, pgid, sid; };
static struct who *notes;
enum { PARENT, SAME, GROUP, SESSION, GRAND, ORPHAN, COUNT };
static volatile int *noted;

static void note(int i)
{
    notes[i] = (struct who){getpid(), getppid(), getpgrp(), getsid(0)};
    __atomic_add_fetch(noted, 1, __ATOMIC_SEQ_CST);
}
static void check(int i)
{
    CHECK("pid", notes[i].pid, getpid());
    if (i != PARENT)
        CHECK("ppid", notes[i].ppid, getppid());
    CHECK("pgid", notes[i].pgid, getpgrp());
    // A session whose leader stands outside becomes that of the restorer, or a new one.
    CHECK("sid", notes[i].sid == notes[PARENT].sid ? getsid(notes[PARENT].pid) : notes[i].sid, getsid(0));
}
static void live(int i)
{
    note(i);
    mist_wait();
    check(i);
    _exit(10 + i);
}

int main(void)
{
    notes = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    noted = (int *)(notes + COUNT);
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    pid_t p[COUNT], z[3], mid;
    if (!(p[SAME] = MUST(fork())))
        live(SAME);
    if (!(p[GROUP] = MUST(fork()))) {
        MUST(setpgid(0, 0));
        live(GROUP);
    }
    if (!(p[SESSION] = MUST(fork()))) {
        MUST(setsid());
        pid_t g = MUST(fork());
        if (!g) {
            MUST(setpgid(0, 0));
            live(GRAND);
        }
        note(SESSION);
        mist_wait();
        check(SESSION);
        int status;
        CHECK("the grandchild", g, CALL(waitpid(g, &status, 0)));
        CHECK("its status", 10 + GRAND, WEXITSTATUS(status));
        _exit(10 + SESSION);
    }
    // A child of a child that ends: it becomes ours.
    if (!(mid = MUST(fork()))) {
        pid_t o = MUST(fork());
        if (!o) {
            while (getppid() == notes[PARENT].ppid || *mist_status(getppid(), "Name") != 'f')
                mist_turn();
            for (pid_t was = getppid(); was == getppid() && !noted[1];)
                mist_turn();
            live(ORPHAN);
        }
        _exit(0);
    }
    MUST(waitpid(mid, NULL, 0));
    noted[1] = 1;
    // Zombies: one that exited, one that was killed, one with a group of its own.
    if (!(z[0] = MUST(fork())))
        _exit(99);
    if (!(z[1] = MUST(fork())))
        pause(), _exit(0);
    MUST(kill(z[1], SIGTERM));
    if (!(z[2] = MUST(fork()))) {
        setpgid(0, 0);
        _exit(7);
    }
    for (int i = 0; i < 3; i++) {
        siginfo_t si;
        MUST(waitid(P_PID, z[i], &si, WEXITED | WNOWAIT));
    }
    note(PARENT);
    while (*noted < COUNT)
        mist_turn();

    mist_ready();
    mist_wait();

    check(PARENT);
    int status;
    for (int i = 0; i < 3; i++) {
        CHECK_STR("a zombie", "Z (zombie)", mist_status(z[i], "State"));
        CHECK("waitpid of a zombie", z[i], CALL(waitpid(z[i], &status, 0)));
        if (i == 1)
            CHECK("the signal that killed it", SIGTERM, WIFSIGNALED(status) ? WTERMSIG(status) : -1);
        else
            CHECK("its exit code", i ? 7 : 99, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    }
    int seen[COUNT] = {0};
    p[ORPHAN] = notes[ORPHAN].pid;
    for (int k = 0; k < 4; k++) {
        pid_t w = CALL(waitpid(-1, &status, 0));
        for (int i = SAME; i < COUNT; i++)
            if (i != GRAND && w == p[i]) {
                CHECK("a child's exit code", 10 + i, WIFEXITED(status) ? WEXITSTATUS(status) : -status);
                seen[i]++;
            }
    }
    CHECK("all children were waited for", 4, seen[SAME] + seen[GROUP] + seen[SESSION] + seen[ORPHAN]);
    CHECK_ERR("and there are no others", ECHILD, waitpid(-1, &status, 0));
    mist_pass();
}
