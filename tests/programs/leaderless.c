// The first thread has ended, the others go on: /proc/PID shows a zombie that leads living
// threads.
// mist: cflags -pthread
// mist: copied
#include "mist.h"
#include <pthread.h>

static pid_t leader;
static volatile int done;

// Field 52 of /proc/PID/stat, for root: what the leader ended with.
static int exit_code(void)
{
    char path[64], text[2048];
    snprintf(path, sizeof path, "/proc/%d/stat", leader);
    mist_slurp(path, text, sizeof text);
    char *last = strrchr(text, ' ');
    return last ? atoi(last) : -1;
}

static void *sleeper(void *arg)
{
    (void)arg;
    while (!done)
        mist_sleep(20000);
    return (void *)7;
}

static void *rest(void *arg)
{
    pthread_t other;
    void *result;
    (void)arg;
    while (mist_status(leader, "State")[0] != 'Z')
        mist_turn();
    pthread_create(&other, NULL, sleeper, NULL);
    char *old = strdup(mist_status(leader, "CapEff"));
    pid_t me = syscall(SYS_gettid);
    int fd = MUST(open("a file", O_RDWR | O_CREAT, 0600));
    int s[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s));
    void *heap = malloc(8 << 20);
    mist_fill(heap, 8 << 20, 11);
    MUST(write(s[0], "abc", 3));
    mist_ready();
    mist_wait();
    CHECK("pid", leader, getpid());
    CHECK("tid", me, syscall(SYS_gettid));
    CHECK("the leader's state", 'Z', mist_status(leader, "State")[0]);
    CHECK_STR("the leader's name", "was the leader", mist_status(leader, "Name"));
    CHECK_STR("the leader's capabilities", old, mist_status(leader, "CapEff"));
    CHECK("what the leader ended with", 5 << 8, exit_code());
    CHECK("threads", 3, atoi(mist_status(leader, "Threads")));
    CHECK("a file", 4, CALL(write(fd, "test", 4)));
    char text[4] = "";
    CHECK("a socket", 3, CALL(read(s[1], text, 3)));
    CHECK_STR("what came", "abc", text);
    mist_check_fill("the heap", heap, 8 << 20, 11);
    done = 1;
    pthread_join(other, &result);
    CHECK("the other thread's result", 7, result);
    mist_pass();
    return NULL;
}

int main(void)
{
    pthread_t t;
    leader = getpid();
    MUST(prctl(PR_SET_NAME, "was the leader"));
    pthread_create(&t, NULL, rest, NULL);
    syscall(SYS_exit, 5);
}
