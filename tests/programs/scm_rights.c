// A description that two processes share because one passed it to the other, and memory of a
// memfd passed likewise.
// mist: tree
#include "mist.h"

static void pass(int s, int fd)
{
    char room[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec v = {"x", 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    MUST(sendmsg(s, &m, 0));
}
static int take(int s)
{
    char room[CMSG_SPACE(sizeof(int))], x;
    struct iovec v = {&x, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    MUST(recvmsg(s, &m, 0));
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}

int main(void)
{
    int s[2], done[2];
    char x;
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s));
    MUST(pipe(done));
    pid_t child = MUST(fork());
    if (!child) {
        // Opened after the fork: shared only because it was passed.
        int f = MUST(open("file", O_RDWR | O_CREAT, 0600));
        MUST(write(f, "0123456789", 10));
        MUST(lseek(f, 3, SEEK_SET));
        int m = MUST(memfd_create("passed", 0));
        MUST(ftruncate(m, 8192));
        char *p = MUST(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0));
        memset(p, 1, 4096);
        pass(s[1], f);
        pass(s[1], m);
        MUST(write(done[1], "d", 1));
        mist_wait();
        CALL(read(s[1], &x, 1)); // the parent has moved it
        CHECK("the child sees the parent's seek", 7, lseek(f, 0, SEEK_CUR));
        mist_check_byte("the child sees the parent's write", p + 4096, 4096, 2);
        _exit(0);
    }
    int f = take(s[0]), m = take(s[0]);
    char *p = MUST(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0));
    MUST(read(done[0], &x, 1));

    mist_ready();
    mist_wait();

    CHECK("position", 3, lseek(f, 0, SEEK_CUR));
    mist_check_byte("the parent sees the child's write", p, 4096, 1);
    CALL(lseek(f, 7, SEEK_SET));
    memset(p + 4096, 2, 4096);
    CALL(write(s[0], "g", 1));
    int status;
    CALL(waitpid(child, &status, 0));
    CHECK("the child's status", 0, status);
    mist_pass();
}
