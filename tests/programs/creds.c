// Credentials: ids of all four kinds, groups, capabilities (with inheritable, bounding and
// ambient sets), securebits, no_new_privs, dumpable, keepcaps.
#include "mist.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/fsuid.h>

static const char *const keys[] = {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Groups", "Gid", "Uid"};
#define N (sizeof keys / sizeof *keys)
static char before[N][512];

int main(void)
{
    if (geteuid())
        mist_skip("needs root");
    MUST(mkdir("mine", 0777));
    chmod(".", 0777);
    gid_t groups[] = {5, 77, 1000, 65533};
    MUST(setgroups(4, groups));
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP | SECBIT_NOROOT));
    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
    MUST(prctl(PR_CAPBSET_DROP, CAP_MKNOD));
    MUST(setresgid(1001, 1002, 1003));
    MUST(setresuid(2001, 2002, 2003));
    setfsgid(1004);
    setfsuid(2004);
    struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct d[2] = {0};
    d[0].permitted = 1u << CAP_CHOWN | 1u << CAP_NET_BIND_SERVICE | 1u << CAP_SYS_PTRACE | 1u << CAP_SETUID;
    d[0].inheritable = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_CHOWN;
    d[0].effective = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_SETUID;
    MUST(syscall(SYS_capset, &h, d));
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_DUMPABLE, 1));
    for (unsigned i = 0; i < N; i++)
        strcpy(before[i], mist_status(getpid(), keys[i]));
    int bits = prctl(PR_GET_SECUREBITS);

    mist_ready();
    mist_wait();

    for (unsigned i = 0; i < N; i++)
        CHECK_STR(keys[i], before[i], mist_status(getpid(), keys[i]));
    CHECK("securebits", bits, prctl(PR_GET_SECUREBITS));
    CHECK("keepcaps", 1, prctl(PR_GET_KEEPCAPS));
    CHECK("dumpable", 1, prctl(PR_GET_DUMPABLE));
    uid_t r, e, s;
    CALL(getresuid(&r, &e, &s));
    CHECK("ruid", 2001, r);
    CHECK("euid", 2002, e);
    CHECK("suid", 2003, s);
    CHECK("fsuid", 2004, setfsuid(-1));
    CHECK("fsgid", 1004, setfsgid(-1));
    CHECK("no_new_privs", 1, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    CHECK("an ambient capability", 1, prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_BIND_SERVICE, 0, 0));
    CHECK("a dropped one of the bounding set", 0, prctl(PR_CAPBSET_READ, CAP_SYS_BOOT));
    CHECK_ERR("no more than it had", EPERM, chown("mine", 0, 0));
    CALL(setresuid(2001, 2001, 2001));
    mist_pass();
}
